"""Attacks of torchattacks under our judge."""

from __future__ import annotations

import importlib
import inspect
import re
from typing import Annotated, Any

from torch import Tensor, nn

from src.attacks.peers import Arguments, Peer, Seen, name_in, parameters
from src.threat import Norm, ThreatModel

LIBRARY, INSTALL = "torchattacks", "--no-deps torchattacks"
Name = Annotated[str, name_in(LIBRARY, INSTALL)]


class TorchAttacks(Peer):
    """An attack of torchattacks, by name and arguments.

    Library: Kim 2020, "Torchattacks: A PyTorch Repository for Adversarial Attacks", https://arxiv.org/abs/2010.01950

    Norms: those the attack's own documentation names. Untargeted and, where the attack has it, targeted. Norm and eps
    come from the threat; eps reaches an attack as its ``eps``, ``max_epsilon`` or ``pixels``, one that takes none of
    these counts as minimal.

    Args:
        name: class in ``torchattacks``: PGD, CW, JSMA, …
        arguments: of its constructor, in the library's own names and units (``alpha``: step in [0, 1] pixels).

    Shapes: images ``(B, C, H, W)`` in [0, 1], labels or targets ``(B,)``.

    Raises:
        UserError: the library is not installed; when called, it has no attack of that name or none for this norm or
            mode, it refuses an argument or fails, or the model rejects.

    Example::

        attacked = TorchAttacks(name="PGD", arguments={"steps": 40})(model, images, labels, threat)
    """

    library = LIBRARY
    install = INSTALL

    def __init__(self, *, name: Name = "PGD", arguments: Arguments | None = None) -> None:
        super().__init__(name=name, arguments=arguments)

    def kind(self, norm: Norm, *, targeted: bool) -> Any:
        library = importlib.import_module(LIBRARY)
        names = [name for name in library.__all__ if name not in library.__wrapper__]
        if self.name not in names:
            raise self.unknown(names)
        kind = getattr(library, self.name)
        if norm not in (norms := documented_norms(kind)):
            raise self.wrong_norm(norm, norms)
        if targeted:  # only an object knows, so one is made for a model that is never asked
            self._object(kind, norm, targeted, nn.Identity(), radius=1.0, classes=2)
        return kind

    def attack(self, library: Any, model: Seen, x: Tensor, y: Tensor, threat: ThreatModel) -> tuple[Tensor, bool]:
        kind = self.kind(threat.norm, targeted=False)
        known = parameters(kind)
        classes = model.classes(x) if "n_classes" in known else None
        attack = self._object(kind, threat.norm, threat.targeted, model, radius=threat.radius(x), classes=classes)
        bounded = bool({"eps", "max_epsilon", "pixels"} & known) and self.name != "FAB"
        return attack(x, y), bounded

    def _object(
        self, kind: Any, norm: Norm, targeted: bool, model: nn.Module, *, radius: float, classes: int | None
    ) -> Any:
        taken = {
            "eps": radius,
            "max_epsilon": radius,
            "pixels": int(radius),
            "norm": "Linf" if norm is Norm.LINF else norm.upper(),
            "n_classes": classes,
        }
        attack = self.make(kind, taken, model)
        if targeted:
            if "targeted" not in attack.supported_mode:
                raise self.no_target()
            attack.set_mode_targeted_by_label(quiet=True)
        return attack


def documented_norms(kind: Any) -> frozenset[Norm]:
    """The norms in the line ``Distance Measure : …`` of an attack's docstring; all where there is none."""
    found = re.search(r"Distance Measure\s*:(.*)", inspect.getdoc(kind) or "")
    return frozenset(Norm.parse(name) for name in re.findall(r"L(?:inf|\d)", found[1])) if found else frozenset(Norm)
