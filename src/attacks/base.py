"""The contract of every attack.

An attack of one's own is a class with ``norms`` and ``run`` in ``src/attacks/x.py`` and its ``conf/attack/x.yaml``.
It works on any callable from images to logits, without Hydra::

    attack = PGD(steps=40)
    attacked = attack(model, images, labels, ThreatModel(norm="linf", eps=8 / 255))
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from src.errors import UserError
from src.threat import Norm, ThreatModel

Model = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Attacked:
    """What an attack made of a batch. All tensors have the batch's first dimension ``B``."""

    images: Tensor  # (B, C, H, W) in [0, 1], within the budget
    prediction: Tensor  # (B,) the attacked model's class for `images`, in float32 and eval mode
    attempted: Tensor  # (B,) bool: right before the attack, so the attack worked on it
    success: Tensor  # (B,) bool: turned (untargeted), or turned into the target
    distance: Tensor  # (B,) in the threat's norm; 0 where not attempted
    forward_passes: int  # images sent through the model, verdicts included
    backward_passes: int


class Attack(ABC):
    """Base of all attacks. Authors write :meth:`run`; callers use ``attack(model, images, labels, threat)``."""

    norms: ClassVar[frozenset[Norm]]

    @final
    def __call__(
        self,
        model: Model,
        images: Tensor,
        labels: Tensor,
        threat: ThreatModel,
        *,
        generator: torch.Generator | None = None,
        target: Tensor | None = None,
    ) -> Attacked:
        """Attack the images the model gets right and judge the outcome.

        Args:
            model: any callable ``(B, C, H, W) in [0, 1] → logits (B, classes)``.
            images: float32 in [0, 1].
            labels: true classes ``(B,)``.
            threat: norm, radius, targeted or not.
            generator: CPU generator of all the attack's randomness; the same generator state gives the same images.
            target: wanted classes ``(B,)`` of a targeted attack; drawn among the wrong classes when absent.

        Raises:
            UserError: a norm the attack does not have, images outside [0, 1], labels or targets that make no sense.
            BudgetError: the attack's own images break the rules.
        """
        if threat.norm not in self.norms:
            allowed = ", ".join(sorted(self.norms))
            raise UserError(f"threat.norm={threat.norm}: {type(self).__name__} cannot do it. Allowed: {allowed}")
        _check(images, labels)
        generator = generator or torch.Generator().manual_seed(0)
        # A batch made under Lightning's inference mode can never carry gradients; a copy made outside can.
        with torch.inference_mode(False), torch.enable_grad(), _untouched(model, images.device, generator):
            counted = _Counted(model)
            images = images.detach().clone()
            logits = counted.verdict(images)
            if len(images) and int(labels.max()) >= logits.shape[1]:
                raise UserError(f"labels up to {int(labels.max())}, but the model has {logits.shape[1]} classes")
            attempted = logits.argmax(dim=1) == labels
            goal = labels
            if threat.targeted:
                goal = _targets(labels, logits.shape[1], generator) if target is None else target
                if bool((goal == labels).any()):
                    raise UserError("target equals the label of an image: a targeted attack needs a wrong class")
            result, prediction = images.clone(), logits.argmax(dim=1)
            todo = attempted.nonzero().flatten()
            if threat.eps > 0 and len(todo):
                made = self.run(counted, images[todo], goal[todo], threat, generator=generator)
                result[todo] = made.detach().to(images.dtype)
                prediction[todo] = counted.verdict(result[todo]).argmax(dim=1)
            distance = threat.judge(images, result)
            success = attempted & ((prediction == goal) if threat.targeted else (prediction != labels))
        return Attacked(
            images=result,
            prediction=prediction,
            attempted=attempted,
            success=success,
            distance=distance,
            forward_passes=counted.forward_passes,
            backward_passes=counted.backward_passes,
        )

    @abstractmethod
    def run(self, model: Model, x: Tensor, y: Tensor, threat: ThreatModel, *, generator: torch.Generator) -> Tensor:
        """Adversarial images for ``x``, same shape, in [0, 1] and within ``threat``.

        All of ``x`` is classified correctly. ``y`` is the label to leave, or the target to reach when
        ``threat.targeted``. Parameters of the model carry no gradient; the model is in eval mode.
        """


