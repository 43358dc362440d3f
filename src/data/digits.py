"""scikit-learn's bundled handwritten digits: the embedded default, no download."""

from __future__ import annotations

import torch

from src.data.base import DataSpec, ImageDataModule, Split, channel_statistics
from src.data.split import hold_out, seeded
from src.threat import Norm


class Digits(ImageDataModule):
    """1,797 grey 8x8 digits (Alpaydin and Kaynak, https://archive.ics.uci.edu/dataset/80).

    Their values 0..16 are stretched to 0..255. The test fifth of each class is the same for every seed.
    """

    @property
    def where(self) -> str:
        """There is no folder to name."""
        return "dataset=digits"

    def load(self) -> tuple[DataSpec, Split, Split]:
        """Read from the installed package."""
        from sklearn.datasets import load_digits

        bunch = load_digits()
        images = torch.from_numpy(bunch.images).mul(255 / 16).round().to(torch.uint8).unsqueeze(1)
        whole = Split(images=images, labels=torch.from_numpy(bunch.target).to(torch.int64))
        classes = tuple(str(digit) for digit in range(10))
        kept, held = hold_out(whole.labels, 0.2, seeded("digits test"), classes=classes, key="dataset.test")
        train, test = whole.take(kept), whole.take(held)
        mean, std = channel_statistics(images[kept])
        spec = DataSpec(
            name="digits",
            classes=classes,
            channels=1,
            size=(8, 8),
            eps={
                Norm.LINF: (0.05, 0.1, 0.2, 0.3),
                Norm.L2: (0.25, 0.5, 1.0),
                Norm.L1: (1.0, 2.0, 4.0),
                Norm.L0: (1.0, 2.0, 4.0),
            },
            augment="crop",
            mean=mean,
            std=std,
        )
        return spec, train, test
