"""AutoAttack: the ensemble that published robust accuracies are measured with."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import PositiveInt
from torch import Tensor

from src.attacks.apgd import APGD
from src.attacks.base import Attack
from src.attacks.combine import Ensemble
from src.attacks.query import Query
from src.attacks.square import Square
from src.threat import Norm, ThreatModel


class AutoAttack(Ensemble):
    """APGD, FAB and Square one after the other, each on the images that still hold.

    Papers: Croce, Hein 2020, "Reliable evaluation of adversarial robustness with an ensemble of diverse parameter-free
    attacks", https://arxiv.org/abs/2003.01690; l1: Croce, Hein 2021, https://arxiv.org/abs/2103.01208. The versions are
    those of https://github.com/fra31/auto-attack:

    - ``standard``: APGD on cross-entropy, APGD on the targeted ratio towards 9 classes, FAB towards 9 classes, Square.
      For l1 the APGDs begin in larger balls, the first with 5 restarts, the second towards 5 classes.
    - ``plus``: APGD on cross-entropy and on the ratio with 5 restarts each, FAB with 5 restarts, Square, and the
      targeted APGD and FAB towards 9 classes.
    - ``rand``, for models that answer at random: APGD on cross-entropy and on the ratio, each step's gradient the mean
      of 20.

    Norms: linf, l2, l1. Untargeted only.

    Args:
        version: see above.
        steps: gradient steps of each start of APGD and FAB.
        queries: times that Square may show an image to the model.
        eot_iter: ``rand`` only: gradients averaged in each step.

    Shapes: images ``(B, C, H, W)`` in [0, 1], labels ``(B,)``.

    Where ours departs from the reference: what its members say of themselves; an image that holds comes back as the
    first APGD left it instead of clean; images meant for another model or other draws (``threat.exhaust``) go on to
    further members until the goal leads by far, and are those in which it leads by most; with fewer than ten classes
    the targeted members try all there are.

    Example::

        attacked = AutoAttack()(model, images, labels, ThreatModel(norm="linf", eps=8 / 255))
    """

    norms = frozenset({Norm.LINF, Norm.L2, Norm.L1})
    can_target = False

    def __init__(
        self,
        *,
        version: Literal["standard", "plus", "rand"] = "standard",
        steps: PositiveInt = 100,
        queries: PositiveInt = 5000,
        eot_iter: PositiveInt = 20,
    ) -> None:
        self.version = version
        self.steps = steps
        self.queries = queries
        self.eot_iter = eot_iter

    def parts(self, norm: Norm) -> dict[str, Attack]:
        """The attacks of this version in their order."""
        steps, l1 = self.steps, norm is Norm.L1
        if self.version == "rand":
            return {
                "apgd-ce": APGD(steps=steps, eot_iter=self.eot_iter),
                "apgd-dlr": APGD(steps=steps, eot_iter=self.eot_iter, loss="dlr"),
            }
        from src.attacks.fab import FAB

        square = Square(queries=self.queries, rescale_schedule=False)
        if self.version == "standard":
            classes = 5 if l1 else 9
            return {
                "apgd-ce": APGD(steps=steps, restarts=5 if l1 else 1, enlarge=l1),
                "apgd-t": APGD(steps=steps, loss="dlr_targeted", target_classes=classes, enlarge=l1),
                "fab-t": FAB(steps=steps, target_classes=9, stop_at_eps=True),
                "square": square,
            }
        return {
            "apgd-ce": APGD(steps=steps, restarts=5),
            "apgd-dlr": APGD(steps=steps, restarts=5, loss="dlr"),
            "fab": FAB(steps=steps, restarts=5, stop_at_eps=True),
            "square": square,
            "apgd-t": APGD(steps=steps, loss="dlr_targeted", target_classes=9),
            "fab-t": FAB(steps=steps, target_classes=9, stop_at_eps=True),
        }

    def run(self, model: Query, x: Tensor, y: Tensor, threat: ThreatModel, *, generator: torch.Generator) -> Tensor:
        parts = self.parts(threat.norm).values()
        return self.in_turn(parts, model, x, y, threat, generator, all_images=False)
