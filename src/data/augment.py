"""From uint8 pictures to what a network sees: conversion and augmentation of a whole batch on its device."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Augment = Literal["none", "crop", "crop_flip"]


def to_float(images: Tensor) -> Tensor:
    """``(B, C, H, W)`` uint8 0..255 → float32 in ``[0, 1]``, on the device they are on."""
    return images.to(torch.float32).div_(255.0)


def padding(size: int) -> int:
    """Pixels a crop may shift along a side of ``size``: a sixteenth, so 2 of 32, at least 1.

    Half of the usual 4 of 32: trainings here are short, and shifts of 4 pay only after many more epochs (Jordan 2024,
    https://arxiv.org/abs/2404.00498).
    """
    return max(1, size // 16)


def augment_batch(images: Tensor, kind: Augment, generator: torch.Generator | None = None) -> Tensor:
    """Shift every image by its own few pixels (edges reflected) and, with ``crop_flip``, mirror half of them.

    Args:
        images: ``(B, C, H, W)``, any dtype; uint8 is the cheapest, so augment before :func:`to_float`.
        kind: ``none`` returns the batch itself; ``crop`` shifts; ``crop_flip`` shifts and mirrors left-right.
        generator: source of the shifts, on the device of the images; None takes the device's global one.

    Returns:
        A tensor of the same shape and dtype. Only the image's own values occur in it, so the range is kept.
    """
    if kind == "none":
        return images
    batch, channels, height, width = images.shape

    def draw(low: int, high: int) -> Tensor:
        return torch.randint(low, high, (batch, 1), generator=generator, device=images.device)

    rows = torch.arange(height, device=images.device) + draw(-padding(height), padding(height) + 1)
    columns = torch.arange(width, device=images.device) + draw(-padding(width), padding(width) + 1)
    rows, columns = _reflect(rows, height), _reflect(columns, width)
    if kind == "crop_flip":
        columns = torch.where(draw(0, 2) == 1, width - 1 - columns, columns)
    # One gather over flat pixel positions needs no index tensors for batch and channel.
    flat = (rows[:, :, None] * width + columns[:, None, :]).view(batch, 1, height * width)
    gathered = images.flatten(2).gather(2, flat.expand(batch, channels, height * width))
    return gathered.view(batch, channels, height, width)


def _reflect(positions: Tensor, size: int) -> Tensor:
    """Positions outside ``0..size-1`` mirrored back at the edge; the clamp is for sides of one pixel."""
    inside = (size - 1) - ((size - 1) - positions.abs()).abs()
    return inside.clamp(0, size - 1)
