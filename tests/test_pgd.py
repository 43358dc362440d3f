"""PGD step by step, on models of one value or one plane, where every step is known."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from src.attacks.pgd import PGD
from src.threat import Norm, ThreatModel
from tests.conftest import Linear


class Along(nn.Module):
    """Two classes; the second leads by a function of the only value."""

    def __init__(self, lead: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.lead = lead

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        value = x.flatten(1)[:, 0]
        return torch.stack([torch.zeros_like(value), self.lead(value)], dim=1)


def walked(attack: PGD, lead: Callable[[torch.Tensor], torch.Tensor]) -> float:
    """Where one value, 0.5 at first, ends in linf."""
    half, label = torch.full((1, 1, 1, 1), 0.5), torch.zeros(1, dtype=torch.int64)
    return float(attack(Along(lead), half, label, ThreatModel(norm="linf", eps=0.5, exhaust=True)).images)


@pytest.mark.parametrize(("momentum", "end"), [(0.0, 0.5), (0.5, 0.5), (2.0, 0.7)])
def test_momentum_adds_directions_of_length_one(momentum: float, end: float) -> None:
    """A slope of 10, and behind 0.55 one of -1: the steeper does not outweigh the later."""
    attack = PGD(steps=2, step=0.1, random_start=False, loss="margin", momentum=momentum)
    assert walked(attack, lambda x: torch.minimum(10 * (x - 0.55), 0.55 - x) - 1) == pytest.approx(end)


def test_an_image_that_was_turned_and_came_back_keeps_the_turned_version() -> None:
    """Only around 0.6 is it turned; momentum carries it past, to 0.7 and 0.8."""
    attack = PGD(steps=3, step=0.1, random_start=False, loss="margin", momentum=1.0)
    assert walked(attack, lambda x: 0.02 - (x - 0.61).abs()) == pytest.approx(0.6)


@pytest.mark.parametrize("norm", [Norm.LINF, Norm.L2, Norm.L1])
def test_starts_lie_all_over_the_ball(norm: Norm) -> None:
    """linf: uniform in each value, of both signs; l2 and l1: uniform in length, not all on the surface."""
    x, eps = torch.full((400, 1, 4, 4), 0.5), 0.3
    start = PGD._start(x, ThreatModel(norm=norm, eps=eps), torch.Generator().manual_seed(0))
    drawn = start.flatten() if norm is Norm.LINF else ThreatModel(norm=norm, eps=eps).distance(x, x + start)
    low = -eps if norm is Norm.LINF else 0.0
    expected = torch.linspace(low, eps, 5)
    torch.testing.assert_close(drawn.quantile(torch.linspace(0, 1, 5)), expected, rtol=0, atol=0.03)


def test_a_step_in_l1_is_shared_by_the_largest_slopes_that_can_move() -> None:
    model = Linear(side=4)
    slope = (model.layer.weight[1] - model.layer.weight[0]).detach()
    order = slope.abs().argsort(descending=True)
    images = torch.full((1, 16), 0.5)
    images[0, order[0]] = float(slope[order[0]] > 0)  # stands at the end of the box already
    attack = PGD(steps=1, step=0.4, random_start=False, loss="margin", sparsity=0.25)
    label = torch.zeros(1, dtype=torch.int64)
    with torch.no_grad():
        model.layer.bias[0] += 100  # so that the label holds
    threat = ThreatModel(norm="l1", eps=1.0)
    change = attack(model, images.view(1, 1, 4, 4), label, threat).images.flatten() - images[0]
    expected = torch.zeros(16)
    expected[order[1:5]] = 0.1 * slope[order[1:5]].sign()
    torch.testing.assert_close(change, expected)
