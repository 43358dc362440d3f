"""What an attacker may do: norm, radius, access; and the judge that holds every attack to it.

Images are float tensors ``(B, C, H, W)`` in ``[0, 1]``; radii are in the same units (``8/255``, ``0.3``, ``inf``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
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

    @property
    def order(self) -> float:
        """The p of lp: 0, 1, 2 or inf."""
        return {Norm.L0: 0, Norm.L1: 1, Norm.L2: 2, Norm.LINF: math.inf}[self]

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
    BLACK_BOX = "black_box"  # only the defended model's scores
    TRANSFER = "transfer"  # a surrogate classifier trained apart, nothing of the defended model

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


def parse_eps(value: object, key: str = "threat.eps", norm: Norm | None = None) -> float:
    """A radius from a number or text: ``0.3``, ``"8/255"``, ``"inf"``.

    Raises:
        UserError: negative, not a number, or text that is neither number nor fraction; for linf over 1 and not inf.
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
    if norm is Norm.LINF and 1 < eps < math.inf:
        raise UserError(
            f"{key}={value}: in linf pixels are at most 1 apart; did you mean 8/255? Allowed: 0 to 1, or inf"
        )
    return eps


def parse_eps_list(value: object, key: str = "threat.eps", norm: Norm | None = None) -> tuple[float, ...]:
    """One radius or a list of them, ascending and without repeats."""
    values = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    if not values:
        raise UserError(f"{key}=[]: nothing to measure. Allowed: a radius or a list of radii")
    return tuple(sorted({parse_eps(item, key, norm) for item in values}))


class BudgetError(RuntimeError):
    """An attack returned an image outside the box or the budget: a defect of the attack, never a user's mistake."""


@dataclass(frozen=True, kw_only=True)
class ThreatModel:
    """A norm and a radius, and whether the attacker wants one given class (targeted) or any wrong one."""

    norm: Norm
    eps: float
    targeted: bool = False
    # Go on after success: the images are meant for another model than the one attacked (gray-box, training), or for
    # other draws of a random one.
    exhaust: bool = False
    # Take the verdict after rounding to 8-bit pixels, as a saved picture would have them.
    quantize: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "norm", Norm.parse(self.norm))
        object.__setattr__(self, "eps", parse_eps(self.eps, norm=self.norm))

    def distance(self, clean: Tensor, images: Tensor) -> Tensor:
        """Size of the perturbation per image, shape ``(B,)``, in this norm."""
        delta = images - clean
        if self.norm is Norm.L0:
            return (delta != 0).any(dim=1).flatten(1).sum(dim=1).to(delta.dtype)
        size = delta.abs().flatten(1)
        if self.norm is Norm.LINF:
            return size.amax(dim=1)
        # As sums, which torch takes pairwise: the error of a vector_norm of many values is more than `slack`.
        return size.sum(dim=1) if self.norm is Norm.L1 else size.square().sum(dim=1).sqrt()

    def before_rounding(self, clean: Tensor) -> ThreatModel:
        """The threat to search under where the outcome is rounded: in linf by whole grey levels, if ``clean`` is so.

        What a search spends beyond the last whole level, rounding takes back.
        """
        if not self.quantize or self.norm is not Norm.LINF or not math.isfinite(self.eps):
            return self
        if not torch.equal((clean * 255).round() / 255, clean):
            return self
        return replace(self, eps=math.floor(self.eps * 255 + 1e-4) / 255)

    def radius(self, clean: Tensor) -> float:
        """``eps``, but never more than the unit box is wide in this norm, so that ``inf`` has a finite step."""
        _, channels, height, width = clean.shape
        pixels = channels * height * width
        widest = {Norm.L0: height * width, Norm.L1: pixels, Norm.L2: math.sqrt(pixels), Norm.LINF: 1.0}[self.norm]
        return min(self.eps, float(widest))

    def project(self, clean: Tensor, images: Tensor) -> Tensor:
        """The nearest allowed images: into the ball around ``clean`` and then into the box ``[0, 1]``.

        Clipping to the box after the ball never leaves the ball, since ``clean`` lies in the box. For l2 this is
        the usual radial projection, not the exact projection onto the intersection; for l1 it is exact, since there
        the difference decides whether attacks work (Croce, Hein 2021, https://arxiv.org/abs/2103.01208); for l0 the
        pixels with the largest change are kept.
        """
        delta = images - clean
        if self.norm is Norm.LINF:
            delta = delta.clamp(-self.eps, self.eps)
        elif self.norm is Norm.L2:
            size = self.distance(clean, images).clamp_min(1e-12)
            delta = delta * (self.eps / size).clamp_max(1.0).view(-1, 1, 1, 1)
        elif self.norm is Norm.L1:
            delta = project_l1_box(clean, delta, self.eps)
        else:
            delta = (clean + delta).clamp(0.0, 1.0) - clean
            delta = delta * largest_pixels(delta, self.eps)
        moved = (clean + delta).clamp(0.0, 1.0)
        if self.norm not in (Norm.L1, Norm.L2):
            return moved
        # Rounding of the sum, up in thousands of pixels, would leave the ball.
        return torch.where((moved - clean).abs() > delta.abs(), moved.nextafter(clean), moved)

    def to_8_bit(self, clean: Tensor, images: Tensor) -> Tensor:
        """Images on the grid of 8-bit pixels; where rounding would leave the budget, rounded toward ``clean``.

        For l1 and l2 only as many values as it takes, first those that rounding away had moved farthest. Where the
        clean pixels are off the grid that may not be enough: then the change is shortened, and an image with no point
        of the grid within the budget stays clean, off the grid.
        """
        saved = self._rounded(clean, images)
        for share in (0.75, 0.5, 0.25, 0.0, None):
            over = self.distance(clean, saved) > self.eps + self.slack
            over &= self.distance(clean, images) <= self.eps + self.slack  # what was beyond before is the judge's
            if not bool(over.any()):
                break
            nearer = clean if share is None else ((clean + share * (images - clean)) * 255).round() / 255
            saved = torch.where(over.view(-1, 1, 1, 1), nearer, saved)
        return saved

    def _rounded(self, clean: Tensor, images: Tensor) -> Tensor:
        saved = (images * 255).round() / 255
        if not math.isfinite(self.eps):
            return saved
        size = (saved - clean).abs()
        back = ((saved - (saved - clean).sign() / 255) * 255).round() / 255  # the next value toward the clean one
        away = (size > (images - clean).abs()) & ((back - clean).abs() < size)
        toward = torch.where(away, back, saved)
        if self.norm is Norm.LINF:
            return torch.where(size > self.eps + self.slack, toward, saved)
        over = self.distance(clean, saved) > self.eps + self.slack
        if self.norm is Norm.L0 or not bool(over.any()):
            return torch.where(over.view(-1, 1, 1, 1), toward, saved)
        power = self.norm.order
        before, after = ((each - clean).abs().flatten(1) ** power for each in (saved, toward))
        moved = (saved - images).abs().flatten(1).masked_fill(before <= after, -1.0)
        order = moved.argsort(dim=1, descending=True)
        spared = (before - after).gather(1, order).cumsum(dim=1)
        lacking = before.sum(dim=1, keepdim=True) - self.eps**power
        first = torch.searchsorted(spared, lacking.clamp_min(0))  # how many values have to give way
        giving = torch.zeros_like(before, dtype=torch.bool).scatter(
            1, order, torch.arange(before.shape[1], device=clean.device) <= first
        )
        return torch.where(giving.view_as(saved) & over.view(-1, 1, 1, 1), toward, saved)

    @property
    def slack(self) -> float:
        """How far over eps float32 rounding may carry a distance."""
        return 1e-6 if self.norm is Norm.LINF else 1e-5 * max(1.0, self.eps)

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
        if math.isfinite(self.eps) and (worst := distance.max()) > self.eps + self.slack:
            raise BudgetError(f"attack left the budget: {self.norm} distance {worst:.8g}, eps {self.eps:.8g}")
        return distance


