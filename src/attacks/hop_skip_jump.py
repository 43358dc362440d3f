"""HopSkipJump: a walk along the decision boundary that sees labels only."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from pydantic import PositiveInt
from torch import Tensor

from src.attacks.base import Attack, fooled
from src.attacks.query import Query
from src.threat import Norm, ThreatModel

GRIDS = (1, 2, 3, 4, 6, 8, 12)  # cells along a side of the black and white noise
DRAWN_AT_ONCE = 256  # directions drawn per pass
HALVINGS = 30  # of a step: shorter ones are lost in float32


class HopSkipJump(Attack):
    """Estimates the normal of the decision boundary from labels, steps along it, and returns to the boundary.

    Paper: Chen, Jordan, Wainwright 2020, "HopSkipJumpAttack: A Query-Efficient Decision-Based Attack",
    https://arxiv.org/abs/1904.02144

    Norms: l2, linf. Untargeted and targeted. Minimal: finds the smallest change it can, whatever eps. Needs the labels
    only (the argmax of the scores).

    An image needs a start that already has the goal: noise, or, where none will do, the nearest image of the
    batch that the model takes for another class. Targeted, it is the nearest image of the batch that the model takes
    for the target, or else noise. Images that find no start stay as they are.

    Args:
        iterations: steps along the boundary.
        samples: directions tried for the first estimate of the normal; the t-th takes ``sqrt(t)`` times as many.
        max_samples: at most so many.
        starts: noise images tried in search of a start.
        batch_size: images the model gets at once. It bounds the memory, whatever the number of images or samples.

    Shapes: images ``(B, C, H, W)`` in [0, 1], labels or targets ``(B,)``.

    Where ours departs from the paper: only one in eight noise images is uniform per pixel, the others are cells of
    black and white, since many networks take all pixel noise for one class; the nearest point of the walk is
    returned, not the last; a step that was halved 30 times without success is not taken. The images of a batch share
    their random draws, so that without starts from the batch an image comes out the same whatever else is in it, but
    for float rounding. The search is in float32 always: bfloat16 cannot tell the sides of a boundary this close to it.

    Example::

        attacked = HopSkipJump(iterations=20)(model, images, labels, ThreatModel(norm="l2", eps=float("inf")))
    """

    norms = frozenset({Norm.L2, Norm.LINF})
    needs = "labels"
    minimal = True

    def __init__(
        self,
        *,
        iterations: PositiveInt = 50,
        samples: PositiveInt = 100,
        max_samples: PositiveInt = 10000,
        starts: PositiveInt = 100,
        batch_size: PositiveInt = 1024,
    ) -> None:
        self.iterations = iterations
        self.samples = samples
        self.max_samples = max_samples
        self.starts = starts
        self.batch_size = batch_size

    @torch.no_grad()
    def run(self, model: Query, x: Tensor, y: Tensor, threat: ThreatModel, *, generator: torch.Generator) -> Tensor:
        seed = int(torch.randint(2**62, (), generator=generator))
        result, everyone = x.clone(), torch.arange(len(x), device=x.device)
        exact = model.of(everyone, torch.float32)
        start, found = self._starts(exact, x, y, threat, torch.Generator().manual_seed(seed))
        for rows in torch.split(everyone[found], self.batch_size) if bool(found.any()) else ():
            walk = _Walk(exact.of(rows), x[rows], y[rows], threat, self.batch_size)
            draws = torch.Generator().manual_seed(seed + 1)
            result[rows] = self._along(walk, start[rows], draws)
        return result

    def _along(self, walk: _Walk, start: Tensor, draws: torch.Generator) -> Tensor:
        """The nearest images found with the goal, from images that have it."""
        images = best = walk.to_boundary(start)
        shortest = distance = walk.threat.distance(walk.x, images)
        reach = walk.threat.distance(walk.x, start)  # before the return to the boundary: the paper's d(x~, x*)
        for t in range(1, self.iterations + 1):
            count = min(int(self.samples * math.sqrt(t)), self.max_samples)
            normal = walk.normal(images, reach, count, draws)
            stepped = walk.step(images, normal, distance / math.sqrt(t))
            reach = walk.threat.distance(walk.x, stepped)
            images = walk.to_boundary(stepped)
            distance = walk.threat.distance(walk.x, images)
            best = torch.where(_wide(distance < shortest), images, best)
            shortest = torch.minimum(distance, shortest)
        return best

    def _starts(
        self, model: Query, x: Tensor, y: Tensor, threat: ThreatModel, draws: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """An image with the goal for each of ``x``, and whether there is one."""
        start, found = x.clone(), torch.zeros(len(x), dtype=torch.bool, device=x.device)
        if threat.targeted:
            self._from_batch(model, x, y, threat, start, found)
            self._from_noise(model, x, y, threat, start, found, draws)
        else:
            self._from_noise(model, x, y, threat, start, found, draws)
            self._from_batch(model, x, y, threat, start, found)
        return start, found

    def _from_noise(
        self,
        model: Query,
        x: Tensor,
        y: Tensor,
        threat: ThreatModel,
        start: Tensor,
        found: Tensor,
        draws: torch.Generator,
    ) -> None:
        """Fill in noise: for each image the first of the sequence that has its goal."""
        for tried in range(0, self.starts, 1 + len(GRIDS)):
            noise = _noise(x.shape[1:], draws).to(x.device)
            for one in noise[: self.starts - tried]:
                todo = (~found).nonzero().flatten()
                if not len(todo):
                    return
                for rows in torch.split(todo, self.batch_size):
                    hit = fooled(model.of(rows)(one.expand(len(rows), -1, -1, -1)), y[rows], threat)
                    start[rows[hit]], found[rows[hit]] = one, True

    def _from_batch(
        self, model: Query, x: Tensor, y: Tensor, threat: ThreatModel, start: Tensor, found: Tensor
    ) -> None:
        """Fill in the nearest image of the batch that has the goal."""
        if bool(found.all()):
            return
        everyone = torch.arange(len(x), device=x.device)
        answers = []
        for rows in torch.split(everyone, self.batch_size):
            classes, refusal = model.of(rows).apart(x[rows])
            said = classes.argmax(dim=1)
            answers.append(said if refusal is None else said.masked_fill(refusal > 0, -1))  # rejected: no class at all
        answer = torch.cat(answers)
        for rows in torch.split((~found).nonzero().flatten(), self.batch_size):
            usable = ((answer[None] == y[rows, None]) == threat.targeted) & (answer[None] >= 0)
            away = torch.cdist(x[rows].flatten(1), x.flatten(1), p=threat.norm.order).masked_fill(~usable, torch.inf)
            nearest = away.argmin(dim=1)
            hit = usable.any(dim=1)
            start[rows[hit]], found[rows[hit]] = x[nearest[hit]], True


class _Walk:
    """The moves along the boundary, for all images at once. Images are ``(R, C, H, W)``, the rest ``(R,)``."""

    def __init__(self, model: Query, x: Tensor, y: Tensor, threat: ThreatModel, batch_size: int) -> None:
        self.model, self.x, self.y, self.threat, self.batch_size = model, x, y, threat, batch_size
        self.size = math.prod(x.shape[1:])
        self.l2 = threat.norm is Norm.L2

    def reached(self, images: Tensor) -> Tensor:
        """Which of the images, in any number of versions, have the goal."""
        return fooled(self.model(images), self.y.repeat(len(images) // len(self.y)), self.threat)

    def to_boundary(self, images: Tensor) -> Tensor:
        """Toward the clean images as far as the goal holds, by bisection: blended (l2), clipped to a ball (linf)."""
        low = torch.zeros(len(images), device=images.device)
        high = torch.ones_like(low) if self.l2 else self.threat.distance(self.x, images)
        # The paper's precision, d^-3/2 and d^-2 of the way.
        for _ in range(math.ceil((1.5 if self.l2 else 2) * math.log2(self.size))):
            middle = (low + high) / 2
            hit = self.reached(self._between(images, middle))
            high, low = torch.where(hit, middle, high), torch.where(hit, low, middle)
        return self._between(images, high)

    def _between(self, images: Tensor, share: Tensor) -> Tensor:
        if self.l2:
            return torch.lerp(self.x, images, _wide(share))
        return torch.minimum(torch.maximum(images, self.x - _wide(share)), self.x + _wide(share))

    def normal(self, images: Tensor, reach: Tensor, count: int, draws: torch.Generator) -> Tensor:
        """The step of length one along the boundary's normal, estimated from the labels of ``count`` neighbours."""
        width = _wide(reach / self.size).clamp_min(torch.finfo(images.dtype).eps)
        hits = torch.zeros(len(images), device=images.device)
        inside, everywhere = torch.zeros_like(images), torch.zeros_like(images)
        for drawn in range(0, count, DRAWN_AT_ONCE):
            directions = self._directions(min(DRAWN_AT_ONCE, count - drawn), draws)
            for some in torch.split(directions, max(1, self.batch_size // len(images))):
                near = (images + width * some[:, None]).clamp(0, 1)
                hit = self.reached(near.flatten(0, 1)).view(len(some), -1).to(images.dtype)
                moved = (near - images) / width  # what the box has left of the direction
                inside += torch.einsum("sr,srchw->rchw", hit, moved)
                everywhere += moved.sum(dim=0)
                hits += hit.sum(dim=0)
        # The paper's sum of (phi - mean phi) u, with phi 1 where the goal holds and -1 elsewhere; where all agree, the
        # mean direction or its opposite.
        share = _wide(hits / count)
        slope = 2 * (inside - share * everywhere)
        slope = torch.where(share == 1, everywhere, torch.where(share == 0, -everywhere, slope))
        if not self.l2:
            return slope.sign()
        length = torch.linalg.vector_norm(slope.flatten(1), dim=1)
        return slope / _wide(length).clamp_min(1e-12)

    def _directions(self, count: int, draws: torch.Generator) -> Tensor:
        """Random directions of Euclidean length one, the same for all images: ``(count, C, H, W)``."""
        shape = (count, *self.x.shape[1:])
        drawn = torch.randn(shape, generator=draws) if self.l2 else torch.rand(shape, generator=draws) * 2 - 1
        drawn = drawn.to(self.x.device)
        return drawn / _wide(torch.linalg.vector_norm(drawn.flatten(1), dim=1))

    def step(self, images: Tensor, direction: Tensor, length: Tensor) -> Tensor:
        """The longest step, of ``length`` halved again and again, that keeps the goal."""
        result, todo, view = images.clone(), torch.arange(len(images), device=images.device), self.model
        for _ in range(HALVINGS):
            moved = (images[todo] + _wide(length[todo]) * direction[todo]).clamp(0, 1)
            hit = fooled(view(moved), self.y[todo], self.threat)
            result[todo[hit]] = moved[hit]
            todo = todo[~hit]
            if not len(todo):
                break
            view = self.model.of(todo)
            length = length / 2
        return result


def _noise(shape: torch.Size, draws: torch.Generator) -> Tensor:
    """Images to start from: uniform noise, and cells of 0 and 1 in ever finer grids."""
    size = list(shape[1:])
    cells = [torch.randint(2, (1, shape[0], grid, grid), generator=draws).float() for grid in GRIDS]
    return torch.cat([torch.rand(1, *shape, generator=draws), *(F.interpolate(cell, size) for cell in cells)])


def _wide(values: Tensor) -> Tensor:
    """``(R,)`` as ``(R, 1, 1, 1)``."""
    return values.view(-1, 1, 1, 1)
