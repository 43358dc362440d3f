"""Auto-PGD: projected gradient ascent that chooses its own step size."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Annotated, Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from src.attacks.base import Attack, fooled, lead
from src.attacks.gradients import LOSSES, gradient, steepest, toward
from src.attacks.query import Query
from src.threat import Norm, ThreatModel

# Shares of all steps: the first window between two looks at the step size, by how much each shrinks, the shortest; l1.
WINDOW, SHORTER, SHORTEST, WINDOW_L1 = 0.22, 0.03, 0.06, 0.04
INERTIA = 0.25  # share of the previous move in the next one
FIRST_SHARE = 0.2  # l1: share of the values that the first steps move
ENLARGED = (3, 2)  # l1: radii, in eps, of the balls that the search begins in


@dataclass
class Climb:
    """Where each image still in the batch stands; all fields have that many rows."""

    rows: Tensor  # position in the batch that the run began with
    clean: Tensor
    y: Tensor
    other: Tensor | None  # second class of the targeted ratio
    now: Tensor
    before: Tensor  # one step ago
    slope: Tensor  # direction of ascent at `now`
    loss: Tensor
    peak: Tensor  # the image of the largest loss so far
    peak_slope: Tensor
    peak_loss: Tensor
    step: Tensor
    rises: Tensor  # how often the loss rose since the last look
    peak_loss_then: Tensor  # `peak_loss` at the last look
    slowed: Tensor  # whether the step was shortened at the last look
    share: Tensor  # l1: share of the values that a step moves
    changed: Tensor  # l1: values that differ from the clean image at the last look

    def keep(self, mask: Tensor) -> None:
        for field in fields(self):
            if (value := getattr(self, field.name)) is not None:
                setattr(self, field.name, value[mask])


class APGD(Attack):
    """Gradient ascent with momentum; the step is halved, and the search goes back to its best point, where it stalls.

    Papers: Croce, Hein 2020, "Reliable evaluation of adversarial robustness with an ensemble of diverse parameter-free
    attacks", https://arxiv.org/abs/2003.01690; l1: Croce, Hein 2021, "Mind the box: l1-APGD for sparse adversarial
    attacks on image classifiers", https://arxiv.org/abs/2103.01208

    Norms: linf, l2, l1. Untargeted and targeted.
    Shapes: images ``(B, C, H, W)`` in [0, 1], labels or targets ``(B,)``.

    Args:
        steps: gradient steps of one start.
        restarts: starts per image (and per target class); each goes only to the images that still hold. Where these are
            few, as many starts of each as the batch has room for run at once.
        loss: ``ce`` cross-entropy; ``dlr`` difference of logits ratio; ``dlr_targeted`` the ratio towards one other
            class after another, the most likely of the clean image first. A targeted threat has its one class, and
            ``dlr`` is the targeted ratio there: the other is flat where the target's logit is the third largest.
        target_classes: ``dlr_targeted`` only: how many other classes are tried, at most all.
        rho: the step is halved where no more than this share of the steps since the last look raised the loss.
        eot_iter: gradients averaged in each step; for models that answer at random.
        enlarge: l1 only: spend the first 30 % of the steps in a ball of radius 3 eps and the next 30 % in 2 eps.

    Where ours departs from the papers' code: an image that is turned leaves the batch (``threat.exhaust`` keeps it in
    and returns its turned version of the largest loss); one that holds comes back as its point of the largest loss; the
    first window compares with the loss at the start; with ``eot_iter`` loss and verdict are means over the draws, not
    the last draw's; the point after the last step costs no gradient; fewer than four classes will do; in l1 the number
    of values to move is rounded to the nearest, or it never falls from two to one.

    Example::

        attacked = APGD(loss="dlr", restarts=5)(model, images, labels, ThreatModel(norm="linf", eps=8 / 255))
    """

    norms = frozenset({Norm.LINF, Norm.L2, Norm.L1})

    def __init__(
        self,
        *,
        steps: PositiveInt = 100,
        restarts: PositiveInt = 1,
        loss: Literal["ce", "dlr", "dlr_targeted"] = "ce",
        target_classes: PositiveInt = 9,
        rho: Annotated[float, Field(gt=0, le=1)] = 0.75,
        eot_iter: PositiveInt = 1,
        enlarge: bool = False,
    ) -> None:
        self.steps = steps
        self.restarts = restarts
        self.loss = loss
        self.target_classes = target_classes
        self.rho = rho
        self.eot_iter = eot_iter
        self.enlarge = enlarge

    def run(self, model: Query, x: Tensor, y: Tensor, threat: ThreatModel, *, generator: torch.Generator) -> Tensor:
        result, todo = x.clone(), torch.arange(len(x), device=x.device)
        largest = torch.full((len(x),), -torch.inf, device=x.device)
        starts = [other for other in self._others(model, x, y, threat) for _ in range(self.restarts)]
        while starts and len(todo):
            count = max(1, model.batch // len(todo))  # where few images are left, several starts of each fill the batch
            together, starts = starts[:count], starts[count:]
            rows = todo.repeat(len(together))
            other = None if together[0] is None else torch.cat([each[todo] for each in together if each is not None])
            images, loss, done = self._start(model.of(rows), x[rows], y[rows], other, threat, generator)
            turned = torch.zeros_like(todo, dtype=torch.bool)
            for made, value, hit in zip(*(torch.split(part, len(todo)) for part in (images, loss, done)), strict=True):
                better = (hit & ~turned) | ((hit == turned) & (value > largest[todo]))
                result[todo] = torch.where(_image(better), made, result[todo])
                largest[todo] = torch.where(better, value, largest[todo])
                turned |= hit
            todo = todo[~turned]
        return result

    def _others(self, model: Query, x: Tensor, y: Tensor, threat: ThreatModel) -> list[Tensor | None]:
        """The second classes of the targeted ratio, one run each."""
        if self.loss == "ce" or (self.loss == "dlr" and not threat.targeted):
            return [None]
        logits = model.clean(x).scatter(1, y[:, None], -torch.inf)
        count = 1 if threat.targeted else min(self.target_classes, logits.shape[1] - 1)
        return list(logits.topk(count, dim=1).indices.T)

    def _start(
        self, model: Query, x: Tensor, y: Tensor, other: Tensor | None, threat: ThreatModel, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor]:
        """A start for each row: images, their loss, and whether each has met the goal."""
        if threat.norm is not Norm.L1 or not self.enlarge:
            return self._climb(model, x, y, other, _drawn(x, threat, generator), threat, self.steps)
        start, steps = x + torch.randn(x.shape, generator=generator).to(x.device), math.ceil(0.3 * self.steps)
        for factor in ENLARGED:
            # Turned there is not turned within eps: none leaves, and the point of the largest loss goes on.
            wide = replace(threat, eps=factor * threat.eps, exhaust=True)
            start, *_ = self._climb(model, x, y, other, wide.project(x, start), wide, steps, enlarged=True)
        left = max(self.steps - len(ENLARGED) * steps, 1)
        return self._climb(model, x, y, other, threat.project(x, start), threat, left)

    def _climb(
        self,
        model: Query,
        x: Tensor,
        y: Tensor,
        other: Tensor | None,
        start: Tensor,
        threat: ThreatModel,
        steps: int,
        *,
        enlarged: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Ascend from ``start`` until one of an image's starts turns it.

        ``enlarged``: return the images of the largest loss, turned or not.
        """
        result, value = start.clone(), torch.full((len(x),), -torch.inf, device=x.device)
        done = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        at = self._begin(x, y, other, start, threat)
        left, window, since = model, self._window(threat, steps, None), 0
        for i in range(steps + 1):
            before = at.loss
            logits, at.loss, at.slope = self._look(left, at, threat, slope=i < steps)
            at.rises += at.loss > before
            higher = at.loss > at.peak_loss
            at.peak_loss = torch.where(higher, at.loss, at.peak_loss)
            at.peak = torch.where(_image(higher), at.now, at.peak)
            at.peak_slope = torch.where(_image(higher), at.slope, at.peak_slope)
            if i == 0:
                at.rises, at.peak_loss_then = torch.zeros_like(at.rises), at.peak_loss
            if not enlarged:
                hit = fooled(logits, at.y, threat)
                if any_hit := threat.exhaust or bool(hit.any()):
                    # Of others a ratio says little: how far the goal leads here is what carries over.
                    worth = lead(logits, at.y, threat) if threat.exhaust and self.loss != "ce" else at.loss
                    better = hit & (worth > value[at.rows])
                    result[at.rows] = torch.where(_image(better), at.now, result[at.rows])
                    value[at.rows] = torch.where(better, worth, value[at.rows])
                    done[at.rows] |= hit
                if any_hit and not threat.exhaust:
                    at.keep(~torch.isin(left.rows, left.rows[hit.cpu()]).to(hit.device))  # with its other starts
                    if not len(at.rows):
                        return result, value, done
                    left = model.of(at.rows)
            since += i > 0
            if since == window:
                self._adapt(at, threat, window)
                window, since = self._window(threat, steps, window), 0
            if i < steps:
                at.before, at.now = at.now, self._moved(at, threat, first=i == 0)
        holds = ~done[at.rows]
        result[at.rows] = torch.where(_image(holds), at.peak, result[at.rows])
        value[at.rows] = torch.where(holds, at.peak_loss, value[at.rows])
        return result, value, done

    def _begin(self, x: Tensor, y: Tensor, other: Tensor | None, start: Tensor, threat: ThreatModel) -> Climb:
        low, zero = torch.full((len(x),), -torch.inf, device=x.device), torch.zeros(len(x), device=x.device)
        share, changed = zero + FIRST_SHARE, zero + math.prod(x.shape[1:])
        if self.enlarge:
            share, changed = _spread(x, start)
        reach = threat.radius(x) * (1.0 if threat.norm is Norm.L1 else 2.0)
        return Climb(
            rows=torch.arange(len(x), device=x.device), clean=x, y=y, other=other,
            now=start, before=start, slope=torch.zeros_like(x), loss=low,
            peak=start, peak_slope=torch.zeros_like(x), peak_loss=low, peak_loss_then=low,
            step=_image(zero + reach), rises=zero.clone(), slowed=zero == 0, share=share, changed=changed,
        )  # fmt: skip

    def _window(self, threat: ThreatModel, steps: int, last: int | None) -> int:
        """Steps until the next look at the step size."""
        if threat.norm is Norm.L1:
            return max(int(WINDOW_L1 * steps), 1)
        shorter = WINDOW * steps if last is None else max(last - max(int(SHORTER * steps), 1), int(SHORTEST * steps))
        return max(int(shorter), 1)

    def _look(self, model: Query, at: Climb, threat: ThreatModel, *, slope: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Logits, what is to be raised, and its gradient at ``at.now``: means over the draws."""
        folded = model.rejects and threat.targeted
        loss = LOSSES[self.loss] if at.other is None else toward(at.other, refusal=folded)
        sums: list[Tensor] = []
        for _ in range(self.eot_iter):
            if slope:
                logits, direction = gradient(model, at.now, at.y, threat, loss)
            else:
                with torch.no_grad():
                    logits, direction = model(at.now), at.slope
            draw = [logits, -loss(logits, at.y) if threat.targeted else loss(logits, at.y), direction]
            sums = [a + b for a, b in zip(sums, draw, strict=True)] if sums else draw
        logits, raised, direction = sums if self.eot_iter == 1 else (total / self.eot_iter for total in sums)
        return logits, raised, direction

    def _moved(self, at: Climb, threat: ThreatModel, *, first: bool) -> Tensor:
        """The next point."""
        if threat.norm is Norm.L1:
            return threat.project(at.clean, at.now + at.step * _sparse(at.slope, at.share))
        there = threat.project(at.clean, at.now + at.step * steepest(at.slope, threat.norm))
        if first:
            return there
        move = (1 - INERTIA) * (there - at.now) + INERTIA * (at.now - at.before)
        return threat.project(at.clean, at.now + move)

    def _adapt(self, at: Climb, threat: ThreatModel, window: int) -> None:
        """Shorten the step, and go back to the best point, of images whose search stalls."""
        if threat.norm is Norm.L1:
            share, changed = _spread(at.clean, at.peak)
            back = changed / at.changed < 0.95  # the change became sparser: begin again from there with long steps
            longest = threat.radius(at.clean)
            shorter = (at.step / 1.5).clamp_min(longest / 10)
            at.step = torch.where(_image(back), longest, shorter)
            at.share, at.changed = share, changed
        else:
            back = (at.rises <= self.rho * window) | (~at.slowed & (at.peak_loss <= at.peak_loss_then))
            at.step = torch.where(_image(back), at.step / 2, at.step)
            at.slowed, at.peak_loss_then = back, at.peak_loss
        at.now = torch.where(_image(back), at.peak, at.now)
        at.slope, at.rises = torch.where(_image(back), at.peak_slope, at.slope), torch.zeros_like(at.rises)


def _image(mask: Tensor) -> Tensor:
    return mask.view(-1, 1, 1, 1)


def _spread(clean: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
    """l1: the share of values to move next, and how many differ from the clean image."""
    changed = (images != clean).flatten(1).sum(dim=1).float()
    return changed / math.prod(clean.shape[1:]) / 1.5, changed


def _sparse(slope: Tensor, share: Tensor) -> Tensor:
    """A step of l1 length one along the signs of the largest ``share`` of an image's values."""
    size = slope.abs().flatten(1)
    count = size.shape[1]
    place = count - (share * count).round().long().clamp(1, count)
    least = size.sort(dim=1).values.gather(1, place[:, None])
    chosen = slope.sign() * (size >= least).view_as(slope)
    return chosen / chosen.abs().sum(dim=(1, 2, 3), keepdim=True).clamp_min(1)


def _drawn(x: Tensor, threat: ThreatModel, generator: torch.Generator) -> Tensor:
    """A random start on the ball's surface (l1: a projected Gaussian), drawn on the CPU for every device alike."""
    if threat.norm is Norm.LINF:
        noise = torch.rand(x.shape, generator=generator).mul_(2).sub_(1)
        noise = noise / noise.abs().amax(dim=(1, 2, 3), keepdim=True).clamp_min(1e-12) * threat.radius(x)
    else:
        noise = torch.randn(x.shape, generator=generator)
        if threat.norm is Norm.L2:
            size = torch.linalg.vector_norm(noise.flatten(1), dim=1).clamp_min(1e-12)
            noise = noise / _image(size) * threat.radius(x)
    return threat.project(x, x + noise.to(x.device))
