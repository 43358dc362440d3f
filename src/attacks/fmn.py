"""Fast minimum-norm attack."""

from __future__ import annotations

import math
from typing import Annotated

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor

from src.attacks.base import TINY, Attack, fooled
from src.attacks.gradients import gradient, margin, steepest
from src.attacks.minimal import Nearest, dual_size
from src.attacks.query import Query
from src.threat import Norm, ThreatModel, project_l1_box


class FMN(Attack):
    """Gradient steps inside a ball that shrinks while the image is adversarial and grows while it is not.

    Paper: Pintor, Roli, Brendel, Biggio 2021, "Fast Minimum-norm Adversarial Attacks through Adaptive Norm
    Constraints", https://arxiv.org/abs/2102.12827

    Norms: l0 (counts pixels), l1, l2, linf; minimal. Untargeted and targeted.

    Args:
        steps: gradient steps.
        step: first length of a step, l2, in [0, 1] pixel units; falls along half a cosine.
        last_step: its last length; None: a hundredth of ``step``.
        gamma: first share by which the ball shrinks or grows; falls along half a cosine.
        last_gamma: its last value.

    Shapes: images ``(B, C, H, W)`` in [0, 1], labels or targets ``(B,)``.

    Where ours departs from the paper: as long as nothing is found the ball reaches beyond the estimated boundary by
    gamma, without which rounding keeps an image of a nearly linear model right before it for ever; l1 projects onto
    the ball and the box together instead of one after the other; l0 counts a pixel once, whatever number of its
    channels change; the image after the last step is looked at as well; the start is always the clean image.

    Example::

        attacked = FMN(steps=200)(model, images, labels, ThreatModel(norm="l0", eps=math.inf))
        print(attacked.distance.median())
    """

    norms = frozenset({Norm.L0, Norm.L1, Norm.L2, Norm.LINF})
    minimal = True

    def __init__(
        self,
        *,
        steps: PositiveInt = 100,
        step: PositiveFloat = 1.0,
        last_step: PositiveFloat | None = None,
        gamma: Annotated[float, Field(gt=0, lt=1)] = 0.05,
        last_gamma: Annotated[float, Field(gt=0, lt=1)] = 0.001,
    ) -> None:
        self.steps = steps
        self.step = step
        self.last_step = last_step or step / 100
        self.gamma = gamma
        self.last_gamma = last_gamma

    def run(self, model: Query, x: Tensor, y: Tensor, threat: ThreatModel, *, generator: torch.Generator) -> Tensor:
        nearest, rows = Nearest(x), torch.arange(len(x), device=x.device)
        images = x
        widest = threat.distance(x, torch.where(x > 0.5, 0.0, 1.0))  # the farthest corner of the box
        radius = torch.ones_like(widest) if threat.norm is Norm.L0 else torch.full_like(widest, torch.inf)
        for index in range(self.steps):
            cosine = (1 + math.cos(math.pi * index / self.steps)) / 2
            step = self.last_step + (self.step - self.last_step) * cosine
            gamma = self.last_gamma + (self.gamma - self.last_gamma) * cosine

            logits, slope = gradient(model, images, y, threat, margin)
            hit = fooled(logits, y, threat)
            distance = threat.distance(x, images)
            nearest.offer(rows, images, distance, hit)
            if threat.norm is Norm.L0:
                less = torch.minimum(radius - 1, (radius * (1 - gamma)).floor()).minimum(nearest.distance)
                more = torch.maximum(radius + 1, (radius * (1 + gamma)).floor())
                radius = torch.where(hit, less, more).clamp_min(1)
            else:
                boundary = margin(logits, y).abs() / dual_size(slope, threat.norm).clamp_min(TINY)
                found = nearest.distance.isfinite()
                more = torch.where(found, radius, distance + boundary) * (1 + gamma)
                radius = torch.where(hit, torch.minimum(radius * (1 - gamma), nearest.distance), more)
            radius = torch.minimum(radius, widest)
            delta = images - x + step * steepest(slope, Norm.L2)
            images = (x + _into_ball(x, delta, radius, threat.norm)).clamp(0, 1)
        with torch.no_grad():
            hit = fooled(model(images), y, threat)
        nearest.offer(rows, images, threat.distance(x, images), hit)
        return nearest.images


def _into_ball(x: Tensor, delta: Tensor, radius: Tensor, norm: Norm) -> Tensor:
    """The change nearest to ``delta`` of size at most ``radius`` ``(B,)``; the box aside, but for l1."""
    limit = radius.view(-1, 1, 1, 1)
    if norm is Norm.LINF:
        return torch.minimum(torch.maximum(delta, -limit), limit)
    if norm is Norm.L2:
        size = torch.linalg.vector_norm(delta.flatten(1), dim=1).clamp_min(TINY)
        return delta * (radius / size).clamp_max(1).view(-1, 1, 1, 1)
    if norm is Norm.L0:
        change = delta.abs().sum(dim=1).flatten(1)
        least = change.sort(dim=1, descending=True).values.gather(1, radius.long()[:, None] - 1)
        return delta * (change >= least).view(len(delta), 1, *delta.shape[2:])
    return project_l1_box(x, delta, radius)
