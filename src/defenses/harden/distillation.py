"""Defensive distillation."""

from __future__ import annotations

from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import PositiveFloat
from torch import Tensor, nn

from src.defenses.base import Fresh, Harden
from src.errors import UserError


class Distillation(Harden):
    """A network that learns the answers of another one, both at a high temperature; used at temperature 1.

    Paper: Papernot, McDaniel, Wu, Jha, Swami 2016, "Distillation as a Defense to Adversarial Perturbations against Deep
    Neural Networks", https://arxiv.org/abs/1511.04508. Broken by Carlini, Wagner 2017,
    https://arxiv.org/abs/1608.04644: at temperature 1 the logits are so large that a cross-entropy's gradient vanishes
    in float32. Measure it with attacks on margins or logit ratios (attack=cw, attack.loss=dlr, autoattack).

    In the first half of the training a teacher learns the labels at the temperature; in the second half the new network
    learns the teacher's probabilities on the same images, at the same temperature. Each half has the whole schedule of
    the learning rate.

    Where ours departs from the paper: the loss is multiplied by the temperature, so that one learning rate suits every
    temperature.

    Args:
        fresh: makes a network of the bare classifier's kind, as it is before its training.
        classifier: the trained bare classifier, for ``layers="last"``.
        temperature: what logits are divided by in training; the paper's are 1 to 100.
        layers: ``all``: the paper's. ``last``: both networks keep the bare classifier's features as they are, in eval
            mode, and only their last layer is made anew.

    Shapes: images ``(B, C, H, W)`` in [0, 1], logits ``(B, classes)``.

    Raises:
        UserError: ``layers="last"`` for a network without ``head``; at fit, a recipe with ``patience``.
    """

    def __init__(
        self,
        *,
        fresh: Fresh,
        classifier: nn.Module,
        temperature: PositiveFloat = 20.0,
        layers: Literal["all", "last"] = "all",
    ) -> None:
        super().__init__(fresh=fresh)
        self.teacher = fresh()
        self.temperature = temperature
        self.layers = layers
        self.learns_from_classifier = layers == "last"
        self.automatic_optimization = False
        if layers == "last":
            for network in (self.teacher, self.network):
                _keep_features(network, getattr(classifier, "network", classifier))
        self.train()  # nobody else calls it before the training: the kept features would begin in training mode

    def train(self, mode: bool = True) -> Self:
        """As usual, but features that are kept stay in eval mode."""
        super().train(mode)
        if self.layers == "last":
            for network in (self.teacher, self.network):
                network.eval().get_submodule("head").train(mode)
        return self

    def on_fit_start(self) -> None:
        if self.recipe is not None and self.recipe.patience is not None:
            raise UserError(
                f"defense.fit.patience={self.recipe.patience}: distillation cannot stop early, since the new network "
                "only begins to learn when the teacher is done. Use defense.fit.patience=null"
            )

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        steps, each = self.trainer.current_epoch * int(self.trainer.num_training_batches) + batch_idx, self._half
        optimizers, schedules = self.optimizers(), self.lr_schedulers()
        assert isinstance(optimizers, list)
        second = int(steps >= each)
        loss = self._taught(batch) if second else self._learnt(self.teacher, batch["image"], batch["label"])
        optimizers[second].zero_grad()
        self.manual_backward(loss)
        optimizers[second].step()
        if isinstance(schedules, list):
            schedules[second].step()  # type: ignore[call-arg]
        self.log(
            "train_loss" if second else "train_teacher", loss.detach(), on_step=False, on_epoch=True, sync_dist=True
        )

    def _taught(self, batch: dict[str, Tensor]) -> Tensor:
        self.teacher.eval()
        with torch.no_grad():
            soft = (self.teacher(batch["image"]).float() / self.temperature).softmax(dim=1)
        return self._learnt(self.network, batch["image"], soft)

    def _learnt(self, network: nn.Module, images: Tensor, target: Tensor) -> Tensor:
        """Cross-entropy at the temperature with classes ``(B,)`` or probabilities ``(B, classes)``."""
        return self.temperature * F.cross_entropy(network(images).float() / self.temperature, target)

    @property
    def _half(self) -> int:
        return int(self.trainer.estimated_stepping_batches) // 2

    def configure_optimizers(self) -> Any:
        assert self.recipe is not None, "a defense is trained through src.fit, which gives it a recipe"
        whole = int(self.trainer.estimated_stepping_batches)
        lengths = (self.teacher, max(1, self._half)), (self.network, whole - self._half)
        return [self.recipe.optimizers(network, steps=steps) for network, steps in lengths]


def _keep_features(network: nn.Module, classifier: nn.Module) -> None:
    """Everything of ``classifier`` but its last layer, frozen."""
    head = getattr(network, "head", None)
    if not isinstance(head, nn.Module):
        raise UserError(
            f"defense.layers=last: {type(network).__name__} has no last layer of the name head. Use defense.layers=all"
        )
    kept = {name: value for name, value in classifier.state_dict().items() if not name.startswith("head.")}
    network.load_state_dict(kept, strict=False)
    network.requires_grad_(False)
    head.requires_grad_(True)
