"""An output layer of distances: by hand, and what it rejects."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from src.defenses.harden.rbf import RBF
from src.errors import UserError
from tests.hardening import batch, fresh, images


def rbf(**options) -> RBF:
    torch.manual_seed(0)
    return RBF(fresh=fresh, channels=1, size=(8, 8), num_classes=3, code=5, **options)


def test_rbf_by_hand() -> None:
    module, data = rbf(margin=4.0), batch()
    codes = module.network.encode(data["image"].flatten(1))
    squares = torch.stack([(codes - centre).square().sum(1) for centre in module.network.centres], dim=1)
    torch.testing.assert_close(module(data["image"]), -squares)
    torch.testing.assert_close(module.distance(data["image"]), squares.amin(dim=1))
    losses = [
        squares[i, y] + sum(F.softplus(4.0 - squares[i, k]) for k in range(3) if k != y)
        for i, y in enumerate(data["label"].tolist())
    ]
    torch.testing.assert_close(module.loss(data), torch.stack(losses).mean())


def test_rbf_rejects_what_is_far_from_every_class() -> None:
    module = rbf(fpr=0.05)
    defended = module.guard(fresh())
    with torch.no_grad():
        module.network.encode.weight.mul_(3)
        clean = images(200) * 0.1  # near the origin, where the codes are alike
        defended.set_thresholds(defended.scores(clean))
        assert float((defended(clean).argmax(1) == 3).float().mean()) <= 0.05
        assert int(defended(torch.ones(1, 1, 8, 8)).argmax(1)) == 3
    assert not rbf().guard(fresh()).rejects


def test_rbf_refuses_features_that_are_maps() -> None:
    """As those of a VGG, whose classifier flattens them itself."""
    network = nn.Module()
    network.features = nn.Conv2d(1, 4, 3)
    with pytest.raises(UserError, match=r"features\(images\) of Module is \(1, 4, 6, 6\); expected a row an image"):
        RBF(fresh=lambda: network, channels=1, size=(8, 8), num_classes=3)