def fooled(logits: Tensor, y: Tensor, threat: ThreatModel) -> Tensor:
    """Which images have reached the attack's goal, shape ``(B,)``."""
    hit = logits.argmax(dim=1) == y
    return hit if threat.targeted else ~hit


def gradient(model: Model, x: Tensor, y: Tensor, threat: ThreatModel) -> tuple[Tensor, Tensor]:
    """Logits and the direction of ascent: the cross-entropy's gradient, turned round when targeted.

    Summed over the batch, so that an image's gradient does not depend on its neighbours.
    """
    x = x.detach().requires_grad_()
    logits = model(x).float()
    loss = F.cross_entropy(logits, y, reduction="sum")
    (slope,) = torch.autograd.grad(loss, x)
    return logits.detach(), -slope if threat.targeted else slope


def steepest(slope: Tensor, norm: Norm) -> Tensor:
    """The step of length one, in ``norm``, along which a linear loss grows fastest."""
    if norm is Norm.LINF:
        return slope.sign()
    # Scaled first: gradients of a confident network underflow when squared.
    scaled = slope / slope.abs().amax(dim=(1, 2, 3), keepdim=True).clamp_min(torch.finfo(slope.dtype).tiny)
    size = torch.linalg.vector_norm(scaled.flatten(1), dim=1).clamp_min(1e-12)
    return scaled / size.view(-1, 1, 1, 1)


class _Counted:
    """A model that counts the images it is asked about, forward and backward."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.forward_passes = 0
        self.backward_passes = 0

    def __call__(self, x: Tensor) -> Tensor:
        self.forward_passes += len(x)
        logits = self.model(x)
        if logits.requires_grad:
            logits.register_hook(self._count_backward)  # type: ignore[no-untyped-call]
        return logits

    def _count_backward(self, slope: Tensor) -> None:
        self.backward_passes += len(slope)

    @torch.no_grad()
    def verdict(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            logits = self(x)
        if not bool(torch.isfinite(logits).all()):
            raise UserError("the model returned NaN or infinite logits: it cannot be attacked; check its weights")
        return logits


@contextmanager
def _untouched(model: Model, device: torch.device, generator: torch.Generator) -> Iterator[None]:
    """Eval mode and no parameter gradients inside; mode, flags and the caller's random state as before outside."""
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    parameters = [p for p in model.parameters() if p.requires_grad] if isinstance(model, nn.Module) else []
    training = [module for module in modules if module.training]
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        # A stochastic model draws from the global state: let the attack's generator decide that as well.
        torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
        try:
            for module in training:
                module.training = False
            for parameter in parameters:
                parameter.requires_grad_(False)
            yield
        finally:
            for module in training:
                module.training = True
            for parameter in parameters:
                parameter.requires_grad_(True)


def _check(images: Tensor, labels: Tensor) -> None:
    if images.ndim != 4 or images.dtype != torch.float32:
        raise UserError(f"images are {tuple(images.shape)} {images.dtype}; expected (B, C, H, W) float32 in [0, 1]")
    if labels.shape != images.shape[:1] or labels.dtype != torch.int64:
        raise UserError(f"labels are {tuple(labels.shape)} {labels.dtype}; expected ({len(images)},) int64")
    if images.numel() and not (images.min() >= 0 and images.max() <= 1):
        raise UserError(
            f"images range from {images.min():.4g} to {images.max():.4g}; expected [0, 1]: "
            "put the normalisation inside the model"
        )
    if labels.numel() and int(labels.min()) < 0:
        raise UserError(f"labels go down to {int(labels.min())}; expected 0 or more")


def _targets(labels: Tensor, classes: int, generator: torch.Generator) -> Tensor:
    if classes < 2:
        raise UserError("a targeted attack needs a model with at least two classes")
    shift = torch.randint(1, classes, labels.shape, generator=generator).to(labels.device)
    return (labels + shift) % classes
