"""What the rest of the pipeline may ask of a dataset without opening it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from src.data.augment import Augment
from src.threat import Norm


@dataclass(frozen=True, kw_only=True)
class DataSpec:
    """Facts of a dataset.

    Attributes:
        name: what messages call it; tables name the choice of the config.
        classes: names, by class number.
        channels: 1 (grey) or 3 (RGB).
        size: ``(H, W)`` in pixels.
        eps: radii worth asking about, per norm, in [0,1] pixel units (l0: pixels).
        augment: what leaves the class of such a picture unchanged; a mirrored digit is another sign.
        mean: per channel, of training pixels in [0,1]; the network normalises with it.
        std: per channel, in the same units, never 0.
    """

    name: str
    classes: tuple[str, ...]
    channels: int
    size: tuple[int, int]
    eps: Mapping[Norm, tuple[float, ...]]
    augment: Augment
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def num_classes(self) -> int:
        """Number of classes = width of the logits."""
        return len(self.classes)


# The radii of the literature for such pictures: what a first look should ask about.
GREY_EPS: dict[Norm, tuple[float, ...]] = {
    Norm.LINF: (0.05, 0.1, 0.15, 0.2, 0.3),
    Norm.L2: (1.0, 2.0),
    Norm.L1: (5.0, 10.0),
    Norm.L0: (8.0, 15.0),
}
COLOUR_EPS: dict[Norm, tuple[float, ...]] = {
    Norm.LINF: (2 / 255, 4 / 255, 8 / 255),
    Norm.L2: (0.25, 0.5),
    Norm.L1: (6.0, 12.0),
    Norm.L0: (12.0, 24.0),
}


def default_eps(channels: int) -> dict[Norm, tuple[float, ...]]:
    """Radii for a set nobody has published radii for: those of MNIST when grey, of CIFAR-10 when coloured."""
    return dict(GREY_EPS if channels == 1 else COLOUR_EPS)


def default_augment(channels: int) -> Augment:
    """Grey pictures are mostly signs, which a mirror changes; photographs may be mirrored."""
    return "crop" if channels == 1 else "crop_flip"


def channel_statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel of uint8 ``(N, C, H, W)``, in [0,1] units.

    From a histogram of whole numbers: exact, the same on every machine. A constant channel gets 1/255.
    """
    values = torch.arange(256, dtype=torch.float64)
    means, stds = [], []
    for channel in range(images.shape[1]):
        counts = torch.zeros(256, dtype=torch.float64)
        for start in range(0, len(images), 4096):  # in pieces, since bincount widens its input to int64
            counts += torch.bincount(images[start : start + 4096, channel].flatten(), minlength=256)
        mean = float((counts * values).sum() / counts.sum())
        variance = float((counts * (values - mean) ** 2).sum() / counts.sum())
        means.append(mean / 255)
        stds.append(max(variance**0.5, 1.0) / 255)
    return tuple(means), tuple(stds)
