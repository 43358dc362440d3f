"""Sections of results.md that compare cells: over seeds, and defense against defense on the same images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

from numpy.typing import ArrayLike

from src import records as store
from src import sidecars
from src.analysis.points import defense_name
from src.checks.flags import unreliable
from src.records import Record
from src.tables import format_eps, percent
from src.uncertainty import Paired, but_for_the_seed, over_seeds, paired
from src.variant import overrides_of, own_weights, places, variant_of, what


@dataclass(frozen=True, kw_only=True)
class Versus:
    """The defense that holds most images, and another under the same attack and access."""

    best: Record
    other: Record
    found: Paired


def against_best(records: Iterable[Record], held: Mapping[str, ArrayLike]) -> list[Versus]:
    """Each defense against the best one that met the same attack on the same images.

    Args:
        records: cells.
        held: key of a record → whether each image held; cells without are left out.
    """
    groups: dict[tuple[object, ...], list[Record]] = {}
    for record in sorted(records, key=store.order):
        if record.status == "done" and record.key in held:
            groups.setdefault(_but_for_the_defense(record), []).append(record)
    found = []
    for group in groups.values():
        best = max(group, key=lambda record: record.robust_accuracy or 0.0)
        found += [
            Versus(best=best, other=other, found=paired(held[best.key], held[other.key]))
            for other in group
            if _model(other) != _model(best)
        ]
    return found


def _but_for_the_defense(record: Record) -> tuple[object, ...]:
    return (
        record.dataset, record.stages.get("data"), record.n, record.classifier, record.attack,
        variant_of(record, attack=True), record.norm, record.eps, record.access, record.targeted, record.seed,
        record.stages.get("surrogate"), *(i for i in overrides_of(record) if what(i).startswith(_SETTING)),
    )  # fmt: skip


_SETTING = ("threat.", "surrogate", "split")  # of a variant: what is no part of the defended model


def _called(record: Record) -> str:
    """The defense, with weights of the user's own: another file is another defense."""
    return " ".join([defense_name(record), *own_weights(record)])


def _model(record: Record) -> tuple[object, ...]:
    weights = tuple(record.stages.get(kind) for kind in ("classifier", "defense"))
    return record.defense, variant_of(record), weights


def to_markdown(records: Sequence[Record], files: Mapping[str, Path]) -> str:
    """The sections of results.md over seeds and between defenses; empty where there is nothing to say.

    Cells that are unreliable have no part in them; each section names those that it leaves out.
    """
    from tabulate import tabulate

    done = [record for record in records if record.status == "done"]
    records = [record for record in done if not unreliable(record.flags)]
    held = {r.key: found.held for r in done if (found := sidecars.verdicts(r, files.get(r.key))) is not None}

    def about(record: Record) -> list[str]:
        data = " ".join(filter(None, [record.dataset, places(record).get("dataset.root")]))
        return [data, record.classifier, record.attack, record.norm, format_eps(record.eps), record.access]

    def between(low: float, high: float) -> str:
        return f"[{percent(low)}, {percent(high)}]"

    def section(title: str, head: list[str], rows: list[list[str]], text: str, without: Iterable[Record]) -> str:
        left = [f"{' '.join(about(r))} {_called(r)} seed {r.seed}" for r in without if unreliable(r.flags)]
        told = [f"## {title}"]
        if rows:
            told += [tabulate(rows, [*heads, *head], tablefmt="pipe", disable_numparse=True), text]
        if left:
            told.append(f"Left out as unreliable: {'; '.join(left)}.")
        return "\n\n".join(told) + "\n" if rows or left else ""

    heads = ["dataset", "classifier", "attack", "norm", "eps", "access"]
    seeds = section(
        "Over seeds",
        ["defense", "seeds", "mean", "95 % interval", "sd"],
        [
            [*about(each.first), _called(each.first), str(each.seeds), percent(each.mean),
             between(each.low, each.high), percent(each.spread)]
            for each in over_seeds(records)
        ],
        "Mean robust accuracy over the seeds in %, its interval by Student's t, and the standard deviation between "
        "seeds: how much the figure depends on the training and on the attack's random numbers.",
        _several(done, but_for_the_seed),
    )  # fmt: skip
    drawn = [record for record in done if record.robust_accuracy_redraws]
    values = [[r.robust_accuracy or 0.0, *r.robust_accuracy_redraws] for r in drawn]
    redraws = section(
        "Over redraws",
        ["defense", "draws", "mean", "sd", "least to most"],
        [
            [*about(record), _called(record), str(len(found)), percent(mean(found)), percent(stdev(found)),
             f"{percent(min(found))} to {percent(max(found))}"]
            for record, found in zip(drawn, values, strict=True) if not unreliable(record.flags)
        ],
        "Robust accuracy in % of a stochastic defense on the same attacked images, drawn again.",
        drawn,
    )  # fmt: skip
    pairs = section(
        "Defense against defense",
        ["best", "against", "difference (pp)", "95 % interval", "images only one holds", "p"],
        [
            [*about(each.best), _called(each.best), _called(each.other), percent(each.found.difference),
             between(each.found.low, each.found.high), f"{each.found.only_first} / {each.found.only_second}",
             f"{each.found.p:.2g}"]
            for each in against_best(records, held)
        ],
        "The best defense of each threat model against the others, image by image: difference in robust accuracy with "
        "its paired interval (Newcombe), the images that only one of them holds, and p of McNemar's "
        "exact test. Neither accounts for the best having been chosen on the same images.",
        _several([record for record in done if record.key in held], _but_for_the_defense),
    )  # fmt: skip
    return "\n".join(filter(None, (seeds, redraws, pairs)))


def _several(records: Sequence[Record], alike: Callable[[Record], tuple[object, ...]]) -> list[Record]:
    """Those that have others to be compared with."""
    counts = Counter(map(alike, records))
    return [record for record in records if counts[alike(record)] > 1]
