"""What a run or a sweep would do, before it does it: ``+plan=true``."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
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
        cells: of each cell, whether its record is there and what it is: attack, defense, access.
        stages: of each stage, whether it is there, its kind and its words.
    """

    cells: dict[str, dict[str, Any]] = field(default_factory=dict)
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)
    artifacts: str = "artifacts"


def report(plan: Plan, records: Iterable[Record], metas: Iterable[dict[str, Any]]) -> str:
    """The plan in words, with the time that such cells and stages took before.

    Args:
        records: cells measured so far.
        metas: ``meta.json`` of the stages in the cache.
    """
    cells = [cell for cell in plan.cells.values() if not cell["present"]]
    stages = [stage for stage in plan.stages.values() if not stage["present"]]
    before = [(_shape(_facts(record)), record.wall_seconds) for record in records if record.status == "done"]
    made = [((str(meta["what"]), str(meta["kind"])), float(meta["seconds"])) for meta in metas]
    times = [_estimate(_shape(cell), before) for cell in cells]
    times += [_estimate((stage["what"], stage["kind"]), made) for stage in stages]
    known = [seconds for seconds in times if seconds is not None]
    unknown = len(times) - len(known)
    lines = [
        f"{len(plan.cells)} cells: {len(plan.cells) - len(cells)} found, {len(cells)} to measure",
        f"{len(plan.stages)} stages: {len(plan.stages) - len(stages)} found, {len(stages)} to make",
        *(f"  {stage['what']} ({key})" for key, stage in plan.stages.items() if not stage["present"]),
    ]
    if times:
        rest = f"; {unknown} of which nothing is known yet" if unknown else ""
        took = f"about {_time(sum(known))} by what such cells and stages took so far" if known else "time unknown"
        lines.append(took + rest)
    return "\n".join(lines)


def _facts(record: Record) -> dict[str, Any]:
    return {name: getattr(record, name) for name in ("attack", "defense", "access", "dataset")}


def _shape(cell: dict[str, Any]) -> tuple[str, ...]:
    """What decides how long a cell takes, the weightiest last."""
    return tuple(str(cell[name]) for name in ("access", "defense", "attack", "dataset"))


def _estimate(shape: tuple[str, ...], before: Sequence[tuple[tuple[str, ...], float]]) -> float | None:
    """Median of those most alike: the same in all, else in all but the first part, and so on."""
    for start in range(len(shape)):
        alike = [seconds for other, seconds in before if other[start:] == shape[start:]]
        if alike:
            return median(alike)
    return None


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
            found.append({"what": meta["what"], "kind": meta["kind"], "seconds": float(meta["seconds"])})
    return found
