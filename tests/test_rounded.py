"""Verdicts after rounding to 8-bit pixels: a search that knows of it gives nothing away."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from src.attacks.apgd import APGD
from src.attacks.base import Attack
from src.attacks.pgd import PGD
from src.attacks.query import Query
from src.attacks.square import Square
from src.attacks.worst_case import WorstCase
from src.threat import Norm, ThreatModel
from tests.conftest import Linear


def levels(count: int, side: int = 8) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (count, 1, side, side), generator=generator) / 255


@pytest.mark.parametrize("eps", [0.03, 0.05, 12 / 255])
@pytest.mark.parametrize(
    "attack", [PGD(steps=40), APGD(steps=40), WorstCase(members={"pgd": PGD(steps=40)})], ids=lambda a: type(a).__name__
)
def test_a_linear_model_is_turned_wherever_whole_levels_can(attack: Attack, eps: float) -> None:
    model, images = Linear(side=8), levels(400)
    with torch.no_grad():
        model.layer.weight /= 8
        labels = model(images).argmax(dim=1)
        away = (model.layer.weight[1] - model.layer.weight[0]).sign().view(1, 1, 8, 8) * (1 - 2 * labels).view(
            -1, 1, 1, 1
        )
        worst = (images + math.floor(eps * 255 + 1e-4) / 255 * away).clamp(0, 1)
        turned = model(worst).argmax(dim=1) != labels
    attacked = attack(model, images, labels, ThreatModel(norm="linf", eps=eps, quantize=True))
    assert 20 < int(turned.sum()) < 380
    assert int((attacked.success != turned).sum()) <= 4  # of those on the boundary itself
    torch.testing.assert_close(attacked.images, (attacked.images * 255).round() / 255)


def test_a_radius_under_one_level_changes_nothing() -> None:
    model, images = Linear(side=8), levels(20)
    labels = model(images).argmax(dim=1)
    for attack in (PGD(steps=3), Square(queries=5)):
        attacked = attack(model, images, labels, ThreatModel(norm="linf", eps=0.9 / 255, quantize=True))
        assert torch.equal(attacked.images, images)


@pytest.mark.parametrize(
    ("norm", "eps", "quantize", "off", "searched"),
    [
        ("linf", 0.1, True, 0.0, 25 / 255), ("linf", 8 / 255, True, 0.0, 8 / 255), ("linf", 0.1, True, 1e-3, 0.1),
        ("linf", 0.1, False, 0.0, 0.1), ("l2", 0.1, True, 0.0, 0.1), ("linf", math.inf, True, 0.0, math.inf),
    ],
)  # fmt: skip
def test_the_radius_that_is_searched(norm: str, eps: float, quantize: bool, off: float, searched: float) -> None:
    threat = ThreatModel(norm=norm, eps=eps, quantize=quantize)
    assert threat.before_rounding((levels(2) * (1 - off)).clamp(0, 1)).eps == pytest.approx(searched, abs=1e-9)


class Barely(Attack):
    """Stops as soon as the float image is turned, which rounding undoes; to the end where it is told to go on."""

    norms = frozenset(Norm)

    def __init__(self) -> None:
        self.asked: list[int] = []

    def run(self, model: Query, x: Tensor, y: Tensor, threat: ThreatModel, *, generator: torch.Generator) -> Tensor:
        self.asked.append(len(x))
        far = 2.0 if threat.exhaust else torch.where(x > 0.7, 1.2, 0.2)  # of a level: images in the light stay turned
        return (x + far / 255).clamp(0, 1)


def test_what_rounding_turns_back_is_searched_to_the_end() -> None:
    class Brighter(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            over = x.mean(dim=(1, 2, 3)) * 255 % 100 - 50.1  # turned a tenth of a level up
            return torch.stack([-over, over], dim=1)

    images = torch.tensor([50, 150, 250, 40]).view(4, 1, 1, 1).expand(4, 1, 2, 2) / 255
    attack = Barely()
    labels = torch.zeros(4, dtype=torch.int64)
    attacked = attack(Brighter(), images, labels, ThreatModel(norm="linf", eps=3 / 255, quantize=True))
    assert attacked.success.tolist() == [True, True, True, False]
    assert attack.asked == [4, 2]  # the third stayed turned, and the fourth never was
    assert (attacked.distance * 255).round().tolist() == [2, 2, 1, 0]
