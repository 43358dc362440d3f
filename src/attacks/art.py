"""Attacks of the Adversarial Robustness Toolbox (ART) under our judge."""

from __future__ import annotations

import importlib
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from src.attacks.peers import Arguments, Peer, Seen, name_in, parameters
from src.threat import Norm, ThreatModel

LIBRARY, INSTALL = "art", "adversarial-robustness-toolbox"
Name = Annotated[str, name_in(LIBRARY, INSTALL)]

# Attacks that take no norm, and the one they work in.
NORMS = {
    "BasicIterativeMethod": Norm.LINF,
    "BoundaryAttack": Norm.L2,
    "CarliniL0Method": Norm.L0,
    "CarliniL2Method": Norm.L2,
    "CarliniLInfMethod": Norm.LINF,
    "DeepFool": Norm.L2,
    "ElasticNet": Norm.L1,
    "NewtonFool": Norm.L2,
    "PixelAttack": Norm.L0,
    "SaliencyMapMethod": Norm.L0,
    "SignOPTAttack": Norm.L2,
    "SimBA": Norm.L2,
    "ThresholdAttack": Norm.LINF,
    "VirtualAdversarialMethod": Norm.L2,
    "ZooAttack": Norm.L2,
}
# Attacks that take a norm, where they lack some.
SOME_NORMS = {
    "AutoAttack": (Norm.L1, Norm.L2, Norm.LINF),
    "AutoConjugateGradient": (Norm.L1, Norm.L2, Norm.LINF),
    "AutoProjectedGradientDescent": (Norm.L1, Norm.L2, Norm.LINF),
    "BrendelBethgeAttack": tuple(Norm),
    "FastGradientMethod": (Norm.L1, Norm.L2, Norm.LINF),
    "GeoDA": (Norm.L1, Norm.L2, Norm.LINF),
    "HopSkipJump": (Norm.L2, Norm.LINF),
    "MomentumIterativeMethod": (Norm.L1, Norm.L2, Norm.LINF),
    "ProjectedGradientDescent": (Norm.L1, Norm.L2, Norm.LINF),
    "ProjectedGradientDescentNumpy": (Norm.L1, Norm.L2, Norm.LINF),
    "ProjectedGradientDescentPyTorch": (Norm.L1, Norm.L2, Norm.LINF),
    "SquareAttack": (Norm.L2, Norm.LINF),
}
TRIES_ALL_TARGETS = {"AutoAttack"}  # `targeted` means more attacks to it, and no one class
NAMES_Y_ITS_TARGET = {"SaliencyMapMethod"}  # always targeted: untargeted it picks a class itself when given no labels


class ART(Peer):
    """An evasion attack of ART, by name and arguments.

    Library: Nicolae et al. 2018, "Adversarial Robustness Toolbox", https://arxiv.org/abs/1807.01069

    Norms: those the attack has. Untargeted and, where the attack has it, targeted. Norm, eps and mode come from the
    threat; an attack that takes no ``eps`` (nor, as PixelAttack, a number of pixels ``th``) counts as minimal.

    Args:
        name: class in ``art.attacks.evasion``: ProjectedGradientDescent, HopSkipJump, PixelAttack, …
        arguments: of its constructor, in the library's own names and units (``eps_step``: in [0, 1] pixels).

    Shapes: images ``(B, C, H, W)`` in [0, 1], labels or targets ``(B,)``.

    Raises:
        UserError: the library is not installed; when called, it has no attack of that name or none for this norm or
            mode, it refuses an argument or fails, or the model rejects.

    Example::

        attacked = ART(name="ProjectedGradientDescent", arguments={"max_iter": 40})(model, images, labels, threat)
    """

    library = LIBRARY
    install = INSTALL

    def __init__(self, *, name: Name = "ProjectedGradientDescent", arguments: Arguments | None = None) -> None:
        super().__init__(name=name, arguments=arguments)

    def kind(self, norm: Norm, *, targeted: bool) -> Any:
        evasion = importlib.import_module("art.attacks.evasion")
        names = [*NORMS, *SOME_NORMS]
        kind = getattr(evasion, self.name, None)
        if self.name not in names or kind is None:
            raise self.unknown(names)
        norms = frozenset(SOME_NORMS.get(self.name) or (NORMS[self.name],))
        if norm not in norms:
            raise self.wrong_norm(norm, norms)
        aims = "targeted" in parameters(kind) and self.name not in TRIES_ALL_TARGETS
        if targeted and not aims and self.name not in NAMES_Y_ITS_TARGET:
            raise self.no_target()
        return kind

    def attack(self, library: Any, model: Seen, x: Tensor, y: Tensor, threat: ThreatModel) -> tuple[Tensor, bool]:
        kind = self.kind(threat.norm, targeted=threat.targeted)
        known = parameters(kind)
        radius = threat.radius(x)
        taken: dict[str, Any] = {"norm": threat.norm.order, "eps": radius, "targeted": threat.targeted}
        if self.name in {"PixelAttack", "ThresholdAttack"}:  # ThresholdAttack counts in 8-bit steps
            taken["th"] = int(radius) if threat.norm is Norm.L0 else max(1, int(radius * 255))
        if "verbose" not in self.arguments:
            taken["verbose"] = False
        if "batch_size" not in self.arguments:
            taken["batch_size"] = len(x)
        attack = self.make(kind, taken, self._classifier(model, x))
        labels = None if self.name in NAMES_Y_ITS_TARGET and not threat.targeted else y.cpu().numpy()
        made = torch.from_numpy(attack.generate(x.cpu().numpy(), y=labels)).to(x.device)
        return made, bool({"eps", "th"} & known & set(taken)) and self.name not in {"BoundaryAttack", "ZooAttack"}

    @staticmethod
    def _classifier(model: Seen, x: Tensor) -> Any:
        """The model as ART wants it."""
        return importlib.import_module("art.estimators.classification").PyTorchClassifier(
            model=model,
            loss=nn.CrossEntropyLoss(),
            input_shape=tuple(x.shape[1:]),
            nb_classes=model.classes(x),
            clip_values=(0.0, 1.0),
            device_type="gpu" if x.device.type == "cuda" else "cpu",
        )
