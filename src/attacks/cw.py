"""Carlini and Wagner's l2 attack."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor

from src.attacks.base import TINY, Attack, lead
from src.attacks.gradients import gradient, margin
from src.attacks.minimal import Nearest, dual_size, shorten
from src.attacks.query import Query
from src.threat import Norm, ThreatModel

DECAY, DECAY_SQUARE, SMALLEST = 0.9, 0.999, 1e-12  # of Adam
MOST = 5.0  # learning rate in tanh space, which leads from one end of the box to near the other
STALLED = 0.99  # a loss that a tenth of the steps left above this share of itself goes nowhere


@dataclass
class _Search:
    """Where each image's search stands; all tensors have one row per image still in it."""

    rows: Tensor  # which images
    shift: Tensor  # (B, C, H, W) change in tanh space
    mean: Tensor  # Adam's running mean of gradients
    square: Tensor  # and of their squares
    c: Tensor  # (B,) weight of the logits against the distance
    low: Tensor  # largest weight that failed
    high: Tensor  # smallest weight that worked
    age: Tensor  # steps with this weight
    trial: Tensor  # weights tried before this one
    lr: Tensor  # halved after each weight that worked
    worked: Tensor  # bool: turned since the last look
    last: Tensor  # loss at the last look

    def keep(self, mask: Tensor) -> None:
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name)[mask])


