"""LeNet of system A."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field
from torch import Tensor, nn

from src.classifiers.network import Network


class LeNet(Network):
    """Two 5x5 convolutions and two linear layers: 21,840 parameters on 1x28x28 images of 10 classes.

    Source: the MNIST target of system A, which is the network of PyTorch's basic MNIST example
    (https://github.com/pytorch/examples/tree/main/mnist), after LeCun et al. 1998, "Gradient-based learning
    applied to document recognition", https://doi.org/10.1109/5.726791.
    Departure: the first linear layer follows the size and the channels of the images.

    Args:
        dropout: share of channels (second convolution) and of hidden units dropped in training, in [0, 1).

    The other arguments, shapes and ranges are those of :class:`Network`; ``features`` has 50 columns.

    Raises:
        UserError: images under 16x16.
    """

    smallest = 16
    instead = "cnn3"

    def __init__(
        self,
        *,
        channels: int,
        size: tuple[int, int],
        num_classes: int,
        mean: Sequence[float],
        std: Sequence[float],
        dropout: Annotated[float, Field(ge=0, lt=1)] = 0.5,
    ) -> None:
        super().__init__(channels=channels, size=size, num_classes=num_classes, mean=mean, std=std)
        height, width = (((side - 4) // 2 - 4) // 2 for side in size)
        self.body = nn.Sequential(
            nn.Conv2d(channels, 10, 5),
            nn.MaxPool2d(2),
            nn.ReLU(),
            nn.Conv2d(10, 20, 5),
            nn.Dropout2d(dropout),
            nn.MaxPool2d(2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(20 * height * width, 50),
            nn.ReLU(),
        )
        self.head = nn.Sequential(nn.Dropout(dropout), nn.Linear(50, num_classes))

    def features(self, images: Tensor) -> Tensor:
        """The 50 hidden units, after ReLU and before dropout: ``(B, 50)``."""
        return self.body(self.normalise(images))
