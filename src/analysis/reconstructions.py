"""What a purifier makes of images, and how far from clean ones that lies."""

from __future__ import annotations

from pathlib import Path

import torch
from pydantic import PositiveInt

from src.analysis.curves import FONT, paper_style
from src.analysis.fid import Fid
from src.analysis.over_eps import show
from src.analysis.scene import Analysis, Scene, finish
from src.errors import UserError


class Reconstructions(Analysis):
    """Clean, attacked and purified images in rows, with the FID of each set to the clean images.

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
            fid = Fid(clean, scene.classifier, scene.classifier_name)
            for row, (name, images) in zip(axes, sets.items(), strict=True):
                far = fid(images)
                error = float((images - clean).pow(2).mean().sqrt())
                label = name if name == "clean" else f"{name}\nFID {far:.3g}\nRMS {error:.2g}"
                row[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=FONT)
                for axis, image in zip(row, images, strict=False):
                    show(axis, image)
            text = f"FID to the clean images on {fid.features}; RMS: root mean square difference of pixels in [0, 1]."
            return finish(figure, f"{scene.caption(len(labels))} {text}", path)
