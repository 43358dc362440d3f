"""How the training of the defense went: every figure that it logged, by epoch."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from src.analysis.curves import BLUE, FONT, VERMILLION, paper_style
from src.analysis.scene import Analysis, Scene, finish
from src.analysis.training import read, series
from src.errors import UserError
from src.tables import format_eps

COLUMNS = 3  # panels beside each other


class Losses(Analysis):
    """A panel a figure: losses of the parts of a GAN or of a VAE, and what the epochs were compared by."""

    def draw(self, scene: Scene, path: Path) -> Path:
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator

        panels = [
            (_meta(folder)["what"], name, points)
            for folder in scene.trainings
            for name, points in series(read(folder / "metrics.csv")).items()
        ]
        if not panels:
            raise UserError("nothing was trained for this defense; use one that is, such as defense=vae")
        several = len({what for what, _, _ in panels}) > 1
        lines = math.ceil(len(panels) / COLUMNS)
        with paper_style():
            figure = Figure(figsize=(7.0, 0.9 + 1.9 * lines), dpi=200, layout="constrained")
            axes = figure.subplots(lines, COLUMNS, squeeze=False).flatten().tolist()
            for axis, (what, name, points) in zip(axes, panels, strict=False):
                color = VERMILLION if name.startswith("val") else BLUE
                axis.plot(*zip(*points, strict=True), color=color, marker="o", markersize=2.5, linewidth=1.2)
                axis.set_title(f"{what}: {name}" if several else name, fontsize=FONT, loc="left")
                axis.set_xlabel("epoch")
                axis.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True, min_n_ticks=1))
            for axis in axes[len(panels) :]:
                axis.set_axis_off()
            shown = {what for what, _, _ in panels}
            metas = [meta for folder in scene.trainings if (meta := _meta(folder))["what"] in shown]
            about = "; ".join(dict.fromkeys(f"{meta['what']} ({_threat(meta)})" for meta in metas))
            epochs = max(int(epoch) for _, _, points in panels for epoch, _ in points)
            text = (
                f"Training of {about}, n = {epochs} epochs; a point is the mean over one. Blue: training images, "
                "orange: validation images. Each in the unit it was logged in."
            )
            return finish(figure, text, path)


def _meta(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "meta.json").read_text())
    return found


def _threat(meta: dict[str, Any]) -> str:
    """The threat model that a training learnt from, if any."""
    source = meta["about"].get("trained_on")
    if not source:
        return "on images that nothing attacks"
    name = str((source["attack"] or source["validation"])["_target_"]).split(".")[-2]
    attack = f"by {name}" if source["attack"] else f"by itself, validation images by {name}"
    radius = "up to " if source["radius"] == "drawn" else ""
    return f"attacked {attack}, untargeted, {source['norm']}, ε = {radius}{format_eps(source['eps'])}"
