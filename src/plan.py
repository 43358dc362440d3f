"""What a run or a sweep would do, before it does it: ``+plan=true``."""

from __future__ import annotations

import functools
import json
from collections import defaultdict
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from src.records import Record


@dataclass
class Plan:
    """Cells and stages by key; ``True`` where the cache has it.

    Attributes:
        cells: of each cell, whether its record is there and what it is: attack, defense, access, images.
        stages: of each stage, whether it is there, its words and what :meth:`src.stages.Stages.make` was told of it.
    """

    cells: dict[str, dict[str, Any]] = field(default_factory=dict)
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)
    artifacts: str = "artifacts"


def report(plan: Plan, records: Iterable[Record], metas: Iterable[dict[str, Any]]) -> str:
    """The plan in words, with the time that such cells and stages took before, image for image.

    Args:
        records: cells measured so far.
        metas: ``meta.json`` of the stages in the cache.
    """
    absent = [cell for cell in plan.cells.values() if not cell["present"]]
    cells = list({cell["same"]: cell for cell in absent}.values())
    stages = [stage for stage in plan.stages.values() if not stage["present"]]
    before = _estimator((_shape(vars(record)), record.n, record.wall_seconds) for record in records)
    made = _estimator((tuple(meta["like"]), meta["images"], meta["seconds"]) for meta in metas)
    times = [before(_shape(cell), cell["n"]) for cell in cells]
    times += [made(stage["like"], stage["images"]) for stage in stages]
    known = [seconds for seconds in times if seconds is not None]
    unknown = len(times) - len(known)
    twins = len(absent) - len(cells)
    again = f", {twins} the same as another but in what they are called" if twins else ""
    lines = [
        f"{len(plan.cells)} cells: {len(plan.cells) - len(absent)} found, {len(cells)} to measure{again}",
        f"{len(plan.stages)} stages: {len(plan.stages) - len(stages)} found, {len(stages)} to make",
        *(f"  {stage['what']} ({key})" for key, stage in plan.stages.items() if not stage["present"]),
    ]
    if times:
        rest = f"; {unknown} of which nothing is known yet" if unknown else ""
        took = f"about {_time(sum(known))} by what such cells and stages took so far" if known else "time unknown"
        lines.append(took + rest)
    return "\n".join(lines)


def _shape(cell: dict[str, Any]) -> tuple[str, ...]:
    """What decides how long a cell takes, the weightiest last: fgsm tells nothing of square, nor digits of cifar10."""
    names = (str(cell[name]) for name in ("variant", "access", "classifier", "defense"))
    return (*names, f"{cell['attack']} on {cell['dataset']}")


def _estimator(
    before: Iterable[tuple[tuple[str, ...], int, float]],
) -> Callable[[tuple[str, ...], int], float | None]:
    """Seconds of what has a shape and goes through so many images, by what was made before: shape, images, seconds.

    The median of those most alike: the same in all parts of the shape, else in all but the first, and so on. Of these
    the ones with as many images count, else all of them, image for image.
    """
    known: dict[tuple[str, ...], list[tuple[int, float]]] = defaultdict(list)
    for shape, images, seconds in before:
        for start in range(len(shape) if images else 0):
            known[shape[start:]].append((images, seconds))

    @functools.cache  # of thousands of cells many are alike
    def estimate(shape: tuple[str, ...], images: int) -> float | None:
        for start in range(len(shape)):
            if alike := known.get(shape[start:]):
                same = [(count, seconds) for count, seconds in alike if count == images]
                return median(seconds / count * images for count, seconds in same or alike)
        return None

    return estimate


def _time(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{seconds:.0f} s" if minutes < 2 else f"{minutes} min" if minutes < 120 else f"{minutes / 60:.1f} h"


def show(plan: Plan) -> None:
    """Print the plan. What of the cache cannot be read is passed over: a run sets it aside and makes it again."""
    from src.overview import read_records

    root = Path(plan.artifacts)
    found, _ = read_records(root)
    print(report(plan, found, _metas(root)))


def _metas(root: Path) -> list[dict[str, Any]]:
    """Of the stages that are whole: a name with a dot is of one that is being made or was set aside."""
    found = []
    for path in root.glob("*/*/meta.json"):
        if "." in path.parent.name:
            continue
        with suppress(OSError, ValueError, KeyError, TypeError):
            meta = json.loads(path.read_text())
            like, images = [str(word) for word in meta["like"]], int(meta["images"])
            found.append({"like": like, "images": images, "seconds": float(meta["seconds"])})
    return found
