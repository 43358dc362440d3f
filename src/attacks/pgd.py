"""Projected gradient descent."""

from __future__ import annotations

import math

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor

from src.attacks.base import Attack, Model, fooled, gradient, steepest
from src.threat import Norm, ThreatModel


class PGD(Attack):
    """Steps along the cross-entropy's gradient, each followed by projection onto the ball and the box.

    Paper: Madry, Makelov, Schmidt, Tsipras, Vladu 2017, "Towards Deep Learning Models Resistant to Adversarial
    Attacks", https://arxiv.org/abs/1706.06083

    Norms: linf, l2. Untargeted and targeted.

    Args:
        steps: gradient steps of one start.
        step: length of a step in [0, 1] pixel units; None: ``relative_step * eps / steps``.
        relative_step: reach of all steps together, in radii. 2.5 is the choice of Madry's CIFAR-10 challenge.
        random_start: begin at a uniform point of the ball (for l2: uniform in direction and volume) instead of the
            image itself.
        restarts: starts per image; each goes only to the images that no earlier start has turned.

    Where ours departs from the paper: an image that is already misclassified leaves the batch, since more steps cannot
    change its verdict (``threat.exhaust`` keeps it in, for images that are meant for another model).

    Example::

        attacked = PGD(steps=40, restarts=5)(model, images, labels, ThreatModel(norm="linf", eps=8 / 255))
    """

    norms = frozenset({Norm.LINF, Norm.L2})

    def __init__(
        self,
        *,
        steps: PositiveInt = 40,
        step: PositiveFloat | None = None,
        relative_step: PositiveFloat = 2.5,
        random_start: bool = True,
        restarts: PositiveInt = 1,
    ) -> None:
        self.steps = steps
        self.step = step
        self.relative_step = relative_step
        self.random_start = random_start
        self.restarts = restarts

    def run(self, model: Model, x: Tensor, y: Tensor, threat: ThreatModel, *, generator: torch.Generator) -> Tensor:
        result, todo = x.clone(), torch.arange(len(x), device=x.device)
        for _ in range(self.restarts):
            images, done = self._ascend(model, x[todo], y[todo], threat, generator)
            result[todo] = images
            todo = todo[~done]
            if not len(todo):
                break
        return result

    def _ascend(
        self, model: Model, x: Tensor, y: Tensor, threat: ThreatModel, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """One start: the images reached ``(B, C, H, W)`` and whether each has met the goal ``(B,)``."""
        step = self.step or self.relative_step * threat.radius(x) / self.steps
        current = threat.project(x, x + self._start(x, threat, generator)) if self.random_start else x
        result, done = current.clone(), torch.zeros(len(x), dtype=torch.bool, device=x.device)
        todo = torch.arange(len(x), device=x.device)
        for _ in range(self.steps):
            logits, slope = gradient(model, current, y[todo], threat)
            hit = fooled(logits, y[todo], threat)
            done[todo] |= hit
            result[todo] = torch.where((hit | ~done[todo]).view(-1, 1, 1, 1), current, result[todo])
            if not threat.exhaust:
                keep = ~hit
                todo, current, slope = todo[keep], current[keep], slope[keep]
                if not len(todo):
                    return result, done
            current = threat.project(x[todo], current + step * steepest(slope, threat.norm))
        with torch.no_grad():
            hit = fooled(model(current), y[todo], threat)
        # An image that was turned once and came back keeps the turned version.
        result[todo] = torch.where((hit | ~done[todo]).view(-1, 1, 1, 1), current, result[todo])
        done[todo] |= hit
        return result, done

    @staticmethod
    def _start(x: Tensor, threat: ThreatModel, generator: torch.Generator) -> Tensor:
        """A point drawn uniformly from the ball of radius eps, on the CPU so that every device draws the same."""
        radius = threat.radius(x)
        if threat.norm is Norm.LINF:
            return (torch.rand(x.shape, generator=generator) * 2 - 1).to(x.device) * radius
        noise = torch.randn(x.shape, generator=generator).flatten(1)
        direction = noise / torch.linalg.vector_norm(noise, dim=1, keepdim=True)
        length = torch.rand(len(x), 1, generator=generator) ** (1 / math.prod(x.shape[1:]))
        return (radius * length * direction).view_as(x).to(x.device)
