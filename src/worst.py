"""The worst case over attacks: an image holds only if it holds against every one of them.

Counted image by image, from the verdicts beside the records; never a mean, nor the least of several accuracies, which
can be far above it. One row for each defended model and threat model (norm, eps, access, aim) that met several attacks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from src import records as store
from src import sidecars
from src.checks.flags import unreliable
from src.records import Record
from src.variant import variant_of

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

WORST = "worst_of_all"  # what stands in the column of the attack
# Decisive flags that no attack is to blame for.
OF_ALL = {"batch_changes_verdict", "threshold_not_clean", "test_in_training"}
_SHARED = ("dataset", "classifier", "defense", "surrogate", "paths")  # of the config: what no attack changes


def worst_cases(records: Iterable[Record], files: Mapping[str, Path]) -> list[Record]:
    """A record for each threat model that several attacks tried, in the order of a table.

    Where an attack has no verdicts per image the row is a failed one: it says whose are missing, and the bound that the
    accuracies give.

    Args:
        records: cells; failed ones, and earlier worst cases, are left out.
        files: key of a record → the ``.npz`` with its verdicts, as :func:`src.sidecars.find` gives it.
    """
    groups: dict[tuple[object, ...], list[Record]] = {}
    for record in records:
        if record.status == "done" and record.attack != WORST and record.eps is not None:
            groups.setdefault(_threat(record), []).append(record)
    rows = [_worst(group, files) for group in groups.values() if len({_name(r) for r in group}) > 1]
    return sorted(rows, key=store.order)


def _threat(record: Record) -> tuple[object, ...]:
    return (
        record.dataset, record.classifier, record.defense, variant_of(record), record.norm, record.eps, record.access,
        record.seed, record.targeted, record.n, record.made_of,
    )  # fmt: skip


def _name(record: Record) -> str:
    change = variant_of(record, attack=True)
    return f"{record.attack} ({change})" if change else record.attack


def _worst(group: Sequence[Record], files: Mapping[str, Path]) -> Record:
    first = group[0]
    names = sorted({_name(r) for r in group})
    missing: list[str] = []
    held: NDArray[np.bool_] | None = None
    met: NDArray[np.bool_] | None = None  # right before, and attacked by one of them at least
    for record in group:
        found = sidecars.verdicts(record, files.get(record.key))
        if found is None:
            missing.append(_name(record))
            continue
        mine = found.right & found.attempted
        met = mine if met is None else met | mine
        held = found.held if held is None else held & found.held
    facts = {
        name: getattr(first, name)
        for name in (
            "dataset", "classifier", "defense", "norm", "eps", "access", "seed", "targeted", "n", "correct_bare",
            "correct_defended", "clean_accuracy", "clean_accuracy_defended", "clean_rejected", "defense_ms_per_image",
            "defense_memory_mib", "stages", "versions", "host", "device",
        )
    }  # fmt: skip
    facts |= {
        "key": "worst-" + min(r.key for r in group),
        "attack": WORST,
        "variant": variant_of(first),
        # What the attacks share, of which tables tell models and data of one name apart.
        "config": {kind: node for kind, node in first.config.items() if kind in _SHARED},
        "created": max(r.created for r in group),
        "flags": _flags(group),
        "uses": sorted(r.key for r in group),
    }
    if missing or held is None or met is None:
        bound = min((r.robust_accuracy for r in group if r.robust_accuracy is not None), default=None)
        most = "" if bound is None else f"; at most {bound:.4f}"
        why = f"no verdicts per image of {', '.join(sorted(set(missing)))}{most}"
        return Record(status="failed", reason=why, **facts)
    count = int(held.sum())
    low, high = store.wilson(count, first.n)
    return Record(
        **facts,
        reason=f"per image over {', '.join(names)}",
        correct_attacked=count,
        robust_accuracy=count / max(first.n, 1),
        robust_accuracy_low=low,
        robust_accuracy_high=high,
        # Of a targeted attack it is the share that reached the target, which the verdicts do not tell.
        attack_success_rate=float((met & ~held).sum() / met.sum()) if met.any() and not first.targeted else None,
        forward_passes=_sum(r.forward_passes for r in group),
        backward_passes=_sum(r.backward_passes for r in group),
        attack_ms_per_image=_sum(r.attack_ms_per_image for r in group),
    )


def _flags(group: Sequence[Record]) -> list[str]:
    """What any attack raised; but that an attack failed matters only where all did that are more than noise.

    What is wrong with the data or with every verdict counts wherever it was looked for.
    """
    attacks = [r for r in group if r.attack != "noise"] or group
    shared = set.intersection(*(set(r.flags) for r in attacks))
    return sorted({flag for r in group for flag in r.flags if flag in shared | OF_ALL or not unreliable([flag])})


def _sum(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if known else None
