"""What a detector sees: its scores of clean and attacked images, the threshold, and the ROC curve."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from pydantic import PositiveInt
from torch import Tensor

from src.analysis.curves import ACCESS, paper_style
from src.analysis.scene import Analysis, Scene, finish
from src.errors import UserError


class Detector(Analysis):
    """Distributions of suspicion, and detection rate over false positive rate.

    Attacked are, as in the record, the images that were right before and that the model behind the detector gets wrong
    now: the others do no harm.

    Args:
        images: first images looked at.
    """

    def __init__(self, *, images: PositiveInt = 300) -> None:
        self.images = images

    @torch.no_grad()
    def draw(self, scene: Scene, path: Path) -> Path:
        from matplotlib.figure import Figure

        if not getattr(scene.defended, "rejects", False):
            raise UserError("this defense rejects nothing; use one that detects, such as defense=squeezing_detector")
        clean, labels = scene.take(self.images)
        before = _answers(scene.defended, clean)
        base, right = before["suspicion"], before["prediction"] == labels.cpu()
        attacked = {}
        for access in scene.accesses:
            with torch.enable_grad():
                made = scene.attacked(access, self.images).images
            after = _answers(scene.defended, made)
            attacked[access] = after["suspicion"][right & (after["behind"] != labels.cpu())]
        lowest = min(float(scores.min()) for scores in (base, *attacked.values()) if len(scores))
        with paper_style():
            figure = Figure(figsize=(7.0, 3.2), dpi=200, layout="constrained")
            left, curve = figure.subplots(1, 2)
            edges = torch.linspace(lowest, max(2.0, float(base.max())), 41).tolist()
            left.hist(base.clamp(edges[0], edges[-1]), edges, color="#bbbbbb", label=f"clean ({len(base)})")
            for access, scores in attacked.items():
                color, label = ACCESS[access], f"attacked, {access} ({len(scores)})"
                left.hist(scores.clamp(edges[0], edges[-1]), edges, color=color, histtype="step", label=label)
                if len(scores):
                    x, y, area = roc(base, scores)
                    style = (0, (4, 1.5)) if access == "gray_box" else "solid"  # where both agree, both are seen
                    curve.plot(x, y, color=color, linestyle=style, zorder=3, label=f"{access}: AUC {area:.3f}")
                    curve.plot(float((base > 1).double().mean()), float((scores > 1).double().mean()), "o", color=color)
            left.axvline(1, color="black", linewidth=1, linestyle=(0, (3, 2)))
            left.set_xlabel("suspicion (threshold 1, last bar: more)")
            left.set_ylabel("images")
            left.legend(framealpha=0.9, edgecolor="none")
            curve.plot([0, 1], [0, 1], color="#999999", linewidth=0.8, linestyle=(0, (2, 2)))
            curve.set_xlabel("clean images rejected (share)")
            curve.set_ylabel("attacked images rejected (share)")
            curve.legend(frameon=False, loc="lower right")
            text = "The threshold (dashed, dots) is set on clean validation images."
            return finish(figure, f"{scene.caption(len(labels), access=', '.join(scene.accesses))} {text}", path)


def _answers(defended: Any, images: Tensor) -> dict[str, Tensor]:
    """What a record is counted from: the answer, that of the model behind, and the suspicion, all of one draw."""
    parts = [defended.test_step({"image": images[i : i + 256]}, 0) for i in range(0, len(images), 256)]
    return {name: torch.cat([part[name] for part in parts]).cpu() for name in parts[0]}


def roc(clean: Tensor, attacked: Tensor) -> tuple[Tensor, Tensor, float]:
    """Share of clean and of attacked images at or above each score, from the highest down, and the area below."""
    cuts = torch.cat([clean, attacked]).sort(descending=True).values
    x = (clean[None] >= cuts[:, None]).double().mean(dim=1)
    y = (attacked[None] >= cuts[:, None]).double().mean(dim=1)
    start = torch.zeros(1, dtype=torch.float64)
    x, y = torch.cat([start, x]), torch.cat([start, y])
    return x, y, float(torch.trapezoid(y, x))
