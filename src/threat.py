"""What an attacker may do: norm, radius, access; and the judge that holds every attack to it.

Images are float tensors ``(B, C, H, W)`` in ``[0, 1]``; radii are in the same units (``8/255``, ``0.3``, ``inf``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

from src.errors import UserError


class Norm(StrEnum):
    """The distance that bounds a perturbation."""

    L0 = "l0"  # counts pixels: all channels of one position are one pixel
    L1 = "l1"
    L2 = "l2"
    LINF = "linf"

    @classmethod
    def parse(cls, value: object) -> Norm:
        """Accept ``linf``, ``l-inf``, ``Linf``, ``inf`` and the like; anything else is a :class:`UserError`."""
        text = str(value).lower().replace("-", "").replace("_", "")
        text = text if text.startswith("l") else f"l{text}"
        try:
            return cls(text)
        except ValueError:
            raise UserError(f"threat.norm={value}: not a norm. Allowed: {', '.join(cls)}") from None


class Access(StrEnum):
    """What the attacker knows."""

    GRAY_BOX = "gray_box"  # the bare classifier, not the defense
    WHITE_BOX = "white_box"  # the defended model, through it

    @classmethod
    def parse(cls, value: object) -> tuple[Access, ...]:
        """One name or a list of names, in the order given, without repeats."""
        names = list(dict.fromkeys([value] if isinstance(value, str) else list(value)))  # type: ignore[call-overload]
        if not names:
            raise UserError(f"threat.access=[]: nothing to measure. Allowed: a list of {', '.join(cls)}")
        try:
            return tuple(cls(str(name)) for name in names)
        except ValueError as error:
            raise UserError(f"threat.access={value}: {error}. Allowed: {', '.join(cls)}") from None


def parse_eps(value: object, key: str = "threat.eps") -> float:
    """A radius from a number or text: ``0.3``, ``"8/255"``, ``"inf"``.

    Raises:
        UserError: negative, not a number, or text that is neither a number nor a fraction.
    """
    try:
        if isinstance(value, bool):
            raise ValueError
        if isinstance(value, str) and "/" in value:
            numerator, denominator = value.split("/")
            eps = float(numerator) / float(denominator)
        else:
            eps = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, ZeroDivisionError):
        raise UserError(f"{key}={value}: not a radius. Allowed: a number ≥ 0, a fraction like 8/255, or inf") from None
    if math.isnan(eps) or eps < 0:
        raise UserError(f"{key}={value}: a radius cannot be negative or NaN. Allowed: 0 or more, in [0,1] pixel units")
    return eps


def parse_eps_list(value: object, key: str = "threat.eps") -> tuple[float, ...]:
    """One radius or a list of them, ascending and without repeats."""
    values = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    if not values:
        raise UserError(f"{key}=[]: nothing to measure. Allowed: a radius or a list of radii")
    return tuple(sorted({parse_eps(item, key) for item in values}))


class BudgetError(RuntimeError):
    """An attack returned an image outside the box or the budget: a defect of the attack, never a user's mistake."""


@dataclass(frozen=True, kw_only=True)
class ThreatModel:
    """A norm and a radius, and whether the attacker wants one given class (targeted) or any wrong one."""

    norm: Norm
    eps: float
    targeted: bool = False
    # Go on after success: the images are meant for another model than the one attacked (gray-box, training).
    exhaust: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "norm", Norm.parse(self.norm))
        object.__setattr__(self, "eps", parse_eps(self.eps))

    def distance(self, clean: Tensor, images: Tensor) -> Tensor:
        """Size of the perturbation per image, shape ``(B,)``, in this norm."""
        delta = images - clean
        if self.norm is Norm.L0:
            return (delta != 0).any(dim=1).flatten(1).sum(dim=1).to(delta.dtype)
        order = {Norm.L1: 1.0, Norm.L2: 2.0, Norm.LINF: math.inf}[self.norm]
        return torch.linalg.vector_norm(delta.flatten(1), ord=order, dim=1)

    def radius(self, clean: Tensor) -> float:
        """``eps``, but never more than the unit box is wide in this norm, so that ``inf`` has a finite step."""
        _, channels, height, width = clean.shape
        pixels = channels * height * width
        widest = {Norm.L0: height * width, Norm.L1: pixels, Norm.L2: math.sqrt(pixels), Norm.LINF: 1.0}[self.norm]
        return min(self.eps, float(widest))

    def project(self, clean: Tensor, images: Tensor) -> Tensor:
        """The nearest allowed images: into the ball around ``clean`` and then into the box ``[0, 1]``.

        Clipping to the box after the ball never leaves the ball, since ``clean`` lies in the box. For l2 this is
        the usual radial projection, not the exact projection onto the intersection.
        """
        delta = images - clean
        if self.norm is Norm.LINF:
            delta = delta.clamp(-self.eps, self.eps)
        elif self.norm is Norm.L2:
            size = torch.linalg.vector_norm(delta.flatten(1), dim=1).clamp_min(1e-12)
            delta = delta * (self.eps / size).clamp_max(1.0).view(-1, 1, 1, 1)
        else:
            raise UserError(f"threat.norm={self.norm}: no projection onto this ball yet. Allowed here: l2, linf")
        return (clean + delta).clamp(0.0, 1.0)

    def judge(self, clean: Tensor, images: Tensor) -> Tensor:
        """Distances ``(B,)`` of images that keep to the rules.

        Raises:
            BudgetError: wrong shape or dtype, a value that is not finite or outside [0, 1], or a distance over eps
                by more than float32 rounding.
        """
        if images.shape != clean.shape or images.dtype != torch.float32:
            raise BudgetError(
                f"attack returned {tuple(images.shape)} {images.dtype}, expected {tuple(clean.shape)} float32"
            )
        if images.numel() == 0:
            return images.new_zeros(len(images))
        low, high = images.aminmax()
        if not (low >= 0 and high <= 1):  # also false for NaN
            raise BudgetError(f"attack left the box [0, 1]: values from {low:.6g} to {high:.6g}")
        distance = self.distance(clean, images)
        slack = 1e-6 if self.norm is Norm.LINF else 1e-5 * max(1.0, self.eps)
        if math.isfinite(self.eps) and (worst := distance.max()) > self.eps + slack:
            raise BudgetError(f"attack left the budget: {self.norm} distance {worst:.8g}, eps {self.eps:.8g}")
        return distance
