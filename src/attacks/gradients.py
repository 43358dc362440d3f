"""Losses and directions that gradient attacks share."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from src.errors import UserError
from src.threat import Norm, ThreatModel

Loss = Callable[[Tensor, Tensor], Tensor]  # logits (B, classes), y (B,) → (B,); larger is further from y


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Negative log-probability of ``y``, per image."""
    return F.cross_entropy(logits, y, reduction="none")


def margin(logits: Tensor, y: Tensor) -> Tensor:
    """Best other logit minus that of ``y``, per image: positive where ``y`` is not the answer.

    Paper: Carlini, Wagner 2017, https://arxiv.org/abs/1608.04644 (f6, without the cut at zero).
    """
    own = logits.gather(1, y[:, None]).squeeze(1)
    others = logits.scatter(1, y[:, None], -torch.inf)
    return others.amax(dim=1) - own


def dlr(logits: Tensor, y: Tensor) -> Tensor:
    """Difference of logits ratio, per image: the margin over the spread of the largest logits.

    Paper: Croce, Hein 2020, https://arxiv.org/abs/2003.01690, eq. 6. With fewer than three classes the ratio is
    undefined and the margin stands in for it.
    """
    if logits.shape[1] < 3:
        return margin(logits, y)
    ordered = logits.sort(dim=1).values
    return margin(logits, y) / (ordered[:, -1] - ordered[:, -3] + 1e-12)


def dlr_pair(logits: Tensor, y: Tensor, *, other: Tensor) -> Tensor:
    """The logit of ``other`` minus that of ``y``, over the spread of the largest logits, per image.

    Paper: that of :func:`dlr`, eq. 7. It asks for four classes; with fewer the difference stands alone, since a ratio
    would be flat.
    """
    pair = logits.gather(1, torch.stack([other, y], dim=1))
    difference = pair[:, 0] - pair[:, 1]
    if logits.shape[1] < 4:
        return difference
    top = logits.topk(4, dim=1).values
    return difference / (top[:, 0] - top[:, 2:].mean(dim=1) + 1e-12)


def toward(other: Tensor, *, refusal: bool) -> Loss:
    """The ratio of :func:`dlr_pair`, or the margin where a targeted attack meets a model that rejects (``refusal``).

    There the logit of rejection stands in for that of every class but the target, so that what the ratio divides by is
    next to nothing, and raising it counts for more than the target.
    """
    return margin if refusal else partial(dlr_pair, other=other)


LOSSES: dict[str, Loss] = {"ce": cross_entropy, "dlr": dlr, "margin": margin}


def gradient(
    model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, threat: ThreatModel, loss: Loss = cross_entropy
) -> tuple[Tensor, Tensor]:
    """Logits and the direction of ascent: the loss's gradient, turned round when targeted; NaN counts as none."""
    logits, slope = raw_gradient(model, x, y, threat, loss)
    return logits, slope.nan_to_num()


def raw_gradient(
    model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, threat: ThreatModel, loss: Loss = cross_entropy
) -> tuple[Tensor, Tensor]:
    """The same with NaN where there is one, such as a root's at black pixels.

    Summed over the batch, so that an image's gradient does not depend on its neighbours.
    """
    x = x.detach().requires_grad_()
    logits = model(x)
    slope = derivative(loss(logits, y).sum(), x)
    return logits.detach(), -slope if threat.targeted else slope


def derivative(outputs: Tensor, x: Tensor, weights: Tensor | None = None, **how: bool) -> Tensor:
    """``torch.autograd.grad`` at the model's input, refused where nothing of ``outputs`` depends on it smoothly."""
    slope = None
    if outputs.requires_grad:  # its parameters may, where the model is a plain callable
        (slope,) = torch.autograd.grad(outputs, x, weights, allow_unused=True, **how)
    if slope is None:
        raise UserError(
            "the model lets no gradient through to its input: this attack needs one; "
            "use an attack that needs scores only, such as attack=square"
        )
    return slope


def steepest(slope: Tensor, norm: Norm) -> Tensor:
    """The step of length one, in ``norm`` (linf or l2), along which a linear loss grows fastest."""
    if norm is Norm.LINF:
        return slope.sign()
    # Scaled first: gradients of a confident network underflow when squared.
    scaled = slope / slope.abs().amax(dim=(1, 2, 3), keepdim=True).clamp_min(torch.finfo(slope.dtype).tiny)
    size = torch.linalg.vector_norm(scaled.flatten(1), dim=1).clamp_min(1e-12)
    return scaled / size.view(-1, 1, 1, 1)
