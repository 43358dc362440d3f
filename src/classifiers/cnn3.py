"""The three-convolution network of system C."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field, PositiveInt
from torch import Tensor, nn

from src.classifiers.network import Network


class CNN3(Network):
    """Convolutions 16 (3x3, same), 32 and 64 (3x3, stride 2, valid) with ReLU, then one linear layer.

    Source: the MNIST target of system C. Small enough for 8x8 images.

    Args:
        widths: channels of the three convolutions.
        dropout: share of the features dropped in training before the linear layer, in [0, 1); 0 in system C.

    The other arguments, shapes and ranges are those of :class:`Network`; ``features`` has
    ``widths[2] * h * w`` columns (2,304 on 28x28 images, 64 on 8x8).

    Raises:
        UserError: images under 7x7.
    """

    smallest = 7

    def __init__(
        self,
        *,
        channels: int,
        size: tuple[int, int],
        num_classes: int,
        mean: Sequence[float],
        std: Sequence[float],
        widths: tuple[PositiveInt, PositiveInt, PositiveInt] = (16, 32, 64),
        dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0,
    ) -> None:
        super().__init__(channels=channels, size=size, num_classes=num_classes, mean=mean, std=std)
        first, second, third = widths
        height, width = (((side - 1) // 2 - 1) // 2 for side in size)
        self.body = nn.Sequential(
            nn.Conv2d(channels, first, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(first, second, 3, stride=2),
            nn.ReLU(),
            nn.Conv2d(second, third, 3, stride=2),
            nn.ReLU(),
            nn.Flatten(),
        )
        self.head = nn.Sequential(nn.Dropout(dropout), nn.Linear(third * height * width, num_classes))

    def features(self, images: Tensor) -> Tensor:
        """The flattened map of the last convolution, after ReLU: ``(B, widths[2] * h * w)``."""
        return self.body(self.normalise(images))
