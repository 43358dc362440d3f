"""What lies beside a record, ``<key>.npz``: the verdict of each image and a few example pictures."""

from __future__ import annotations

import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from src.records import Record

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Verdicts:
    """One entry an image of the test split: right before, on the defended model; attacked at all; withstood."""

    right: NDArray[np.bool_]
    attempted: NDArray[np.bool_]
    held: NDArray[np.bool_]


def find(paths: Iterable[Path]) -> dict[str, Path]:
    """Key of a record → its ``.npz``, for all found in the folders (of a file: beside it) and below."""
    folders = [path if path.is_dir() else path.parent for path in paths]
    return {path.stem: path for folder in folders for path in sorted(folder.rglob("*.npz"))}


def read(path: Path | None, names: Iterable[str], beside: Iterable[str] = ()) -> dict[str, Any] | None:
    """The arrays of those names; None where the file is absent, damaged or has not all of them.

    Args:
        beside: names of arrays that are taken where they are there: earlier versions wrote none.
    """
    import numpy as np

    if path is None:
        return None
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in (*names, *(name for name in beside if name in file))}
    except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile):
        return None


def withstood(right: Any, same: Any, rejected: Any) -> Any:
    """Which images a model that rejects withstood: rejection does no harm, unless of the clean image already."""
    return right & (same | rejected)


def verdicts(record: Record, path: Path | None) -> Verdicts | None:
    """The verdicts of a record; None where they are absent or do not count to what the record says."""
    found = read(path, ("label", "prediction", "clean_prediction", "attempted", "class_names"))
    if found is None:
        return None
    label, said, names = found["label"], found["prediction"], found["class_names"]
    right, held = found["clean_prediction"] == label, said == label
    if record.clean_rejected is not None:  # it rejects; a class of the data may have that name as well
        held = withstood(right, held, said == len(names) - 1)
    sound = len(label) == record.n and int(held.sum()) == record.correct_attacked
    return Verdicts(right, found["attempted"], held) if sound else None
