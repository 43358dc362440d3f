"""What the checks look at: a few images, the model under attack, and what the attack made of them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from src.attacks.base import Attack
from src.attacks.gradients import Loss, cross_entropy, margin, raw_gradient
from src.errors import UserError
from src.keys import seed_of
from src.threat import ThreatModel

FEW = 16  # images on which the judged model is asked more often


@dataclass(kw_only=True)
class Look:
    """A cell, seen from nearby.

    Attributes:
        target: the model under attack as the attacker meets it, ``(B, C, H, W) → logits``, in eval mode.
        model: the model that gives the verdict; with a last column for rejection where it ``rejects``.
        images, labels: clean images of the test split.
        attacked: what the attack made of them.
        turned: ``(B,)`` whether the attack met its goal on ``target``.
        attack, threat, search: what attacked.
        exact: the target's gradient is declared true, not replaced.
        stochastic: the verdict is declared to vary from draw to draw.
        draws: passes that the target averages over.
        seed: of all that a check draws.
    """

    target: nn.Module
    model: nn.Module
    images: Tensor
    labels: Tensor
    attacked: Tensor
    turned: Tensor
    attack: Attack
    threat: ThreatModel
    search: torch.dtype = torch.float32
    exact: bool = True
    stochastic: bool = False
    draws: int = 1
    seed: int = 0

    def run(self, attack: Attack, threat: ThreatModel) -> Tensor:
        """``(B,)`` whether another attack meets its goal on the target."""
        generator = torch.Generator().manual_seed(seed_of(self.seed, 1))
        return attack(
            self.target, self.images, self.labels, threat, generator=generator, search=self.search
        ).success.cpu()

    def seeded(self, draw: int = 0) -> None:
        """Set the global random state, so that a model which draws from it answers the same again."""
        torch.manual_seed(seed_of(self.seed, 2, draw))

    @cached_property
    def random(self) -> bool:
        """Whether the verdict varies from draw to draw: it is declared to, or two passes over a few images differ."""
        if self.stochastic:
            return True
        with torch.no_grad():
            self.seeded(0)
            one = self.model(self.images[:FEW]).float()
            self.seeded(1)
            return bool(differ(one, self.model(self.images[:FEW]).float()).any())

    @property
    def members(self) -> list[Attack]:
        """The attack, or those it is made of."""
        return members_of(self.attack, self.threat)

    @property
    def by_gradient(self) -> bool:
        """Whether the attack differentiates the target."""
        able = getattr(self.target, "differentiable", True)
        return able and any(each.needs == "gradient" for each in self.members)

    @cached_property
    def logits(self) -> Tensor:
        """Of the target, on the clean images."""
        self.seeded()
        with torch.no_grad():
            return self.target(self.images).float()

    @cached_property
    def right(self) -> Tensor:
        """``(B,)`` which clean images the target gets right."""
        return self.logits.argmax(dim=1) == self.labels

    @property
    def holds(self) -> bool:
        """Whether the attack left any of those: one that turns all is not too weak, whatever its gradients."""
        return bool((self.right.cpu() & ~self.turned.cpu()).any())

    @cached_property
    def losses(self) -> frozenset[Loss]:
        """What the attack climbs: cross-entropy; the margin stands for all differences of logits."""
        able = [each for each in self.members if each.needs == "gradient"]
        if not getattr(self.target, "rejects", False):  # an ensemble spares such a model those made for the others
            able = [each for each in able if not each.against_rejection] or able
        return frozenset(_climbed(each) for each in able)

    @cached_property
    def slopes(self) -> list[Tensor]:
        """Gradients of these losses at the clean images; empty where none comes through."""
        found = []
        for loss in self.losses:
            self.seeded()
            try:
                found.append(raw_gradient(self.target, self.images, self.labels, self.threat, loss)[1])
            except UserError:
                return []
        return found


def differ(one: Tensor, other: Tensor) -> Tensor:
    """``(B,)`` which answers differ by more than the order of a sum may change."""
    return ((one - other).abs() > 1e-4 * one.abs().amax(dim=1, keepdim=True) + 1e-6).any(dim=1)


def members_of(attack: Attack, threat: ThreatModel) -> list[Attack]:
    parts = attack.parts(threat.norm)
    return [one for each in parts.values() for one in members_of(each, threat)] if parts else [attack]


def _climbed(attack: Attack) -> Loss:
    """Attacks without a choice of loss: those for the smallest change and those past a detector climb logits."""
    loss = getattr(attack, "loss", None)
    if loss is None:
        return margin if type(attack).minimal or attack.against_rejection else cross_entropy
    return cross_entropy if loss in ("ce", cross_entropy) else margin
