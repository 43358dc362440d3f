"""What is taken for what: clean, attacked and defended, and where the attack drives each class."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from pydantic import PositiveInt
from torch import Tensor

from src.analysis.curves import FONT, paper_style
from src.analysis.scene import Analysis, Scene, finish


class Confusion(Analysis):
    """Four matrices: the bare classifier on clean and on attacked images, the defended model on both.

    Those of attacked images are of what was right before, so that all that is off the diagonal is the attack's doing.

    Args:
        images: first images looked at.
    """

    def __init__(self, *, images: PositiveInt = 500) -> None:
        self.images = images

    def draw(self, scene: Scene, path: Path) -> Path:
        from matplotlib.figure import Figure

        clean, labels = scene.take(self.images)
        access = scene.strongest
        bare_access = "gray_box" if "gray_box" in scene.accesses else access
        attacked = scene.attacked(access, self.images).images
        on_bare = scene.attacked(bare_access, self.images).images
        truth = labels.cpu()
        bare, defended = scene.answers(scene.classifier, clean)[0], scene.answers(scene.defended, clean)[0]
        bare_after, after = scene.answers(scene.classifier, on_bare)[0], scene.answers(scene.defended, attacked)[0]
        held = scene.held(defended, after)
        everything = torch.ones_like(truth, dtype=torch.bool)
        parts = [
            ("bare classifier, clean", bare, bare == truth, "right", everything),
            (f"bare, attacked ({bare_access})", bare_after, bare_after == truth, "right", bare == truth),
            ("defended model, clean", defended, defended == truth, "right", everything),
            (f"defended, attacked ({access})", after, held, "held", defended == truth),
        ]
        count = max(len(scene.classes), *(int(said.max()) + 1 for _, said, *_ in parts))
        names = [scene.name(i) for i in range(count)]
        with paper_style():
            figure = Figure(figsize=(7.0, 6.6), dpi=200, layout="constrained")
            axes = figure.subplots(2, 2).flat
            for axis, (title, said, good, word, rows) in zip(axes, parts, strict=True):
                shares = confusion(truth[rows], said[rows], count)
                picture = _matrix(axis, shares, names[: len(scene.classes)], names)
                axis.set_title(f"{title}: {100 * float(good.double().mean()):.1f} % {word}", fontsize=FONT + 1)
            figure.colorbar(picture, ax=figure.axes, shrink=0.5, label="share of the class (%)")
            accesses = " and ".join(dict.fromkeys((bare_access, access)))
            text = (
                "Above each matrix: the share of all images. Rows: the true class; columns: the answer. Those of "
                "attacked images are of what was right before: off the diagonal is where the attack drives each class."
                f"{scene.rule}"
            )
            return finish(figure, f"{scene.caption(len(labels), access=accesses)} {text}", path)


def confusion(labels: Tensor, said: Tensor, count: int) -> Tensor:
    """Percentages of each true class, ``(count, count)``; a class without images is a row of zeros."""
    table = torch.zeros(count, count, dtype=torch.float64)
    table.index_put_((labels, said), torch.ones(len(labels), dtype=torch.float64), accumulate=True)
    return 100 * table / table.sum(dim=1, keepdim=True).clamp_min(1)


def _matrix(axis: Any, shares: Tensor, rows: list[str], columns: list[str]) -> Any:
    shown = shares[: len(rows)]
    picture = axis.imshow(shown.numpy(), cmap="cividis", vmin=0, vmax=100)
    crowded = len(columns) > 12
    if not crowded:
        for i in range(len(rows)):
            for j in range(len(columns)):
                if shown[i, j] >= 0.5:
                    color = "black" if shown[i, j] > 55 else "white"
                    axis.text(j, i, f"{shown[i, j]:.0f}", ha="center", va="center", fontsize=FONT - 1, color=color)
    step = max(1, len(columns) // 20)
    axis.set_xticks(range(0, len(columns), step), columns[::step], rotation=90 if len(max(columns, key=len)) > 2 else 0)
    axis.set_yticks(range(0, len(rows), step), rows[::step])
    axis.set_xlabel("answer")
    axis.set_ylabel("true class")
    return picture
