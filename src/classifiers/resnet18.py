"""ResNet-18, as used on CIFAR."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from src.classifiers.network import Network


class ResNet18(Network):
    """torchvision's ResNet-18 with a 3x3 stem of stride 1 and no max pooling.

    Source: He et al. 2015, https://arxiv.org/abs/1512.03385.
    Departure: the stem, as usual for 32x32 images.

    The arguments, shapes and ranges are those of :class:`Network`; ``features`` has 512 columns.

    Raises:
        UserError: images under 16x16.
    """

    smallest = 16
    instead = "cnn6"

    def __init__(
        self,
        *,
        channels: int,
        size: tuple[int, int],
        num_classes: int,
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        super().__init__(channels=channels, size=size, num_classes=num_classes, mean=mean, std=std)
        from torchvision.models import resnet18  # here: it costs seconds

        self.body = resnet18()
        self.body.conv1 = nn.Conv2d(channels, 64, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(self.body.conv1.weight, mode="fan_out", nonlinearity="relu")
        self.body.maxpool = nn.Identity()
        self.body.fc = nn.Identity()
        self.head = nn.Linear(512, num_classes)

    def features(self, images: Tensor) -> Tensor:
        """The last stage's map, averaged over positions: ``(B, 512)``."""
        return self.body(self.normalise(images))
