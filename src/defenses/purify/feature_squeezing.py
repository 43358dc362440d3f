"""Feature squeezing."""

from __future__ import annotations

from typing import Annotated

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from src.defenses.base import Purifier


class FeatureSqueezing(Purifier):
    """Median filter before the classifier; nothing is trained.

    Paper: Xu, Evans, Qi 2018, "Feature Squeezing: Detecting Adversarial Examples in Deep Neural Networks",
    https://arxiv.org/abs/1704.01155. Broken by adaptive attacks: He et al. 2017, https://arxiv.org/abs/1706.04701

    Args:
        window: side of the square window in pixels; an even window reaches one pixel further right and down, as in
            the paper's 2x2 filter. The lower of the two middle values is taken when their number is even.

    The gradient is exact: it goes to the pixel that is the median. Where ours departs from the paper: this is the
    filter as a purifier; the detector that compares outputs stands apart.
    """

    gradient = "exact"

    def __init__(self, *, window: Annotated[int, Field(ge=2, le=15)] = 3) -> None:
        super().__init__()
        self.window = window

    def purify(self, images: Tensor) -> Tensor:
        before, after = (self.window - 1) // 2, self.window // 2
        channels, height, width = images.shape[1:]
        padded = F.pad(images, (before, after, before, after), mode="reflect")
        # unfold makes one column per pixel, all channels stacked: split them again before taking the median
        columns = F.unfold(padded, self.window).view(len(images), channels, self.window**2, height * width)
        return columns.median(dim=2).values.view_as(images)
