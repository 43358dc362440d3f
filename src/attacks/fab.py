"""Fast adaptive boundary attack."""

from __future__ import annotations

import math
from typing import Annotated

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor

from src.attacks.base import TINY, Attack, fooled
from src.attacks.minimal import Boundary, Nearest, nearest_boundary
from src.attacks.query import Query
from src.threat import Norm, ThreatModel

# Radius of random starts when the threat names none, as in the reference.
START = {Norm.LINF: 0.3, Norm.L2: 1.0, Norm.L1: 5.0}


class FAB(Attack):
    """Projections onto the linearised boundary inside the box, drawn toward the clean image.

    Paper: Croce, Hein 2020, "Minimally distorted Adversarial Examples with a Fast Adaptive Boundary Attack",
    https://arxiv.org/abs/1907.02044; the version over target classes as in AutoAttack: Croce, Hein 2020,
    https://arxiv.org/abs/2003.01690

    Norms: linf, l2, l1; minimal. Untargeted and targeted.

    Args:
        steps: projections of one start.
        restarts: starts: the image itself, then random points at half of eps (eps inf: of 0.3, 1, 5 for linf, l2, l1),
            or of the smallest change found so far where that is less.
        target_classes: None: the nearest boundary of all classes at each step. K: FAB-T, one search for each of the K
            wrong classes with the largest logits at the clean image; any wrong class counts as found. AutoAttack: 9.
        alpha_max: most weight of the projection of the clean image.
        eta: by how much a step goes beyond the boundary; 1 stops on it.
        beta: share of the change kept when going back after success.
        stop_at_eps: an image leaves once something within ``threat.eps`` is found for it: the verdict for that eps
            stays as it is, the distance is no longer the smallest. AutoAttack wants this. Without
            effect at eps inf, which is where the pipeline searches, for every eps at once; members have the eps itself.
        batch_size: most images times classes in one backward pass; bounds the memory.

    Shapes: images ``(B, C, H, W)`` in [0, 1], labels or targets ``(B,)``.

    Where ours departs from the reference: the projections for linf and l2 are found by Newton's method on their dual
    instead of by sorting (both are exact); nothing is skipped between starts or target classes unless
    ``stop_at_eps``, so the nearest of all is returned; ``threat.targeted`` aims at the boundary between the target and
    whichever other class leads; the paper's optional final search, three interpolations between what was found and the
    clean image, is left out, as in AutoAttack.

    Example::

        attacked = FAB(target_classes=9)(model, images, labels, ThreatModel(norm="linf", eps=math.inf))
        print(attacked.distance.median())
    """

    norms = frozenset({Norm.LINF, Norm.L2, Norm.L1})
    minimal = True

    def __init__(
        self,
        *,
        steps: PositiveInt = 100,
        restarts: PositiveInt = 1,
        target_classes: PositiveInt | None = None,
        alpha_max: Annotated[float, Field(ge=0, le=1)] = 0.1,
        eta: PositiveFloat = 1.05,
        beta: Annotated[float, Field(ge=0, lt=1)] = 0.9,
        stop_at_eps: bool = False,
        batch_size: PositiveInt = 1024,
    ) -> None:
        self.steps = steps
        self.restarts = restarts
        self.target_classes = target_classes
        self.alpha_max = alpha_max
        self.eta = eta
        self.beta = beta
        self.stop_at_eps = stop_at_eps
        self.batch_size = batch_size

    def run(self, model: Query, x: Tensor, y: Tensor, threat: ThreatModel, *, generator: torch.Generator) -> Tensor:
        nearest = Nearest(x)
        for toward in self._aims(model, x, y, threat):
            for restart in range(self.restarts):
                start = self._random_start(x, nearest.distance, threat, generator) if restart else x
                self._descend(model, x, y, toward, start, nearest, threat)
        return nearest.images

    def _aims(self, model: Query, x: Tensor, y: Tensor, threat: ThreatModel) -> list[Tensor | None]:
        """Classes ``(B, K)`` to go toward, one entry for each search; None: to the target, away from what leads."""
        if threat.targeted:
            return [None]
        ranked = model.clean(x).scatter(1, y[:, None], -torch.inf).argsort(dim=1, descending=True)[:, :-1]
        if not ranked.shape[1]:
            return []  # a single class has no boundary
        return list(torch.split(ranked[:, : self.target_classes], 1, dim=1)) if self.target_classes else [ranked]

    def _descend(
        self,
        model: Query,
        x: Tensor,
        y: Tensor,
        toward: Tensor | None,
        start: Tensor,
        nearest: Nearest,
        threat: ThreatModel,
    ) -> None:
        """One start; what is found goes to ``nearest``."""
        todo, current = torch.arange(len(x), device=x.device), start
        for _ in range(self.steps):
            if self.stop_at_eps and math.isfinite(threat.eps):  # infinite: one search for every eps
                left = nearest.distance[todo] > threat.eps
                todo, current = todo[left], current[left]
                if not len(todo):
                    return
            view, clean, goal = model.of(todo), x[todo], y[todo]
            boundary = self._boundary(view, current, goal, None if toward is None else toward[todo], threat.norm)
            current = self._closer(clean, current, boundary.gap, boundary.slope, threat.norm)
            distance = threat.distance(clean, current)
            worth = distance < nearest.distance[todo]
            if self.stop_at_eps:
                worth &= distance <= threat.eps + threat.slack
            hit = self._hits(view, current, goal, worth, threat)
            nearest.offer(todo, current, distance, hit)
            back = clean + self.beta * (current - clean)
            current = torch.where(hit.view(-1, 1, 1, 1), back, current)

    @staticmethod
    @torch.no_grad()
    def _hits(model: Query, images: Tensor, y: Tensor, worth: Tensor, threat: ThreatModel) -> Tensor:
        """Which images are adversarial ``(B,)``: in float32 those worth keeping, to turn back the search's will do."""
        hit, exact = torch.empty_like(worth), worth | (model.search is torch.float32)
        for asked, search in ((exact, torch.float32), (~exact, model.search)):
            if bool(asked.any()):
                hit[asked] = fooled(model.of(asked, search)(images[asked]), y[asked], threat)
        return hit

    def _boundary(self, model: Query, current: Tensor, y: Tensor, toward: Tensor | None, norm: Norm) -> Boundary:
        if toward is None:  # y is the target; away from the best of the others
            with torch.no_grad():
                away = model(current).scatter(1, y[:, None], -torch.inf).argmax(dim=1, keepdim=True)
            return nearest_boundary(model, current, y[:, None], away, norm, batch_size=self.batch_size)
        own = y[:, None].expand_as(toward)
        return nearest_boundary(model, current, toward, own, norm, batch_size=self.batch_size)

    def _closer(self, clean: Tensor, current: Tensor, gap: Tensor, slope: Tensor, norm: Norm) -> Tensor:
        """A point between the projections of ``current`` and of ``clean``, both gone beyond by ``eta``."""
        behind = gap + ((clean - current) * slope).flatten(1).sum(dim=1)  # the gap that the plane has at `clean`
        moves = to_plane(torch.cat([current, clean]), slope.repeat(2, 1, 1, 1), -torch.cat([gap, behind]), norm)
        size = torch.linalg.vector_norm(moves.flatten(1), ord=norm.order, dim=1).clamp_min(1e-8)
        here, there = size.chunk(2)
        alpha = (here / (here + there)).clamp_max(self.alpha_max).view(-1, 1, 1, 1)
        move, move_clean = moves.chunk(2)
        return ((1 - alpha) * (current + self.eta * move) + alpha * (clean + self.eta * move_clean)).clamp(0, 1)

    @staticmethod
    def _random_start(x: Tensor, found: Tensor, threat: ThreatModel, generator: torch.Generator) -> Tensor:
        """Half as far away as what was found so far, or as eps where that is nearer."""
        radius = found.clamp_max(threat.eps if math.isfinite(threat.eps) else START[threat.norm]).view(-1, 1, 1, 1)
        if threat.norm is Norm.LINF:
            noise = torch.rand(x.shape, generator=generator) * 2 - 1
        else:
            noise = torch.randn(x.shape, generator=generator)
        size = torch.linalg.vector_norm(noise.flatten(1), ord=threat.norm.order, dim=1).view(-1, 1, 1, 1)
        return (x + radius / 2 * (noise / size).to(x.device)).clamp(0, 1)


