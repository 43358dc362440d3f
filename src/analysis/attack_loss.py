"""Is the attack finished? Loss and accuracy as it is given more steps."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from pydantic import PositiveInt
from torch import Tensor

from src.analysis.curves import ACCESS, paper_style
from src.analysis.scene import Analysis, Scene, finish
from src.errors import UserError


class AttackLoss(Analysis):
    """Mean cross-entropy and accuracy of the defended model on the attack's result after 1, 2, 4, … steps.

    Accuracy is that of the records: an image that is rejected has held unless its clean version was rejected. Of the
    loss a rejection counts as the right answer, as attackers take it.

    The steps are as long as those of the whole attack. One that plans by their number (apgd, fmn) plans anew for each.
    A loss that still rises at the end, or an accuracy that still falls, says that more steps would do more harm. The
    last point is twice the steps that were asked for.

    Args:
        images: first images looked at.
    """

    def __init__(self, *, images: PositiveInt = 128) -> None:
        self.images = images

    def draw(self, scene: Scene, path: Path) -> Path:
        from matplotlib.figure import Figure

        if scene.steps is None:
            raise UserError("this attack counts no steps; use one that does, such as attack=pgd")
        powers = (2**k for k in range(12) if 2**k <= scene.steps / 1.5)  # labels of two near each other would touch
        budgets = sorted({1, scene.steps, 2 * scene.steps, *powers})
        images, labels = scene.take(self.images)
        before = scene.answers(scene.defended, images)[0]
        with paper_style():
            figure = Figure(figsize=(7.0, 3.1), dpi=200, layout="constrained")
            left, right = figure.subplots(1, 2)
            for access in scene.accesses:
                losses, accuracies = [], []
                for steps in budgets:
                    made = scene.attack(access, images, labels, scene.eps, steps=steps, exhaust=True).images
                    with torch.no_grad():
                        logits = scene.defended(made).float()
                    shown = _accepted(logits, labels) if getattr(scene.defended, "rejects", False) else logits
                    losses.append(float(F.cross_entropy(shown, labels)))
                    held = scene.held(before, logits.argmax(1).cpu())
                    accuracies.append(100 * float(held.double().mean()))
                look = {"color": ACCESS[access], "marker": "o", "markersize": 3.5, "label": access}
                left.plot(budgets, losses, **look)
                right.plot(budgets, accuracies, **look)
            for axis in (left, right):
                axis.set_xscale("log", base=2)
                axis.set_xticks(budgets, [str(b) for b in budgets])
                axis.minorticks_off()
                axis.set_xlabel("steps of the attack")
                axis.axvline(scene.steps, color="#999999", linewidth=0.8, linestyle=(0, (2, 2)))
            left.set_ylabel("cross-entropy (nat)")
            right.set_ylabel("accuracy, defended (%)")
            right.set_ylim(-3, 103)
            left.legend(frameon=False)
            text = f"Of the defended model; what is turned is attacked on. Dotted: the {scene.steps} steps of this job."
            return finish(
                figure, f"{scene.caption(len(labels), access=', '.join(scene.accesses))} {text}{scene.rule}", path
            )


def _accepted(logits: Tensor, labels: Tensor) -> Tensor:
    """Logits of the classes without that of rejection, which stands in place of the right one where it is likelier."""
    right = labels[:, None]
    return logits[:, :-1].scatter(1, right, torch.maximum(logits.gather(1, right), logits[:, -1:]))
