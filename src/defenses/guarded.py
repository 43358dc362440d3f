"""A classifier behind a defense, as tests and attackers meet it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pytorch_lightning import LightningModule
from torch import Tensor, nn

Gradient = Literal["exact", "bpda", "none"]
ImageMap = Callable[[Tensor], Tensor]

WORST_LAST: tuple[Gradient, ...] = ("exact", "bpda", "none")


def bpda(value: ImageMap, stand_in: ImageMap) -> ImageMap:
    """``value`` forwards, the gradient of ``stand_in`` backwards.

    Paper: Athalye, Carlini, Wagner 2018, "Obfuscated Gradients Give a False Sense of Security",
    https://arxiv.org/abs/1802.00420, section 4.1
    """

    def replaced(images: Tensor) -> Tensor:
        with torch.no_grad():
            true = value(images)
        if not torch.is_grad_enabled():
            return true
        smooth = stand_in(images)
        return smooth + (true - smooth).detach()

    return replaced


@dataclass(frozen=True, kw_only=True)
class Detection:
    """A score of suspicion, ``(B, C, H, W) → (B,)``, higher for attacked images.

    Attributes:
        threshold: images that score more are rejected; None: set on clean validation images.
    """

    score: ImageMap
    threshold: float | None = None


class DefendedModel(LightningModule):
    """A classifier behind a defense: images in [0, 1] → logits.

    One that detects has a last column beside the classes: it is the largest where the image is rejected. ``rejects``
    says so; an attack has then to avoid the right class and rejection alike.

    Defenses nest: ``classifier`` may be a DefendedModel, whose detections then count here.

    Args:
        classifier: the network that decides in the end.
        defense: kept so that its weights move and switch mode with this module.
        purify: what happens to the images before the classifier sees them; None: nothing.
        surrogate: differentiable stand-in for ``purify`` when ``gradient`` is ``bpda``.
        gradient: how gradients pass through ``purify``.
        stochastic: the answer varies from call to call.
        votes: answers of a stochastic defense of which the majority is given.
        detections: scores of the images as they come in.
        fpr: share of clean validation images that all detections together reject.
        certify: l2 radius within which the answer is proven right, ``(B, C, H, W), labels → (B,)``; -1 where it is
            wrong or withheld.
        certify_images: how many of the first test images are certified.
    """

    def __init__(
        self,
        *,
        classifier: nn.Module,
        defense: nn.Module | None = None,
        purify: ImageMap | None = None,
        surrogate: ImageMap | None = None,
        gradient: Gradient = "exact",
        stochastic: bool = False,
        votes: int = 1,
        detections: Sequence[Detection] = (),
        fpr: float = 0.05,
        certify: Callable[[Tensor, Tensor], Tensor] | None = None,
        certify_images: int = 0,
    ) -> None:
        super().__init__()
        self.classifier = classifier
        self.defense = defense
        self._own = self._declared(purify, surrogate, gradient)
        self.gradient = gradient
        self.stochastic = stochastic
        self.votes = votes
        self.certify = certify
        self.certify_images = certify_images
        self.fpr = fpr
        self.detections = list(detections)
        inner = classifier if isinstance(classifier, DefendedModel) else None
        self._inner = inner
        if inner is not None:
            self.gradient = max(gradient, inner.gradient, key=WORST_LAST.index)
            self.stochastic = stochastic or inner.stochastic
            self.votes = max(votes, inner.votes)
            self.fpr = fpr if detections else inner.fpr
            self.detections += [
                Detection(score=_after(self._own, each.score), threshold=each.threshold) for each in inner.detections
            ]
        self.frozen: dict[str, Tensor] = {}

    @staticmethod
    def _declared(purify: ImageMap | None, surrogate: ImageMap | None, gradient: Gradient) -> ImageMap:
        """The defense as an attacker may differentiate it."""
        if purify is None:
            return lambda images: images
        if gradient == "exact":
            return purify
        if gradient == "none":
            return torch.no_grad()(purify)
        assert surrogate is not None
        return bpda(purify, surrogate)

    @property
    def rejects(self) -> bool:
        return bool(self.detections)

    def purified(self, images: Tensor) -> Tensor:
        """What the classifier gets to see."""
        seen = self._own(images)
        return seen if self._inner is None else self._inner.purified(seen)

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``(B, classes)``, with a last column for rejection where the defense detects."""
        return self._with_rejection(self._voted(images), images)

    def once(self, images: Tensor) -> Tensor:
        """As :meth:`forward`, from a single draw."""
        return self._with_rejection(self.logits(images), images)

    def logits(self, images: Tensor) -> Tensor:
        """What the classifier answers, whether the image is rejected or not; a single draw."""
        seen = self._own(images)
        return self.classifier(seen) if self._inner is None else self._inner.logits(seen)

    def _voted(self, images: Tensor) -> Tensor:
        if self.votes == 1:
            return self.logits(images)
        counts = mean = torch.zeros((), device=images.device)
        for _ in range(self.votes):
            logits = self.logits(images).float()
            counts = counts + F.one_hot(logits.argmax(dim=1), logits.shape[1])
            mean = mean + logits.softmax(dim=1) / self.votes
        return counts + mean  # the mean probability breaks ties

    def _with_rejection(self, logits: Tensor, images: Tensor) -> Tensor:
        if not self.rejects:
            return logits
        top = logits.amax(dim=1)
        # In the scale of the logits, so that neither term drowns the other in an attacker's gradient.
        spread = (top - logits.mean(dim=1)).detach().clamp_min(1.0)
        return torch.cat([logits, (top + spread * (self.suspicion(images) - 1))[:, None]], dim=1)

    def scores(self, images: Tensor) -> Tensor:
        """What each detection says: ``(B, detections)``."""
        return torch.stack([each.score(images) for each in self.detections], dim=1)

    def suspicion(self, images: Tensor) -> Tensor:
        """The detections as one figure, ``(B,)``: over 1 is rejected."""
        if not self.frozen:
            raise RuntimeError(
                "the thresholds of this defense are not set: call set_thresholds with scores of clean validation images"
            )
        zero, unit, limit = (self.frozen[name].to(images.device) for name in ("zero", "unit", "limit"))
        return ((self.scores(images) - zero) / unit).amax(dim=1) / limit

    def set_thresholds(self, clean: Tensor) -> dict[str, Tensor]:
        """Set the thresholds from the scores of clean validation images ``(N, detections)``.

        Each detection is put on a scale where its median is 0 and its own threshold 1; an image is rejected by the
        largest of them, at the value that leaves at most ``fpr`` of the clean images above it. A threshold given by
        the user stands as it is, and then nothing is adjusted to ``fpr``.
        """
        given = [each.threshold for each in self.detections]
        middle = clean.median(dim=0).values
        reach = torch.quantile(clean, 1 - self.fpr, dim=0, interpolation="higher") - middle
        zero = torch.stack([m if t is None else m.new_zeros(()) for m, t in zip(middle, given, strict=True)])
        unit = torch.stack([r if t is None else r.new_tensor(t) for r, t in zip(reach, given, strict=True)])
        unit = unit.clamp_min(1e-12)
        limit = unit.new_ones(())
        if all(threshold is None for threshold in given):
            together = ((clean - zero) / unit).amax(dim=1)
            limit = torch.quantile(together, 1 - self.fpr, interpolation="higher").clamp_min(1e-12)
        self.frozen = {"zero": zero, "unit": unit, "limit": limit}
        return self.frozen

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        images = batch["image"]
        answer = self(images)
        told = {"prediction": answer.argmax(dim=1)}
        if self.rejects:
            classes = answer[:, :-1]
            told |= {
                "behind": classes.argmax(dim=1),
                "rejected": told["prediction"] == classes.shape[1],
                "suspicion": self.suspicion(images),
            }
        return told

    def adaptive(self, draws: int) -> nn.Module:
        """The model that a white_box attacker differentiates: through the defense, as its declaration says.

        Args:
            draws: passes averaged when the defense is stochastic (EOT, Athalye et al. 2018).
        """
        return _Adaptive(self, draws if self.stochastic else 1)


class _Adaptive(nn.Module):
    log_probabilities = True  # on purpose, where it averages: no need to warn of it

    def __init__(self, defended: DefendedModel, draws: int) -> None:
        super().__init__()
        self.defended = defended
        self.draws = draws
        self.rejects = defended.rejects

    def forward(self, images: Tensor) -> Tensor:
        if self.draws == 1:
            return self.defended.once(images)
        logits = self.defended.once(images.repeat(self.draws, 1, 1, 1))
        # The log of the mean probability: what the defense answers on average, and the draws that still hold weigh
        # most in its gradient. Taken over log-probabilities so that a confident draw does not underflow.
        each = logits.float().log_softmax(dim=1).view(self.draws, len(images), -1)
        return each.logsumexp(dim=0) - math.log(self.draws)


def _after(first: ImageMap, then: ImageMap) -> ImageMap:
    return lambda images: then(first(images))


def answers(classifier: nn.Module) -> Callable[[Tensor], Any]:
    """The logits of the classes, also of a classifier behind a defense that rejects."""
    return classifier.logits if isinstance(classifier, DefendedModel) else classifier
