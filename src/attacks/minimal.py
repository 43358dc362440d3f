"""What searches for the smallest change share: slopes of many logits at once, the best image found, a bisection."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from src.attacks.base import TINY
from src.attacks.gradients import derivative
from src.attacks.query import Query
from src.threat import Norm


class Nearest:
    """The adversarial image nearest to each clean one so far; the clean image itself until there is one.

    Attributes:
        images: ``(B, C, H, W)``.
        distance: ``(B,)``, infinite where nothing was found.
    """

    def __init__(self, clean: Tensor) -> None:
        self.images = clean.clone()
        self.distance = clean.new_full((len(clean),), torch.inf)

    def offer(self, rows: Tensor, images: Tensor, distance: Tensor, adversarial: Tensor) -> None:
        """Take those of ``images`` (versions of ``rows``) that are adversarial and nearer than what is known."""
        better = adversarial & (distance < self.distance[rows])
        self.distance[rows] = torch.where(better, distance, self.distance[rows])
        self.images[rows] = torch.where(better.view(-1, 1, 1, 1), images, self.images[rows])


def slopes(model: Query, outputs: Tensor, x: Tensor, *, again: bool = False) -> Tensor:
    """Gradients ``(K, B, C, H, W)`` of ``outputs`` ``(B, K)``, made of ``model(x)``: one batched backward pass.

    Args:
        model: that made the outputs; each of the K rows counts as a backward pass.
        outputs: made from the logits of ``x``, image by image.
        x: what was given to the model, requiring a gradient.
        again: keep the graph for another call.

    Returns:
        gradients in which NaN counts as none.
    """
    count = outputs.shape[1]
    if count == 1:
        return derivative(outputs.sum(), x, retain_graph=again).nan_to_num()[None]
    each = torch.eye(count, dtype=outputs.dtype, device=outputs.device)[:, None].expand(-1, len(outputs), -1)
    try:
        result = derivative(outputs, x, each, retain_graph=True, is_grads_batched=True)
    except RuntimeError:  # a layer that cannot be batched, such as a hand-written backward
        model.add_backward(-len(x))  # the attempt was counted
        rows = [derivative(outputs, x, row, retain_graph=True) for row in each]
        return torch.stack(rows).nan_to_num()
    model.add_backward((count - 1) * len(x))  # the hook saw one pass
    return result.nan_to_num()


def dual_size(slope: Tensor, norm: Norm) -> Tensor:
    """Size ``(...)`` of gradients ``(..., C, H, W)`` in the dual of ``norm``: how fast a step of length one gains."""
    flat = slope.flatten(-3)
    if norm is Norm.L2:
        return torch.linalg.vector_norm(flat, dim=-1)
    return flat.abs().sum(dim=-1) if norm is Norm.LINF else flat.abs().amax(dim=-1)


class Boundary(NamedTuple):
    """The nearest of several linearised class boundaries, for each image."""

    gap: Tensor  # (B,) logit of the class to win minus that of the class to leave, negative on the near side
    slope: Tensor  # (B, C, H, W) its gradient
    sizes: Tensor  # (B, K) dual sizes of the gradients of all K gaps


def nearest_boundary(model: Query, x: Tensor, toward: Tensor, away: Tensor, norm: Norm, *, batch_size: int) -> Boundary:
    """Of several linearised class boundaries the nearest to each image.

    Args:
        toward: ``(B, K)`` classes whose logit should win over that of ...
        away: ``(B, K)`` ... these classes.
        norm: of the distance.
        batch_size: most images and classes together that one pass holds.
    """
    at_once = max(1, batch_size // toward.shape[1])
    rows = torch.arange(len(x))
    parts = [
        _nearest(model.of(part), x[part], toward[part], away[part], norm, batch_size)
        for part in (torch.split(rows, at_once) if len(x) > at_once else [rows])
    ]
    return Boundary(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _nearest(
    model: Query, x: Tensor, toward: Tensor, away: Tensor, norm: Norm, batch_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    x = x.detach().requires_grad_()
    logits = model(x)
    gaps = logits.gather(1, toward) - logits.gather(1, away)
    images = torch.arange(len(x), device=x.device)
    least, sizes = torch.full_like(images, torch.inf, dtype=torch.float32), []
    best_gap, best_slope = gaps[:, 0].detach(), torch.zeros_like(x)
    blocks = torch.split(gaps, batch_size, dim=1)
    for block in blocks:
        slope = slopes(model, block, x, again=len(blocks) > 1)
        gap, size = block.detach().T, dual_size(slope, norm)
        distance, chosen = (gap.abs() / size.clamp_min(TINY)).min(dim=0)
        closer = distance < least
        least = torch.where(closer, distance, least)
        best_gap = torch.where(closer, gap[chosen, images], best_gap)
        best_slope = torch.where(closer.view(-1, 1, 1, 1), slope[chosen, images], best_slope)
        sizes.append(size.T)
    return best_gap, best_slope, torch.cat(sizes, dim=1)


@torch.no_grad()
def shorten(
    model: Query, x: Tensor, found: Tensor, holds: Callable[[Tensor, Tensor], Tensor], *, passes: int
) -> Tensor:
    """``found``, drawn straight toward the clean image by up to a fifth, as far as it stays adversarial.

    Args:
        holds: from float32 logits and the rows they are of to whether these are still adversarial.
        passes: forward passes of the bisection.
    """
    rows = (found != x).flatten(1).any(dim=1).nonzero().flatten()
    if not len(rows) or not passes:
        return found
    view, clean, change = model.of(rows, torch.float32), x[rows], found[rows] - x[rows]
    near, far = (torch.full((len(rows), 1, 1, 1), share, device=x.device) for share in (0.8, 1.0))
    best = found[rows]
    for _ in range(passes):
        middle = (near + far) / 2
        images = (clean + middle * change).clamp(0, 1)
        good = holds(view(images), rows).view(-1, 1, 1, 1)
        best = torch.where(good, images, best)
        near, far = torch.where(good, near, middle), torch.where(good, middle, far)
    result = found.clone()
    result[rows] = best
    return result