class CW(Attack):
    """Adam on squared distance plus c times a hinge on the logits, with a binary search over c for each image.

    Paper: Carlini, Wagner 2017, "Towards Evaluating the Robustness of Neural Networks",
    https://arxiv.org/abs/1608.04644

    Norms: l2; minimal. Untargeted and targeted.

    Args:
        steps: Adam steps with one c.
        binary_search_steps: values of c tried for each image.
        initial_c: the first of them, in multiples of the least c that suffices where the classifier is linear, which is
            estimated for each image; tenfold until one works, then halving the interval.
        lr: Adam's first learning rate, such that its first step is this many times as long as the distance to the
            linearised boundary; halved after each c that worked.
        confidence: by how much the wrong logit has to lead (kappa).
        abort_early: give up a c when a tenth of the steps lowered the image's loss by less than 1 %.
        shorten: forward passes of the bisection that ends the search: what was found is drawn straight toward the
            clean image, as far as it stays adversarial.

    Shapes: images ``(B, C, H, W)`` in [0, 1], labels or targets ``(B,)``.

    Where ours departs from the paper: learning rate and first c follow from the gradient at the clean image, so that
    one setting does for images near their boundary and far from it (an absolute rate of 0.01 steps over near ones, and
    never gets pixels off the ends of the box); the search at each further c begins where the last one ended, not at the
    clean image, and a c has worked when the image was turned in the last tenth of its steps; every image has its own c
    and goes on to the next one as soon as its own search has stalled, so that images at different values of c share a
    batch; an image leaves after its last c; what is found is shortened (0 leaves this out).

    Example::

        attacked = CW(steps=100)(model, images, labels, ThreatModel(norm="l2", eps=math.inf))
        print(attacked.distance.median())
    """

    norms = frozenset({Norm.L2})
    minimal = True

    def __init__(
        self,
        *,
        steps: PositiveInt = 100,
        binary_search_steps: PositiveInt = 9,
        initial_c: PositiveFloat = 1.5,
        lr: PositiveFloat = 1.0,
        confidence: NonNegativeFloat = 0.0,
        abort_early: bool = True,
        shorten: NonNegativeInt = 6,
    ) -> None:
        self.steps = steps
        self.binary_search_steps = binary_search_steps
        self.initial_c = initial_c
        self.lr = lr
        self.confidence = confidence
        self.abort_early = abort_early
        self.shorten = shorten

    def run(self, model: Query, x: Tensor, y: Tensor, threat: ThreatModel, *, generator: torch.Generator) -> Tensor:
        nearest, anchor = Nearest(x), torch.atanh((2 * x - 1) * (1 - 1e-6))
        one, nothing = torch.ones_like(nearest.distance), torch.zeros_like(x)
        c, lr = self._scales(model, x, y, threat)
        search = _Search(
            rows=torch.arange(len(x), device=x.device),
            shift=nothing,
            mean=nothing.clone(),
            square=nothing.clone(),
            c=c,
            low=one * 0,
            high=one * torch.inf,
            age=one * 0,
            trial=one * 0,
            lr=lr,
            worked=one < 0,
            last=one * torch.inf,
        )
        look = max(1, self.steps // 10)  # steps between two looks at the loss: nothing is dropped in between
        while len(search.rows):
            rows, search.worked = search.rows, torch.zeros_like(search.worked)
            view, clean, goal, start = model.of(rows), x[rows], y[rows], anchor[rows]
            for _ in range(min(look, self.steps - int(search.age.max()))):
                loss = self._step(view, clean, goal, start, search, nearest, threat)
            self._next_c(search, loss)

        def holds(logits: Tensor, rows: Tensor) -> Tensor:
            return lead(logits, y[rows], threat) > self.confidence

        return shorten(model, x, nearest.images, holds, passes=self.shorten)

    def _scales(self, model: Query, x: Tensor, y: Tensor, threat: ThreatModel) -> tuple[Tensor, Tensor]:
        """The first c and learning rate of each image ``(B,)``, exact where the classifier is linear."""
        logits, slope = gradient(model, x, y, threat, margin)
        size = dual_size(slope, Norm.L2).clamp_min(TINY)
        gap = (self.confidence - lead(logits, y, threat)).clamp_min(TINY)
        distance = (gap / size).clamp_max(math.sqrt(x[0].numel()))
        # A step moves a value by the rate times 2x(1 - x), which is nothing at the ends of the box.
        reach = dual_size(2 * x * (1 - x), Norm.L2).clamp_min(1e-3 * math.sqrt(x[0].numel()))
        # At the least c that reaches the boundary the pull c * size equals 2 * distance, the slope of the square.
        return self.initial_c * 2 * distance / size, (self.lr * distance / reach).clamp_max(MOST)

    def _step(
        self,
        model: Query,
        x: Tensor,
        y: Tensor,
        anchor: Tensor,
        search: _Search,
        nearest: Nearest,
        threat: ThreatModel,
    ) -> Tensor:
        """One Adam step of all images; the loss ``(B,)`` before it."""
        images = torch.sigmoid(2 * (anchor + search.shift))  # (tanh + 1) / 2
        change = images - x
        logits, slope = gradient(model, images, y, threat, margin)
        ahead = lead(logits, y, threat)
        squared = change.square().flatten(1).sum(dim=1)
        hit = ahead > self.confidence
        nearest.offer(search.rows, images, squared.sqrt(), hit)
        search.worked |= hit
        loss = squared + search.c * (self.confidence - ahead).clamp_min(0)

        pull = torch.where(hit, 0.0, search.c).view(-1, 1, 1, 1)
        descent = (2 * change - pull * slope) * (2 * images * (1 - images))
        search.age += 1
        search.mean.lerp_(descent, 1 - DECAY)
        search.square.mul_(DECAY_SQUARE).addcmul_(descent, descent, value=1 - DECAY_SQUARE)
        rate = (search.lr / (1 - DECAY**search.age)).view(-1, 1, 1, 1)
        spread = (search.square / (1 - DECAY_SQUARE**search.age).view(-1, 1, 1, 1)).sqrt_().add_(SMALLEST)
        search.shift.sub_(rate * search.mean / spread)
        return loss

    def _next_c(self, search: _Search, loss: Tensor) -> None:
        """Give the images that are through with their c the next one; drop those that are through with all."""
        over = search.age >= self.steps
        if self.abort_early:
            over |= loss > STALLED * search.last
        search.last = torch.where(over, torch.inf, loss)
        search.high = torch.where(over & search.worked, torch.minimum(search.high, search.c), search.high)
        search.low = torch.where(over & ~search.worked, torch.maximum(search.low, search.c), search.low)
        following = torch.where(search.high.isfinite(), (search.low + search.high) / 2, search.c * 10)
        search.lr = torch.where(over & search.worked, search.lr / 2, search.lr)
        search.c = torch.where(over, following, search.c)
        search.trial += over
        fresh = over.view(-1, 1, 1, 1)  # the next search begins where this one ended, with a new Adam
        search.mean.masked_fill_(fresh, 0.0)
        search.square.masked_fill_(fresh, 0.0)
        search.age = torch.where(over, 0.0, search.age)
        more = search.trial < self.binary_search_steps
        if not bool(more.all()):
            search.keep(more)
