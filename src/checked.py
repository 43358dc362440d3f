"""The sanity checks of a cell: what ``src/checks/`` needs to look at, and the figures it finds."""

from __future__ import annotations

from functools import cached_property

import torch

from src import fit, uncertainty
from src.attacked import LOOKED_AT, AttackedImages
from src.checks import attack as attack_checks
from src.checks import data as data_checks
from src.checks import model as model_checks
from src.checks import probe
from src.checks.look import Look
from src.data.augment import to_float
from src.outcome import Table
from src.threat import Access, ThreatModel

SOURCES = (probe, model_checks, attack_checks, data_checks, Look, uncertainty)


class Checked:
    """Takes the figures; what several cells share is taken once."""

    def __init__(self, images: AttackedImages) -> None:
        self.images, self.job, self.data, self.subject = images, images.job, images.data, images.subject
        self._once: dict[Access, dict[str, float]] = {}  # of the model that each access attacks

    def of_cell(self, threat: ThreatModel, access: Access, made: Table, seen: Table) -> dict[str, float]:
        """Figures of a cell: ``made`` by the attack, ``seen`` by the defended model."""
        device = fit.device(self.job.trainer)
        look = self._look(threat, access, made, seen, device)
        models = (look.target.to(device), look.model.to(device))
        try:
            if access not in self._once:
                self._once[access] = probe.take(look, probe.ONCE, full=self._full)
            own = self._once[access] | probe.take(look, probe.EACH, full=self._full)
            of_data = self._of_data
        finally:
            for model in models:
                model.cpu()
        return of_data | own | self._left_out(access)

    @property
    def _full(self) -> bool:
        return self.job.checks == "full"

    def _look(self, threat: ThreatModel, access: Access, made: Table, seen: Table, device: torch.device) -> Look:
        defended = self.subject.defended
        white = access is Access.WHITE_BOX
        target = {Access.GRAY_BOX: self.subject.classifier, Access.TRANSFER: self.subject.surrogate}.get(access)
        first = self.data.test.batch(range(min(len(self.data.test), LOOKED_AT[self.job.checks])))
        return Look(
            target=target or self.images.target(access),
            model=defended,
            images=to_float(first["image"]).to(device),
            labels=first["label"].to(device),
            attacked=seen["image"][: len(first["label"])].to(device),
            turned=made["success"][: len(first["label"])],
            attack=self.images.attack,
            threat=threat,
            search=self.images.search,
            exact=not white or defended.gradient == "exact",
            stochastic=defended.stochastic,
            draws=self.images.draws if white else 1,
            seed=self.job.seed,
        )

    @cached_property
    def _of_data(self) -> dict[str, float]:
        """Figures that are the same for every cell; taken where the defended model is."""
        found = {
            "test_in_training": data_checks.test_in_training(self.data, full=self._full),
            **data_checks.thresholds(self.subject.defended, self.data, self.job.seed),
        }
        return {name: round(figure, 6) for name, figure in found.items() if figure is not None}

    def _left_out(self, access: Access) -> dict[str, float]:
        closed = self.subject.defended.gradient == "none" if access is Access.WHITE_BOX else access is Access.BLACK_BOX
        if not closed:
            return {}
        left = attack_checks.members_left_out(self.images.attack, rejects=self.subject.defended.rejects)
        return {} if left is None else {"members_left_out": left}
