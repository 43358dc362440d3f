"""A fixed first layer that takes the correlation of neighbouring pixels out of the images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

SIDE = 2  # pixels of a patch


class Whitening(nn.Module):
    """Patches of 2x2 pixels in their principal components, each of unit spread, with both signs: ``(B, 24, H-1, W-1)``.

    Source: the first layer of Page 2019, "How to Train Your ResNet 8", in the form of Jordan 2024, "94% on CIFAR-10 in
    3.29 Seconds on a Single GPU", https://arxiv.org/abs/2404.00498 (section 3.2), where it halves the training. It is
    part of the normalisation: computed once from training images, never trained.

    Args:
        covariance: ``(C*4, C*4)`` of the patches of normalised training images, see :func:`patch_covariance`.
        floor: added to the variance of each component, so that noise is not blown up.
    """

    weight: Tensor

    def __init__(self, covariance: Sequence[Sequence[float]], *, floor: float = 5e-4) -> None:
        super().__init__()
        matrix = torch.tensor(covariance, dtype=torch.float64)
        variance, vectors = torch.linalg.eigh(matrix)
        # eigh leaves signs and, among equals, order to the machine; both signs are kept, and the order is by size.
        scaled = (vectors / (variance + floor).sqrt()).T.flip(0).float()
        channels = len(matrix) // SIDE**2
        kernels = scaled.reshape(-1, channels, SIDE, SIDE)
        self.register_buffer("weight", torch.cat([kernels, -kernels]))

    def forward(self, images: Tensor) -> Tensor:
        return nn.functional.conv2d(images, self.weight)


def patch_covariance(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> list[list[float]]:
    """Second moments of the 2x2 patches of ``images``, ``(N, C, H, W)`` in [0, 1], after normalisation."""
    shift, scale = (torch.tensor(list(values)).view(-1, 1, 1) for values in (mean, std))
    patches = nn.functional.unfold((images - shift) / scale, SIDE).transpose(1, 2).flatten(0, 1).double()
    covariance: list[list[float]] = (patches.T @ patches / len(patches)).tolist()
    return covariance
