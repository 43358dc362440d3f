"""Checks of cells side by side: what one says of another. Figures are by how much accuracy goes the wrong way."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence

from src.checks.flags import FLAGS, raised
from src.records import Record

Check = Callable[[Record, Sequence[Record]], float]

MANY = 2.0  # gradients an image, on average: one step takes one, or a second where bfloat16 deceived it


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
    return _largest_rise(record, smaller)


def weaker_access_stronger(record: Record, others: Sequence[Record]) -> float:
    """Of a white_box cell, against attacks that know less of the defended model and are no better for it."""
    if record.access != "white_box":
        return 0.0
    weaker = [o for o in others if _same(o, record, "eps") and _knows_less(o, record)]
    return max((_rise(record.robust_accuracy, o.robust_accuracy, record.n) for o in weaker), default=0.0)


def _knows_less(other: Record, record: Record) -> bool:
    """Whether it is what ``other`` knows that should make it weaker than a white_box cell, rather than how it searches.

    Another attack is compared only with gradients followed for many steps: one step, noise and random search may
    rightly lose to it. Nor with a change of a few whole pixels (l0), of which a gradient says little. It must itself
    take no more than a gradient an image, or a surrogate's: on a bare classifier that the defense hardly changes a
    better attack in many steps is the better one through the defense as well.
    """
    if _same(other, record, "attack", "variant"):
        return other.access != record.access
    gradients = other.backward_passes
    if gradients is None or (record.backward_passes or 0) < MANY or record.norm == "l0" or record.targeted:
        return False
    return gradients == 0 or other.access == "transfer" or (other.access == "gray_box" and gradients < MANY)


def one_step_stronger(record: Record, others: Sequence[Record]) -> float:
    """Of an attack in many steps, against those in one step with the same access."""
    if _steps(record) < 2:
        return 0.0
    return _largest_rise(record, [o for o in others if _same(o, record, "eps", "access") and _steps(o) == 1])


def noise_stronger(record: Record, others: Sequence[Record]) -> float:
    """Of any attack but noise, against noise with the same access."""
    if record.attack == "noise":
        return 0.0
    return _largest_rise(record, [o for o in others if _same(o, record, "eps", "access") and o.attack == "noise"])


CHECKS: dict[str, Check] = {
    check.__name__: check
    for check in (accuracy_rises_with_eps, weaker_access_stronger, one_step_stronger, noise_stronger)
}


def _subject(record: Record) -> tuple[object, ...]:
    return (
        record.dataset, record.classifier, record.defense, record.norm, record.seed, record.targeted, record.n,
        record.weights,
    )  # fmt: skip


def _same(one: Record, other: Record, *names: str) -> bool:
    return all(getattr(one, name) == getattr(other, name) for name in names)


def _steps(record: Record) -> int:
    """Steps of the attack; 0 where it has none."""
    steps = record.config.get("attack", {}).get("steps", 0)
    return steps if isinstance(steps, int) else 0


def _largest_rise(record: Record, others: Iterable[Record]) -> float:
    """On the model that the attack saw: only there need the stronger attack do more harm."""
    return max((_rise(_on_attacked(record), _on_attacked(other), record.n) for other in others), default=0.0)


def _on_attacked(record: Record) -> float | None:
    """Accuracy of the model that the attack saw; None where the record does not have it."""
    if record.access == "transfer":
        return None
    return record.robust_accuracy_bare if record.access == "gray_box" else record.robust_accuracy


def _rise(high: float | None, low: float | None, n: int) -> float:
    """By how much more of ``n`` images one cell holds than another that should hold as many or more.

    0 where chance explains it: Fisher's exact test, one-sided at 5 %, as if the images were not the same. Where most of
    them fare alike in both cells, that leaves more to chance than there is.
    """
    if high is None or low is None or high <= low:
        return 0.0
    return round(high - low, 6) if _fisher(round(high * n), round(low * n), n) < 0.05 else 0.0


@functools.cache  # the same counts come again and again
def _fisher(more: int, fewer: int, n: int) -> float:
    from scipy.stats import hypergeom

    return float(hypergeom.sf(more - 1, 2 * n, more + fewer, n))
