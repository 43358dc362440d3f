"""How attacks enter Lightning: the batch is attacked before the module sees it, and the module need not know."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn

from src.attacks.base import Attack, Attacked
from src.errors import UserError
from src.keys import seed_of
from src.threat import ThreatModel


class AttackCallback(Callback):
    """Replaces the images of a batch by attacked ones: at test, and at fit for modules that learn from attacks.

    A batch is a dict with ``image`` and ``label`` (then ``clean`` and ``verdict`` are added to it), or a list whose
    first two entries are images and labels.

    Args:
        attack: what attacks. At fit it takes every image, at test those that are right. None: the module makes its own
            images to learn from, and only ``validation`` attacks.
        threat: norm and radius.
        target: the model under attack; None: the module itself.
        draw_radius: at fit each batch gets a radius drawn uniformly up to the threat's, so that the module learns every
            strength; at test the radius is the threat's.
        validation: another attack for the batches that a training is judged by.
        warmup: share of the training in which the radius grows linearly from 0. A network that meets large radii at
            once may answer the same class for every image and never leave that.
        search: precision of the model inside the search; verdicts are in float32.
        seed: at test it decides, with the position of a batch's first image, all randomness of the attack on that
            batch, so that any number of devices makes the same images; at fit, with epoch, batch and process.
    """

    def __init__(
        self,
        *,
        attack: Attack | None,
        threat: ThreatModel,
        target: nn.Module | None = None,
        seed: int = 0,
        search: torch.dtype = torch.float32,
        draw_radius: bool = True,
        validation: Attack | None = None,
        warmup: float = 0.0,
    ) -> None:
        self.attack = attack
        self.validation = validation or attack
        self.draw_radius = draw_radius
        self.warmup = warmup
        self.threat = threat
        self.target = target
        self.seed = seed
        self.search = search

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self.target is not None:
            self.target.to(pl_module.device)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self.target is not None:
            self.target.cpu()  # as Lightning does with the module itself

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        seed = seed_of(self.seed, trainer.current_epoch, batch_idx, trainer.global_rank)
        if self.attack is not None:
            self._perturb(self.attack, pl_module, batch, seed, self._grown(trainer, batch_idx))

    def _grown(self, trainer: Trainer, batch_idx: int) -> float:
        """Share of the radius that this batch gets."""
        if not self.warmup:
            return 1.0
        assert trainer.max_epochs is not None
        done = (trainer.current_epoch + batch_idx / trainer.num_training_batches) / trainer.max_epochs
        return min(1.0, done / self.warmup)

    def on_validation_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        # The same radii and images every epoch: epochs are compared by this figure.
        assert self.validation is not None
        self._perturb(self.validation, pl_module, batch, seed_of(self.seed, batch_idx, trainer.global_rank))

    def on_test_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        assert self.attack is not None
        first = int(batch["index"][0]) if isinstance(batch, dict) and "index" in batch else batch_idx
        image, label = _keys(batch)
        clean = batch[image]
        # Apart from the verdict's draws, which come from (seed, first).
        generator = torch.Generator().manual_seed(seed_of(self.seed, first, 1))
        started = time.perf_counter()
        model = self.target or pl_module
        attacked = self.attack(model, clean, batch[label], self.threat, generator=generator, search=self.search)
        seconds = time.perf_counter() - started
        batch[image] = attacked.images
        if isinstance(batch, dict):
            batch["clean"] = clean
            batch["verdict"] = _verdict(attacked, seconds)

    def _perturb(self, attack: Attack, pl_module: LightningModule, batch: Any, seed: int, share: float = 1.0) -> None:
        """Images to learn from: no verdict is needed of them."""
        image, label = _keys(batch)
        clean, generator, threat = batch[image], torch.Generator().manual_seed(seed), self.threat
        if self.draw_radius:
            share *= float(torch.rand((), generator=generator))
        if share < 1:
            threat = dataclasses.replace(threat, eps=threat.eps * share)
        model = self.target or pl_module
        batch[image] = attack.perturb(model, clean, batch[label], threat, generator=generator, search=self.search)
        if isinstance(batch, dict):
            batch["clean"] = clean


class Replay(Callback):
    """Shows a module the attacked images made earlier for another: gray_box examples meet every defense."""

    def __init__(self, images: Tensor) -> None:
        self.images = images

    def on_test_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        batch["clean"] = batch["image"]
        batch["image"] = self.images[batch["index"].cpu()].to(batch["image"].device)


def _keys(batch: Any) -> tuple[Any, Any]:
    """Where a batch has its images and labels."""
    if isinstance(batch, dict):
        return "image", "label"
    if isinstance(batch, list):
        return 0, 1
    raise UserError(f"batches are {type(batch).__name__}; an attack needs a dict with image and label, or a list")


def _verdict(attacked: Attacked, seconds: float) -> dict[str, Tensor]:
    """What the attack says of each image."""
    # Time is shared among the images by what was asked of the model for each.
    passes = (attacked.forward_passes + 2 * attacked.backward_passes).double()
    return {
        "attempted": attacked.attempted,
        "success": attacked.success,
        "reached": attacked.prediction,
        "distance": attacked.distance,
        "attack_seconds": seconds * passes / passes.sum().clamp_min(1),
        "forward_passes": attacked.forward_passes,
        "backward_passes": attacked.backward_passes,
    }
