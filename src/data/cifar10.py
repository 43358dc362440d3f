"""CIFAR-10: small photographs."""

from __future__ import annotations

from src.data.base import DataSpec
from src.data.downloaded import DownloadedData
from src.data.spec import COLOUR_EPS


class CIFAR10(DownloadedData):
    """50,000 + 10,000 RGB 32x32 photographs (Krizhevsky 2009, https://www.cs.toronto.edu/~kriz/cifar.html)."""

    source = "CIFAR10"
    files = "cifar-10-batches-py/{data_batch_1..5,test_batch,batches.meta}"

    def describe(self) -> DataSpec:
        """Its published facts."""
        return DataSpec(
            name="cifar10",
            classes=(
                "airplane", "automobile", "bird", "cat", "deer",
                "dog", "frog", "horse", "ship", "truck",
            ),
            channels=3,
            size=(32, 32),
            eps=dict(COLOUR_EPS),
            augment="crop_flip",
            mean=(0.4914, 0.4822, 0.4465),
            std=(0.2470, 0.2435, 0.2616),
        )  # fmt: skip
