"""The six-convolution network of system B."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import PositiveInt
from torch import Tensor, nn

from src.classifiers.network import Network
from src.classifiers.whitening import Whitening


class CNN6(Network):
    """Three blocks of two 3x3 convolutions (padding 1) with max pooling, then one linear layer.

    Source: the CIFAR-10 target of system B, whose widths and place of pooling its authors do not give.
    Departures, all but the first from Jordan 2024, "94% on CIFAR-10 in 3.29 Seconds on a Single GPU",
    https://arxiv.org/abs/2404.00498: batch norm after each convolution; a block pools between its two convolutions,
    which at equal cost affords twice the width; pixels are whitened; convolutions start out passing their input on;
    GELU for ReLU; global max pooling, so that any size from 9x9 up works; logits that start out small.

    Args:
        batch_norm: normalise after each convolution, which then has no bias.
        whiten: take the correlation of neighbouring pixels out first.
        widths: channels of the three blocks.
        mirror: in eval mode the features are the mean over the image and its mirror image, where that keeps the class:
            the test-time augmentation of the paper above as a part of the network, so that attacks go through it.
            Twice the cost at test.
        patches: covariance of the training images' 2x2 patches, from the pipeline.
        symmetric: whether a mirrored image keeps its class, from the pipeline.

    The other arguments, shapes and ranges are those of :class:`Network`; ``features`` has ``widths[2]``
    columns.

    Raises:
        UserError: images under 9x9.
    """

    smallest = 9

    def __init__(
        self,
        *,
        channels: int,
        size: tuple[int, int],
        num_classes: int,
        mean: Sequence[float],
        std: Sequence[float],
        patches: Sequence[Sequence[float]],
        symmetric: bool,
        batch_norm: bool = True,
        whiten: bool = True,
        mirror: bool = True,
        widths: tuple[PositiveInt, PositiveInt, PositiveInt] = (64, 256, 256),
    ) -> None:
        super().__init__(channels=channels, size=size, num_classes=num_classes, mean=mean, std=std)
        self.mirror = mirror and symmetric
        first = Whitening(patches)
        layers: list[nn.Module] = [first, nn.GELU()] if whiten else []
        before = len(first.weight) if whiten else channels
        for width in widths:
            for inputs, pool in ((before, [nn.MaxPool2d(2)]), (width, [])):
                convolution = nn.Conv2d(inputs, width, 3, padding=1, bias=not batch_norm)
                nn.init.dirac_(convolution.weight.data[:inputs])
                layers += [convolution, *pool]
                if batch_norm:
                    layers.append(nn.BatchNorm2d(width))
                layers.append(nn.GELU())
            before = width
        self.body = nn.Sequential(*layers, nn.AdaptiveMaxPool2d(1), nn.Flatten())
        self.head = nn.Linear(before, num_classes)
        nn.init.normal_(self.head.weight)

    def features(self, images: Tensor) -> Tensor:
        """The largest value of each channel of the last block, scaled down: ``(B, widths[2])``."""
        seen = self._largest(images)
        return seen if self.training or not self.mirror else (seen + self._largest(images.flip(3))) / 2

    def _largest(self, images: Tensor) -> Tensor:
        largest: Tensor = self.body(self.normalise(images)) / 9
        return largest
