"""One defended classifier on one test split, measured cell by cell."""

from __future__ import annotations

import logging
import tempfile
import time
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Callback
from torch import Tensor

from src import fit, memory, records
from src.attacks.base import Attack
from src.callbacks.attack_callback import AttackCallback, Replay
from src.callbacks.collect import Collect
from src.certificate import certified
from src.checks import attack as attack_checks
from src.checks import data as data_checks
from src.checks import model as model_checks
from src.checks import probe
from src.checks.look import Look
from src.config import Job, build
from src.data.augment import to_float
from src.data.base import ImageDataModule
from src.errors import UserError
from src.keys import content_key, seed_of, source_digest
from src.outcome import Table, has_held, to_record, to_sidecar
from src.records import Record
from src.stages import Stages, alone
from src.subject import Names, Subject
from src.threat import Access, ThreatModel

log = logging.getLogger(__name__)

REDRAWS = 4  # of a stochastic defense, beside the one that is counted
CHECKS = (probe, model_checks, attack_checks, data_checks, Look)
LOOKED_AT = {"cheap": 64, "full": 256}  # first images that the checks, and the examples, are taken from


class Bench:
    """Measures cells; what several cells share is made once."""

    def __init__(self, job: Job, names: Names, data: ImageDataModule, stages: Stages, subject: Subject) -> None:
        self.job, self.names, self.data, self.stages, self.subject = job, names, data, stages, subject
        self.keys = {"data": data.fingerprint, **subject.keys}
        self.attack: Attack = build(job.attack, "attack")
        self.bare = subject.defended.defense is None  # nothing stands before the classifier
        trained = (job.classifier.get("fit") or {}).get("precision", "32-true")
        # A search for the nearest boundary ends where bfloat16 cannot tell the sides apart: only on demand.
        precision = job.search_precision or ("32-true" if self.attack.minimal else trained)
        self.search = torch.bfloat16 if str(precision).startswith("bf16") else torch.float32
        self._check_access()
        self._common = list(stages.used)  # what every cell was made from
        self._once: dict[Access, dict[str, float]] = {}  # checks of the model that each access attacks

    def cell(self, eps: float, access: Access, folder: Path) -> Record:
        """The record of a cell, found in the cache or measured; a copy with its pictures lands in ``folder``."""
        threat = self._threat(eps)
        key = self._key(threat, access)
        store = self.stages.root / "records"
        store.mkdir(parents=True, exist_ok=True)
        with alone(store / f".{key}.lock", f"record {self.names.attack} eps {eps:.4g} {access}"):
            record = self.recall(eps, access, folder)
            if record is None:
                record, arrays = self._measure(key, threat, access)
                records.save_sidecar(store / f"{key}.npz", arrays)
                records.copy(records.save(record, store), folder)
                records.copy(store / f"{key}.npz", folder)
        return record

    def recall(self, eps: float, access: Access, folder: Path) -> Record | None:
        """The record of a cell if the cache has it, with a copy in ``folder``; nothing trained is needed for it."""
        key = self._key(self._threat(eps), access)
        path = self.stages.root / "records" / f"{key}.json"
        record = self._found(path)
        if record is not None:
            records.copy(path, folder)
            records.copy(path.with_suffix(".npz"), folder)
        return record

    def planned(self, eps: float, access: Access) -> dict[str, Any]:
        """What is known of a cell before it is measured; the stage it would need is asked of the cache."""
        threat = self._threat(eps)
        key = self._key(threat, access)
        present = (self.stages.root / "records" / f"{key}.json").exists()
        if not present:
            self._examples(threat, access)
        return {"key": key, "present": present, "access": str(access), "eps": eps, **asdict(self.names)}

    def _threat(self, eps: float) -> ThreatModel:
        job = self.job.threat
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
            path.rename(path.with_name(f"{path.name}.damaged-{time.time_ns()}"))
            return None
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

    def _key(self, threat: ThreatModel, access: Access) -> str:
        return content_key(
            names=asdict(self.names),
            **self.keys,
            attack=self._attack_parts(threat),
            access=access,
            draws=self._draws,
            checks=self.job.checks,
            source=source_digest(type(self.subject.defended), Collect, Bench, to_record, *CHECKS),
        )

    @property
    def _draws(self) -> int:
        return self.job.eot_draws if self.subject.defended.stochastic else 1

    def _attack_parts(self, threat: ThreatModel) -> dict[str, Any]:
        return {
            "node": self.job.attack,
            "threat": asdict(threat),
            "seed": self.job.seed,
            "batch": self.job.eval_batch_size,
            "search": str(self.search),
            "source": source_digest(
                type(self.attack), *self._members, ThreatModel, AttackCallback, within="src.attacks"
            ),
        }

    @property
    def _members(self) -> list[type]:
        """Attacks that this one is made of: their source is part of its key."""
        members = getattr(self.attack, "members", None)
        return [type(member) for member in members.values()] if isinstance(members, dict) else []

    def _measure(self, key: str, threat: ThreatModel, access: Access) -> tuple[Record, dict[str, Any]]:
        started = time.perf_counter()
        self.stages.used.clear()
        clean = self._clean
        made = self._attacked(threat, access)
        # Images made on another model than the defended one are shown to it now; others have met it already.
        elsewhere = access in (Access.GRAY_BOX, Access.TRANSFER) and not (self.bare and access is Access.GRAY_BOX)
        seen = self._shown(made["image"]) if elsewhere else made
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
            stages=self.keys,
            uses=sorted({*self._common, *self.stages.used}),
            checks=self._checks(threat, access, made, seen),
            robust_accuracy_redraws=self._redrawn(made["image"]),
            wall_seconds=round(time.perf_counter() - started, 3),
        )
        log.info("%s %s eps %.4g %s: robust accuracy %.4f (n=%d)", self.names.defense, self.names.attack,
                 threat.eps, access, record.robust_accuracy, record.n)  # fmt: skip
        subject, classes = self.subject, self.data.spec.classes
        return record, to_sidecar(self.job, classes, subject.classifier, subject.defended, **outcome)

    @cached_property
    def _clean(self) -> Table:
        """Clean predictions of the bare classifier and of the defended model."""
        defended = self._test(self.subject.defended)
        bare = defended if self.bare else self._test(self.subject.classifier)
        return defended | {"bare": bare["prediction"], "defended": defended["prediction"]}

    def _checks(self, threat: ThreatModel, access: Access, made: Table, seen: Table) -> dict[str, float]:
        """Figures of the sanity checks of a cell."""
        device = fit.device(self.job.trainer)
        look = self._look(threat, access, made, seen, device)
        models = (look.target.to(device), look.model.to(device))
        try:
            if access not in self._once:
                self._once[access] = probe.take(look, probe.ONCE, full=self._full)
            own = self._once[access] | probe.take(look, probe.EACH, full=self._full)
        finally:
            for model in models:
                model.cpu()
        return self._of_data | own | self._left_out(access)

    def _look(self, threat: ThreatModel, access: Access, made: Table, seen: Table, device: torch.device) -> Look:
        defended = self.subject.defended
        white = access is Access.WHITE_BOX
        target = {Access.GRAY_BOX: self.subject.classifier, Access.TRANSFER: self.subject.surrogate}.get(access)
        first = self.data.test.batch(range(min(len(self.data.test), LOOKED_AT[self.job.checks])))
        return Look(
            target=target or self._target(access),
            model=defended,
            images=to_float(first["image"]).to(device),
            labels=first["label"].to(device),
            attacked=seen["image"][: len(first["label"])].to(device),
            turned=made["success"][: len(first["label"])],
            attack=self.attack,
            threat=threat,
            search=self.search,
            exact=not white or defended.gradient == "exact",
            stochastic=defended.stochastic,
            draws=self._draws if white else 1,
            seed=self.job.seed,
        )

    @property
    def _full(self) -> bool:
        return self.job.checks == "full"

    @cached_property
    def _of_data(self) -> dict[str, float]:
        """Figures that are the same for every cell."""
        found = {
            "test_in_training": data_checks.test_in_training(self.data, full=self._full),
            "threshold_not_clean": data_checks.threshold_not_clean(self.subject.defended, self.data),
        }
        return {name: round(figure, 6) for name, figure in found.items() if figure is not None}

    def _left_out(self, access: Access) -> dict[str, float]:
        closed = self.subject.defended.gradient == "none" if access is Access.WHITE_BOX else access is Access.BLACK_BOX
        left = attack_checks.members_left_out(self.attack) if closed else None
        return {} if left is None else {"members_left_out": left}

    @cached_property
    def _certified(self) -> dict[str, Any]:
        if self.subject.defended.certify is None:
            return {}
        key, found = certified(self.subject.defended, self.keys, self.data, self.stages, self.job)
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

    def _attacked(self, threat: ThreatModel, access: Access) -> Table:
        """Attacked images of every test image with the attack's verdicts, made by what ``access`` allows."""
        table: Table
        if (stored := self._examples(threat, access)) is not None:
            table = torch.load(stored / "examples.pt", weights_only=True)
        else:
            again = self._full and self.subject.defended.stochastic  # other draws are shown every image
            keep = self._few | ({"image": None} if again else {})
            table = self._test(self.subject.defended, self._callback(threat, self._target(access)), keep=keep)
        return _within(table, threat) if self.attack.minimal else table

    def _examples(self, threat: ThreatModel, access: Access) -> Path | None:
        """The stage of attacked images that serves a cell and others; None where they serve this cell alone."""
        whole = threat
        if self.attack.minimal:  # one search answers every eps
            whole = replace(threat, eps=float("inf"))
        if access is Access.GRAY_BOX or (self.bare and access is Access.WHITE_BOX):
            return self._stored(self.subject.classifier, "classifier", replace(whole, exhaust=True))
        if access is Access.TRANSFER:
            assert self.subject.surrogate is not None
            return self._stored(self.subject.surrogate, "surrogate", replace(whole, exhaust=True))
        if self.attack.minimal:
            return self._stored(self.subject.defended, "defense", whole, self._target(access))
        return None

    def _target(self, access: Access) -> torch.nn.Module:
        defended = self.subject.defended
        return defended.adaptive(self.job.eot_draws) if access is Access.WHITE_BOX else defended.closed()

    def _callback(self, threat: ThreatModel, target: torch.nn.Module | None = None) -> AttackCallback:
        return AttackCallback(attack=self.attack, threat=threat, target=target, seed=self.job.seed, search=self.search)

    @property
    def _few(self) -> dict[str, int | None]:
        return dict.fromkeys(("image", "clean"), LOOKED_AT[self.job.checks])

    def _redrawn(self, images: Tensor) -> list[float]:
        """Accuracies on the same attacked images under other draws of a stochastic defense."""
        if not (self._full and self.subject.defended.stochastic):
            return []
        draws = (seed_of(self.job.seed, 3, draw) for draw in range(REDRAWS))
        return [float(has_held(self._clean, self._shown(images, seed)).double().mean()) for seed in draws]

    def _stored(self, model: Any, role: str, threat: ThreatModel, target: torch.nn.Module | None = None) -> Path:
        """Attacked images kept as a stage: those on a classifier serve every defense, minimal ones every eps."""
        parts = {"data": self.keys["data"], role: self.keys[role], **self._attack_parts(threat)}
        if target is not None:
            parts |= {"classifier": self.keys["classifier"], "draws": self._draws, "target": type(target).__name__}
        what = f"examples {self.names.attack} {threat.norm} eps {threat.eps:.4g} on {role}"

        def make(folder: Path) -> None:
            keep = {"image": None, "clean": None if self.attack.minimal else LOOKED_AT["full"]}
            self._test(model, self._callback(threat, target), path=folder / "examples.pt", keep=keep)

        return self.stages.make("examples", content_key(**parts), what=what, build=make, about=parts)

    def _shown(self, images: Tensor, seed: int | None = None) -> Table:
        return self._test(self.subject.defended, Replay(images), keep=self._few, seed=seed)

    def _test(
        self,
        module: Any,
        *callbacks: Callback,
        path: Path | None = None,
        keep: dict[str, int | None] | None = None,
        seed: int | None = None,
    ) -> Table:
        watchers = [build(node, f"callbacks.{name}") for name, node in self.job.callbacks.items()]
        with tempfile.TemporaryDirectory() as scratch:
            return fit.evaluate(
                module,
                self.data,
                config=self.job.trainer,
                path=path or Path(scratch) / "collected.pt",
                seed=self.job.seed if seed is None else seed,
                callbacks=[*callbacks, *watchers],
                keep=keep,
            )


def _within(table: Table, threat: ThreatModel) -> Table:
    """Of a minimal-norm attack's images those within eps; the others count as unchanged, so their label stands.

    ``distance`` stays what the search found, whatever eps, for the images in ``found``.
    """
    beyond = table["distance"] > threat.eps + threat.slack
    return table | {
        "image": torch.where(beyond.view(-1, 1, 1, 1), table["clean"], table["image"]),
        "prediction": torch.where(beyond, table["label"], table["prediction"]),
        # Beyond eps nothing is shown, so nothing is rejected.
        **({"behind": torch.where(beyond, table["label"], table["behind"])} if "behind" in table else {}),
        **({"rejected": table["rejected"] & ~beyond} if "rejected" in table else {}),
        "success": table["success"] & ~beyond,
        "found": table["success"],
    }
