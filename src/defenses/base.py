"""The contract of every defense.

A defense of one's own is a class in ``src/defenses/{purify,harden,detect}/x.py`` and its ``conf/defense/x.yaml``. It
declares how gradients pass through it; the adaptive (white_box) attack is derived from that declaration.

Facts of the data and models come to a class that asks for them by a keyword without default: ``channels``, ``size``,
``num_classes``, ``mean``, ``std``; ``classifier``, the trained bare classifier; ``fresh``, a callable that makes a
network of the classifier's kind, as it is before its training (torchvision's with ``weights`` has those, and
``classifier=own`` gives what its ``model`` gives, trained or not).

One that can make images out of nothing says so by a method ``samples_to_show(count, generator)``, which returns
``(count, C, H, W)`` in [0, 1] and the classes they were asked to be of, ``(count,)``, or None. ``analysis=samples``
shows them; the method is no part of a trained stage's key, so nothing that is measured may use it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, Literal

import torch.nn.functional as F
from pydantic import Field
from pytorch_lightning import LightningModule
from torch import Tensor, nn

from src.defenses.guarded import DefendedModel, Detection, Gradient, answers
from src.recipe import Recipe
from src.threat import ThreatModel

Fresh = Callable[[], nn.Module]
Share = Annotated[float, Field(gt=0, lt=1)]
Threshold = Annotated[float, Field(ge=-math.inf)]  # inf rejects nothing; NaN is no threshold


class Defense(LightningModule, ABC):
    """Base of all defenses. A trained one writes ``training_step`` and ``validation_step`` (logging ``val_loss``).

    A training batch is a dict with ``image`` and ``label``; where the config names an attack in ``trained_on``,
    ``image`` is attacked and ``clean`` holds what it was.

    Attributes:
        gradient: how the white_box attacker differentiates through it. ``exact``: autograd is true. ``bpda``: the
            backward pass is replaced (Athalye et al. 2018, https://arxiv.org/abs/1802.00420). ``none``: no gradient,
            score-based attacks only.
        stochastic: the output varies from call to call, so the attacker averages over draws (EOT).
        replaces: it answers in place of the classifier it guards, and never asks that one.
        monitor: validation figure that chooses the checkpoint, and whether more (``max``) or less is better.
        learns_from_classifier: of one that asks for the bare classifier: whether its training depends on that.
        at_test: arguments that neither the first weights, nor training, nor its validation depend on: other values of
            them find the training again.
    """

    gradient: Gradient = "exact"
    stochastic: bool = False
    replaces: bool = False
    learns_from_classifier: bool = True
    at_test: frozenset[str] = frozenset()
    monitor: tuple[str, Literal["min", "max"]] = ("val_loss", "min")
    recipe: Recipe | None = None  # set by the trainer of stages
    threat: ThreatModel | None = None  # norm and radius of `trained_on`, set likewise

    @abstractmethod
    def guard(self, classifier: nn.Module) -> DefendedModel:
        """The classifier behind this defense."""

    def configure_optimizers(self) -> Any:
        assert self.recipe is not None, "a defense is trained through src.fit, which gives it a recipe"
        return self.recipe.optimizers(self)


class Purifier(Defense):
    """A defense that changes the input: authors write :meth:`purify`.

    Attributes:
        votes: answers of a stochastic purifier of which the majority is given.
    """

    votes: int = 1

    @abstractmethod
    def purify(self, images: Tensor) -> Tensor:
        """Images ``(B, C, H, W)`` in [0, 1] → images of the same shape and range for the classifier."""

    def surrogate(self, images: Tensor) -> Tensor:
        """A differentiable stand-in for :meth:`purify`, whose gradient BPDA takes. Needed when ``gradient="bpda"``."""
        raise TypeError(f'{type(self).__name__} declares gradient="bpda" and has to say what replaces its gradient')

    def guard(self, classifier: nn.Module) -> DefendedModel:
        return DefendedModel(
            classifier=classifier,
            defense=self,
            purify=self.purify,
            surrogate=self.surrogate,
            gradient=self.gradient,
            stochastic=self.stochastic,
            votes=self.votes,
        )


class Harden(Defense):
    """A defense that is a new classifier, trained to hold: authors write :meth:`loss`, or the steps themselves.

    Args:
        fresh: makes a network of the bare classifier's kind, as it is before its training.
    """

    monitor = ("val_accuracy", "max")
    replaces = True

    def __init__(self, *, fresh: Fresh) -> None:
        super().__init__()
        self.network = fresh()

    def forward(self, images: Tensor) -> Tensor:
        """Logits of the new classifier."""
        return self.network(images)

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        """What a training step lowers: the cross-entropy of the images as they come, attacked or not."""
        return F.cross_entropy(self(batch["image"]).float(), batch["label"])

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Any:
        loss = self.loss(batch)
        self.log("train_loss", loss, on_step=False, on_epoch=True, sync_dist=True)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Accuracy on the images as they come: under attack where the config names one to train on."""
        for name in ("image", "clean"):
            if name in batch:
                right = (self(batch[name]).argmax(dim=1) == batch["label"]).float().mean()
                told = "val_accuracy" if name == "image" else "val_accuracy_clean"
                self.log(told, right, batch_size=len(batch["label"]), sync_dist=True, prog_bar=True)

    def guard(self, classifier: nn.Module) -> DefendedModel:
        return DefendedModel(classifier=self.network, defense=self)


class Detector(Defense):
    """A defense that flags the input: authors write :meth:`score`.

    Args:
        fpr: share of clean validation images that are rejected; the threshold is frozen there.
        threshold: a fixed threshold instead.
    """

    def __init__(self, *, fpr: Share = 0.05, threshold: Threshold | None = None) -> None:
        super().__init__()
        self.fpr = fpr
        self.threshold = threshold

    @abstractmethod
    def score(self, images: Tensor, classify: Callable[[Tensor], Tensor]) -> Tensor:
        """How suspicious each image is, ``(B,)``, higher for attacked ones. ``classify`` gives the bare logits.

        An attacker differentiates it as it stands; where that leads nowhere, take :func:`src.defenses.bpda.bpda`
        and declare ``gradient="bpda"``.
        """

    def guard(self, classifier: nn.Module) -> DefendedModel:
        detection = Detection(score=partial(self.score, classify=answers(classifier)), threshold=self.threshold)
        return DefendedModel(
            classifier=classifier,
            defense=self,
            gradient=self.gradient,
            stochastic=self.stochastic,
            detections=[detection],
            fpr=self.fpr,
        )
