"""Jacobian-based saliency map attack."""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from src.attacks.base import Attack, fooled
from src.attacks.minimal import slopes
from src.attacks.query import Query
from src.errors import UserError
from src.threat import Norm, ThreatModel

BLOCK = 2**22  # most sums of pairs held at once


class JSMA(Attack):
    """Changes, one or two at a time, the values that most raise the target's logit and lower the others'.

    Paper: Papernot, McDaniel, Jha, Fredrikson, Celik, Swami 2016, "The Limitations of Deep Learning in Adversarial
    Settings", https://arxiv.org/abs/1511.07528

    Norms: l0, which counts pixels; minimal. Targeted; untargeted goes toward the runner-up class of the clean image and
    is content with any wrong class.

    Args:
        theta: by how much a value is changed, of either sign, in [0, 1] pixel units.
        saliency: ``pair``, as in the paper's experiments, takes the best two values of a step, ``single`` the best one.
        others: how the logits of the other classes, which are to fall, are put together: ``sum``, as in the paper, or
            weighted by their ``softmax``, which goes for those in the way of the target and needs fewer pixels.
        max_pixels: most pixels changed when eps is inf; None: 14.5 % of them, the paper's bound. The pipeline searches
            once for every eps, so there it bounds them all.

    Shapes: images ``(B, C, H, W)`` in [0, 1], labels or targets ``(B,)``.

    Where ours departs from the paper: the default is ``softmax``, which within 50 pixels turns 92 % of the first 300
    twos of MNIST's training split into sixes on a lenet (``single``: 95 %; ``sum``, which spends pixels on classes that
    are not in the way: about 40 % with either); the map is of logits, not of probabilities, whose weights ``softmax``
    brings back; a value is a channel of a pixel, and the budget counts pixels, so that further channels of a changed
    pixel are free; a search ends when no value, or pair, both raises the target and lowers the rest. The paper's
    Jacobian of all classes enters through two of its combinations only, which take two backward passes whatever the
    number of classes; the best pair is exact, but looked for among the values that at most one other beats in both
    respects.

    Raises:
        UserError: a ``theta`` of less than 1/255 up or down.

    Example::

        attacked = JSMA()(model, images, labels, ThreatModel(norm="l0", eps=50, targeted=True), target=sixes)
        print(attacked.success.float().mean())
    """

    norms = frozenset({Norm.L0})
    minimal = True

    def __init__(
        self,
        *,
        theta: Annotated[float, Field(ge=-1, le=1)] = 1.0,
        saliency: Literal["pair", "single"] = "pair",
        others: Literal["softmax", "sum"] = "softmax",
        max_pixels: PositiveInt | None = None,
    ) -> None:
        if abs(theta) < 1 / 255:
            raise UserError(f"attack.theta={theta}: changes nothing. Allowed: at least 1/255 up or down")
        self.theta = theta
        self.pick = best_pair if saliency == "pair" else best_single
        self.others = others
        self.max_pixels = max_pixels

    def run(self, model: Query, x: Tensor, y: Tensor, threat: ThreatModel, *, generator: torch.Generator) -> Tensor:
        target = y
        budget = threat.eps if math.isfinite(threat.eps) else self.reach(*x.shape[2:])
        if not threat.targeted:
            logits = model.clean(x)
            if logits.shape[1] < 2:
                return x
            target = logits.scatter(1, y[:, None], -torch.inf).argmax(dim=1)
        sign = math.copysign(1.0, self.theta)
        result, todo, current = x.clone(), torch.arange(len(x), device=x.device), x
        while len(todo):
            current = current.detach().requires_grad_()
            view = model.of(todo)
            logits = view(current)
            hit = _turned(view, logits.detach(), current.detach(), y[todo], threat)
            result[todo[hit]] = current[hit].detach()
            # All that the map needs of the Jacobian: the target's row, and that of the others together.
            wanted = target[todo, None]
            share = torch.ones_like(logits).scatter(1, wanted, 0)
            if self.others == "softmax":
                share = logits.detach().scatter(1, wanted, -torch.inf).softmax(dim=1)
            outputs = torch.cat([logits.gather(1, wanted), (share * logits).sum(dim=1, keepdim=True)], dim=1)
            own, rest = (sign * slopes(view, outputs, current)).flatten(2)
            values = current.detach().flatten(1)
            free = values < 1 if sign > 0 else values > 0
            chosen, any_ = self.pick(_scaled(own, free), _scaled(-rest, free))
            values = values.scatter(1, chosen, (values.gather(1, chosen) + self.theta).clamp(0, 1))
            following = values.view_as(current)
            keep = ~hit & any_ & (threat.distance(x[todo], following) <= budget)
            todo, current = todo[keep], following[keep]
        return result

    def reach(self, height: int, width: int) -> float:
        return self.max_pixels or math.ceil(0.145 * height * width)


