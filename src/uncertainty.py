"""How sure a figure is: over images, over seeds, and between two defenses on the same images."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import mean, stdev

import numpy as np
from numpy.typing import ArrayLike

from src import records as store
from src.records import Record
from src.variant import places


@dataclass(frozen=True, kw_only=True)
class Paired:
    """Two defenses on the same images, or one under two attacks.

    Attributes:
        n: images.
        only_first: images that only the first holds.
        only_second: images that only the second holds.
        difference: accuracy of the first minus that of the second.
        low, high: 95 % interval of the difference.
        p: of McNemar's exact test, two-sided: how likely so uneven a split is where neither is better.
    """

    n: int
    only_first: int
    only_second: int
    difference: float
    low: float
    high: float
    p: float


def paired(first: ArrayLike, second: ArrayLike) -> Paired:
    """Compare per-image outcomes (held or not) of the same images in the same order.

    The test is McNemar's in its exact form, binomial over the images on which the two differ (McNemar 1947; Fagerland,
    Lydersen, Laake 2013, https://doi.org/10.1186/1471-2288-13-91). The interval is Newcombe's square-and-add one of
    Wilson intervals (Newcombe 1998, method 10), which keeps to [-1, 1] and is no single point where all agree.

    Raises:
        ValueError: not two outcomes for each image.
    """
    a, b = np.asarray(first, dtype=bool), np.asarray(second, dtype=bool)
    if a.shape != b.shape or a.ndim != 1 or not len(a):
        raise ValueError(f"outcomes of shapes {a.shape} and {b.shape}; expected one of each for every image")
    return _counted(int((a & b).sum()), int((a & ~b).sum()), int((~a & b).sum()), int((~a & ~b).sum()))


def _counted(both: int, only_a: int, only_b: int, neither: int) -> Paired:
    n = both + only_a + only_b + neither
    right_a, right_b = both + only_a, both + only_b
    share_a, share_b = right_a / n, right_b / n
    (low_a, high_a), (low_b, high_b) = store.wilson(right_a, n), store.wilson(right_b, n)
    # Correlation of the two outcomes, with Newcombe's correction for continuity.
    product = math.sqrt(right_a * (n - right_a) * right_b * (n - right_b))
    agreement = both * neither - only_a * only_b
    phi = (max(agreement - n / 2, 0) if agreement > 0 else agreement) / product if product else 0.0
    difference = share_a - share_b

    def reach(x: float, y: float) -> float:
        return math.sqrt(max(x * x - 2 * phi * x * y + y * y, 0.0))

    return Paired(
        n=n,
        only_first=only_a,
        only_second=only_b,
        difference=difference,
        low=difference - reach(share_a - low_a, high_b - share_b),
        high=difference + reach(high_a - share_a, share_b - low_b),
        p=exact(only_a, only_b, "two-sided"),
    )


def exact(more: int, less: int, side: str = "greater") -> float:
    """p of so uneven a split of the images on which two differ, where each side is as likely; 1 where none does."""
    from scipy.stats import binomtest

    return float(binomtest(more, more + less, 0.5, alternative=side).pvalue) if more + less else 1.0


def excess(turned: ArrayLike, turned_less: ArrayLike) -> float:
    """By which share of the images the first attack does more harm than the second; 0 where chance explains it."""
    first, second = np.asarray(turned, dtype=bool), np.asarray(turned_less, dtype=bool)
    more, less = int((first & ~second).sum()), int((~first & second).sum())
    return (more - less) / len(first) if exact(more, less) < 0.05 else 0.0


@dataclass(frozen=True, kw_only=True)
class OverSeeds:
    """One setting measured with several seeds.

    Attributes:
        first: the record of the lowest seed, for its names.
        seeds: how many.
        mean: of the robust accuracies.
        low, high: 95 % interval of that mean by Student's t, cut to [0, 1].
        spread: standard deviation over the seeds.
    """

    first: Record
    seeds: int
    mean: float
    low: float
    high: float
    spread: float


def but_for_the_seed(record: Record) -> tuple[object, ...]:
    """All that tells a cell from others but its seed; other data or weights of one's own are no other seed."""
    return *record.model_copy(update={"seed": 0}).gap_key, record.access, *sorted(places(record).items())


def over_seeds(records: Iterable[Record]) -> list[OverSeeds]:
    """Mean robust accuracy and its interval of every cell that was measured with two seeds or more."""
    groups: dict[tuple[object, ...], dict[int, Record]] = {}
    for record in sorted(records, key=store.order):
        if record.status == "done" and record.robust_accuracy is not None:
            groups.setdefault(but_for_the_seed(record), {}).setdefault(record.seed, record)
    return [_over(list(group.values())) for group in groups.values() if len(group) > 1]


def _over(group: Sequence[Record]) -> OverSeeds:
    from scipy.stats import t

    values = [float(record.robust_accuracy or 0.0) for record in group]
    middle, spread = mean(values), stdev(values)
    reach = float(t.ppf(0.975, len(values) - 1)) * spread / math.sqrt(len(values))
    low, high = max(0.0, middle - reach), min(1.0, middle + reach)
    return OverSeeds(first=group[0], seeds=len(values), mean=middle, low=low, high=high, spread=spread)
