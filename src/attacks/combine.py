"""What attacks made of other attacks share."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from src.attacks.base import Attack, lead
from src.attacks.query import Query
from src.build import build, locate
from src.errors import UserError
from src.threat import ThreatModel

SURE = 3.0  # lead of the goal's logit at which its odds are 20 to 1


class Ensemble(Attack):
    """Runs other attacks on the same images.

    Attributes:
        given: its parts are its ``members``, which a caller chose and may replace; false: it makes them itself, and its
            own arguments say all that can be changed.
    """

    given: ClassVar[bool] = False
    members: dict[str, Attack]

    def in_turn(
        self,
        members: Iterable[Attack],
        model: Query,
        x: Tensor,
        y: Tensor,
        threat: ThreatModel,
        generator: torch.Generator,
        *,
        all_images: bool,
    ) -> Tensor:
        """For each image the nearest that met the goal, else what the first member made of it.

        Each member is judged as if it stood alone: after rounding to 8 bits where the threat asks for it, without what
        a minimal-norm attack found beyond the budget, in float32. Images meant for another model, or for other draws of
        a random one (``threat.exhaust``), are those in which the goal leads by most, and one is spared the members
        that follow only when its goal is all but certain.

        Args:
            all_images: let every member have all images; false: only those that no member before it has turned.
        """
        result, rows = x.clone(), torch.arange(len(x), device=x.device)
        by_lead = threat.exhaust and math.isfinite(threat.eps)
        best = torch.full((len(x),), -torch.inf, device=x.device)
        for turn, member in enumerate(members):
            clean, goal = x[rows], y[rows]
            made, logits = member._made(model.of(rows), clean, goal, threat, generator)
            ahead = lead(logits, goal, threat)
            merit = ahead if by_lead else torch.where(ahead > 0, -threat.distance(clean, made), -torch.inf)
            better = merit > best[rows]
            taken = better | (best[rows] == -torch.inf) if turn == 0 else better
            result[rows] = torch.where(taken.view(-1, 1, 1, 1), made, result[rows])
            best[rows] = torch.where(better, merit, best[rows])
            if not all_images:
                rows = rows[ahead <= (SURE if by_lead else 0)]
                if not len(rows):
                    break
        return result

    def _made(
        self, model: Query, clean: Tensor, y: Tensor, threat: ThreatModel, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        # The members have already searched again where bfloat16 deceived them.
        return self._searched(model, clean, y, threat, generator)


def attacks_of(members: object) -> dict[str, Attack]:
    """Attacks by name, from attacks or from nodes with a ``_target_`` and its arguments.

    Raises:
        UserError: no members, something that is no attack, a wrong argument of one.
    """
    if not isinstance(members, Mapping) or not members:
        raise UserError(f"members={members}: expected attacks by name, such as members.pgd and members.square")
    return {str(name): _attack(node, f"members.{name}") for name, node in members.items()}


def _attack(node: Any, key: str) -> Attack:
    if isinstance(node, Attack):
        return node
    if not isinstance(node, Mapping) or "_target_" not in node:
        raise UserError(f"{key}={node}: expected an attack, or one of the choices in conf/attack")
    found = locate(node, key)
    if not inspect.isclass(found) or not issubclass(found, Attack):
        raise UserError(f"{key}._target_={node['_target_']}: not an attack. Expected a subclass of {Attack.__name__}")
    made: Attack = build(node, key)
    return made
