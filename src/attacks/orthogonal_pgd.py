"""Orthogonal projected gradient descent, against defenses that reject."""

from __future__ import annotations

import math
from typing import Annotated

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from src.attacks.base import Attack, fooled
from src.attacks.gradients import derivative, margin, steepest
from src.attacks.query import Query
from src.threat import Norm, ThreatModel


class OrthogonalPGD(Attack):
    """First across the class boundary, then out of the detector's sight; neither step undoes the other.

    Paper: Bryniarski, Hingun, Pachuca, Wang, Carlini 2021, "Evading Adversarial Example Detection Defenses with
    Orthogonal Projected Gradient Descent", https://arxiv.org/abs/2106.15023

    While an image is classified right it climbs along the classifier's margin, and once it is not along the detector's
    acceptance. As long as it is rejected, the part of either direction that goes against the other is left out. An
    attack on one sum of both is held up where they are at odds: it ends rejected, or right.

    Norms: linf, l2. Untargeted and targeted. On a model that rejects nothing it climbs the margin, with steps that
    shrink; an ensemble spares such a model this member.

    Args:
        steps: each with one forward and two backward passes.
        longest: length of the first step, in radii (linf: root mean square over the values, in half radii).
        shortest: length of the last step; between them it falls along a cosine.

    Shapes: images ``(B, C, H, W)`` in [0, 1], labels or targets ``(B,)``.

    Where ours departs from the paper: steps follow the gradient, not its sign, which is orthogonal to nothing; they
    shrink, since a detector sees a residue of the size of a step; only what is at odds is taken out of a direction;
    the margin for the cross-entropy; an image that is turned and accepted leaves the batch (``threat.exhaust`` keeps it
    in).

    Example::

        attacked = OrthogonalPGD()(detector, images, labels, ThreatModel(norm="linf", eps=0.3))
    """

    norms = frozenset({Norm.LINF, Norm.L2})
    against_rejection = True

    def __init__(
        self,
        *,
        steps: PositiveInt = 100,
        longest: Annotated[float, Field(gt=0, le=2)] = 0.25,
        shortest: Annotated[float, Field(gt=0, le=2)] = 0.005,
    ) -> None:
        self.steps = steps
        self.longest = longest
        self.shortest = shortest

    def run(self, model: Query, x: Tensor, y: Tensor, threat: ThreatModel, *, generator: torch.Generator) -> Tensor:
        result, current, todo = x.clone(), x, torch.arange(len(x), device=x.device)
        done = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        unit = threat.radius(x) * (math.sqrt(math.prod(x.shape[1:])) / 2 if threat.norm is Norm.LINF else 1.0)
        for step in range(self.steps + 1):
            way, hit = self._look(model.of(todo), current, y[todo], threat)
            done[todo] |= hit
            result[todo] = torch.where((hit | ~done[todo]).view(-1, 1, 1, 1), current, result[todo])
            if step == self.steps:
                break
            if not threat.exhaust and bool(hit.any()):
                todo, current, way = todo[~hit], current[~hit], way[~hit]
                if not len(todo):
                    break
            fall = (1 + math.cos(math.pi * step / self.steps)) / 2
            length = self.shortest + (self.longest - self.shortest) * fall
            current = threat.project(x[todo], current + length * unit * way)
        return result

    def _look(self, model: Query, current: Tensor, y: Tensor, threat: ThreatModel) -> tuple[Tensor, Tensor]:
        """The direction to go, of length one, and whether the goal is met."""
        current = current.detach().requires_grad_()
        logits, lead = model.apart(current)
        gain = margin(logits, y) * (-1 if threat.targeted else 1)
        turned = fooled(logits.detach(), y, threat)
        toward = derivative(gain.sum(), current, retain_graph=lead is not None)
        if lead is None:
            return steepest(toward, Norm.L2), turned
        away = derivative(-lead.sum(), current)
        toward, away = steepest(toward, Norm.L2), steepest(away, Norm.L2)
        rejected = (lead > 0).detach()
        odds = (toward * away).flatten(1).sum(dim=1).clamp_max(0).view(-1, 1, 1, 1)
        past_class = torch.where(rejected.view(-1, 1, 1, 1), toward - odds * away, toward)
        way = torch.where(turned.view(-1, 1, 1, 1), away - odds * toward, past_class)
        return steepest(way, Norm.L2), turned & ~rejected
