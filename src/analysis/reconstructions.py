"""What a purifier makes of images, and how far from clean ones that lies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from src.analysis.curves import FONT, paper_style
from src.analysis.over_eps import show
from src.analysis.representation import features
from src.analysis.scene import Analysis, Scene, finish
from src.errors import UserError


class Reconstructions(Analysis):
    """Clean, attacked and purified images in rows, with a Fréchet distance of each set to the clean images.

    The distance (Heusel et al. 2017, https://arxiv.org/abs/1706.08500) is that of the project's own classifier's
    features, not of Inception: it compares sets on these data only.

    Args:
        shown: images shown.
        images: first images that the distances are taken over.
    """

    def __init__(self, *, shown: PositiveInt = 8, images: PositiveInt = 300) -> None:
        self.shown = shown
        self.images = images

    @torch.no_grad()
    def draw(self, scene: Scene, path: Path) -> Path:
        from matplotlib.figure import Figure

        clean, labels = scene.take(self.images)
        with torch.enable_grad():
            attacked = scene.attacked(scene.strongest, self.images).images
        purified = scene.defended.purified(clean)
        if torch.equal(purified, clean):
            raise UserError("this defense changes no image; use one that purifies, such as defense=vae")
        sets = {
            "clean": clean, "clean, purified": purified, "attacked": attacked,
            "attacked, purified": scene.defended.purified(attacked),
        }  # fmt: skip
        count = min(self.shown, len(labels))
        with paper_style():
            figure = Figure(figsize=(1.5 + 0.68 * count, 3.9), dpi=200, layout="constrained")
            axes = figure.subplots(len(sets), count, squeeze=False)
            for row, (name, images) in zip(axes, sets.items(), strict=True):
                far = frechet(scene.classifier, clean, images)
                error = float((images - clean).pow(2).mean().sqrt())
                label = name if name == "clean" else f"{name}\nFD {far:.3g}\nRMS {error:.2g}"
                row[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=FONT)
                for axis, image in zip(row, images, strict=False):
                    show(axis, image)
            text = (
                "FD: Fréchet distance to the clean images in the features of the project's own classifier; RMS: root "
                "mean square difference of pixels in [0, 1]."
            )
            return finish(figure, f"{scene.caption(len(labels))} {text}", path)


class _Features(nn.Module):
    """As torchmetrics wants them; a network that is not Inception gets the images as they are."""

    def __init__(self, classifier: Any, width: int) -> None:
        super().__init__()
        self.classifier = classifier
        self.num_features = width

    def forward(self, images: Tensor) -> Tensor:
        return features(self.classifier, images)


def frechet(classifier: Any, first: Tensor, second: Tensor) -> float:
    """Between Gaussians fitted to the features of two sets of images."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    width = features(classifier, first[:2]).shape[1]
    metric = FrechetInceptionDistance(feature=_Features(classifier, width))
    metric.update(first, real=True)
    metric.update(second, real=False)
    return float(metric.compute())
