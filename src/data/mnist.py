"""MNIST: handwritten digits."""

from __future__ import annotations

from src.data.base import DataSpec
from src.data.downloaded import DownloadedData
from src.data.spec import GREY_EPS


class MNIST(DownloadedData):
    """60,000 + 10,000 grey 28x28 digits (LeCun et al. 1998, http://yann.lecun.com/exdb/mnist)."""

    source = "MNIST"
    files = "MNIST/raw/{train,t10k}-{images-idx3,labels-idx1}-ubyte"

    def describe(self) -> DataSpec:
        """Its published facts."""
        return DataSpec(
            name="mnist",
            classes=tuple(str(digit) for digit in range(10)),
            channels=1,
            size=(28, 28),
            eps=dict(GREY_EPS),
            augment="crop",
            mean=(0.1307,),
            std=(0.3081,),
        )
