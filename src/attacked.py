"""Attacked images of one test split: made by what an access allows, or found where another cell has had them made."""

from __future__ import annotations

import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Callback
from torch import Tensor

from src import fit
from src.attacks.base import Attack
from src.build import build
from src.callbacks.attack_callback import AttackCallback, Replay
from src.config import Job
from src.data.base import ImageDataModule
from src.keys import content_key, source_digest
from src.outcome import Table
from src.stages import Stages
from src.subject import Names, Subject
from src.threat import Access, ThreatModel
from src.variant import beside

LOOKED_AT = {"cheap": 64, "full": 256}  # first images that the checks, and the examples, are taken from


class AttackedImages:
    """Attacks one defended classifier, or shows it images that were made elsewhere."""

    def __init__(self, job: Job, names: Names, data: ImageDataModule, stages: Stages, subject: Subject) -> None:
        self.job, self.names, self.data, self.stages, self.subject = job, names, data, stages, subject
        self.keys = {"data": data.fingerprint, **subject.keys}
        self.attack: Attack = build(job.attack, "attack")
        self.bare = subject.defended.defense is None  # nothing stands before the classifier
        trained = (job.classifier.get("fit") or {}).get("precision", "32-true")
        # A search for the nearest boundary ends where bfloat16 cannot tell the sides apart: only on demand.
        precision = job.search_precision or ("32-true" if self.attack.minimal else trained)
        self.search = torch.bfloat16 if str(precision).startswith("bf16") else torch.float32

    @property
    def draws(self) -> int:
        """Passes that a white_box attacker averages over."""
        return self.job.eot_draws if self.subject.defended.stochastic else 1

    def parts(self, threat: ThreatModel) -> dict[str, Any]:
        """What attacked images depend on beside the model they are made on."""
        return {
            "node": self.job.attack,
            "threat": asdict(threat),
            "seed": self.job.seed,
            "batch": self.job.eval_batch_size,
            "search": str(self.search),
            **beside(vars(self.job)),
            "source": source_digest(*self.attack.kinds(threat.norm), ThreatModel, AttackCallback, within="src.attacks"),
        }

    def made(self, threat: ThreatModel, access: Access) -> Table:
        """Attacked images of every test image with the attack's verdicts, made by what ``access`` allows."""
        table: Table
        if (stored := self.stage(threat, access)) is not None:
            table = torch.load(stored / "examples.pt", weights_only=True)
        else:
            again = self.job.checks == "full" and self.subject.defended.stochastic  # other draws are shown every image
            keep = self._few | ({"image": None} if again else {})
            table = self.test(self.subject.defended, self._callback(threat, self.target(access)), keep=keep)
        return _within(table, threat) if self.attack.minimal else table

    def stage(self, threat: ThreatModel, access: Access) -> Path | None:
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
            return self._stored(self.subject.defended, "defense", whole, self.target(access))
        return None

    def target(self, access: Access) -> torch.nn.Module:
        """The defended model as ``access`` lets an attacker see it."""
        defended = self.subject.defended
        return defended.adaptive(self.job.eot_draws) if access is Access.WHITE_BOX else defended.closed()

    def _callback(self, threat: ThreatModel, target: torch.nn.Module | None = None) -> AttackCallback:
        return AttackCallback(attack=self.attack, threat=threat, target=target, seed=self.job.seed, search=self.search)

    @property
    def _few(self) -> dict[str, int | None]:
        return dict.fromkeys(("image", "clean"), LOOKED_AT[self.job.checks])

    def _stored(self, model: Any, role: str, threat: ThreatModel, target: torch.nn.Module | None = None) -> Path:
        """Attacked images kept as a stage: those on a classifier serve every defense, minimal ones every eps."""
        parts = {"data": self.keys["data"], role: self.keys[role], **self.parts(threat)}
        if target is not None:
            parts |= {"classifier": self.keys["classifier"], "draws": self.draws, "target": type(target).__name__}
        about = dict(parts)
        if role == "defense":  # its key may name no stage
            about["made_from"] = {name: key for name, key in self.subject.made.items() if name != "surrogate"}
        what = f"examples {self.names.attack} {threat.norm} eps {threat.eps:.4g} on {role}"
        on = f"{role} {getattr(self.names, role, '')}"

        def make(folder: Path) -> None:
            keep = {"image": None, "clean": None if self.attack.minimal else LOOKED_AT["full"]}
            self.test(model, self._callback(threat, target), path=folder / "examples.pt", keep=keep)

        return self.stages.make(
            "examples",
            content_key(**parts),
            what=what,
            build=make,
            about=about,
            like=(on, f"examples {self.names.attack} on {self.data.spec.name}"),
            images=len(self.data.test),
        )

    def shown(self, images: Tensor, seed: int | None = None) -> Table:
        """What the defended model makes of attacked images; ``seed``: under another draw of its randomness."""
        return self.test(self.subject.defended, Replay(images), keep=self._few, seed=seed)

    def test(
        self,
        module: Any,
        *callbacks: Callback,
        path: Path | None = None,
        keep: dict[str, int | None] | None = None,
        seed: int | None = None,
    ) -> Table:
        """One pass of a model over the test images."""
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
