"""Fashion-MNIST: pictures of clothes, as small as MNIST and harder."""

from __future__ import annotations

from src.data.base import DataSpec
from src.data.downloaded import DownloadedData
from src.threat import Norm


class FashionMNIST(DownloadedData):
    """60,000 + 10,000 grey 28x28 articles (Xiao et al. 2017, https://arxiv.org/abs/1708.07747)."""

    source = "FashionMNIST"
    files = "FashionMNIST/raw/{train,t10k}-{images-idx3,labels-idx1}-ubyte"

    def describe(self) -> DataSpec:
        """Its published facts."""
        return DataSpec(
            name="fashion_mnist",
            classes=(
                "t-shirt", "trouser", "pullover", "dress", "coat",
                "sandal", "shirt", "sneaker", "bag", "ankle boot",
            ),
            channels=1,
            size=(28, 28),
            eps={Norm.LINF: (0.05, 0.1), Norm.L2: (0.5, 1.0), Norm.L1: (5.0, 10.0), Norm.L0: (8.0, 15.0)},
            augment="crop_flip",
            mean=(0.2860,),
            std=(0.3530,),
        )  # fmt: skip
