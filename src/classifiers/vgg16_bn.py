"""VGG-16 with batch norm, as used on CIFAR."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field
from torch import Tensor, nn

from src.classifiers.network import Network

LAYERS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))  # configuration D


class VGG16BN(Network):
    """Thirteen 3x3 convolutions with batch norm in five blocks, each ended by max pooling; one linear layer.

    Source: configuration D of Simonyan and Zisserman 2014, https://arxiv.org/abs/1409.1556; the target of
    system D. Layers and initialisation as torchvision's ``vgg16_bn``, written out here since importing
    torchvision costs seconds.
    Departures, usual for 32x32 images: one linear layer on 512 features in place of three; no bias before
    batch norm.

    Args:
        dropout: share of the features dropped in training before the linear layer, in [0, 1).

    The other arguments, shapes and ranges are those of :class:`Network`; ``features`` has 512 columns. Images
    over 32x32 are averaged over the positions left.

    Raises:
        UserError: images under 32x32.
    """

    smallest = 32
    instead = "cnn6"

    def __init__(
        self,
        *,
        channels: int,
        size: tuple[int, int],
        num_classes: int,
        mean: Sequence[float],
        std: Sequence[float],
        dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0,
    ) -> None:
        super().__init__(channels=channels, size=size, num_classes=num_classes, mean=mean, std=std)
        layers: list[nn.Module] = []
        before = channels
        for block in LAYERS:
            for width in block:
                convolution = nn.Conv2d(before, width, 3, padding=1, bias=False)
                nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
                layers += [convolution, nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
                before = width
            layers.append(nn.MaxPool2d(2))
        self.body = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Sequential(nn.Dropout(dropout), nn.Linear(before, num_classes))

    def features(self, images: Tensor) -> Tensor:
        """The last block's map, averaged over positions: ``(B, 512)``."""
        return self.body(self.normalise(images))
