"""The contract of every defense.

A defense of one's own is a class in ``src/defenses/{purify,harden,detect}/x.py`` and its ``conf/defense/x.yaml``. It
declares how gradients pass through it; the adaptive (white_box) attack is derived from that declaration.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Literal

import torch
from pytorch_lightning import LightningModule
from torch import Tensor, nn

from src.recipe import Recipe

Gradient = Literal["exact", "bpda", "none"]
ImageMap = Callable[[Tensor], Tensor]


class Defense(LightningModule, ABC):
    """Base of all defenses. A trained one writes ``training_step`` and ``validation_step`` (logging ``val_loss``).

    Attributes:
        gradient: how the white_box attacker differentiates through it. ``exact``: autograd is true. ``bpda``: the
            backward pass is replaced by that of :meth:`surrogate` (Athalye et al. 2018,
            https://arxiv.org/abs/1802.00420). ``none``: no gradient, score-based attacks only.
        stochastic: the output varies from call to call, so the attacker averages over draws (EOT).
        monitor: validation figure that chooses the checkpoint, and whether more (``max``) or less is better.
    """

    gradient: Gradient = "exact"
    stochastic: bool = False
    monitor: tuple[str, Literal["min", "max"]] = ("val_loss", "min")
    recipe: Recipe | None = None  # set by the trainer of stages

    @abstractmethod
    def guard(self, classifier: nn.Module) -> DefendedModel:
        """The classifier behind this defense."""

    def configure_optimizers(self) -> Any:
        assert self.recipe is not None, "a defense is trained through src.fit, which gives it a recipe"
        return self.recipe.optimizers(self)


class Purifier(Defense):
    """A defense that changes the input: authors write :meth:`purify`."""

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
        )


class DefendedModel(LightningModule):
    """A classifier behind a defense: images in [0, 1] → logits.

    Args:
        classifier: the network that decides in the end.
        defense: kept so that its weights move and switch mode with this module.
        purify: what happens to the images before the classifier sees them; None: nothing.
        surrogate: differentiable stand-in for ``purify`` when ``gradient`` is ``bpda``.
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
    ) -> None:
        super().__init__()
        self.classifier = classifier
        self.defense = defense
        self._purify = purify
        self._surrogate = surrogate
        self.gradient = gradient
        self.stochastic = stochastic

    def purified(self, images: Tensor) -> Tensor:
        """What the classifier gets to see."""
        return images if self._purify is None else self._purify(images)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.purified(images))

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        return {"prediction": self(batch["image"]).argmax(dim=1)}

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

    def forward(self, images: Tensor) -> Tensor:
        batch = images.repeat(self.draws, 1, 1, 1)
        logits = self.defended.classifier(self._purified(batch))
        if self.draws == 1:
            return logits
        # The log of the mean probability: what the defense answers on average, and the draws that still hold weigh
        # most in its gradient. Taken over log-probabilities so that a confident draw does not underflow.
        each = logits.float().log_softmax(dim=1).unflatten(0, (self.draws, len(images)))
        return each.logsumexp(dim=0) - math.log(self.draws)

    def _purified(self, images: Tensor) -> Tensor:
        defended = self.defended
        if defended.gradient == "exact" or not torch.is_grad_enabled():
            return defended.purified(images)
        with torch.no_grad():
            value = defended.purified(images)
        if defended.gradient == "none":
            return value
        assert defended._surrogate is not None
        stand_in = defended._surrogate(images)
        return stand_in + (value - stand_in).detach()
