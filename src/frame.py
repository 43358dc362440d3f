"""Records as a table for programs: ``results.csv`` has a row per cell."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from src import records as store
from src.records import Record

if TYPE_CHECKING:  # takes a second to import; `--help` must not wait for it
    import pandas as pd

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
)
_DTYPES = {name: dtype for dtype, names in _SCHEMA for name in names.split()}
COLUMNS = tuple(_DTYPES)


def to_frame(records: Iterable[Record]) -> pd.DataFrame:
    """One row a cell, columns as in :data:`COLUMNS`; missing numbers are NaN, flags joined by ``;``."""
    import pandas as pd

    rows = sorted(records, key=store.order)
    return pd.DataFrame({name: [_plain(row, name) for row in rows] for name in COLUMNS}).astype(_DTYPES)


def _plain(record: Record, name: str) -> object:
    value = getattr(record, name)
    return ";".join(value) if isinstance(value, list) else value


def write_csv(records: Iterable[Record], path: Path) -> Path:
    """Write ``results.csv``, whole or not at all."""
    store.write_whole(path, to_frame(records).to_csv(index=False).encode())
    return path
