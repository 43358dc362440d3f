"""Sections of results.md that compare cells: over seeds, and defense against defense on the same images."""

from __future__ import annotations

import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

import numpy as np
from numpy.typing import ArrayLike, NDArray

from src import records as store
from src.checks.flags import unreliable
from src.records import Record
from src.tables import format_eps, percent
from src.uncertainty import Paired, over_seeds, paired
from src.worst import variant_of


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
            same = (
                record.dataset, record.stages.get("data"), record.n, record.classifier, record.attack,
                variant_of(record, attack=True), record.norm, record.eps, record.access, record.targeted, record.seed,
            )  # fmt: skip
            groups.setdefault(same, []).append(record)
    found = []
    for group in groups.values():
        best = max(group, key=lambda record: record.robust_accuracy or 0.0)
        found += [
            Versus(best=best, other=other, found=paired(held[best.key], held[other.key]))
            for other in group
            if _model(other) != _model(best)
        ]
    return found


def _model(record: Record) -> tuple[object, ...]:
    weights = tuple(record.stages.get(kind) for kind in ("classifier", "defense"))
    return record.defense, variant_of(record), weights


def read_held(records: Iterable[Record], files: Mapping[str, Path]) -> dict[str, NDArray[np.bool_]]:
    """The outcomes of each image that lie beside records; those of older ones, which have none, are left out."""
    held = {}
    for record in records:
        try:
            with np.load(files[record.key], allow_pickle=False) as arrays:
                if "held" in arrays and len(arrays["held"]) == record.n:
                    held[record.key] = arrays["held"]
        except (KeyError, OSError, ValueError, EOFError, zipfile.BadZipFile):
            continue
    return held


def to_markdown(records: Sequence[Record], files: Mapping[str, Path]) -> str:
    """The sections of results.md over seeds and between defenses; empty where there is nothing to say.

    Cells that are unreliable have no part in them.
    """
    from tabulate import tabulate

    records = [record for record in records if not unreliable(record.flags)]

    def about(record: Record) -> list[str]:
        return [record.dataset, record.classifier, record.attack, record.norm, format_eps(record.eps), record.access]

    def name(record: Record) -> str:
        return f"{record.defense} ({record.variant})" if record.variant else record.defense

    def between(low: float, high: float) -> str:
        return f"[{percent(low)}, {percent(high)}]"

    heads = ["dataset", "classifier", "attack", "norm", "eps", "access"]
    parts = []
    if seeds := over_seeds(records):
        rows = [
            [*about(each.first), name(each.first), each.seeds, percent(each.mean), between(each.low, each.high),
             percent(each.spread)]
            for each in seeds
        ]  # fmt: skip
        head = [*heads, "defense", "seeds", "mean", "95 % interval", "sd"]
        parts.append(
            "## Over seeds\n\n"
            + tabulate(rows, head, tablefmt="pipe", disable_numparse=True)
            + "\n\nMean robust accuracy"
            " over the seeds in %, its interval by Student's t, and the standard deviation between seeds: how much the "
            "figure depends on the training and on the attack's random numbers.\n"
        )
    if drawn := [record for record in records if record.robust_accuracy_redraws]:
        rows = []
        for record in drawn:
            values = [record.robust_accuracy or 0.0, *record.robust_accuracy_redraws]
            rows.append(
                [*about(record), name(record), len(values), percent(mean(values)), percent(stdev(values)),
                 f"{percent(min(values))} to {percent(max(values))}"]
            )  # fmt: skip
        head = [*heads, "defense", "draws", "mean", "sd", "least to most"]
        parts.append(
            "## Over redraws\n\n" + tabulate(rows, head, tablefmt="pipe", disable_numparse=True) + "\n\nRobust accuracy"
            " in % of a stochastic defense on the same attacked images, drawn again.\n"
        )
    if pairs := against_best(records, read_held(records, files)):
        rows = [
            [*about(each.best), name(each.best), name(each.other), percent(each.found.difference),
             between(each.found.low, each.found.high), f"{each.found.only_first} / {each.found.only_second}",
             f"{each.found.p:.2g}"]
            for each in pairs
        ]  # fmt: skip
        head = [*heads, "best", "against", "difference (pp)", "95 % interval", "images only one holds", "p"]
        parts.append(
            "## Defense against defense\n\n" + tabulate(rows, head, tablefmt="pipe", disable_numparse=True) + "\n\nThe "
            "best defense of each threat model against the others, image by image: difference in robust accuracy with "
            "its paired interval (Newcombe), the images that only one of them holds, and p of McNemar's "
            "exact test. Neither accounts for the best having been chosen on the same images.\n"
        )
    return "\n".join(parts)
