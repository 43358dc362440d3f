"""What a search for the smallest change leaves right before the boundary, the base pushes over it."""

from __future__ import annotations

import pytest
import torch

from src.attacks.base import Attack
from src.threat import Norm, ThreatModel
from tests.conftest import Linear


class Short(Attack):
    """Ends a share of the way before the boundary of a linear model, as a search does that was deceived."""

    norms = frozenset({Norm.L2})
    minimal = True

    def __init__(self, share: float) -> None:
        self.share = share

    def run(self, model, x, y, threat, *, generator):
        normal = (model.model.layer.weight[0] - model.model.layer.weight[1]).view(x.shape[1:])
        logits = model(x)
        gap = (logits[:, 0] - logits[:, 1]) / normal.square().sum()
        return x - (1 - self.share) * gap.view(-1, 1, 1, 1) * normal


@pytest.mark.parametrize(
    ("share", "push"),
    [(-0.01, None), (5e-5, 1e-4), (5e-4, 1e-3), (5e-3, 0.01), (0.015, 0.02), (0.03, 0.04), (0.05, 0.08), (0.13, 0.16)],
)
def test_a_point_before_the_boundary_is_pushed_on_by_as_little_as_turns_it(
    share: float, push: float | None, linear: Linear
) -> None:
    images = torch.full((3, 1, 4, 4), 0.5) + 0.01 * torch.arange(3).view(3, 1, 1, 1)
    normal = linear.layer.weight[0] - linear.layer.weight[1]
    logits = linear(images)
    away = ((logits[:, 0] - logits[:, 1]) / normal.norm()).abs()
    made = Short(share)(linear, images, logits.argmax(dim=1), ThreatModel(norm="l2", eps=torch.inf))
    assert made.success.all()
    torch.testing.assert_close(made.distance, (1 - share) * (1 + (push or 0)) * away, rtol=1e-5, atol=0)


def test_what_is_too_far_before_it_stays_as_it_was_found(linear: Linear) -> None:
    images = torch.full((1, 1, 4, 4), 0.5)
    labels = linear(images).argmax(dim=1)
    normal, logits = linear.layer.weight[0] - linear.layer.weight[1], linear(images)
    away = ((logits[:, 0] - logits[:, 1]) / normal.norm()).abs()
    far = Short(0.2)(linear, images, labels, ThreatModel(norm="l2", eps=torch.inf))
    assert not far.success.any()
    torch.testing.assert_close(far.distance, 0.8 * away, rtol=1e-5, atol=0)


def test_where_pixels_are_rounded_it_is_pushed_on_further(linear: Linear) -> None:
    images = torch.full((1, 1, 4, 4), 128 / 255)
    labels = linear(images).argmax(dim=1)
    made = Short(0.2)(linear, images, labels, ThreatModel(norm="l2", eps=torch.inf, quantize=True))
    assert made.success.all()
    assert torch.equal((made.images * 255).round() / 255, made.images)


@pytest.mark.parametrize(("beyond", "kept"), [(0.5, True), (1.5, False)])
def test_what_is_beyond_the_budget_by_more_than_float_rounding_is_undone(
    beyond: float, kept: bool, linear: Linear
) -> None:
    images = torch.full((1, 1, 4, 4), 0.5)
    labels = linear(images).argmax(dim=1)
    far = float(Short(-0.01)(linear, images, labels, ThreatModel(norm="l2", eps=torch.inf)).distance)
    threat = ThreatModel(norm="l2", eps=far - beyond * ThreatModel(norm="l2", eps=far).slack)
    made = Short(-0.01)(linear, images, labels, threat)
    assert bool(made.success) is kept
    assert float(made.distance) == (pytest.approx(far) if kept else 0)
