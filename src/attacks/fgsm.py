"""Fast gradient sign method."""

from __future__ import annotations

import torch
from torch import Tensor

from src.attacks.base import Attack, Model, gradient, steepest
from src.threat import Norm, ThreatModel


class FGSM(Attack):
    """One step of length eps along the gradient of the cross-entropy.

    Paper: Goodfellow, Shlens, Szegedy 2014, "Explaining and Harnessing Adversarial Examples",
    https://arxiv.org/abs/1412.6572

    Norms: linf (the paper's sign step) and l2 (the fast gradient method: the normalised gradient). Untargeted and
    targeted. Where ours departs from the paper: images are clipped to [0, 1].

    Example::

        attacked = FGSM()(model, images, labels, ThreatModel(norm="linf", eps=0.3))
    """

    norms = frozenset({Norm.LINF, Norm.L2})

    def run(self, model: Model, x: Tensor, y: Tensor, threat: ThreatModel, *, generator: torch.Generator) -> Tensor:
        _, slope = gradient(model, x, y, threat)
        return threat.project(x, x + threat.radius(x) * steepest(slope, threat.norm))
