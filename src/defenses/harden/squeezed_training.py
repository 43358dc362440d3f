"""A classifier trained on median-filtered images."""

from __future__ import annotations

from torch import Tensor, nn

from src.defenses.base import Fresh, Harden
from src.defenses.guarded import DefendedModel
from src.defenses.purify.squeezers import Window, median_filter


class SqueezedTraining(Harden):
    """The network is trained anew on median-filtered images, and the filter stays before it.

    Source: system B; the filter: Xu, Evans, Qi 2018, https://arxiv.org/abs/1704.01155. A filter whose gradient is known
    is no obstacle to an attacker who goes through it: He et al. 2017, https://arxiv.org/abs/1706.04701

    Args:
        fresh: makes a network of the bare classifier's kind, as it is before its training.
        window: side of the filter's square window in pixels.

    Shapes: images ``(B, C, H, W)`` in [0, 1], logits ``(B, classes)``.

    The gradient is exact: it goes to the pixel that is the median.

    Raises:
        UserError: when called, a window that is too large for the images.
    """

    def __init__(self, *, fresh: Fresh, window: Window = 3) -> None:
        super().__init__(fresh=fresh)
        self.window = window

    def squeeze(self, images: Tensor) -> Tensor:
        """What the network sees: images of the same shape and range."""
        return median_filter(images, self.window)

    def forward(self, images: Tensor) -> Tensor:
        return self.network(self.squeeze(images))

    def guard(self, classifier: nn.Module) -> DefendedModel:
        return DefendedModel(classifier=self.network, defense=self, purify=self.squeeze)
