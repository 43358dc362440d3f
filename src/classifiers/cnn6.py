"""The six-convolution network of system B."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import PositiveInt
from torch import Tensor, nn

from src.classifiers.network import Network


class CNN6(Network):
    """Three blocks of two 3x3 convolutions (padding 1) with ReLU and max pooling, then one linear layer.

    Source: the CIFAR-10 target of system B.
    Departures: batch norm after each convolution (``batch_norm=False`` for system B's own), and global
    average pooling before the linear layer, so that any size from 8x8 up works.

    Args:
        batch_norm: normalise after each convolution, which then has no bias.
        widths: channels of the three blocks.

    The other arguments, shapes and ranges are those of :class:`Network`; ``features`` has ``widths[2]``
    columns.

    Raises:
        UserError: images under 8x8.
    """

    smallest = 8

    def __init__(
        self,
        *,
        channels: int,
        size: tuple[int, int],
        num_classes: int,
        mean: Sequence[float],
        std: Sequence[float],
        batch_norm: bool = True,
        widths: tuple[PositiveInt, PositiveInt, PositiveInt] = (32, 64, 192),
    ) -> None:
        super().__init__(channels=channels, size=size, num_classes=num_classes, mean=mean, std=std)
        layers: list[nn.Module] = []
        before = channels
        for width in widths:
            for inputs in (before, width):
                layers.append(nn.Conv2d(inputs, width, 3, padding=1, bias=not batch_norm))
                if batch_norm:
                    layers.append(nn.BatchNorm2d(width))
                layers.append(nn.ReLU())
            layers.append(nn.MaxPool2d(2))
            before = width
        self.body = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(before, num_classes)

    def features(self, images: Tensor) -> Tensor:
        """The mean of the last block's map over positions: ``(B, widths[2])``."""
        return self.body(self.normalise(images))
