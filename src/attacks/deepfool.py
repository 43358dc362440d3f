"""DeepFool."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field, NonNegativeFloat, PositiveInt
from torch import Tensor

from src.attacks.base import TINY, Attack, fooled
from src.attacks.gradients import steepest
from src.attacks.minimal import dual_size, nearest_boundary
from src.attacks.query import Query
from src.threat import Norm, ThreatModel

MORE_AT_FIRST = 1  # contenders of the first step, which knows their logits but not yet the sizes of their gradients
NUDGE = 1e-6  # of each step, in [0, 1] pixels: off a boundary that the image stands on
STRIDE = 1e-3  # of each step, in distances from the clean image: clipping makes steps fall short by a share, so that
# boundaries are neared ever more slowly and 3 % of MNIST was never turned


class DeepFool(Attack):
    """Again and again to the nearest boundary of the linearised classifier, until the class changes.

    Paper: Moosavi-Dezfooli, Fawzi, Frossard 2016, "DeepFool: a simple and accurate method to fool deep neural
    networks", https://arxiv.org/abs/1511.04599

    Norms: l2, linf; minimal. Untargeted.

    Args:
        steps: most linearisations of one image.
        overshoot: share by which each step goes beyond the boundary it aims at.
        candidates: classes considered, the image's own included: those with the largest logits at the clean image.
        contenders: of the candidates, those whose gradients are computed at a step, one more at the first; None: all.
        batch_size: most images times classes in one backward pass; bounds the memory.

    Shapes: images ``(B, C, H, W)`` in [0, 1], labels ``(B,)``.

    Where ours departs from the paper: only the contenders with the nearest boundaries, by their present logits and the
    sizes their gradients had when last seen, are linearised; images are clipped to [0, 1]
    after every step; a step is longer by a thousandth of the way come so far (the authors' code: by 1e-4), which gets
    an image across a boundary; images that have turned leave before their gradients are asked for.

    Example::

        attacked = DeepFool()(model, images, labels, ThreatModel(norm="l2", eps=math.inf))
        print(attacked.distance.median())
    """

    norms = frozenset({Norm.L2, Norm.LINF})
    minimal = True
    can_target = False

    def __init__(
        self,
        *,
        steps: PositiveInt = 50,
        overshoot: NonNegativeFloat = 0.02,
        candidates: Annotated[int, Field(ge=2)] = 10,
        contenders: PositiveInt | None = 3,
        batch_size: PositiveInt = 1024,
    ) -> None:
        self.steps = steps
        self.overshoot = overshoot
        self.candidates = candidates
        self.contenders = contenders
        self.batch_size = batch_size

    def run(self, model: Query, x: Tensor, y: Tensor, threat: ThreatModel, *, generator: torch.Generator) -> Tensor:
        result, todo, current = x.clone(), torch.arange(len(x), device=x.device), x
        logits = model.clean(x)
        ranked = logits.scatter(1, y[:, None], -torch.inf).argsort(dim=1, descending=True)
        others = ranked[:, : min(self.candidates, logits.shape[1]) - 1]
        if not others.shape[1]:
            return result  # a single class has no boundary
        sizes = torch.ones_like(others, dtype=x.dtype)  # dual sizes of the slopes, as last seen
        for step in range(self.steps):
            own = y[todo, None]
            gaps = logits.gather(1, others) - logits.gather(1, own)
            few = others.shape[1]
            if self.contenders is not None:
                few = min(few, self.contenders + (0 if step else MORE_AT_FIRST))
            chosen = (gaps.abs() / sizes.clamp_min(TINY)).topk(few, dim=1, largest=False).indices
            toward = others.gather(1, chosen)
            gap, slope, size = nearest_boundary(
                model.of(todo), current, toward, own.expand_as(toward), threat.norm, batch_size=self.batch_size
            )
            sizes = sizes.scatter(1, chosen, size)
            length = (1 + self.overshoot) * (gap.abs() / dual_size(slope, threat.norm).clamp_min(TINY) + NUDGE)
            length = length + STRIDE * threat.distance(x[todo], current)
            current = (current + length.view(-1, 1, 1, 1) * steepest(slope, threat.norm)).clamp(0, 1)
            with torch.no_grad():
                logits = model.of(todo, torch.float32)(current)
            hit = fooled(logits, y[todo], threat)
            result[todo[hit]] = current[hit]
            keep = ~hit
            if not bool(keep.any()):
                break
            todo, current, logits = todo[keep], current[keep], logits[keep]
            others, sizes = others[keep], sizes[keep]
        return result
