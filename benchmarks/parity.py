"""Is ours as strong as every other library's? Robust accuracy and median distance on an MNIST lenet, same budgets.

    make bench-parity
    .venv-peers/bin/python -m benchmarks.parity --only deepfool cw --images 200

Writes ``benchmarks/parity.md``. Ours is as strong when its robust accuracy is at most 0.5 points (AutoAttack: 0.3)
above that of the best peer and, for attacks that minimise, its median distance at most 2 % above.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from benchmarks.models import (
    LIBRARIES,
    Peering,
    Score,
    Subject,
    earlier,
    installed,
    markdown,
    mean,
    ours,
    peer,
    score,
    subject,
    theirs,
)
from src.attacks.base import Attack
from src.errors import UserError

OUT = Path(__file__).parent / "parity.md"
PACKAGES = {"art": "adversarial-robustness-toolbox", "adv_lib": "adv-lib", "reference": "pyautoattack"}


@dataclass(frozen=True)
class Row:
    """One comparison."""

    choice: str  # ours: a name in conf/attack and overrides
    norm: str
    eps: float
    peers: tuple[Peering, ...]
    minimal: bool = False
    images: int = 1000  # at most: fewer where a peer is slow
    points: float = 0.005  # how far above the best peer our robust accuracy may be


STEP = 2.5 / 40  # of 40 steps, in radii
L2, L1, LINF = 1.5, 10.0, 0.1


def _pgd() -> list[Row]:
    rows = [
        Row("fgsm", norm, eps, (peer("foolbox", "FastGradientAttack"), peer("art", "FastGradientMethod"), *more))
        for norm, eps, more in (("linf", LINF, (peer("torchattacks", "FGSM"),)), ("l2", L2, ()))
    ]
    for norm, eps, name in (("linf", LINF, "PGD"), ("l2", L2, "PGDL2"), ("l1", L1, None)):
        peers = [
            peer("foolbox", "PGD", steps=40, rel_stepsize=STEP),
            peer("art", "ProjectedGradientDescent", max_iter=40, eps_step=STEP * eps, num_random_init=1),
        ]
        if name:
            peers.append(peer("torchattacks", name, steps=40, alpha=STEP * eps))
        if norm == "linf":
            peers.append(peer("adv_lib", "pgd_linf", steps=40, relative_step_size=STEP))
        rows.append(Row("pgd", norm, eps, tuple(peers)))
    momentum = (
        peer("torchattacks", "MIFGSM", steps=10, alpha=LINF / 10),
        peer("foolbox", "MIFGSM", steps=10, rel_stepsize=0.1),
        peer("art", "MomentumIterativeMethod", max_iter=10, eps_step=LINF / 10, decay=1.0),
    )
    return [*rows, Row("mi_fgsm", "linf", LINF, momentum)]


def _apgd() -> list[Row]:
    rows = []
    for norm, eps in (("linf", LINF), ("l2", L2), ("l1", L1)):
        for loss, name in (("ce", "cross_entropy"), ("dlr", "difference_logits_ratio")):
            more = () if norm == "l1" else (peer("torchattacks", "APGD", steps=100, loss=loss),)
            mine = f"apgd attack.loss={loss}"
            peers = (
                peer("adv_lib", "apgd", n_iter=100, loss_function=loss),
                peer("reference", f"apgd-{loss}"),
                peer("art", "AutoProjectedGradientDescent", eps_step=2 * eps, nb_random_init=1, loss_type=name),
            )
            rows.append(Row(mine, norm, eps, (*peers, *more)))
        more = () if norm == "l1" else (peer("torchattacks", "APGDT", steps=100),)
        adv_lib = peer("adv_lib", "apgd_targeted", n_iter=100)
        mine = "apgd attack.loss=dlr_targeted"
        rows.append(Row(mine, norm, eps, (adv_lib, peer("reference", "apgd-t"), *more)))
    return rows


def _minimal() -> list[Row]:
    rows = []
    for norm, eps in (("linf", LINF), ("l2", L2), ("l1", L1)):
        more = () if norm == "l1" else (peer("torchattacks", "FAB", steps=100),)
        peers = (peer("adv_lib", "fab", n_iter=100), peer("reference", "fab"), *more)
        rows.append(Row("fab", norm, eps, peers, minimal=True))
    peers = (peer("adv_lib", "df", steps=50), peer("foolbox", "DeepFool", steps=50))
    slow = (peer("torchattacks", "DeepFool", steps=50), peer("art", "DeepFool", max_iter=50))
    rows.append(Row("deepfool", "l2", L2, (*peers, *slow), minimal=True))
    rows.append(Row("deepfool", "linf", LINF, peers, minimal=True))
    carlini = (
        peer("foolbox", "CarliniWagner", steps=200, binary_search_steps=9, stepsize=0.01),
        peer("adv_lib", "carlini_wagner_l2", max_iterations=200, binary_search_steps=9),
        peer("torchattacks", "CW", steps=200),
        peer("art", "CarliniL2Method", max_iter=200, binary_search_steps=9),
    )
    rows.append(Row("cw", "l2", L2, carlini, minimal=True, images=50))
    for norm, eps in (("l0", 10.0), ("l1", L1), ("l2", L2), ("linf", LINF)):
        peers = (peer("foolbox", "FMN", steps=100), peer("adv_lib", "fmn", steps=100))
        rows.append(Row("fmn", norm, eps, peers, minimal=True))
    return rows


def _few_pixels() -> list[Row]:
    saliency = (
        peer("torchattacks", "JSMA", theta=1.0, gamma=0.145),
        peer("art", "SaliencyMapMethod", theta=1.0, gamma=0.145),
    )
    pixels = (
        peer("art", "PixelAttack", max_iter=100),
        peer("torchattacks", "OnePixel", popsize=400, steps=100, inf_batch=2048),
    )
    return [
        Row("jsma", "l0", 30.0, saliency, minimal=True, images=100),
        Row("one_pixel", "l0", 5.0, pixels, images=20),
    ]


def _queries() -> list[Row]:
    rows = []
    for norm, eps in (("linf", LINF), ("l2", L2)):
        # The schedule of sizes as the reference has it, and stretched to the queries as ART always has it.
        reference = (
            peer("reference", "square"),
            peer("torchattacks", "Square", n_queries=5000, resc_schedule=False),
        )
        rows.append(Row("square attack.rescale_schedule=false", norm, eps, reference))
        stretched = (
            peer("torchattacks", "Square", n_queries=5000, resc_schedule=True),
            peer("art", "SquareAttack", max_iter=5000),
        )
        rows.append(Row("square", norm, eps, stretched, images=200))
    for norm, eps in (("l2", L2), ("linf", LINF)):
        peers = (peer("foolbox", "HopSkipJump", steps=20), peer("art", "HopSkipJump", max_iter=20, init_eval=100))
        rows.append(Row("hop_skip_jump attack.iterations=20", norm, eps, peers, minimal=True, images=50))
    return rows


def _ensembles() -> list[Row]:
    return [
        Row("autoattack", norm, eps, (peer("reference", "standard"), *more), points=0.003)
        for norm, eps, more in (
            ("linf", LINF, (peer("torchattacks", "AutoAttack"),)),
            ("l2", L2, (peer("torchattacks", "AutoAttack"),)),
            ("l1", L1, ()),
        )
    ]


ROWS = [*_pgd(), *_apgd(), *_minimal(), *_few_pixels(), *_queries(), *_ensembles()]


def cell(found: Score | str, minimal: bool) -> str:
    if isinstance(found, str):
        return found
    return f"{found.accuracy:.3f}" + (f"; {found.median:.4g}" if minimal else "") + f" ({found.seconds:.1f} s)"


def verdict(mine: Score | str, others: list[Score | str], row: Row) -> str:
    """Whether ours is as strong as the best peer, and by how much it is not."""
    scores = [other for other in others if isinstance(other, Score)]
    if not isinstance(mine, Score) or not scores:
        return "no comparison"
    best = min(other.accuracy for other in scores)
    faults = []
    if mine.accuracy > best + row.points + 1e-9:
        faults.append(f"accuracy {100 * (mine.accuracy - best):+.1f} points")
    if row.minimal:
        nearest = min(other.median for other in scores)
        if math.isfinite(nearest) and mine.median > 1.02 * nearest:
            faults.append(f"median {100 * (mine.median / nearest - 1):+.1f} %")
    return "weaker: " + ", ".join(faults) if faults else "as strong"


def title(row: Row) -> tuple[str, str, str]:
    """The columns that say which row it is."""
    name, *rest = row.choice.split()
    return " ".join([name, *(part.removeprefix("attack.") for part in rest)]), row.norm, f"{row.eps:g}"


def compare(row: Row, on: Subject, seeds: int) -> list[str]:
    """One line of the table."""
    on = on.first(row.images)

    def taken(attack: Attack) -> Score | str:
        run = range(seeds)
        return mean([score(attack, on, row.norm, row.eps, minimal=row.minimal, seed=seed) for seed in run])

    try:
        mine = taken(ours(row.choice))
    except UserError as error:
        mine = str(error)
    cells, others = {}, []
    for peering in row.peers:
        if not installed(peering.library):
            cells[peering.library] = "not installed"
            continue
        other = taken(theirs(peering))
        others.append(other)
        cells[peering.library] = cell(other, row.minimal)
    images = f"{on.tested} x {seeds}" if seeds > 1 else str(on.tested)
    start = [*title(row), images, cell(mine, row.minimal)]
    return [*start, *(cells.get(library, "not compared") for library in LIBRARIES), verdict(mine, others, row)]


def versions() -> str:
    found = []
    for library in LIBRARIES:
        package = PACKAGES.get(library, library)
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            found.append(f"{package} not installed")
    return ", ".join(found)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--root", default="data", help="folder with MNIST/raw (default: data)")
    options.add_argument("--artifacts", default="artifacts", help="where the trained lenet is found, or put")
    options.add_argument("--weights", help="weights of your own for the lenet instead")
    options.add_argument("--images", type=int, default=1000, help="first so many test images")
    options.add_argument("--seeds", type=int, default=1, help="how often each attack is run; means are compared")
    options.add_argument("--only", nargs="+", help="rows to take, by words of them: apgd, 'apgd l1'")
    options.add_argument("--threads", type=int, default=2)
    options.add_argument("--out", type=Path, default=OUT)
    given = options.parse_args()
    torch.set_num_threads(given.threads)
    choice = ["dataset=mnist", "classifier=lenet"]
    on = subject(choice, given.images, root=given.root, artifacts=given.artifacts, weights=given.weights)
    head = ["attack", "norm", "eps", "images", "ours", *LIBRARIES, "verdict"]
    lines = earlier(given.out) if given.only else {}
    about = (
        f"# Parity: {on.name}\n\n"
        "Made by `make bench-parity`, a row on the first so many test images (x seeds, of which the mean stands). A "
        "cell is robust accuracy at eps (and seconds); for attacks that minimise, the median distance follows it.\n"
        "Reference: the published AutoAttack as the package pyautoattack. "
        f"Versions: torch {torch.__version__}, {versions()}.\n\n"
    )
    for row in ROWS:
        words = " ".join(title(row)).split()
        if given.only and not any(set(only.split()) <= set(words) for only in given.only):
            continue
        lines[title(row)] = compare(row, on, given.seeds)
        print(" | ".join(lines[title(row)]), flush=True)
        given.out.write_text(about + markdown(head, [lines[title(r)] for r in ROWS if title(r) in lines]))


if __name__ == "__main__":
    main()
