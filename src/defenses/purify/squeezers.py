"""Functions that squeeze the features of images: plain tensors, shared by a purifier and a detector.

Paper: Xu, Evans, Qi 2018, "Feature Squeezing: Detecting Adversarial Examples in Deep Neural Networks",
https://arxiv.org/abs/1704.01155. Images are float ``(B, C, H, W)`` in [0, 1] before and after.
"""

from __future__ import annotations

from typing import Annotated

import torch
import torch.nn.functional as F
from annotated_types import Predicate
from pydantic import Field
from torch import Tensor

from src.errors import UserError


def _is_odd(side: int) -> bool:
    return side % 2 == 1


Window = Annotated[int, Field(ge=2, le=15)]
Bits = Annotated[int, Field(ge=1, le=7)]
Search = Annotated[int, Field(ge=3, le=21), Predicate(_is_odd)]
Patch = Annotated[int, Field(ge=1, le=7), Predicate(_is_odd)]
Strength = Annotated[float, Field(gt=0)]


def median_filter(images: Tensor, window: int) -> Tensor:
    """The median of the ``window`` x ``window`` pixels around each, mirrored at the border; each channel apart.

    As scipy.ndimage, which the paper uses: an even window reaches one pixel further up and left, and the upper of two
    middle values is taken. The gradient is exact: it goes to the pixel that is the median.
    """
    before, after = window // 2, (window - 1) // 2
    channels, height, width = images.shape[1:]
    _fits(window // 2, images, f"a median window of {window}")
    padded = F.pad(images, (before, after, before, after), mode="reflect")
    # unfold makes one column per pixel, all channels stacked: split them again before taking the median
    columns = F.unfold(padded, window).view(len(images), channels, window**2, height * width)
    return columns.kthvalue(window**2 // 2 + 1, dim=2).values.view_as(images)


def reduce_bits(images: Tensor, bits: int) -> Tensor:
    """Rounds to ``2**bits`` equally spaced levels. Its gradient is zero almost everywhere."""
    levels = 2**bits - 1
    return (images * levels).round() / levels


def non_local_means(images: Tensor, search: int, patch: int, strength: float) -> Tensor:
    """The mean of the pixels nearby, weighted by how alike the patches around them are.

    Paper: Buades, Coll, Morel 2005, "A non-local algorithm for image denoising",
    https://doi.org/10.1109/CVPR.2005.38; weights and borders are those of OpenCV's fastNlMeansDenoising, without its
    table of rounded weights. The gradient is exact.

    Args:
        search: side of the window whose pixels are averaged, odd.
        patch: side of the patches that are compared, odd.
        strength: distance between patches at which a weight has fallen to 1/e, in levels of 255.
    """
    reach, around = search // 2, patch // 2
    height, width = images.shape[2:]
    _fits(reach + around, images, f"non-local means over a search of {search} with patches of {patch}")
    padded = F.pad(images, [reach + around] * 4, mode="reflect")
    size = (height + 2 * around, width + 2 * around)
    middle = padded[..., reach : reach + size[0], reach : reach + size[1]]
    total, weights = torch.zeros_like(images), images.new_zeros(len(images), 1, height, width)
    for down in range(search):
        for right in range(search):
            moved = padded[..., down : down + size[0], right : right + size[1]]
            unlike = F.avg_pool2d((moved - middle).square().mean(dim=1, keepdim=True), patch, stride=1)
            weight = (-unlike * (255 / strength) ** 2).exp()
            total = total + weight * moved[..., around : around + height, around : around + width]
            weights = weights + weight
    return (total / weights).clamp(0, 1)


def _fits(reach: int, images: Tensor, what: str) -> None:
    """Mirroring needs more pixels than it adds."""
    if reach >= min(images.shape[2:]):
        size = f"{images.shape[2]}x{images.shape[3]}"
        raise UserError(f"{what} is too large for images of {size}: take a smaller one")
