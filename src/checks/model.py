"""Checks of a model: are its gradients there and true, are its answers logits, does its verdict stand?

Each takes a :class:`~src.checks.look.Look` and returns a figure, or None where it does not apply.
"""

from __future__ import annotations

import torch
from torch import Tensor

from src.attacks.gradients import cross_entropy, gradient, margin
from src.checks.look import FEW, Look, differ

SATURATED = -70.0  # log of the probability left to the other classes: e^-70 times a weight or two is lost in float32
STEP = 5e-4  # of finite differences, in [0, 1] pixels: larger meets the kinks of ReLUs, smaller float32's rounding
DRAWS = 4
POINTS = 8  # of a way, at which its gradient is taken


def gradient_missing(look: Look) -> float | None:
    """Share of the images whose gradient is zero, NaN or the same at all pixels.

    Of the loss that the attack climbs; where it climbs several, of each of them.
    """
    if not (look.by_gradient and look.holds):
        return None
    missing = torch.ones_like(look.right)
    for slope in look.slopes:
        flat = slope.flatten(1)
        missing &= ~torch.isfinite(flat).all(dim=1) | (flat.amax(dim=1) == flat.amin(dim=1))
    return _share(missing)


def gradient_untrue(look: Look) -> float | None:
    """Share of the images along whose gradient the margin changes otherwise than the gradients on the way say.

    They are averaged over the way, so that a kink is no fault: at one point a true gradient knows one of its sides.
    """
    if not (look.by_gradient and look.exact and look.slopes):
        return None
    middle = look.images.clamp(STEP, 1 - STEP)
    slope = _ascent(look, middle)
    drawn = torch.rand(middle.shape, generator=torch.Generator().manual_seed(look.seed)).to(middle.device) - 0.5
    way = STEP * torch.where(slope == 0, drawn.sign(), slope.sign())  # where it says nothing nothing should change
    true = _margin(look, middle + way) - _margin(look, middle - way)
    places = torch.linspace(-1, 1, 2 * POINTS + 1)[1::2].tolist()  # the middles of equal parts
    slopes = torch.stack([_ascent(look, middle + place * way) for place in places]).mean(dim=0)
    told = (slopes * 2 * way).flatten(1).sum(dim=1)
    rounding = 4e-6 * _margin(look, middle).abs().clamp_min(1)
    off = (true - told).abs()
    return _share(off > (torch.maximum(true.abs(), told.abs()) / 2).clamp_min(rounding))


def _ascent(look: Look, images: Tensor) -> Tensor:
    """Gradient of the margin."""
    look.seeded()
    slope = gradient(look.target, images, look.labels, look.threat, margin)[1]
    return -slope if look.threat.targeted else slope


@torch.no_grad()
def _margin(look: Look, images: Tensor) -> Tensor:
    look.seeded()
    return margin(look.target(images).float(), look.labels)


def logits_saturated(look: Look) -> float | None:
    """Share of the images got right whose cross-entropy has no gradient that float32 resolves."""
    if not (look.by_gradient and look.losses == {cross_entropy} and look.holds):
        return None
    logits, labels = look.logits[look.right], look.labels[look.right]
    others = logits.scatter(1, labels[:, None], -torch.inf).logsumexp(dim=1) - logits.logsumexp(dim=1)
    return _share(others < SATURATED)


@torch.no_grad()
def softmax_as_logits(look: Look) -> float | None:
    """Share of the images whose logits are a probability distribution."""
    look.seeded()
    logits = look.model(look.images).float()
    if getattr(look.model, "rejects", False):
        logits = logits[:, :-1]
    return _share((logits.amin(dim=1) >= 0) & ((logits.sum(dim=1) - 1).abs() < 1e-4))


@torch.no_grad()
def random_without_eot(look: Look) -> float | None:
    """Share of the images whose logits differ between two passes, where the attack takes one.

    An attack without gradients may where randomness is declared: it then goes on at images that one draw gets wrong.
    """
    averaging = all(getattr(each, "eot_iter", 1) > 1 for each in look.members if each.needs == "gradient")
    averaging &= look.by_gradient
    declared = look.stochastic and not look.by_gradient
    if declared or look.draws > 1 or averaging:
        return None
    first = look.logits
    look.seeded(1)
    return _share(differ(first, look.target(look.images).float()))


@torch.no_grad()
def redraws_disagree(look: Look) -> float | None:
    """Share of the attacked images that are right in some draws of the defense and wrong in others."""
    if not look.random:
        return None
    right = []
    for draw in range(DRAWS):
        look.seeded(draw)
        right.append(look.model(look.attacked).argmax(dim=1) == look.labels)
    votes = torch.stack(right).sum(dim=0)
    return _share((votes > 0) & (votes < DRAWS))


@torch.no_grad()
def batch_changes_verdict(look: Look) -> float | None:
    """Share of the clean images that get another class alone than in a batch."""
    if look.random:
        return None  # that is what other checks say
    look.seeded()
    together = look.model(look.images).float()
    few = look.images[:FEW]
    alone = torch.cat([look.model(image).float() for image in torch.split(few, 1)])
    return _share(alone.argmax(dim=1) != together[: len(few)].argmax(dim=1))


@torch.no_grad()
def bf16_changes_verdict(look: Look) -> float | None:
    """Share of the clean images that get another class in bfloat16."""
    if look.random:
        return None
    look.seeded()
    exact = look.model(look.images).argmax(dim=1)
    look.seeded()
    with torch.autocast(look.images.device.type, dtype=torch.bfloat16):
        rough = look.model(look.images).argmax(dim=1)
    return _share(exact != rough)


def _share(mask: Tensor) -> float:
    return float(mask.double().mean())
