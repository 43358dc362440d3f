"""The worst of several attacks, image by image."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import BeforeValidator
from torch import Tensor

from src.attacks.base import Attack
from src.attacks.combine import Ensemble, attacks_of
from src.attacks.query import Query
from src.errors import UserError
from src.threat import Norm, ThreatModel


class WorstCase(Ensemble):
    """An image holds only if it holds against every member; among the successes, the nearest is kept.

    Images meant for another model, or for other draws of a random one (``threat.exhaust``), are those in which the goal
    leads by most, and are spared further members only once it leads by far.

    Paper: per-image worst case over an ensemble as in Croce, Hein 2020, https://arxiv.org/abs/2003.01690, and over any
    set of attacks as in Carlini et al. 2019, "On Evaluating Adversarial Robustness", https://arxiv.org/abs/1902.06705

    Norms: those that all members have, but those ``against_rejection``, which are asked for the norm only where the
    model rejects; targeted likewise.

    Args:
        members: attacks by name, or their config nodes; they run in this order, under the one threat model. An image
            that nobody turns comes back as the first member left it.
        all_images: every member has all images, so that the nearest success is known; false: an image that one has
            turned is spared the others, which is faster and gives the same verdicts where members draw no random
            numbers.

    Shapes: images ``(B, C, H, W)`` in [0, 1], labels or targets ``(B,)``.

    A model that declares that it lets no gradient through (``differentiable`` is false) meets the other members only,
    and one that rejects nothing is spared those ``against_rejection`` where there are others.

    Raises:
        UserError: no members, something that is no attack, or a wrong argument of one; when called, members that lack
            the norm or the mode, or all of which need a gradient where there is none.

    Example::

        worst = WorstCase(members={"pgd": PGD(), "square": Square()})
        attacked = worst(model, images, labels, ThreatModel(norm="linf", eps=8 / 255))
    """

    norms = frozenset(Norm)  # of the class; an instance has those of its members
    given = True

    def __init__(
        self,
        *,
        members: Annotated[dict[str, Attack], BeforeValidator(attacks_of)],
        all_images: bool = True,
    ) -> None:
        self.members = attacks_of(members)
        self.all_images = all_images
        all_members = [each for each in self.members.values() if not each.against_rejection] or self.members.values()
        vars(self).update(  # what one instance can do depends on its members
            norms=frozenset.intersection(*(member.norms for member in all_members)),
            can_target=all(member.can_target for member in all_members),
            needs=max((member.needs for member in all_members), key=("gradient", "scores", "labels").index),
        )

    def parts(self, norm: Norm) -> dict[str, Attack]:
        return self.members

    def check(self, norm: Norm, *, targeted: bool = False) -> None:
        if norm not in self.norms:
            lacking = [f"members.{name}" for name, member in self.members.items() if norm not in member.norms]
            allowed = [*sorted(self.norms), f"members that all have {norm}"]
            raise UserError(f"threat.norm={norm}: {', '.join(lacking)} cannot do it. Allowed: {', '.join(allowed)}")
        super().check(norm, targeted=targeted)

    def run(self, model: Query, x: Tensor, y: Tensor, threat: ThreatModel, *, generator: torch.Generator) -> Tensor:
        able = [each for each in self.members.values() if model.differentiable or each.needs != "gradient"]
        if not able:
            raise UserError(
                f"the model lets no gradient through, and each of members.{', members.'.join(self.members)} needs one; "
                "use an attack that needs scores only, such as attack=square"
            )
        members = [each for each in able if model.rejects or not each.against_rejection] or able
        for member in members:
            member.check(threat.norm, targeted=threat.targeted)
        return self.in_turn(members, model, x, y, threat, generator, all_images=self.all_images)
