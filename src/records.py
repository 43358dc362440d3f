"""One cell, one record: typed, versioned, written whole or not at all.

A record is the JSON that every table is made from. Beside it may lie ``<key>.npz`` with the verdict of each image and a
few example pictures, so that figures can be drawn again without loading a model.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from src.errors import UserError

SCHEMA_VERSION = 4  # 2: checks, redraws; 3: digest; 4: memory


class Record(BaseModel):
    """One cell: dataset, classifier, defense, attack, norm, eps, access, seed. Accuracies are shares of ``n``."""

    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="strings")

    schema_version: int = SCHEMA_VERSION
    key: str
    status: Literal["done", "failed"] = "done"
    reason: str = ""  # one line, when failed

    dataset: str
    classifier: str
    defense: str
    attack: str
    norm: str
    eps: float | None  # None only in a failed cell whose eps could not be read
    access: str
    seed: int
    targeted: bool = False
    variant: str = ""  # the overrides that the columns above do not show, e.g. "defense.noise=0"

    n: int = 0  # test images, all of them counted once
    correct_bare: int | None = None  # clean images the bare classifier gets right
    correct_defended: int | None = None
    correct_attacked: int | None = None  # attacked images the defended model gets right
    correct_attacked_bare: int | None = None  # the same images on the bare classifier (gray_box only)

    clean_accuracy: float | None = None  # bare classifier
    clean_accuracy_defended: float | None = None
    robust_accuracy: float | None = None  # defended model under this attack and access
    robust_accuracy_low: float | None = None  # 95 % Wilson interval
    robust_accuracy_high: float | None = None
    robust_accuracy_bare: float | None = None  # bare classifier under the same images (gray_box only)
    # Of a stochastic defense with checks=full: the same attacked images under other draws than the one counted above.
    robust_accuracy_redraws: list[float] = Field(default_factory=list)
    attack_success_rate: float | None = None  # share of the defended model's right answers that the attack turned
    distance_median: float | None = None  # over the images the attack worked on, in `norm`
    distance_max: float | None = None
    forward_passes: float | None = None  # of the attacked model, mean per image attacked
    backward_passes: float | None = None
    attack_ms_per_image: float | None = None
    defense_ms_per_image: float | None = None  # the defended model's forward pass
    # Most tensor memory at once in such a pass over (at most) 64 images, weights and images included; 1 MiB = 2**20
    # bytes. None in records made before it was taken.
    defense_memory_mib: float | None = None
    # Where the defense detects; a detected image counts as held, one whose clean version is rejected does not.
    clean_rejected: float | None = None  # share of the clean images
    accepted_wrong: float | None = None  # share of the attacked images, of all n
    detection_auc: float | None = None  # attacked images that the classifier behind gets wrong against clean ones
    detection_tpr: float | None = None  # share of those images that is rejected, at the frozen threshold
    detection_n: int | None = None  # how many those images are; None in records made before it was counted
    # Where the defense certifies: share of the first certified_n images right and certified at each l2 radius.
    certified_n: int | None = None
    certified: dict[str, float] | None = None
    checks: dict[str, float] = Field(default_factory=dict)  # figures of the sanity checks that were taken
    flags: list[str] = Field(default_factory=list)  # those that were raised, see docs/checks.md

    # Kind of stage → its content key; "defense_LABEL" is the part of a chain that has this label in the config.
    stages: dict[str, str] = Field(default_factory=dict)
    uses: list[str] = Field(default_factory=list)  # keys of all stages that the cell was made from
    config: dict[str, Any] = Field(default_factory=dict)  # the resolved config of the cell
    versions: dict[str, str] = Field(default_factory=dict)
    host: str = ""
    device: str = ""
    created: str = ""  # ISO 8601, UTC
    wall_seconds: float = 0.0  # without the making of stages

    @property
    def gap_key(self) -> tuple[object, ...]:
        """Everything but access: records that share it stand side by side in the table."""
        return (
            self.dataset, self.classifier, self.defense, self.attack, self.norm,
            self.eps, self.seed, self.targeted, self.variant,
        )  # fmt: skip

    @property
    def weights(self) -> tuple[str, ...]:
        """Content keys of the data and the models: cells of the same names may be of other ones."""
        return tuple(self.stages.get(kind, "") for kind in ("data", "classifier", "defense"))

    @property
    def made_of(self) -> tuple[str, ...]:
        """:attr:`weights` and, under transfer, the surrogate: the other accesses never meet it."""
        return *self.weights, *([self.stages.get("surrogate", "")] if self.access == "transfer" else [])

    def interval(self, name: str) -> tuple[float, float] | None:
        """95 % Wilson interval of the share that the field ``name`` is; None where it is not known."""
        share, n = getattr(self, name), self.detection_n if name == "detection_tpr" else self.n
        return wilson(round(share * n), n) if share is not None and n else None


@functools.cache  # scipy takes a millisecond; the same counts come again and again
def wilson(successes: int, n: int) -> tuple[float, float]:
    """95 % Wilson score interval of a proportion (Wilson 1927); ``(0, 1)`` when there is nothing to go by."""
    from scipy.stats import binomtest

    if n == 0:
        return 0.0, 1.0
    interval = binomtest(successes, n).proportion_ci(confidence_level=0.95, method="wilson")
    return float(interval.low), float(interval.high)


@contextmanager
def whole(path: Path) -> Iterator[IO[bytes]]:
    """A file to write, under a temporary name until it is: a reader sees all of it or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_whole(path: Path, data: bytes | memoryview) -> None:
    """A file with these bytes, whole or not at all."""
    with whole(path) as file:
        file.write(data)


