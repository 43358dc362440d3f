"""Checks of cells side by side: what one says of another. Figures are by how much accuracy goes the wrong way."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

from src.checks.flags import FLAGS, raised
from src.records import Record

Check = Callable[[Record, Sequence[Record]], float]


def across(records: Iterable[Record]) -> list[Record]:
    """The records in their order, with the flags that the others raise. Doing it twice changes nothing."""
    cells = list(records)
    groups: dict[tuple[object, ...], list[Record]] = {}
    for record in cells:
        if record.status == "done" and record.robust_accuracy is not None:
            groups.setdefault(_subject(record), []).append(record)
    found: dict[int, Record] = {}
    for group in groups.values():
        for record in group:
            figures = {name: figure for name, check in CHECKS.items() if (figure := check(record, group)) > 0}
            new = {name: max(figure, record.checks.get(name, 0.0)) for name, figure in figures.items()}
            flags = {*record.flags, *raised(new)}
            ordered = [name for name in FLAGS if name in flags] + [name for name in record.flags if name not in FLAGS]
            found[id(record)] = record.model_copy(update={"checks": record.checks | new, "flags": ordered})
    return [found.get(id(record), record) for record in cells]


def accuracy_rises_with_eps(record: Record, others: Sequence[Record]) -> float:
    """Against the same attack with the same access and a smaller radius."""
    smaller = [
        o for o in others if _same(o, record, "attack", "variant", "access") and (o.eps or 0) < (record.eps or 0)
    ]
    return max((_rise(record, other) for other in smaller), default=0.0)


def weaker_access_stronger(record: Record, others: Sequence[Record]) -> float:
    """Of a white_box cell, against any other access by the same attack."""
    if record.access != "white_box":
        return 0.0
    weaker = [o for o in others if _same(o, record, "attack", "variant", "eps") and o.access != record.access]
    return max((_rise(record, other) for other in weaker), default=0.0)


def one_step_stronger(record: Record, others: Sequence[Record]) -> float:
    """Of an attack in many steps, against those in one step."""
    if _steps(record) < 2:
        return 0.0
    return max((_rise(record, o) for o in others if _same(o, record, "eps", "access") and _steps(o) == 1), default=0.0)


def noise_stronger(record: Record, others: Sequence[Record]) -> float:
    """Of any attack but noise, against noise."""
    if record.attack == "noise":
        return 0.0
    noise = [o for o in others if _same(o, record, "eps") and o.attack == "noise"]
    return max((_rise(record, other) for other in noise), default=0.0)


CHECKS: dict[str, Check] = {
    check.__name__: check
    for check in (accuracy_rises_with_eps, weaker_access_stronger, one_step_stronger, noise_stronger)
}


def _subject(record: Record) -> tuple[object, ...]:
    weights = tuple(record.stages.get(kind, "") for kind in ("data", "classifier", "defense"))
    return (
        record.dataset, record.classifier, record.defense, record.norm, record.seed, record.targeted, record.n, weights,
    )  # fmt: skip


def _same(one: Record, other: Record, *names: str) -> bool:
    return all(getattr(one, name) == getattr(other, name) for name in names)


def _steps(record: Record) -> int:
    """Steps of the attack; 0 where it has none."""
    steps = record.config.get("attack", {}).get("steps", 0)
    return steps if isinstance(steps, int) else 0


def _rise(high: Record, low: Record) -> float:
    """By how much more one cell holds than another that should hold as much or more; 0 where chance explains it.

    One-sided test of two proportions at 5 %, as if the images were not the same: on the safe side.
    """
    n = high.n
    one, two = high.robust_accuracy or 0.0, low.robust_accuracy or 0.0
    middle = (one + two) / 2
    chance = 1.645 * math.sqrt(2 * middle * (1 - middle) / n) if n else math.inf
    return round(one - two, 6) if one - two > chance else 0.0
