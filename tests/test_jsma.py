"""Saliency map attack: the best pixels by hand, and what it counts."""

from __future__ import annotations

import math

import pytest
import torch

from src.attacks.jsma import JSMA, best_pair
from src.errors import UserError
from src.threat import ThreatModel
from tests.conftest import Linear
from tests.test_apgd import batch, curved


def test_saliency_picks_the_known_best() -> None:
    generator = torch.Generator().manual_seed(3)
    gain, fall = torch.randn(2, 64, 40, generator=generator)
    gain[:, 7], fall[:, 9] = -math.inf, -math.inf
    pair, found = best_pair(gain, fall)
    sums = [(values[:, :, None] + values[:, None]) for values in (gain, fall)]
    score = torch.where((sums[0] > 0) & (sums[1] > 0), sums[0] * sums[1], 0.0)
    score.diagonal(dim1=1, dim2=2).zero_()
    assert found.all()
    rows = torch.arange(64)
    assert torch.equal(score[rows, pair[:, 0], pair[:, 1]], score.flatten(1).amax(dim=1))
    assert not best_pair(-gain.abs(), fall)[1].any()


@pytest.mark.parametrize(("saliency", "pixels"), [("single", 1), ("pair", 2)])
def test_jsma_changes_the_best_pixels_of_a_linear_model(saliency: str, pixels: int) -> None:
    model = Linear(side=4)
    with torch.no_grad():
        model.layer.weight.mul_(0.1)
        model.layer.weight[:, [5, 11]] = torch.tensor([[-5.0, -4.0], [5.0, 4.0]])
        model.layer.bias.copy_(torch.tensor([1.0, 0.0]))
    images = torch.zeros(3, 1, 4, 4)
    attack = JSMA(saliency=saliency)  # type: ignore[arg-type]
    attacked = attack(model, images, torch.zeros(3, dtype=torch.long), ThreatModel(norm="l0", eps=4))
    assert attacked.success.all()
    assert attacked.distance.tolist() == [pixels] * 3
    expected = {5} if pixels == 1 else {5, 11}
    assert set(attacked.images[0].flatten().nonzero().flatten().tolist()) == expected


def test_jsma_counts_a_pixel_once_and_can_darken() -> None:
    network = curved()
    images, labels = batch(network)
    for theta in (1.0, -1.0, 0.3):
        attack = JSMA(theta=theta, saliency="single", max_pixels=6)
        attacked = attack(network, images, labels, ThreatModel(norm="l0", eps=math.inf))
        change = attacked.images - images
        assert attacked.success.float().mean() > 0.6
        assert float((change * math.copysign(1, theta)).min()) >= 0
        assert torch.equal(attacked.distance, (change != 0).any(dim=1).flatten(1).sum(dim=1).float())
        assert float(attacked.distance.max()) <= 6
    with pytest.raises(UserError, match="theta"):
        JSMA(theta=0.0)
