"""Records as a table for programs: a row per cell, as CSV, Parquet, a pandas frame or a labelled cube."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from src import records as store
from src import sidecars
from src.checks.across import across
from src.checks.flags import unreliable
from src.errors import UserError
from src.records import Record
from src.variant import data_apart

if TYPE_CHECKING:
    import xarray

# Shares whose interval no record holds: it follows from their counts.
_SHARES = (
    "clean_accuracy", "clean_accuracy_defended", "robust_accuracy_bare", "detection_tpr", "clean_rejected",
    "accepted_wrong",
)  # fmt: skip
# Types are stated, not inferred: a sweep whose cells all failed still gives columns of numbers.
_SCHEMA = (
    ("str", "dataset classifier defense attack norm"),
    ("float64", "eps"),
    ("str", "access"),
    ("int64", "seed n"),
    (
        "float64",
        "clean_accuracy clean_accuracy_defended robust_accuracy robust_accuracy_low robust_accuracy_high",
    ),
    ("float64", "attack_success_rate distance_median attack_ms_per_image defense_ms_per_image"),
    ("str", "flags status reason key"),
    # extras, after the columns that others rely on
    ("bool", "targeted"),
    ("str", "variant"),
    (
        "float64",
        "robust_accuracy_bare distance_max forward_passes backward_passes "
        "detection_auc detection_tpr clean_rejected accepted_wrong",
    ),
    ("bool", "unreliable"),
    ("float64", "defense_memory_mib"),
    ("float64", " ".join(f"{name}_low {name}_high" for name in _SHARES)),
)
_DTYPES = {name: dtype for dtype, names in _SCHEMA for name in names.split()}
COLUMNS = tuple(_DTYPES)
# What an attack left: of an unreliable cell programs get the numbers and the column `unreliable`, people the word.
ATTACKED = (
    *(f"{name}{end}" for name in ("robust_accuracy", "robust_accuracy_bare", "accepted_wrong", "detection_tpr")
      for end in ("", "_low", "_high")),
    "attack_success_rate", "detection_auc",
)  # fmt: skip
DIMENSIONS = ("dataset", "classifier", "defense", "attack", "eps", "access", "seed")
_FURTHER = ("norm", "targeted", "variant", "n")  # dimensions only where they differ


class Results(pd.DataFrame):
    """A row a cell with the columns in :data:`COLUMNS`; a pandas frame whose ``to_xarray`` gives the labelled cube."""

    @property
    def _constructor(self) -> type[Results]:
        return Results

    def to_xarray(self) -> xarray.Dataset:  # type: ignore[misc]
        """The cube over dataset, classifier, defense, attack, eps, access, seed; NaN where nothing was measured.

        ``norm``, ``targeted``, ``variant`` and ``n`` are further dimensions where they have more than one value, else
        coordinates of the whole. Failed cells are left out.

        Raises:
            UserError: two rows of the same place, which no cube can hold.
        """
        done = pd.DataFrame(self[self["status"] == "done"])
        further = [name for name in _FURTHER if done[name].nunique() > 1]
        names = [*DIMENSIONS, *further]
        if (twice := done.duplicated(names, keep=False)).any():
            keys = ", ".join(done.loc[twice, "key"].head(2))
            raise UserError(
                f"to_xarray: {int(twice.sum())} cells share a place ({keys}): measured twice, with other weights. "
                "Expected one a place: drop some rows first"
            )
        values = done.set_index(names).drop(columns=[*(set(_FURTHER) - set(further)), "status", "reason"])
        cube = values.to_xarray()
        return cube.assign_coords({name: done[name].iloc[0] for name in _FURTHER if name not in names and len(done)})


def load(paths: Iterable[Path | str] | Path | str, *, worst: bool = True) -> Results:
    """The records under folders or files as a frame.

    Args:
        paths: output folders of runs or sweeps, ``artifacts/records``, or single records.
        worst: with a row ``worst_of_all`` for each threat model that several attacks tried.
    """
    from src.worst import worst_cases

    places = [Path(paths)] if isinstance(paths, str | Path) else [Path(path) for path in paths]
    for place in places:
        if not place.exists():
            raise UserError(f"{place}: no such file or folder. Expected the output folder of a run or a sweep")
    cells = across(store.find(places))
    return to_frame([*cells, *(worst_cases(cells, sidecars.find(places)) if worst else [])])


def to_frame(records: Iterable[Record]) -> Results:
    """One row a cell, columns as in :data:`COLUMNS`; missing numbers are NaN, flags joined by ``;``."""
    rows = sorted(records, key=store.order)
    columns = {name: [_plain(row, name) for row in rows] for name in COLUMNS}
    columns["variant"] = [
        ",".join(filter(None, names)) for names in zip(columns["variant"], data_apart(rows), strict=True)
    ]
    return Results(columns).astype(_DTYPES)


def _plain(record: Record, name: str) -> Any:
    if name == "unreliable":
        return record.status == "done" and unreliable(record.flags)
    base, _, end = name.rpartition("_")
    if base in _SHARES and end in ("low", "high"):
        interval = record.interval(base)
        return None if interval is None else interval[end == "high"]
    value = getattr(record, name)
    return ";".join(value) if isinstance(value, list) else value


def shown(table: pd.DataFrame) -> pd.DataFrame:
    """The same for people: *unreliable* in place of the robust accuracy of a cell that failed a decisive check."""
    text = pd.DataFrame(table).astype(object)
    text.loc[table["unreliable"], list(ATTACKED)] = math.nan
    text.loc[table["unreliable"], "robust_accuracy"] = "unreliable"
    return text


def write_csv(records: Iterable[Record], path: Path) -> Path:
    """Write ``results.csv``, whole or not at all."""
    store.write_whole(path, to_frame(records).to_csv(index=False).encode())
    return path


def write_parquet(records: Iterable[Record], path: Path) -> Path:
    """Write ``results.parquet``: the columns of results.csv with their types."""
    buffer = io.BytesIO()
    pd.DataFrame(to_frame(records)).to_parquet(buffer, index=False)
    store.write_whole(path, buffer.getvalue())
    return path
