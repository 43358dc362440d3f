"""The base of every classifier network: images in [0, 1] in, logits out, normalisation inside."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from src.errors import UserError


class Network(nn.Module, ABC):
    """A classifier network: ``forward(images)`` gives logits, ``features(images)`` what the last layer sees.

    An author sets ``self.head`` and writes :meth:`features`, which starts with ``self.normalise(images)``.
    The name a user types is the stem of the author's file.

    Args:
        channels: channels of an image.
        size: height and width of an image, in pixels.
        num_classes: number of logits.
        mean: mean of each channel over the training images, [0, 1] pixels.
        std: standard deviation of each channel, [0, 1] pixels.

    Shapes: images ``(B, channels, *size)`` float in [0, 1]; features ``(B, D)``; logits ``(B, num_classes)``.

    Raises:
        UserError: images smaller than the network takes, or a channel without spread.
    """

    smallest: ClassVar[int] = 1  # least height and width, in pixels
    instead: ClassVar[str] = "torchvision, which resizes them"  # what to use for smaller images

    mean: Tensor
    std: Tensor
    head: nn.Module

    def __init__(
        self,
        *,
        channels: int,
        size: tuple[int, int],
        num_classes: int,
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        super().__init__()
        if min(size) < self.smallest:
            raise UserError(
                f"classifier={type(self).__module__.rpartition('.')[2]} takes images of at least "
                f"{self.smallest}x{self.smallest}, this dataset has {size[0]}x{size[1]}: "
                f"use classifier={self.instead}"
            )
        if not len(mean) == len(std) == channels:
            raise ValueError(f"{channels} channels, but {len(mean)} means and {len(std)} standard deviations")
        if not all(value > 0 for value in std):
            raise UserError(
                f"dataset: a channel has the same value everywhere (std {list(std)}). "
                "Allowed: channels that vary; drop this one"
            )
        self.register_buffer("mean", torch.tensor(list(mean), dtype=torch.float32).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(list(std), dtype=torch.float32).view(-1, 1, 1))

    def normalise(self, images: Tensor) -> Tensor:
        """Zero mean and unit spread per channel."""
        return (images - self.mean) / self.std

    @abstractmethod
    def features(self, images: Tensor) -> Tensor:
        """The representation ``(B, D)`` that the head classifies."""

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``(B, num_classes)``."""
        return self.head(self.features(images))