def project_l1_box(clean: Tensor, delta: Tensor, eps: float | Tensor) -> Tensor:
    """The change nearest to ``delta`` with l1 norm at most ``eps`` that keeps ``clean`` in [0, 1]. Exact.

    ``eps`` is one radius for all images or one for each, ``(B,)``.

    The solution is ``sign(delta) * clip(|delta| - t, 0, room)`` with the least ``t >= 0`` that meets the budget,
    where ``room`` is how far each value may move. Its l1 norm is piecewise linear in ``t``: a sort of the break
    points and two running sums find ``t``, without iteration.
    """
    size = delta.abs().flatten(1)
    room = torch.where(delta > 0, 1 - clean, clean).flatten(1).clamp_min(0)
    # Lowering t from above: a value starts to move when t falls below |delta|, and stops when its room is used up.
    breaks, order = torch.cat([size, size - room], dim=1).sort(dim=1, descending=True)
    moving = torch.cat([torch.ones_like(size), -torch.ones_like(size)], dim=1).gather(1, order).cumsum(dim=1)
    gaps = breaks[:, :-1] - breaks[:, 1:]
    norm_at = torch.nn.functional.pad((moving[:, :-1] * gaps).cumsum(dim=1), (1, 0))  # l1 norm when t is at a break
    budget = torch.as_tensor(eps, dtype=size.dtype, device=size.device).expand(len(size))[:, None]
    after = torch.searchsorted(norm_at.contiguous(), budget.contiguous(), right=True)
    at = (after - 1).clamp_min(0)
    speed = moving.gather(1, at).clamp_min(1)
    threshold = breaks.gather(1, at) - (budget - norm_at.gather(1, at)) / speed
    kept = torch.minimum((size - threshold.clamp_min(0)).clamp_min(0), room)
    return delta.sign() * kept.view_as(delta)


def largest_pixels(delta: Tensor, count: float) -> Tensor:
    """Mask ``(B, 1, H, W)`` of the ``count`` pixels that changed most, over all channels together."""
    batch, _, height, width = delta.shape
    kept = int(min(count, height * width))
    change = delta.abs().sum(dim=1).flatten(1)
    mask = torch.zeros_like(change)
    if kept:
        mask.scatter_(1, change.topk(kept, dim=1).indices, 1.0)
    return mask.view(batch, 1, height, width)
