"""Which cells are points of one line, and what that line is called."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from src import records as store
from src.checks.flags import unreliable
from src.records import Record
from src.variant import data_apart, group_of, overrides_of, own_weights

BARE = "no defense"


@dataclass(frozen=True)
class Point:
    """An accuracy with its 95 % interval, fractions; ``sound`` if no decisive check was raised."""

    eps: float
    accuracy: float
    low: float
    high: float
    sound: bool = True


def told_apart(records: Sequence[Record]) -> tuple[list[Record], str]:
    """Copies whose variants name data and weights of the user's own too, but nothing if all are the same; and that."""
    data = data_apart(records)
    variants = [",".join(filter(None, [r.variant, at, *own_weights(r)])) for r, at in zip(records, data, strict=True)]
    shared = variants[0] if len(set(variants)) == 1 else ""
    named = ["" if shared else variant for variant in variants]
    return [r.model_copy(update={"variant": name}) for r, name in zip(records, named, strict=True)], shared


def defense_name(record: Record) -> str:
    return f"{record.defense} ({record.variant})" if record.variant else record.defense


def bare_name(record: Record) -> str:
    """What the line of the bare classifier is called that a cell has a point of; empty where it has none.

    Images of gray_box are aimed at it, and so is every cell of ``defense=none``.
    """
    if record.access != "gray_box" and record.defense != "none":
        return ""
    access = "" if record.access in ("gray_box", "white_box") else f", {record.access}"
    others = ("defense", "eot_draws", *(() if record.access == "transfer" else ("surrogate",)))
    change = ",".join(item for item in overrides_of(record) if group_of(item) not in others)
    return f"{BARE}{access}{f' ({change})' if change else ''}"


def bare_lines(cells: Sequence[Record]) -> list[tuple[str, tuple[Point, ...]]]:
    """Of the bare classifier, with their names: other seeds and weights are lines of their own."""
    groups: dict[tuple[str, int, tuple[str, ...]], list[Record]] = {}
    for record in cells:
        if name := bare_name(record):
            groups.setdefault((name, record.seed, record.weights[:2]), []).append(record)
    return [(name, points) for (name, *_), group in groups.items() if (points := bare_points(group))]


def defended_lines(cells: Sequence[Record]) -> list[tuple[Record, tuple[Point, ...]]]:
    """Of each defense under each access, seed and set of weights, with the first cell of each."""
    groups: dict[tuple[object, ...], dict[float | None, Record]] = {}
    for record in (r for r in cells if r.defense != "none"):
        same, copy = (defense_name(record), record.access, record.seed, record.made_of), 0
        while record.eps in (group := groups.setdefault((*same, copy), {})):
            copy += 1  # what was measured twice is a line of its own: none hides another
        group[record.eps] = record
    return [(next(iter(group.values())), _points(list(group.values()))) for group in groups.values()]


def _points(group: Sequence[Record]) -> tuple[Point, ...]:
    points = {}
    for r in group:
        if r.correct_defended is not None and r.n:
            points[0.0] = Point(0.0, r.correct_defended / r.n, *store.wilson(r.correct_defended, r.n))
    for r in group:
        if r.eps is not None and r.robust_accuracy is not None:
            low, high = r.robust_accuracy_low, r.robust_accuracy_high
            here = r.robust_accuracy
            bounds = here if low is None else low, here if high is None else high
            points[r.eps] = Point(r.eps, here, *bounds, sound=not unreliable(r.flags))
    return tuple(points[eps] for eps in sorted(points))


def bare_points(group: Sequence[Record]) -> tuple[Point, ...]:
    """Of cells that met the same images; a single point makes no line."""
    points = {}
    for r in group:
        if r.correct_bare is not None and r.n:
            points[0.0] = Point(0.0, r.correct_bare / r.n, *store.wilson(r.correct_bare, r.n))
    for r in group:
        right = r.correct_attacked if r.defense == "none" else r.correct_attacked_bare
        sound = not unreliable(r.flags)  # the same images met several defenses: what one of them raised is not all
        if right is not None and r.eps is not None and r.n and (sound or r.eps not in points):
            points[r.eps] = Point(r.eps, right / r.n, *store.wilson(right, r.n), sound=sound)
    return tuple(points[eps] for eps in sorted(points)) if len(points) > 1 else ()
