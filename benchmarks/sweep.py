"""What the cache saves, what a cached cell costs, and how light the parent of a large sweep is. ``make bench-sweep``.

1 classifier, 5 defenses, 4 attacks, 6 radii, 2 accesses: 240 cells as one sweep, the same sweep again, and a random
sample of its cells one by one, each by a command of its own on an empty cache, from which the time of all is
extrapolated. Then a plan of 10,000 cells, and the table of 10,000 made-up records. Wall and CPU seconds stand side by
side: the ratio of CPU seconds holds on a machine that others use too.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
DEFENSES = ("none", "autoencoder", "vae", "feature_squeezing", "jpeg")
ATTACKS = ("fgsm", "pgd", "mi_fgsm", "apgd")
EPS = {"digits": (0.02, 0.05, 0.1, 0.15, 0.2, 0.3), "mnist": (0.05, 0.1, 0.15, 0.2, 0.25, 0.3)}
ACCESS = ("gray_box", "white_box")
CELLS = len(DEFENSES) * len(ATTACKS) * 6 * len(ACCESS)
IMPORTS = ("src.train", "src.pipeline", "src.frame", "src.tables", "src.analysis.curves", "src.analysis.pictures")
QUIET = ("logger=none", "callbacks=none", "trainer.enable_progress_bar=false")


@dataclass
class Cost:
    """Of a command: seconds and MiB."""

    wall: float
    cpu: float
    memory: float

    def __str__(self) -> str:
        return f"{self.wall:8.1f} s wall {self.cpu:8.1f} s CPU {self.memory:6.0f} MiB"


def run(folder: Path, *arguments: str) -> Cost:
    """Python in a process of its own; its words go to ``words.log``."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    started = time.perf_counter()
    with open(folder / "words.log", "a") as words:
        process = subprocess.Popen(
            [sys.executable, *arguments], cwd=folder, env=environment, stdout=words, stderr=words
        )
        _, status, used = os.wait4(process.pid, 0)
    wall = time.perf_counter() - started
    if status:
        raise SystemExit(f"{' '.join(arguments)}: failed: {(folder / 'words.log').read_text()[-800:]}")
    return Cost(wall, used.ru_utime + used.ru_stime, used.ru_maxrss / 1024)


def train(folder: Path, *arguments: str) -> Cost:
    """The command."""
    return run(folder, "-m", "src.train", *arguments)


def start_up(folder: Path) -> Cost:
    """Imports alone, as every run of the command has them; the second time, when the files are in memory."""
    return [run(folder, "-c", f"import {', '.join(IMPORTS)}") for _ in range(2)][-1]


def sweep(folder: Path, dataset: str, base: Sequence[str], alone: int, seed: int) -> None:
    """The sweep, the sweep again, and cells of it one by one."""
    eps = EPS[dataset]
    what = ("-m", f"attack={','.join(ATTACKS)}", f"defense={','.join(DEFENSES)}")
    cells = (f"threat.eps=[{','.join(map(str, eps))}]", f"threat.access=[{','.join(ACCESS)}]")
    nothing = start_up(folder)
    print(f"{dataset}: start-up, imports alone          {nothing}")
    first = train(folder, *what, *cells, *base)
    print(f"{dataset}: {CELLS} cells, nothing cached       {first}")
    again = train(folder, *what, *cells, *base)
    rest = again.wall - nothing.wall, again.cpu - nothing.cpu
    print(f"{dataset}: the same, all cached            {again}")
    print(
        f"{dataset}: without the start-up {rest[0]:.1f} s wall, {rest[1]:.1f} s CPU; "
        f"a cached cell {1000 * rest[0] / CELLS:.0f} ms wall, {1000 * rest[1] / CELLS:.0f} ms CPU"
    )
    chance = random.Random(seed)
    every = [(d, a, e, x) for d in DEFENSES for a in ATTACKS for e in eps for x in ACCESS]
    costs = []
    for number, (defense, attack, radius, access) in enumerate(chance.sample(every, alone)):
        cell = (f"attack={attack}", f"defense={defense}", f"threat.eps={radius}", f"threat.access={access}")
        costs.append(train(folder, *cell, *base, f"paths.artifacts=alone-{number}"))
    if costs:
        wall, cpu = (CELLS * sum(getattr(cost, kind) for cost in costs) / alone for kind in ("wall", "cpu"))
        print(
            f"{dataset}: one by one without the cache, from {alone} random cells of {CELLS}: {wall:.0f} s wall, "
            f"{cpu:.0f} s CPU; the sweep takes {wall / first.wall:.1f} times less wall time, "
            f"{cpu / first.cpu:.1f} times less CPU time"
        )


