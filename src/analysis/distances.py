"""How small a change suffices: distribution of the smallest perturbations found."""

from __future__ import annotations

from pathlib import Path

import torch
from pydantic import PositiveInt

from src.analysis.curves import ACCESS, paper_style, unit
from src.analysis.scene import Analysis, Scene, finish
from src.errors import UserError

_AIM = {"gray_box": "the bare classifier", "transfer": "the surrogate"}


class Distances(Analysis):
    """Share of the images that a minimal-norm attack turns within a radius, on the model it is aimed at.

    Under gray_box that is the bare classifier: how many of its images turn the defended model too, the record says.

    Args:
        images: first images looked at.
    """

    def __init__(self, *, images: PositiveInt = 200) -> None:
        self.images = images

    def draw(self, scene: Scene, path: Path) -> Path:
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator

        if not scene.minimal:
            raise UserError("this attack fills a budget; use one that searches the smallest change, such as attack=fmn")
        _, labels = scene.take(self.images)
        with paper_style():
            figure = Figure(figsize=(5.0, 3.4), dpi=200, layout="constrained")
            axis = figure.subplots()
            for access in scene.accesses:
                made = scene.attacked(access, self.images, float("inf"))
                turned = torch.where(made.attempted, made.distance, torch.zeros_like(made.distance)).double()
                turned[made.attempted & ~made.success] = float("inf")
                found = turned[turned.isfinite()].sort().values
                share = 100 * torch.arange(1, len(found) + 1) / len(labels)
                color = ACCESS[access]
                axis.step(
                    found.cpu(),
                    share,
                    where="post",
                    color=color,
                    label=f"{access}: {_AIM.get(access, 'the defended model')}",
                )
                if len(found):
                    median = float(turned.quantile(0.5, interpolation="higher"))
                    axis.axvline(median, color=color, linewidth=0.8, linestyle=(0, (2, 2)))
            axis.set_xlabel(f"smallest perturbation found ({unit(scene.norm)})")
            axis.set_ylabel("images turned (%)")
            axis.set_ylim(-3, 103)
            axis.set_xlim(left=0)
            axis.xaxis.set_major_locator(MaxNLocator("auto", integer=scene.norm == "l0"))
            axis.legend(frameon=False)
            text = "Dotted: median. Images wrong from the start count as turned at 0."
            caption = scene.caption(len(labels), radius="inf", access=", ".join(scene.accesses))
            return finish(figure, f"{caption} {text}", path)
