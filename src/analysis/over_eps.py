"""The same images as the attacker is allowed more, with what the defended model says of each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import PositiveInt

from src.analysis.curves import FONT, paper_style
from src.analysis.scene import Analysis, Scene, finish
from src.tables import format_eps


class OverEps(Analysis):
    """A row an image, a column a radius of the job; above each the label and its confidence.

    Args:
        images: first images shown.
    """

    def __init__(self, *, images: PositiveInt = 4) -> None:
        self.images = images

    def draw(self, scene: Scene, path: Path) -> Path:
        from matplotlib.figure import Figure

        clean, labels = scene.take(self.images)
        radii = sorted(eps for eps in scene.radii if eps != float("inf")) or list(scene.radii)
        columns: list[tuple[str, Any]] = [("clean", clean)]
        columns += [
            (f"ε = {format_eps(eps)}", scene.attacked(scene.strongest, self.images, eps).images) for eps in radii
        ]
        wide, high = max(3.4, 0.95 * len(columns)), 1.05 * len(labels) + 0.8
        with paper_style():
            figure = Figure(figsize=(wide, high), dpi=200, layout="constrained")
            axes = figure.subplots(len(labels), len(columns), squeeze=False)
            for column, (title, images) in enumerate(columns):
                said, confidence = scene.answers(scene.defended, images)
                for row in range(len(labels)):
                    axis = axes[row][column]
                    show(axis, images[row])
                    word, color = scene.look(int(said[row]), int(labels[row]))
                    head = f"{title}\n" if row == 0 else ""
                    share = f"{100 * float(confidence[row]):.0f} %"
                    axis.set_title(f"{head}{word[:9]} {share}", fontsize=FONT, color=color, pad=2)
            text = (
                "Above each image the answer of the defended model and its softmax share: blue right, orange wrong, "
                "grey rejected by a detector."
            )
            return finish(figure, f"{scene.caption(len(labels), radius='as above each column')} {text}", path)


def show(axis: Any, image: Any) -> None:
    """``(C, H, W)`` in [0, 1]; anything but three channels as their mean."""
    pixels = image.detach().cpu().clamp(0, 1)
    if pixels.shape[0] == 3:
        axis.imshow(pixels.permute(1, 2, 0).numpy(), interpolation="nearest")
    else:
        axis.imshow(pixels.mean(dim=0).numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set(visible=True, color="#bbbbbb", linewidth=0.4)
