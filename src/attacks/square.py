"""Square attack: random search over square patches, by scores alone."""

from __future__ import annotations

import functools
import math
from typing import Annotated, Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from src.attacks.base import Attack, fooled
from src.attacks.gradients import cross_entropy, margin
from src.attacks.query import Query
from src.threat import Norm, ThreatModel

# Of 10,000 queries: after so many the share of pixels in a patch is halved once more.
HALVED_AFTER = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)


class Square(Attack):
    """Proposes a change inside one random square at a time and keeps what raises the loss.

    Paper: Andriushchenko, Croce, Flammarion, Hein 2020, "Square Attack: a query-efficient black-box adversarial attack
    via random search", https://arxiv.org/abs/1912.00049; the l1 version is that of the AutoAttack repository.

    Norms: linf, l2, l1. Untargeted and targeted. Looks at the model's logits only.

    Args:
        queries: times that an image may be shown to the model, for each start.
        p_init: share of the pixels in the first squares.
        restarts: starts per image; each goes only to the images that still hold.
        loss: what is raised: ``margin`` (best other logit minus the label's) or ``ce`` (cross-entropy). A targeted
            attack always lowers the cross-entropy of its target, as in the paper.
        rescale_schedule: stretch the paper's schedule of square sizes, made for 10,000 queries, to ``queries``; false:
            run its first ``queries`` steps, as AutoAttack does.

    Shapes: images ``(B, C, H, W)`` in [0, 1], labels or targets ``(B,)``.

    Where ours departs from the papers' code: every image has squares of its own, not one for the whole batch, and they
    may touch the last row and column; a turned image leaves the batch (``threat.exhaust`` keeps it in); a linf proposal
    that changes no pixel is not shown to the model, since the answer is known, but counts against ``queries``; images
    need not be square, nor five pixels wide. It searches in float32 in any case: what a small square gains is less than
    bfloat16 can tell, and a loss that is too high by chance bars the way to all that follow.

    Example::

        attacked = Square(queries=1000)(model, images, labels, ThreatModel(norm="linf", eps=8 / 255))
    """

    norms = frozenset({Norm.LINF, Norm.L2, Norm.L1})
    needs = "scores"
    exact = True

    def __init__(
        self,
        *,
        queries: PositiveInt = 5000,
        p_init: Annotated[float, Field(gt=0, le=1)] = 0.8,
        restarts: PositiveInt = 1,
        loss: Literal["margin", "ce"] = "margin",
        rescale_schedule: bool = True,
    ) -> None:
        self.queries = queries
        self.p_init = p_init
        self.restarts = restarts
        self.loss = loss
        self.rescale_schedule = rescale_schedule

    @torch.no_grad()
    def run(self, model: Query, x: Tensor, y: Tensor, threat: ThreatModel, *, generator: torch.Generator) -> Tensor:
        result, todo = x.clone(), torch.arange(len(x), device=x.device)
        for _ in range(self.restarts):
            images, done = self._search_once(model.of(todo), x[todo], y[todo], threat, generator)
            result[todo] = images
            todo = todo[~done]
            if not len(todo):
                break
        return result

    def _search_once(
        self, model: Query, x: Tensor, y: Tensor, threat: ThreatModel, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """One start: the images reached ``(B, C, H, W)`` and whether each has met the goal ``(B,)``."""
        result, done = x.clone(), torch.zeros(len(x), dtype=torch.bool, device=x.device)
        rows, left = torch.arange(len(x), device=x.device), model
        now = self._stripes(x, threat, generator) if threat.norm is Norm.LINF else self._tiles(x, threat, generator)
        loss, hit = self._asked(left, now, y, threat)
        for query in range(1, self.queries + 1):
            if not threat.exhaust and bool(hit.any()):
                result[rows[hit]] = now[hit]
                done[rows[hit]] = True
                holds = ~hit
                rows, now, x, y, loss, hit = rows[holds], now[holds], x[holds], y[holds], loss[holds], hit[holds]
                if not len(rows):
                    return result, done
                left = model.of(rows)
            if query == self.queries:
                break
            side = self._side(query - 1, x, threat)
            new = (self._patched if threat.norm is Norm.LINF else self._moved)(x, now, side, threat, generator)
            asked = (new != now).flatten(1).any(dim=1)
            if bool(asked.all()):
                new_loss, new_hit = self._asked(left, new, y, threat)
            else:
                new_loss, new_hit = loss.clone(), hit.clone()
                if bool(asked.any()):
                    new_loss[asked], new_hit[asked] = self._asked(left.of(asked), new[asked], y[asked], threat)
            better = (new_hit & ~hit) | ((new_hit == hit) & (new_loss > loss))
            now = torch.where(better.view(-1, 1, 1, 1), new, now)
            loss, hit = torch.where(better, new_loss, loss), hit | new_hit
        result[rows] = now
        done[rows] |= hit
        return result, done

    def _asked(self, model: Query, images: Tensor, y: Tensor, threat: ThreatModel) -> tuple[Tensor, Tensor]:
        """What is to be raised, and whether the goal is met."""
        logits = model(images)
        if threat.targeted:
            loss = -cross_entropy(logits, y)
        else:
            loss = margin(logits, y) if self.loss == "margin" else cross_entropy(logits, y)
        return loss, fooled(logits, y, threat)

    def _side(self, query: int, x: Tensor, threat: ThreatModel) -> int:
        """Side of the squares of this query, in pixels."""
        height, width = x.shape[-2:]
        at = int(query / self.queries * 10_000) if self.rescale_schedule else query
        share = self.p_init / 2 ** sum(at > after for after in HALVED_AFTER)
        side = round(math.sqrt(share * height * width))
        if threat.norm is not Norm.LINF:  # patches with a centre
            side = max(side, 3)
            side += side % 2 == 0
        return min(max(side, 1), height, width)

    def _stripes(self, x: Tensor, threat: ThreatModel, generator: torch.Generator) -> Tensor:
        """linf: the first images: vertical stripes of plus and minus eps."""
        batch, channels, _, width = x.shape
        return (x + threat.eps * _signs((batch, channels, 1, width), x, generator)).clamp(0.0, 1.0)

    def _patched(self, x: Tensor, now: Tensor, side: int, threat: ThreatModel, generator: torch.Generator) -> Tensor:
        """linf: plus or minus eps throughout a random square, one sign for each channel."""
        batch, channels, height, width = x.shape
        top, start = _corner(batch, height - side, x, generator), _corner(batch, width - side, x, generator)
        row, column = torch.arange(height, device=x.device), torch.arange(width, device=x.device)
        in_rows = (row >= top) & (row < top + side)
        in_columns = (column >= start) & (column < start + side)
        inside = in_rows.view(batch, 1, height, 1) & in_columns.view(batch, 1, 1, width)
        change = threat.eps * _signs((batch, channels, 1, 1), x, generator)
        return torch.where(inside, (x + change).clamp(0.0, 1.0), now)

    def _tiles(self, x: Tensor, threat: ThreatModel, generator: torch.Generator) -> Tensor:
        """l2, l1: the first images: a grid of patches of random sign."""
        batch, channels, height, width = x.shape
        side = max(min(height, width) // 5, 1)
        down, across = height // side, width // side
        patch = self._patches((batch, 1, down, across), side, x, threat, generator)
        patch = patch * _signs((batch, channels, down, across, 1, 1), x, generator)
        grid = patch.permute(0, 1, 2, 4, 3, 5).reshape(batch, channels, down * side, across * side)
        delta, top, start = torch.zeros_like(x), (height - down * side) // 2, (width - across * side) // 2
        delta[:, :, top : top + down * side, start : start + across * side] = grid
        return _filled(x, delta, threat)

    def _moved(self, x: Tensor, now: Tensor, side: int, threat: ThreatModel, generator: torch.Generator) -> Tensor:
        """l2, l1: take the budget of one random window, and what is left over, into a new patch in another."""
        batch, channels, height, width = x.shape
        delta = (now - x).flatten(2)
        here, there = (
            _window(
                _corner(batch, height - side, x, generator), _corner(batch, width - side, x, generator), side, width
            )
            .view(batch, 1, side * side)
            .expand(batch, channels, side * side)
            for _ in range(2)
        )
        whole = _size(delta.flatten(1), threat).view(batch, 1, 1)
        old = delta.gather(2, here)
        delta = delta.scatter(2, here, 0.0)
        freed = _size(torch.cat([old, delta.gather(2, there)], dim=2), threat)  # both windows, per channel
        old_size = _size(old, threat)
        patch = self._patches((batch, 1), side, x, threat, generator).flatten(2)
        new = patch * _signs((batch, channels, 1), x, generator) + old / (old_size + 1e-12)
        unused = threat.radius(x)
        if threat.norm is Norm.L2:
            budget = ((unused**2 - whole**2).clamp_min(0) / channels + freed**2).sqrt()
        else:
            budget = (unused - whole).clamp_min(0) + freed * channels
        new = new / (_size(new, threat) + 1e-12) * budget
        delta = delta.scatter(2, there, 0.0).scatter(2, here, new)
        return _filled(x, delta.view_as(x), threat)

    @staticmethod
    def _patches(
        shape: tuple[int, ...], side: int, x: Tensor, threat: ThreatModel, generator: torch.Generator
    ) -> Tensor:
        """Patches ``(*shape, side, side)`` of size one, each on its side or not at random."""
        patch = _patch(side, threat.norm).to(x.device)
        turned = (torch.rand(shape, generator=generator) > 0.5).to(x.device)
        return torch.where(turned[..., None, None], patch.T, patch)


def _signs(shape: tuple[int, ...], like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randint(2, shape, generator=generator).mul_(2).sub_(1).to(like)


def _corner(count: int, last: int, like: Tensor, generator: torch.Generator) -> Tensor:
    """First row or column of a window, ``(count, 1)``."""
    return torch.randint(last + 1, (count, 1), generator=generator).to(like.device)


def _window(top: Tensor, start: Tensor, side: int, width: int) -> Tensor:
    """Positions, in a flattened channel, of square windows: ``(B, side, side)``."""
    along = torch.arange(side, device=top.device)
    return (top + along)[:, :, None] * width + (start + along)[:, None, :]


def _size(delta: Tensor, threat: ThreatModel) -> Tensor:
    """Norm over the last dimension, which is kept."""
    return torch.linalg.vector_norm(delta, ord=threat.norm.order, dim=-1, keepdim=True)


def _filled(x: Tensor, delta: Tensor, threat: ThreatModel) -> Tensor:
    """The images with ``delta`` brought to the whole budget (l2) or projected onto it (l1)."""
    if threat.norm is Norm.L2:
        delta = delta * (threat.radius(x) / _size(delta.flatten(1), threat).clamp_min(1e-12).view(-1, 1, 1, 1))
    return threat.project(x, x + delta)


@functools.cache
def _patch(side: int, norm: Norm) -> Tensor:
    """A hill above a hollow, each of rings that fall off from its centre; size one in ``norm``."""
    half = side // 2
    hills = [_hill(half, side, norm), -_hill(side - half, side, norm)]
    patch = torch.cat(hills)
    return patch / torch.linalg.vector_norm(patch, ord=norm.order)


def _hill(height: int, width: int, norm: Norm) -> Tensor:
    if not height:
        return torch.zeros(0, width)
    rings = max(height // 2, width // 2) + 1
    power = 2 if norm is Norm.L2 else 4
    added = 1.0 / torch.arange(1, rings + 1) ** power
    value = added.flip(0).cumsum(0).flip(0)  # a value lies in every ring that is at least as wide
    row, column = (torch.arange(height) - height // 2).abs(), (torch.arange(width) - width // 2).abs()
    hill = value[torch.maximum(row[:, None], column[None, :])]
    return hill / torch.linalg.vector_norm(hill, ord=norm.order)
