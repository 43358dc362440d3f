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

from src.defenses.bpda import ImageMap, bpda

Gradient = Literal["exact", "bpda", "none"]

AT_ONCE = 256  # images of all draws in one pass of a stochastic defense, where it keeps no graph
WORST_LAST: tuple[Gradient, ...] = ("exact", "bpda", "none")


@dataclass(frozen=True, kw_only=True)
class Detection:
    """Scores of suspicion, ``(B, C, H, W) → (B,)`` or ``(B, columns)``, higher for attacked images.

    Attributes:
        columns: scores an image gets, each with a threshold of its own: what they have in common is computed once.
        threshold: images that score more are rejected; None: set on clean validation images.
    """

    score: ImageMap
    columns: int = 1
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
        if gradient == "bpda" and purify is not None:
            assert surrogate is not None
            purify = bpda(purify, surrogate)
        self._purify = purify
        self._shut = gradient == "none"
        self.gradient = gradient
        self.stochastic = stochastic
        self.votes = votes
        self.certify = certify
        self.certify_images = certify_images
        self.fpr = fpr
        self._first = tuple(detections)  # those that see the images as they come in
        self.detections = self._first
        inner = classifier if isinstance(classifier, DefendedModel) else None
        self._inner = inner
        if inner is not None:
            self.gradient = max(gradient, inner.gradient, key=WORST_LAST.index)
            self.stochastic = stochastic or inner.stochastic
            self.votes = max(votes, inner.votes)
            self.fpr = fpr if detections else inner.fpr
            self.detections += inner.detections
        self.frozen: dict[str, Tensor] = {}

    @property
    def rejects(self) -> bool:
        return bool(self.detections)

    def _own(self, images: Tensor) -> Tensor:
        """What this defense alone makes of the images, as an attacker may differentiate it."""
        if self._purify is None or not len(images):  # torch shuffles no pixels of an empty batch
            return images
        if self._shut:
            with torch.no_grad():
                return self._purify(images)
        return self._purify(images)

    def purified(self, images: Tensor) -> Tensor:
        """What the classifier gets to see."""
        seen = self._own(images)
        return seen if self._inner is None else self._inner.purified(seen)

    def logits(self, images: Tensor) -> Tensor:
        """What the classifier answers, whether the image is rejected or not; a single draw."""
        seen = self._own(images)
        return self.classifier(seen) if self._inner is None else self._inner.logits(seen)

    def _observed(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Logits of the classes and what each detection says, of the same draw of all that stands before both.

        A detection that asks the classifier draws what stands behind it anew.
        """
        seen = self._own(images)
        logits, scores = (self.classifier(seen), []) if self._inner is None else self._inner._observed(seen)
        return logits, [each.score(images) for each in self._first] + scores

    def scores(self, images: Tensor) -> Tensor:
        """What the detections say: ``(B, columns)`` of all of them."""
        return _beside(self._observed(images)[1])

    def suspicion(self, images: Tensor) -> Tensor:
        """The detections as one figure, ``(B,)``: over 1 is rejected."""
        return self._together(self._observed(images)[1])

    def _together(self, scores: list[Tensor]) -> Tensor:
        if not self.frozen:
            raise RuntimeError(
                "the thresholds of this defense are not set: call set_thresholds with scores of clean validation images"
            )
        told = _beside(scores).float()
        zero, unit, limit = (self.frozen[name].to(told.device) for name in ("zero", "unit", "limit"))
        return ((told - zero) / unit).amax(dim=1) / limit

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``(B, classes)``, with a last column for rejection where the defense detects."""
        return self._answer(images, self.votes)[0]

    def once(self, images: Tensor) -> Tensor:
        """As :meth:`forward`, from a single draw."""
        return self._answer(images, 1)[0]

    def _answer(self, images: Tensor, votes: int) -> tuple[Tensor, Tensor | None]:
        """The logits with the column for rejection, and the suspicion it comes from."""
        logits, scores = self._observed(images)
        if votes > 1:
            logits = self._voted(logits, images, votes)
        if not self.rejects:
            return logits, None
        suspicion = self._together(scores)
        over = suspicion - 1
        # Below or above the best class, as the image is accepted or not. By the logarithm: a score of a thousand
        # thresholds would leave a cross-entropy without gradient, and one squashed to a bound a search without
        # progress.
        refusal = logits.float().amax(dim=1) + over.sign() * over.abs().log1p()
        return torch.cat([logits, refusal[:, None]], dim=1), suspicion

    def _voted(self, first: Tensor, images: Tensor, votes: int) -> Tensor:
        counts = mean = torch.zeros((), device=images.device)
        for vote in range(votes):
            logits = (self.logits(images) if vote else first).float()
            counts = counts + F.one_hot(logits.argmax(dim=1), logits.shape[1])
            mean = mean + logits.softmax(dim=1) / votes
        return counts + mean  # the mean probability breaks ties

    def set_thresholds(self, clean: Tensor) -> dict[str, Tensor]:
        """Set the thresholds from the scores of clean validation images ``(N, columns)``.

        Each column is put on a scale where its median is 0 and its own threshold 1; an image is rejected by the
        largest of them, at the value that leaves at most ``fpr`` of the clean images above it. A threshold given by
        the user stands as it is, and then nothing is adjusted to ``fpr``.
        """
        middle = clean.median(dim=0).values
        reach = (_quantile(clean, 1 - self.fpr) - middle).clamp_min(1e-12)
        given = [each.threshold for each in self.detections for _ in range(each.columns)]
        edge = torch.stack(
            [m + r if t is None else m.new_tensor(t) for m, r, t in zip(middle, reach, given, strict=True)]
        )
        zero = torch.minimum(middle, edge - reach)  # a fixed threshold may lie below the median
        unit = (edge - zero).clamp_min(1e-12)
        limit = unit.new_ones(())
        if all(threshold is None for threshold in given):
            limit = _quantile(((clean - zero) / unit).amax(dim=1), 1 - self.fpr).clamp_min(1e-12)
        self.frozen = {"zero": zero, "unit": unit, "limit": limit}
        return self.frozen

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        answer, suspicion = self._answer(batch["image"], self.votes)
        told = {"prediction": answer.argmax(dim=1)}
        if suspicion is not None:
            classes = answer[:, :-1]
            told["behind"] = classes.argmax(dim=1)
            told["rejected"] = told["prediction"] == classes.shape[1]
            told["suspicion"] = suspicion
        return told

    def adaptive(self, draws: int) -> nn.Module:
        """The model that a white_box attacker differentiates: through the defense, as its declaration says.

        Args:
            draws: passes averaged when the defense is stochastic (EOT, Athalye et al. 2018). With a gradient they are
                taken at once, and need as many times the memory.
        """
        return _Adaptive(self, draws if self.stochastic else 1)

    def closed(self) -> nn.Module:
        """The model that a black_box attacker meets: its answers and nothing else."""
        return _Closed(self)


class _Closed(nn.Module):
    differentiable = False

    def __init__(self, defended: DefendedModel) -> None:
        super().__init__()
        self.defended = defended
        self.rejects = defended.rejects

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        answer: Tensor = self.defended(images)
        return answer


class _Adaptive(nn.Module):
    log_probabilities = True  # on purpose, where it averages: no need to warn of it

    def __init__(self, defended: DefendedModel, draws: int) -> None:
        super().__init__()
        self.defended = defended
        self.draws = draws
        self.rejects = defended.rejects
        self.differentiable = defended.gradient != "none"

    def forward(self, images: Tensor) -> Tensor:
        if self.draws == 1:
            return self.defended.once(images)
        # A gradient needs the graph of all draws. Without one a pass holds no more images than the attack gave, whose
        # batch size bounds the memory, or AT_ONCE.
        graph = images.requires_grad and torch.is_grad_enabled()
        each = self.draws if graph else max(1, AT_ONCE // max(1, len(images)))
        copies = [min(each, self.draws - done) for done in range(0, self.draws, each)]
        logits = torch.cat([self.defended.once(images.repeat(count, 1, 1, 1)) for count in copies])
        # The log of the mean probability: what the defense answers on average, and the draws that still hold weigh
        # most in its gradient. Taken over log-probabilities so that a confident draw does not underflow.
        sure = logits.float().log_softmax(dim=1).view(self.draws, len(images), logits.shape[1])
        return sure.logsumexp(dim=0) - math.log(self.draws)


def _beside(scores: list[Tensor]) -> Tensor:
    return torch.cat([each[:, None] if each.ndim == 1 else each for each in scores], dim=1)


def _quantile(values: Tensor, share: float) -> Tensor:
    """Of each column the least value that has at least ``share`` of the others at or below it."""
    return torch.quantile(values, share, dim=0, interpolation="higher")


def answers(classifier: nn.Module) -> Callable[[Tensor], Any]:
    """The logits of the classes, also of a classifier behind a defense that rejects."""
    return classifier.logits if isinstance(classifier, DefendedModel) else classifier
