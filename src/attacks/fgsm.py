"""Fast gradient sign method, in one step or iterated."""

from __future__ import annotations

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor

from src.attacks.base import Attack
from src.attacks.gradients import gradient, steepest
from src.attacks.query import Query
from src.threat import Norm, ThreatModel


class FGSM(Attack):
    """Along the gradient of the cross-entropy: one step of length eps, or several shorter ones.

    Papers: Goodfellow, Shlens, Szegedy 2014, "Explaining and Harnessing Adversarial Examples",
    https://arxiv.org/abs/1412.6572; iterated (basic iterative method): Kurakin, Goodfellow, Bengio 2016,
    https://arxiv.org/abs/1607.02533

    Norms: linf (the papers' sign step) and l2 (the fast gradient method: the normalised gradient). Untargeted and
    targeted. Where ours departs from the papers: images are clipped to [0, 1].

    Args:
        steps: 1 is the fast gradient sign method, more is the basic iterative method.
        step: length of a step in [0, 1] pixel units; None: ``eps / steps``.

    Shapes: images ``(B, C, H, W)`` in [0, 1], labels or targets ``(B,)``.

    Example::

        attacked = FGSM()(model, images, labels, ThreatModel(norm="linf", eps=0.3))
    """

    norms = frozenset({Norm.LINF, Norm.L2})

    def __init__(self, *, steps: PositiveInt = 1, step: PositiveFloat | None = None) -> None:
        self.steps = steps
        self.step = step

    def run(self, model: Query, x: Tensor, y: Tensor, threat: ThreatModel, *, generator: torch.Generator) -> Tensor:
        step = self.step or threat.radius(x) / self.steps
        images = x
        for _ in range(self.steps):
            _, slope = gradient(model, images, y, threat)
            images = threat.project(x, images + step * steepest(slope, threat.norm))
        return images
