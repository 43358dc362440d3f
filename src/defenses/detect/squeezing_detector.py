"""Feature squeezing as a detector."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from src.defenses.base import Detector, Share, Threshold
from src.defenses.bpda import ImageMap, bpda
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


class SqueezingDetector(Detector):
    """Flags an image whose answer changes when its features are squeezed.

    The score is the largest l1 distance, over the squeezers, between the probabilities of the image and of the squeezed
    image: 0 to 2.

    Paper: Xu, Evans, Qi 2018, "Feature Squeezing: Detecting Adversarial Examples in Deep Neural Networks",
    https://arxiv.org/abs/1704.01155. Broken by adaptive attacks: He et al. 2017, https://arxiv.org/abs/1706.04701

    Args:
        bits: bits a channel is rounded to; ``auto``: the paper's 1 for grey images and 5 for colour; None: not used.
        window: side of the median's window in pixels; None: not used.
        search: side of the window of non-local means in pixels, odd; ``auto``: the paper's 13 for colour, not used for
            grey; None: not used.
        patch: side of their patches in pixels, odd.
        strength: of their smoothing, in levels of 255.
        fpr: share of clean validation images that are rejected.
        threshold: a fixed threshold of the score instead.

    Shapes: images ``(B, C, H, W)`` in [0, 1], scores ``(B,)``.

    The gradient is exact but for the rounding to fewer bits, where the identity stands in for it (``bpda``). Where ours
    departs from the paper: see ``FeatureSqueezing``.

    Raises:
        UserError: no squeezer, or a window that is too large for the images.
    """

    def __init__(
        self,
        *,
        channels: int,
        bits: Bits | Literal["auto"] | None = "auto",
        window: Window | None = 2,
        search: Search | Literal["auto"] | None = "auto",
        patch: Patch = 3,
        strength: Strength = 2.0,
        fpr: Share = 0.05,
        threshold: Threshold | None = None,
    ) -> None:
        super().__init__(fpr=fpr, threshold=threshold)
        grey = channels == 1
        bits = (1 if grey else 5) if bits == "auto" else bits
        search = (None if grey else 13) if search == "auto" else search
        self.squeezers: list[ImageMap] = []
        if bits is not None:
            self.squeezers.append(bpda(partial(reduce_bits, bits=bits), torch.clone))
        if window is not None:
            self.squeezers.append(partial(median_filter, window=window))
        if search is not None:
            self.squeezers.append(partial(non_local_means, search=search, patch=patch, strength=strength))
        if not self.squeezers:
            raise UserError("defense=squeezing_detector: no squeezer; give one of bits, window and search")
        self.gradient = "exact" if bits is None else "bpda"

    def score(self, images: Tensor, classify: Callable[[Tensor], Tensor]) -> Tensor:
        versions = torch.cat([images, *(squeeze(images) for squeeze in self.squeezers)])
        answers = classify(versions).float().softmax(dim=1)
        given = answers.view(1 + len(self.squeezers), len(images), answers.shape[1])
        return (given[:1] - given[1:]).abs().sum(dim=2).amax(dim=0)
