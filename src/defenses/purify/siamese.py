"""A Siamese network: how alike two images are, learnt from attacked and clean ones."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from src.defenses.purify.networks import halve

MARGIN = 5.0  # so that minus the distances, as logits, tell the classes as clearly apart as a classifier does


class Siamese(nn.Module):
    """Images to points ``(B, 32)`` that lie close together where the class is the same.

    Paper: Hadsell, Chopra, LeCun 2006, "Dimensionality Reduction by Learning an Invariant Mapping",
    https://doi.org/10.1109/CVPR.2006.100

    Two 3x3 convolutions of stride 2 and two linear layers, ReLU between; images ``(B, channels, H, W)`` in [0, 1].

    Args:
        channels: channels of an image.
        size: height and width of an image, in pixels.
        width: channels of the first convolution; the second has twice as many.
    """

    def __init__(self, *, channels: int, size: tuple[int, int], width: int) -> None:
        super().__init__()
        height, wide = halve(halve(size))
        self.body = nn.Sequential(
            nn.Conv2d(channels, width, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(2 * width * height * wide, 128),
            nn.ReLU(),
            nn.Linear(128, 32),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Float32 also under autocast."""
        return self.body(images).float()


def contrastive(left: Tensor, right: Tensor, labels: Tensor) -> Tensor:
    """The contrastive loss over all pairs of one point of ``left`` and one of ``right``, ``(B, D)`` each.

    The squared distance for pairs of one class, the squared shortfall from the margin for others. Each kind has its
    own mean, since pairs of one class are few.
    """
    distance = torch.cdist(left, right)
    same = labels[:, None] == labels[None, :]
    short = (MARGIN - distance).clamp_min(0).square()
    # A batch may hold one class only: then there is nothing to keep apart.
    return _mean(distance.square(), same) + _mean(short, ~same)


def _mean(values: Tensor, mask: Tensor) -> Tensor:
    return (values * mask).sum() / mask.sum().clamp_min(1)
