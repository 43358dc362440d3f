"""Feature squeezing as a purifier."""

from __future__ import annotations

from torch import Tensor

from src.defenses.base import Purifier
from src.defenses.purify.squeezers import (
    Bits,
    Patch,
    Search,
    Strength,
    Window,
    median_filter,
    non_local_means,
    reduce_bits,
)
from src.errors import UserError


class FeatureSqueezing(Purifier):
    """Fewer bits, a median filter and non-local means before the classifier, whichever are given; nothing is trained.

    Paper: Xu, Evans, Qi 2018, "Feature Squeezing: Detecting Adversarial Examples in Deep Neural Networks",
    https://arxiv.org/abs/1704.01155. Broken by adaptive attacks: He et al. 2017, https://arxiv.org/abs/1706.04701

    Args:
        bits: bits a channel is rounded to, 1 to 7; None: all 8.
        window: side of the median's window in pixels; None: no median.
        search: side of the window of non-local means in pixels, odd; None: none. The paper has 13 for CIFAR-10.
        patch: side of its patches in pixels, odd.
        strength: of its smoothing, in levels of 255.

    Shapes: images ``(B, C, H, W)`` in [0, 1] before and after.

    Several are applied in that order; for another, chain this defense with itself. The gradient is exact without
    ``bits``; with them it is ``bpda``, the rounding's replaced by the identity.

    Where ours departs from the paper: this is the filter as a purifier, the detector that compares outputs is
    ``squeezing_detector``; images are mirrored at the border without repeating the last pixel, and non-local means
    compare RGB instead of Lab.

    Raises:
        UserError: nothing to apply, or a window that is too large for the images.
    """

    def __init__(
        self,
        *,
        bits: Bits | None = None,
        window: Window | None = 3,
        search: Search | None = None,
        patch: Patch = 3,
        strength: Strength = 2.0,
    ) -> None:
        super().__init__()
        if bits is None and window is None and search is None:
            raise UserError("defense=feature_squeezing: nothing to apply; give one of bits, window and search")
        self.bits = bits
        self.window = window
        self.search = search
        self.patch = patch
        self.strength = strength
        self.gradient = "exact" if bits is None else "bpda"

    def purify(self, images: Tensor) -> Tensor:
        return self._filtered(images if self.bits is None else reduce_bits(images, self.bits))

    def surrogate(self, images: Tensor) -> Tensor:
        return self._filtered(images)

    def _filtered(self, images: Tensor) -> Tensor:
        if self.window is not None:
            images = median_filter(images, self.window)
        if self.search is not None:
            images = non_local_means(images, self.search, self.patch, self.strength)
        return images
