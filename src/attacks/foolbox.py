"""Attacks of foolbox under our judge."""

from __future__ import annotations

import importlib
from typing import Annotated, Any

from torch import Tensor

from src.attacks.peers import Arguments, Peer, Seen, name_in
from src.threat import Norm, ThreatModel

LIBRARY, INSTALL = "foolbox", "foolbox"
Name = Annotated[str, name_in(LIBRARY, INSTALL)]

# How foolbox writes a norm at the head of an attack's name.
HEADS = {Norm.L0: ("L0",), Norm.L1: ("L1",), Norm.L2: ("L2",), Norm.LINF: ("Linf", "LInf", "Linfinity")}
NORM_OF = {norm.order: norm for norm in Norm}


class Foolbox(Peer):
    """An attack of foolbox, by name and arguments.

    Library: Rauber et al. 2020, "Foolbox Native", https://doi.org/10.21105/joss.02607

    Norms: those the attack has; the name may leave the norm out, the threat's is put in. Untargeted and, where the
    attack has it, targeted. Attacks of a fixed budget get eps, minimal ones search without a limit.

    Args:
        name: class in ``foolbox.attacks``, whole (``L2CarliniWagnerAttack``) or without norm and ``Attack``
            (``CarliniWagner``, ``PGD``, ``DeepFool``, ``FMN``).
        arguments: of its constructor, in the library's own names and units (``rel_stepsize``: in radii).

    Shapes: images ``(B, C, H, W)`` in [0, 1], labels or targets ``(B,)``.

    Raises:
        UserError: the library is not installed; when called, it has no attack of that name or none for this norm or
            mode, it refuses an argument or fails, or the model rejects.

    Example::

        attacked = Foolbox(name="PGD", arguments={"steps": 40})(model, images, labels, threat)
    """

    library = LIBRARY
    install = INSTALL

    def __init__(self, *, name: Name = "PGD", arguments: Arguments | None = None) -> None:
        super().__init__(name=name, arguments=arguments)

    def attack(self, library: Any, model: Seen, x: Tensor, y: Tensor, threat: ThreatModel) -> tuple[Tensor, bool]:
        attack = self.kind(threat.norm, targeted=threat.targeted)
        minimal = isinstance(attack, library.attacks.base.MinimizationAttack)
        goal = library.criteria.TargetedMisclassification if threat.targeted else library.criteria.Misclassification
        seen = library.PyTorchModel(model, bounds=(0, 1), device=x.device)
        try:
            raw, clipped, _ = attack(seen, x, goal(y), epsilons=None if minimal else threat.radius(x))
        except ValueError as error:
            if threat.targeted and "criterion" in str(error):
                raise self.no_target() from None
            raise
        return (raw, False) if minimal else (clipped, True)

    def kind(self, norm: Norm, *, targeted: bool) -> Any:
        """The attack itself; whether it can aim at a class only shows when it is asked to."""
        library = importlib.import_module(LIBRARY)
        attack = self.make(self._named(library, norm), {"constraint": str(norm)})
        has = NORM_OF.get(getattr(attack.distance, "p", -1))
        if has is not norm:
            raise self.wrong_norm(norm, frozenset({has} if has else ()))
        return attack

    def _named(self, library: Any, norm: Norm) -> type:
        """The class: the name as it stands, or with the norm before and ``Attack`` behind it."""
        for head in HEADS[norm]:
            for whole in (f"{head}{self.name}", f"{head}{self.name}Attack", self.name, f"{self.name}Attack"):
                if isinstance(kind := getattr(library.attacks, whole, None), type):
                    return kind
        known = [name for name, value in vars(library.attacks).items() if isinstance(value, type) and name != "Attack"]
        others = frozenset(
            norm
            for norm, heads in HEADS.items()
            if any(f"{head}{self.name}{tail}" in known for head in heads for tail in ("", "Attack"))
        )
        raise self.wrong_norm(norm, others) if others else self.unknown(known)
