"""The one LightningModule that trains and tests every classifier."""

from __future__ import annotations

from typing import Any, Literal

import torch.nn.functional as F
from pytorch_lightning import LightningModule
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from src.recipe import Recipe


class Classifier(LightningModule):
    """Cross-entropy training of a network that takes images in [0, 1] and normalises them itself.

    Args:
        network: ``(B, C, H, W) → (B, num_classes)`` logits.
        num_classes: width of the logits.
        label_smoothing: share of the target spread over all classes (Szegedy et al. 2015,
            https://arxiv.org/abs/1512.00567).
    """

    monitor: tuple[str, Literal["min", "max"]] = ("val_accuracy", "max")
    recipe: Recipe | None = None

    def __init__(self, *, network: nn.Module, num_classes: int, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.network = network
        self.label_smoothing = label_smoothing
        self.accuracy = MulticlassAccuracy(num_classes, average="micro")

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        logits = self(batch["image"]).float()
        loss = F.cross_entropy(logits, batch["label"], label_smoothing=self.label_smoothing)
        self.log("train_loss", loss, on_step=False, on_epoch=True, sync_dist=True)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        logits = self(batch["image"]).float()
        self.accuracy.update(logits, batch["label"])
        size = len(batch["label"])
        self.log("val_loss", F.cross_entropy(logits, batch["label"]), batch_size=size, sync_dist=True)
        self.log("val_accuracy", self.accuracy, batch_size=size, prog_bar=True)

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        return {"prediction": self(batch["image"]).argmax(dim=1)}

    def configure_optimizers(self) -> Any:
        assert self.recipe is not None, "a classifier is trained through src.fit, which gives it a recipe"
        return self.recipe.optimizers(self)
