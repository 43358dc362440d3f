"""One defended classifier on one test split, measured cell by cell."""

from __future__ import annotations

import logging
import math
import time
import zipfile
from contextlib import suppress
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from src import fit, memory, records
from src.attacked import AttackedImages
from src.callbacks.collect import Collect
from src.certificate import certified
from src.checked import SOURCES, Checked
from src.checks.flags import raised
from src.config import Job
from src.data.augment import to_float
from src.data.base import ImageDataModule
from src.errors import UserError
from src.keys import content_key, seed_of, source_digest
from src.outcome import Table, has_held, to_record, to_sidecar
from src.records import Record
from src.sidecars import withstood
from src.stages import Stages, alone
from src.subject import Names, Subject
from src.threat import Access, ThreatModel

log = logging.getLogger(__name__)

REDRAWS = 4  # of a stochastic defense, beside the one that is counted


class Bench:
    """Measures cells; what several cells share is made once."""

    def __init__(self, job: Job, names: Names, data: ImageDataModule, stages: Stages, subject: Subject) -> None:
        self.job, self.names, self.data, self.stages, self.subject = job, names, data, stages, subject
        self.images = AttackedImages(job, names, data, stages, subject)
        self.attack, self.keys = self.images.attack, self.images.keys
        self.checked = Checked(self.images)
        self._check_access()
        self._common = list(stages.used)  # what every cell was made from

    def cell(self, eps: float, access: Access, folder: Path) -> Record:
        """The record of a cell, found in the cache or measured; a copy with its pictures lands in ``folder``."""
        threat = self._threat(eps)
        same, key = self._keys(threat, access)
        self._store.mkdir(parents=True, exist_ok=True)
        with alone(self._store / f".{same}.lock", f"record {self.names.attack} eps {eps:.4g} {access}"):
            record = self.recall(eps, access, folder)
            if record is None:
                record = self._namesake(same, key) or self._measured(threat, access, key)
                records.copy(records.save(record, self._store), folder)
                records.copy(self._store / f"{key}.npz", folder)
                records.write_whole(self._store / f".{same}.key", key.encode())
        return record

    def recall(self, eps: float, access: Access, folder: Path) -> Record | None:
        """The record of a cell if the cache has it, with a copy in ``folder``; nothing trained is needed for it."""
        _, key = self._keys(self._threat(eps), access)
        path = self._store / f"{key}.json"
        record = self._found(path)
        if record is not None:
            records.copy(path, folder)
            records.copy(path.with_suffix(".npz"), folder)
        return record

    def planned(self, eps: float, access: Access) -> dict[str, Any]:
        """What is known of a cell before it is measured; the stages it would need are asked of the cache."""
        threat = self._threat(eps)
        same, key = self._keys(threat, access)
        paths = [self._store / f"{each}.json" for each in (key, self._other(same)) if each]
        # Of the verdicts the end of the file alone: to read them all takes milliseconds, of thousands of cells.
        present = any(path.exists() and zipfile.is_zipfile(path.with_suffix(".npz")) for path in paths)
        if not present:
            self.images.stage(threat, access)
            _ = self._certified
        of = {"access": str(access), "eps": eps, "n": len(self.data.test), **asdict(self.names)}
        return {"key": key, "same": same, "present": present, **of}

    def _threat(self, eps: float) -> ThreatModel:
        job, reach = self.job.threat, self.attack.reach(*self.data.spec.size)
        if self.attack.minimal and math.isfinite(eps) and eps > reach:
            raise UserError(
                f"threat.eps={eps:g}: attack={self.names.attack} looks no farther than {reach:g} and would count what "
                "lies beyond as holding. Allowed: at most that, or a larger attack.max_pixels"
            )
        # What one draw of a random defense gets wrong the next may get right: no image is done when it is turned once.
        on = self.subject.defended.stochastic and not self.attack.minimal
        return ThreatModel(norm=self.job.norm, eps=eps, targeted=job.targeted, quantize=job.quantize, exhaust=on)

    def _found(self, path: Path) -> Record | None:
        if not path.exists():
            return None
        try:
            record = records.load(path)
            records.check_sidecar(path.with_suffix(".npz"))
        except UserError as error:
            log.warning("%s; set aside and measured again", error)
            with suppress(FileNotFoundError):  # another job met it first
                path.rename(path.with_name(f"{path.name}.damaged-{time.time_ns()}"))
            return None
        if record.flags != (flags := raised(record.checks)):  # a limit is another than when it was measured
            record = record.model_copy(update={"flags": flags})
            records.save(record, path.parent)
        log.info("record %s eps %.4g %s: found (%s)", record.attack, record.eps, record.access, record.key)
        return record

    def _check_access(self) -> None:
        gradients = self.attack.needs == "gradient"
        for access in self.job.access:
            if access is Access.BLACK_BOX and gradients:
                raise UserError(
                    f"threat.access=black_box: attack={self.names.attack} needs gradients, and black_box gives scores "
                    "only. Use an attack on scores or labels, or another access"
                )
            if access is Access.WHITE_BOX and gradients and self.subject.defended.gradient == "none":
                raise UserError(
                    f"threat.access=white_box: defense={self.names.defense} lets no gradient through, and "
                    f"attack={self.names.attack} needs one. Use an attack on scores, or threat.access=transfer"
                )

    @staticmethod
    def _of(access: Access, keys: dict[str, str]) -> dict[str, str]:
        """Of these stages those that a cell of that access depends on: a surrogate serves transfer alone."""
        return {kind: key for kind, key in keys.items() if kind != "surrogate" or access is Access.TRANSFER}

    @property
    def _store(self) -> Path:
        return self.stages.root / "records"

    def _other(self, same: str) -> str:
        """Key of a record of the same cell, whatever it was called when it was measured; empty where there is none."""
        try:
            return (self._store / f".{same}.key").read_text(errors="replace")
        except FileNotFoundError:
            return ""

    def _namesake(self, same: str, key: str) -> Record | None:
        """The record of the same cell that was called otherwise, under these names: an override may say what holds."""
        if not (other := self._other(same)):
            return None
        record = self._found(path := self._store / f"{other}.json")
        if record is None:
            return None
        records.write_whole(self._store / f"{key}.npz", path.with_suffix(".npz").read_bytes())
        config = self.job.model_dump(mode="json")
        stages = self._of(Access(record.access), self.subject.made | self.keys)  # parts have their labels in its config
        return record.model_copy(update={"key": key, "config": config, "stages": stages, **asdict(self.names)})

    def _keys(self, threat: ThreatModel, access: Access) -> tuple[str, str]:
        """Of what is measured, and of the record, whose names say what the user called it."""
        same = content_key(
            **self._of(access, self.keys),
            attack=self.images.parts(threat),
            access=access,
            draws=self.images.draws,
            checks=self.job.checks,
            source=source_digest(
                type(self.subject.defended),
                Collect,
                Bench,
                AttackedImages,
                Checked,
                to_record,
                withstood,
                certified,
                *SOURCES,
            ),
        )
        return same, content_key(same=same, names=asdict(self.names))

    def _measured(self, threat: ThreatModel, access: Access, key: str) -> Record:
        started, before = time.perf_counter(), self.stages.seconds
        self.stages.used.clear()
        clean = self._clean
        made = self.images.made(threat, access)
        # Images made on another model than the defended one are shown to it now; others have met it already. But of a
        # search for the smallest change those beyond eps stay clean, and a random defense may get them wrong as well.
        elsewhere = access in (Access.GRAY_BOX, Access.TRANSFER) and not (
            self.images.bare and access is Access.GRAY_BOX
        )
        elsewhere |= self.attack.minimal and self.subject.defended.stochastic
        seen = self.images.shown(made["image"]) if elsewhere else made
        outcome = {"clean": clean, "made": made, "seen": seen}
        record = to_record(
            self.job,
            **outcome,
            threat=threat,
            access=access,
            key=key,
            **asdict(self.names),
            **self._certified,
            defense_memory_mib=self._memory,
            stages=self._of(access, self.subject.made | self.keys),
            uses=sorted({*self._common, *self.stages.used}),
            checks=self.checked.of_cell(threat, access, made, seen),
            robust_accuracy_redraws=self._redrawn(made["image"]),
            # What stages took stands in their own meta.json, and other cells use them too.
            wall_seconds=round(time.perf_counter() - started - (self.stages.seconds - before), 3),
        )
        log.info("%s %s eps %.4g %s: robust accuracy %.4f (n=%d)", self.names.defense, self.names.attack,
                 threat.eps, access, record.robust_accuracy, record.n)  # fmt: skip
        subject, classes = self.subject, self.data.spec.classes
        arrays = to_sidecar(self.job, classes, subject.classifier, subject.defended, **outcome)
        records.save_sidecar(self._store / f"{key}.npz", arrays)
        return record

    @cached_property
    def _clean(self) -> Table:
        """Clean predictions of the bare classifier and of the defended model."""
        defended = self.images.test(self.subject.defended)
        bare = defended if self.images.bare else self.images.test(self.subject.classifier)
        return defended | {"bare": bare["prediction"], "defended": defended["prediction"]}

    @cached_property
    def _certified(self) -> dict[str, Any]:
        if self.subject.defended.certify is None:
            return {}
        key, found = certified(self.subject, self._of(Access.WHITE_BOX, self.keys), self.data, self.stages, self.job)
        self._common.append(key)
        return found

    @cached_property
    def _memory(self) -> float:
        """MiB that the defended model takes to answer."""
        device, defended = fit.device(self.job.trainer), self.subject.defended
        first = self.data.test.batch(range(min(len(self.data.test), memory.BATCH)))
        try:
            return round(memory.peak_mib(defended.to(device), to_float(first["image"]).to(device)), 3)
        finally:
            defended.cpu()

    def _redrawn(self, images: Tensor) -> list[float]:
        """Accuracies on the same attacked images under other draws of a stochastic defense."""
        if not (self.job.checks == "full" and self.subject.defended.stochastic):
            return []
        draws = (seed_of(self.job.seed, 3, draw) for draw in range(REDRAWS))
        return [float(has_held(self._clean, self.images.shown(images, seed)).double().mean()) for seed in draws]
