"""Orthogonal PGD on a linear classifier beside a linear detector that is at odds with it, where the best is known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from src.attacks.orthogonal_pgd import OrthogonalPGD
from src.attacks.pgd import PGD
from src.attacks.worst_case import WorstCase
from src.threat import ThreatModel

CLEAN = torch.full((3, 1, 2, 2), 0.5)
LABELS = torch.zeros(3, dtype=torch.int64)
NEEDED, ALLOWED = 0.2, 0.05  # the first two pixels have to gain this together, the first of them only this


class Guarded:
    """Class 1 from a gain of the first two pixels on; the first alone gives the attack away, ten times as steeply."""

    def __init__(self, *, rejects: bool = True) -> None:
        self.rejects = rejects

    def __call__(self, x: Tensor) -> Tensor:
        gain = x.flatten(1) - 0.5
        classes = torch.stack([torch.zeros(len(x)), gain[:, 0] + gain[:, 1] - NEEDED], dim=1)
        if not self.rejects:
            return classes
        return torch.cat([classes, classes.amax(dim=1, keepdim=True) + 10 * (gain[:, :1] - ALLOWED)], dim=1)


@pytest.mark.parametrize(("norm", "nearest"), [("linf", NEEDED - ALLOWED), ("l2", (0.15**2 + 0.05**2) ** 0.5)])
def test_it_gets_past_both_as_soon_as_that_is_possible(norm: str, nearest: float) -> None:
    for eps, possible in ((0.97 * nearest, False), (1.1 * nearest, True)):
        attacked = OrthogonalPGD()(Guarded(), CLEAN, LABELS, ThreatModel(norm=norm, eps=eps))
        assert attacked.success.tolist() == [possible] * 3
        assert attacked.prediction.tolist() == [1 if possible else 0] * 3  # never the column of rejection


@pytest.mark.parametrize("at_odds", [True, False])
def test_a_step_gives_up_what_is_at_odds_and_nothing_else(at_odds: bool) -> None:
    """One step of three images: right and accepted, right and rejected, turned and rejected."""

    def model(x: Tensor) -> Tensor:
        gain = x.flatten(1) - 0.5
        classes = torch.stack([torch.zeros(len(x)), gain[:, 0] + gain[:, 1] - NEEDED], dim=1)
        seen = gain[:, 0] - ALLOWED if at_odds else 0.3 - gain[:, 0]
        return torch.cat([classes, classes.amax(dim=1, keepdim=True) + 10 * seen[:, None]], dim=1)

    model.rejects = True  # type: ignore[attr-defined]
    images = CLEAN.clone()
    images[:, 0, 0] += torch.tensor([[0.0, 0.0], [0.1, 0.0], [0.2, 0.1]])
    attack = OrthogonalPGD(steps=1, longest=0.5)
    step = attack(model, images, LABELS, ThreatModel(norm="l2", eps=0.1)).images - images
    half = 0.5**0.5
    wanted = [[half, half], [0, 1], [-half, half]] if at_odds else [[half, half], [half, half], [1, 0]]
    torch.testing.assert_close(step[:, 0, 0], 0.05 * torch.tensor(wanted), rtol=0, atol=1e-6)
    assert float(step[:, 0, 1].abs().max()) == 0


def test_an_image_that_was_turned_and_came_back_keeps_the_turned_version() -> None:
    """Only around 0.6 is it turned; with images meant for another model the last step goes past, to 0.7."""

    def model(x: Tensor) -> Tensor:
        return torch.stack([torch.zeros(len(x)), 0.02 - (x.flatten(1)[:, 0] - 0.61).abs()], dim=1)

    attack, threat = OrthogonalPGD(steps=2, longest=0.25, shortest=0.25), ThreatModel(norm="l2", eps=0.4, exhaust=True)
    assert float(attack(model, CLEAN[:1, :, :1, :1], LABELS[:1], threat).images) == pytest.approx(0.6)


@pytest.mark.parametrize(("norm", "nearest"), [("linf", NEEDED / 2), ("l2", NEEDED / 2**0.5)])
def test_where_nothing_is_rejected_it_crosses_the_nearest_boundary(norm: str, nearest: float) -> None:
    for eps, possible in ((0.97 * nearest, False), (1.03 * nearest, True)):
        attacked = OrthogonalPGD()(Guarded(rejects=False), CLEAN, LABELS, ThreatModel(norm=norm, eps=eps))
        assert attacked.success.tolist() == [possible] * 3


def test_targeted_it_ends_in_the_wanted_class_and_accepted() -> None:
    threat = ThreatModel(norm="linf", eps=0.2, targeted=True)
    attacked = OrthogonalPGD()(Guarded(), CLEAN, LABELS, threat, target=torch.ones(3, dtype=torch.int64))
    assert attacked.success.all()
    assert (attacked.images.flatten(1)[:, 0] <= 0.5 + ALLOWED + 1e-6).all()


def test_an_ensemble_spares_a_model_that_rejects_nothing() -> None:
    threat, short = ThreatModel(norm="linf", eps=0.05), PGD(steps=5)
    passes = {}
    for rejects in (False, True):
        both = WorstCase(members={"pgd": short, "orthogonal": OrthogonalPGD(steps=7)})
        alone = short(Guarded(rejects=rejects), CLEAN, LABELS, threat)
        passes[rejects] = both(Guarded(rejects=rejects), CLEAN, LABELS, threat).backward_passes - alone.backward_passes
    assert passes[False].tolist() == [0, 0, 0]
    assert passes[True].tolist() == [16, 16, 16]  # eight looks, two gradients each
