"""Fréchet distance between sets of images: how far one set lies from another in what a network sees."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from src.analysis.representation import features

INCEPTION = "weights-inception-2015-12-05-6726825d.pth"  # as torch-fidelity names it in torch's hub folder


class Fid:
    """Distance to a set of real images between Gaussians fitted to features (Heusel et al. 2017,
    https://arxiv.org/abs/1706.08500).

    The features are Inception's where torch-fidelity and its weights are at hand; nothing is ever downloaded. Else they
    are the project's own classifier's, and the distance compares sets on these data only. It is biased: fewer images
    give a larger one, so figures compare at the same n only.

    Args:
        real: ``(N, C, H, W)`` in [0, 1].
        classifier: the bare classifier.
        name: of the classifier.

    Attributes:
        features: whose they are, for a caption.
    """

    def __init__(self, real: Tensor, classifier: Any, name: str) -> None:
        from torchmetrics.image.fid import FrechetInceptionDistance

        weights = inception()
        if weights is None:
            self.features = f"{name} features"
            network = _Features(classifier, features(classifier, real[:2]).shape[1])
            self._metric = FrechetInceptionDistance(feature=network, reset_real_features=False)
        else:
            self.features = "Inception features"
            self._metric = FrechetInceptionDistance(
                normalize=True, reset_real_features=False, feature_extractor_weights_path=str(weights)
            )
        self._color = weights is not None
        self._metric.to(real.device)
        self._update(real, real=True)

    def __call__(self, images: Tensor) -> float:
        """How far ``images`` lie from the real ones."""
        self._metric.reset()
        self._update(images, real=False)
        return max(0.0, float(self._metric.compute()))  # rounding can take it below

    @torch.no_grad()
    def _update(self, images: Tensor, *, real: bool) -> None:
        for some in torch.split(images, 128):
            if self._color and some.shape[1] != 3:
                some = some.mean(dim=1, keepdim=True).expand(-1, 3, -1, -1)
            self._metric.update(some, real=real)


def inception() -> Path | None:
    """The weights of torchmetrics' Inception, where they and the library that reads them are installed."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION
    return path if find_spec("torch_fidelity") is not None and path.is_file() else None


class _Features(nn.Module):
    """As torchmetrics wants them; a network that is not Inception gets the images as they are."""

    def __init__(self, classifier: Any, width: int) -> None:
        super().__init__()
        self.classifier = classifier
        self.num_features = width

    def forward(self, images: Tensor) -> Tensor:
        return features(self.classifier, images)