def to_plane(start: Tensor, slope: Tensor, rise: Tensor, norm: Norm) -> Tensor:
    """The smallest change, in ``norm``, that keeps ``start`` in [0, 1] and gains ``rise`` along ``slope``. Exact.

    Args:
        start: ``(B, C, H, W)`` in [0, 1].
        slope: ``(B, C, H, W)``, normal of the plane.
        rise: ``(B,)``, of either sign: ``(slope * change).sum()`` to reach, or as much of it as the box allows.
    """
    sign = slope.flatten(1).sign() * torch.where(rise < 0, -1.0, 1.0)[:, None]
    room = torch.where(sign > 0, 1 - start.flatten(1), start.flatten(1))
    weight = slope.flatten(1).abs()
    scale = weight.amax(dim=1, keepdim=True).clamp_min(TINY)
    weight, wanted = weight / scale, rise.abs()[:, None] / scale
    if norm is Norm.L1:  # fill the values with the largest weights first
        weight, order = weight.sort(dim=1, descending=True)
        room = room.gather(1, order)
        gain = weight * room
        moved = ((wanted - (gain.cumsum(dim=1) - gain)) / weight.clamp_min(TINY)).clamp_min(0).minimum(room)
        moved = torch.zeros_like(moved).scatter(1, order, moved)
    else:
        pace = weight if norm is Norm.L2 else torch.ones_like(weight)  # of each value as the multiplier grows
        moved = torch.minimum(_multiplier(weight, pace, room, wanted) * pace, room)
    return (sign * moved).view_as(start)


def _multiplier(weight: Tensor, pace: Tensor, room: Tensor, wanted: Tensor) -> Tensor:
    """The least ``m >= 0`` ``(B, 1)`` with ``(weight * min(m * pace, room)).sum() = wanted``.

    The left side is concave, increasing and made of straight pieces, so that Newton's steps from zero never overshoot
    and end on the right piece, after a handful of them.
    """
    multiplier = torch.zeros_like(wanted)
    speed = weight * pace
    for index in range(64):
        moved = multiplier * pace
        free = moved < room
        lacking = wanted - (weight * torch.minimum(moved, room)).sum(dim=1, keepdim=True)
        rate = (speed * free).sum(dim=1, keepdim=True)
        step = torch.where(rate > 0, lacking / rate.clamp_min(TINY), 0.0).clamp_min(0)
        multiplier = multiplier + step
        if index % 4 == 3 and bool((step <= 1e-6 * multiplier).all()):  # looked at rarely: it waits for the device
            break
    return multiplier