def save(record: Record, folder: Path) -> Path:
    """Write ``folder/<key>.json``, with a digest by which a figure changed by hand is found out; return its path."""
    path = folder / f"{record.key}.json"
    data = json.loads(record.model_dump_json())
    write_whole(path, json.dumps({**data, "digest": _digest(data)}, indent=1).encode())
    return path


def _digest(data: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]


def save_tensors(value: Any, path: Path) -> None:
    """``torch.save``, whole or not at all; a full disk is an ``OSError``, where torch says ``unexpected pos``."""
    import io

    import torch

    buffer = io.BytesIO()
    torch.save(value, buffer)
    write_whole(path, buffer.getbuffer())


def copy(source: Path, folder: Path) -> None:
    """A file into a folder, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{source.name}.{os.getpid()}.part"
    try:
        shutil.copyfile(source, temporary)
        os.replace(temporary, folder / source.name)
    finally:
        temporary.unlink(missing_ok=True)


def save_sidecar(path: Path, arrays: dict[str, Any]) -> None:
    """Write the verdicts of each image and the example pictures that belong to a record."""
    import io

    import numpy as np

    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, **arrays)
    write_whole(path, buffer.getvalue())


def check_sidecar(path: Path) -> None:
    """Whether the verdicts of each image are all there.

    Raises:
        UserError: absent or damaged.
    """
    import zipfile

    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
    except (OSError, zipfile.BadZipFile) as error:
        broken = type(error).__name__
    if broken is not None:
        raise UserError(f"{path}: damaged ({broken})")


def load(path: Path) -> Record:
    """Read one record.

    Raises:
        UserError: not JSON, not a record, of a newer schema than this version knows, or changed since it was written.
    """
    try:
        data = json.loads(path.read_bytes())
        if data.get("schema_version", 0) > SCHEMA_VERSION:
            raise UserError(f"{path}: schema {data['schema_version']} is newer than {SCHEMA_VERSION}; update Parapet")
        if (digest := data.pop("digest", "")) and digest != _digest(data):
            raise UserError(f"{path}: changed since it was written. Delete it and run its command again")
        return Record.model_validate(data)
    except (OSError, ValueError, AttributeError, TypeError) as error:
        first = str(error).splitlines()[0]
        if isinstance(error, ValidationError):
            first = f"{error.errors()[0]['loc']}: {error.errors()[0]['msg']}"
        raise UserError(f"{path}: not a record of Parapet ({first})") from None


def find(paths: Iterable[Path]) -> list[Record]:
    """All records under files or folders, each key once (the newest wins), in the order of a table."""
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            files += sorted(path.glob("*.json") if path.name == "records" else path.rglob("records/*.json"))
        else:
            files.append(path)
    by_key: dict[str, Record] = {}
    for file in files:
        record = load(file)
        if record.key not in by_key or record.created >= by_key[record.key].created:
            by_key[record.key] = record
    return sorted(by_key.values(), key=order)


def order(record: Record) -> tuple[object, ...]:
    """Sort key of a table: what is attacked, how, how much, and with what access."""
    eps = math.inf if record.eps is None else record.eps
    return (
        record.dataset, record.classifier, record.defense, record.attack, record.norm,
        record.targeted, record.variant, record.seed, eps, record.access,
    )  # fmt: skip
