"""The six-convolution network of system B."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import PositiveInt
from torch import Tensor, nn

from src.classifiers.network import Network


class CNN6(Network):
    """Three blocks of two 3x3 convolutions (padding 1) with ReLU and max pooling, then one linear layer.

    Source: the CIFAR-10 target of system B, whose widths and place of pooling its authors do not give.
    Departures: batch norm after each convolution (``batch_norm=False`` for none); a block pools between its two
    convolutions, which at equal cost affords twice the width and learns faster (the arrangement of Jordan 2024, "94%
    on CIFAR-10 in 3.29 Seconds on a Single GPU", https://arxiv.org/abs/2404.00498); global max pooling before the
    linear layer, so that any size from 8x8 up works.

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
        widths: tuple[PositiveInt, PositiveInt, PositiveInt] = (64, 128, 256),
    ) -> None:
        super().__init__(channels=channels, size=size, num_classes=num_classes, mean=mean, std=std)
        layers: list[nn.Module] = []
        before = channels
        for width in widths:
            for inputs, pool in ((before, [nn.MaxPool2d(2)]), (width, [])):
                layers += [nn.Conv2d(inputs, width, 3, padding=1, bias=not batch_norm), *pool]
                if batch_norm:
                    layers.append(nn.BatchNorm2d(width))
                layers.append(nn.ReLU())
            before = width
        self.body = nn.Sequential(*layers, nn.AdaptiveMaxPool2d(1), nn.Flatten())
        self.head = nn.Linear(before, num_classes)

    def features(self, images: Tensor) -> Tensor:
        """The largest value of each channel of the last block: ``(B, widths[2])``."""
        return self.body(self.normalise(images))