def plan(folder: Path) -> None:
    """10,000 cells planned."""
    eps = ",".join(f"0.{number:02}" for number in range(1, 11))
    nothing = start_up(folder)
    cost = train(
        folder, "-m", "seed=range(0,25)", f"attack={','.join(ATTACKS)}", f"defense={','.join(DEFENSES)}",
        f"threat.eps={eps}", *QUIET, "+plan=true", "paths.artifacts=planned",  # the sweep has made some of these cells
    )  # fmt: skip
    assert "10000 cells: 0 found, 10000 to measure" in (folder / "words.log").read_text()
    print(f"plan of 10,000 cells                     {cost}")
    print(f"  without the start-up {cost.wall - nothing.wall:.1f} s wall, {cost.cpu - nothing.cpu:.1f} s CPU")


def synthetic(folder: Path, count: int = 10_000) -> None:
    """Records such as a sweep of ``count`` cells leaves, in folders of its jobs."""
    from src.records import Record, save, wilson

    chance, number = random.Random(0), 0
    low, high = zip(*(wilson(held, 1000) for held in range(1001)), strict=True)
    while number < count:
        job, access = divmod(number, 20)
        held, clean = chance.randrange(900), chance.randrange(900, 1001)
        save(
            Record(
                key=f"{number:016x}", dataset="digits", classifier="cnn3", defense=DEFENSES[job % 5], norm="linf",
                attack=ATTACKS[job // 5 % 4], seed=job // 20, eps=0.01 * (1 + access // 2), access=ACCESS[access % 2],
                n=1000, correct_bare=clean, correct_defended=clean, correct_attacked=held, clean_accuracy=clean / 1000,
                clean_accuracy_defended=clean / 1000, robust_accuracy=held / 1000, robust_accuracy_low=low[held],
                robust_accuracy_high=high[held], attack_success_rate=1 - held / 1000, distance_median=0.1,
                attack_ms_per_image=1.0, defense_ms_per_image=0.1, created="2026-01-01T00:00:00+00:00",
                config={"threat": {"norm": "linf"}, "attack": {"steps": 10}}, uses=["0" * 16] * 4,
            ),
            folder / str(job) / "records",
        )  # fmt: skip
        number += 1


def table(folder: Path) -> None:
    """The table that ends a sweep, of 10,000 records."""
    out = folder / "synthetic"
    synthetic(out)
    nothing = start_up(folder)
    (folder / "gather.py").write_text(
        "import sys\nfrom omegaconf import OmegaConf\n"
        "from src.callbacks.results_table import gather\n"
        "node = {'_target_': 'src.tracking.NoTracker'}\n"
        "gather(OmegaConf.create({'logger': node, 'hydra': {'sweep': {'dir': sys.argv[1]}}}))\n"
    )
    cost = run(folder, "gather.py", str(out))
    print(f"table of 10,000 records                  {cost}")
    print(f"  without the start-up {cost.wall - nothing.wall:.1f} s wall, {cost.cpu - nothing.cpu:.1f} s CPU")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sweep", description=__doc__)
    parser.add_argument("parts", nargs="*", default=["sweep", "plan", "table"], help="sweep, plan, table")
    parser.add_argument("--root", type=Path, help="folder with MNIST; without it digits only")
    parser.add_argument("--alone", type=int, default=6, help="cells to run one by one")
    parser.add_argument("--images", type=int, help="test images; default all of digits, 1,000 of MNIST")
    parser.add_argument("--epochs", type=int, help="of each training at most; fewer make the cache look worse")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if "sweep" in options.parts:
            short = [f"limit.epochs={options.epochs}"] if options.epochs else []
            images = [f"limit.test_images={options.images}"] if options.images else []
            sweep(folder, "digits", [*QUIET, *short, *images], options.alone, options.seed)
            if options.root:
                more = ["dataset=mnist", "classifier=lenet", f"paths.data={options.root.absolute()}"]
                limit = f"limit.test_images={options.images or 1000}"
                sweep(folder, "mnist", [*QUIET, *short, *more, limit], options.alone, options.seed)
        if "plan" in options.parts:
            plan(folder)
        if "table" in options.parts:
            table(folder)


if __name__ == "__main__":
    main()