def _turned(model: Query, logits: Tensor, images: Tensor, y: Tensor, threat: ThreatModel) -> Tensor:
    """Which images have the goal ``(B,)``; where the search is coarser than float32, those are asked again in it.

    Args:
        model: a view of these images, that gave ``logits`` for them.
    """
    hit = fooled(logits, y, threat)
    if model.search is not torch.float32 and bool(hit.any()):
        with torch.no_grad():
            exact = model.of(hit, torch.float32)(images[hit])
        hit[hit.clone()] = fooled(exact, y[hit], threat)
    return hit


def _scaled(slope: Tensor, free: Tensor) -> Tensor:
    """Slopes ``(B, D)`` over their largest, which keeps products from underflow; -inf where nothing can be changed."""
    largest = slope.abs().amax(dim=1, keepdim=True).clamp_min(torch.finfo(slope.dtype).tiny)
    return (slope / largest).masked_fill(~free, -torch.inf)


def best_single(gain: Tensor, fall: Tensor) -> tuple[Tensor, Tensor]:
    """The value ``(B, 1)`` with the largest ``gain * fall``, both positive, and whether there is one ``(B,)``.

    Args:
        gain: ``(B, D)`` by how much a value raises the target's logit; -inf excludes it.
        fall: ``(B, D)`` by how much it lowers the sum of the others.
    """
    score, chosen = torch.where((gain > 0) & (fall > 0), gain * fall, 0.0).max(dim=1)
    return chosen[:, None], score > 0


def best_pair(gain: Tensor, fall: Tensor) -> tuple[Tensor, Tensor]:
    """The two values ``(B, 2)`` whose summed gain times summed fall is largest, both sums positive. Exact.

    A value that two others match or beat in both respects cannot be needed: one of them is not its partner and could
    stand in for it. What is left, a few tens of values, is compared pair by pair.
    """
    order = gain.argsort(dim=1, descending=True)
    gain, fall = gain.gather(1, order), fall.gather(1, order)
    # Along falling gain: the second largest fall so far is the running maximum of min(fall, largest before).
    before = _shifted(fall.cummax(dim=1).values)
    second = _shifted(torch.minimum(fall, before).cummax(dim=1).values)
    needed = fall > second
    width = max(2, int(needed.sum(dim=1).max()))
    slot = torch.where(needed, needed.cumsum(dim=1) - 1, width)

    def packed(values: Tensor, empty: float) -> Tensor:
        return values.new_full((len(values), width + 1), empty).scatter(1, slot, values)[:, :width]

    gain, fall, order = packed(gain, -torch.inf), packed(fall, -torch.inf), packed(order, 0)
    rows = max(1, BLOCK // width**2)
    parts = [_outer(*part) for part in zip(torch.split(gain, rows), torch.split(fall, rows), strict=True)]
    score, pair = (torch.cat(column) for column in zip(*parts, strict=True))
    chosen = torch.stack([pair // width, pair % width], dim=1)
    return order.gather(1, chosen), score > 0


def _shifted(running: Tensor) -> Tensor:
    return torch.nn.functional.pad(running[:, :-1], (1, 0), value=-torch.inf)


def _outer(gain: Tensor, fall: Tensor) -> tuple[Tensor, Tensor]:
    """Score and flat position of the best pair, over all pairs of different values."""
    gains, falls = gain[:, :, None] + gain[:, None], fall[:, :, None] + fall[:, None]
    score = torch.where((gains > 0) & (falls > 0), gains * falls, 0.0)
    score.diagonal(dim1=1, dim2=2).zero_()
    best, at = score.flatten(1).max(dim=1)
    return best, at
