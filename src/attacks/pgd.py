"""Projected gradient descent."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor

from src.attacks.base import Attack, fooled
from src.attacks.gradients import LOSSES, dlr, gradient, steepest, toward
from src.attacks.query import Query
from src.threat import Norm, ThreatModel


class PGD(Attack):
    """Steps along a loss's gradient, each followed by projection onto the ball and the box.

    Papers: Madry, Makelov, Schmidt, Tsipras, Vladu 2017, "Towards Deep Learning Models Resistant to Adversarial
    Attacks", https://arxiv.org/abs/1706.06083; momentum: Dong et al. 2018, https://arxiv.org/abs/1710.06081; sparse
    steps for l1: Tramer, Boneh 2019, https://arxiv.org/abs/1904.13000

    Norms: linf, l2, l1. Untargeted and targeted.

    Args:
        steps: gradient steps of one start.
        step: length of a step in [0, 1] pixel units; None: ``relative_step * eps / steps``.
        relative_step: reach of all steps together, in radii. 2.5 is the choice of Madry's CIFAR-10 challenge.
        random_start: begin at a random point of the ball instead of the image itself: linf uniform; l2 and l1
            uniform in length, since a point drawn by volume lies on the surface of so many dimensions, from where the
            steps have to undo it first.
        restarts: starts per image; each goes only to the images that no earlier start has turned.
        loss: ``ce`` cross-entropy, ``dlr`` difference of logits ratio (targeted: the targeted one, as the other is flat
            where the target's logit is the third largest), ``margin`` (Carlini-Wagner).
        momentum: share of the previous direction kept; 1.0 is MI-FGSM.
        sparsity: l1 only: share of the values that one step moves.

    Shapes: images ``(B, C, H, W)`` in [0, 1], labels or targets ``(B,)``.

    Where ours departs from the papers: an image that is already misclassified leaves the batch, since more steps cannot
    change its verdict (``threat.exhaust`` keeps it in, for images that are meant for another model).

    Example::

        attacked = PGD(steps=40, restarts=5)(model, images, labels, ThreatModel(norm="linf", eps=8 / 255))
    """

    norms = frozenset({Norm.LINF, Norm.L2, Norm.L1})

    def __init__(
        self,
        *,
        steps: PositiveInt = 40,
        step: PositiveFloat | None = None,
        relative_step: PositiveFloat = 2.5,
        random_start: bool = True,
        restarts: PositiveInt = 1,
        loss: Literal["ce", "dlr", "margin"] = "ce",
        momentum: NonNegativeFloat = 0.0,
        sparsity: Annotated[float, Field(gt=0, le=1)] = 0.05,
    ) -> None:
        self.steps = steps
        self.step = step
        self.relative_step = relative_step
        self.random_start = random_start
        self.restarts = restarts
        self.loss = LOSSES[loss]
        self.momentum = momentum
        self.sparsity = sparsity

    def run(self, model: Query, x: Tensor, y: Tensor, threat: ThreatModel, *, generator: torch.Generator) -> Tensor:
        result, todo = x.clone(), torch.arange(len(x), device=x.device)
        label = self._label(model, x, threat)
        for _ in range(self.restarts):
            own = None if label is None else label[todo]
            images, done = self._ascend(model.of(todo), x[todo], y[todo], own, threat, generator)
            result[todo] = images
            todo = todo[~done]
            if not len(todo):
                break
        return result

    def _label(self, model: Query, x: Tensor, threat: ThreatModel) -> Tensor | None:
        """The classes that the targeted ratio compares the target with: those of the clean images."""
        if not (threat.targeted and self.loss is dlr):
            return None
        return model.clean(x).argmax(dim=1)

    def _ascend(
        self,
        model: Query,
        x: Tensor,
        y: Tensor,
        label: Tensor | None,
        threat: ThreatModel,
        generator: torch.Generator,
    ) -> tuple[Tensor, Tensor]:
        """One start: the images reached ``(B, C, H, W)`` and whether each has met the goal ``(B,)``."""
        step = self.step or self.relative_step * threat.radius(x) / self.steps
        current = threat.project(x, x + self._start(x, threat, generator)) if self.random_start else x
        result, done = current.clone(), torch.zeros(len(x), dtype=torch.bool, device=x.device)
        todo = torch.arange(len(x), device=x.device)
        trend = torch.zeros_like(x) if self.momentum else None
        left = model
        for _ in range(self.steps):
            loss = self.loss if label is None else toward(label[todo], refusal=model.rejects)
            logits, slope = gradient(left, current, y[todo], threat, loss)
            hit = fooled(logits, y[todo], threat)
            done[todo] |= hit
            # An image that was turned once and came back keeps the turned version.
            result[todo] = torch.where((hit | ~done[todo]).view(-1, 1, 1, 1), current, result[todo])
            if not threat.exhaust and bool(hit.any()):
                keep = ~hit
                todo, current, slope = todo[keep], current[keep], slope[keep]
                if not len(todo):
                    return result, done
                left = model.of(todo)
            if trend is not None:
                length = slope.abs().mean(dim=(1, 2, 3), keepdim=True).clamp_min(torch.finfo(slope.dtype).tiny)
                slope = trend[todo] = self.momentum * trend[todo] + slope / length
            current = threat.project(x[todo], current + step * self._direction(slope, current, threat.norm))
        with torch.no_grad():
            hit = fooled(left(current), y[todo], threat)
        result[todo] = torch.where((hit | ~done[todo]).view(-1, 1, 1, 1), current, result[todo])
        done[todo] |= hit
        return result, done

    def _direction(self, slope: Tensor, current: Tensor, norm: Norm) -> Tensor:
        """A step of length one in ``norm``."""
        if norm is not Norm.L1:
            return steepest(slope, norm)
        # The steepest l1 step moves a single value; spread over the largest few it gets on faster. Values that stand
        # at the end of the box in that direction cannot move and would waste the step.
        blocked = ((current <= 0) & (slope < 0)) | ((current >= 1) & (slope > 0))
        size = slope.abs().masked_fill(blocked, 0).flatten(1)
        count = max(1, round(self.sparsity * size.shape[1]))
        least = size.topk(count, dim=1).values[:, -1:]
        chosen = ((size >= least) & (size > 0)).to(slope.dtype).view_as(slope)
        return slope.sign() * chosen / chosen.sum(dim=(1, 2, 3), keepdim=True).clamp_min(1)

    @staticmethod
    def _start(x: Tensor, threat: ThreatModel, generator: torch.Generator) -> Tensor:
        """A point drawn from the ball of radius eps, on the CPU so that every device draws the same."""
        radius = threat.radius(x)
        if threat.norm is Norm.LINF:
            return (torch.rand(x.shape, generator=generator) * 2 - 1).to(x.device) * radius
        noise = torch.randn(x.shape, generator=generator).flatten(1)
        direction = noise / torch.linalg.vector_norm(noise, ord=threat.norm.order, dim=1, keepdim=True)
        length = torch.rand(len(x), 1, generator=generator)
        return (radius * length * direction).view_as(x).to(x.device)
