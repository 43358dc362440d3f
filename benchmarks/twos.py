"""Which share of MNIST's twos does each targeted attack turn into sixes? The tour of attacks of a small public project.

    make bench-twos
    .venv/bin/python -m benchmarks.twos --root DIR --images 300

Writes ``benchmarks/twos.md``. Shares are of the test twos that the classifier gets right.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.models import Subject, markdown, ours, subject
from src.records import wilson
from src.threat import ThreatModel

OUT = Path(__file__).parent / "twos.md"
# Choice in conf/attack with overrides, norm, eps, most images.
ROWS = (
    ("fgsm attack.steps=200 attack.step=0.001", "linf", 0.2, 300),
    ("pgd attack.steps=200", "linf", 0.2, 300),
    ("apgd", "linf", 0.2, 300),
    ("jsma", "l0", 50.0, 1032),
    ("jsma attack.saliency=single", "l0", 50.0, 1032),
    ("jsma attack.saliency=single attack.others=sum", "l0", 50.0, 1032),
    ("one_pixel", "l0", 1.0, 12),
    ("one_pixel", "l0", 5.0, 12),
    ("one_pixel attack.population=5000 attack.generations=400", "l0", 5.0, 12),
)


def twos(on: Subject) -> Subject:
    chosen = on.labels == 2
    return replace(on, images=on.images[chosen], labels=on.labels[chosen])


def measure(row: tuple[str, str, float, int], on: Subject) -> list[str]:
    """One line of the table."""
    choice, norm, eps, most = row
    images, labels = on.images[:most], on.labels[:most]
    generator = torch.Generator().manual_seed(0)
    threat = ThreatModel(norm=norm, eps=eps, targeted=True)
    started = time.perf_counter()
    turned = 0
    for part, given in zip(images.split(250), labels.split(250), strict=True):
        sixes = torch.full_like(given, 6)
        turned += int(ours(choice)(on.model, part, given, threat, target=sixes, generator=generator).success.sum())
    seconds = time.perf_counter() - started
    low, high = wilson(turned, len(images))
    share = f"{turned / len(images):.3f} [{low:.3f}, {high:.3f}]"
    name, *rest = choice.split()
    settings = " ".join(part.removeprefix("attack.") for part in rest)
    return [name, settings, norm, f"{eps:g}", str(len(images)), share, f"{seconds:.0f} s"]


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--root", default="data", help="folder with MNIST/raw (default: data)")
    options.add_argument("--artifacts", default="artifacts", help="where the trained classifier is found, or put")
    options.add_argument("--classifier", default="cnn3", help="cnn3 is that project's network")
    options.add_argument("--weights", help="weights of your own instead")
    options.add_argument("--images", type=int, default=10_000, help="first so many twos at most")
    options.add_argument("--threads", type=int, default=2)
    options.add_argument("--out", type=Path, default=OUT)
    given = options.parse_args()
    torch.set_num_threads(given.threads)
    choice = ["dataset=mnist", f"classifier={given.classifier}"]
    on = twos(subject(choice, 10_000, root=given.root, artifacts=given.artifacts, weights=given.weights))
    head = ["attack", "settings", "norm", "eps", "twos", "turned into sixes", "time"]
    about = f"# Twos into sixes: {on.name}\n\nMade by `make bench-twos`. Brackets: 95 % Wilson interval.\n\n"
    lines = []
    for row in ROWS:
        lines.append(measure((*row[:3], min(row[3], given.images)), on))
        print(" | ".join(lines[-1]), flush=True)
        given.out.write_text(about + markdown(head, lines))  # the last rows take longest


if __name__ == "__main__":
    main()
