"""MagNet: detectors for what is far from the clean images, a reformer for what is near."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor, nn

from src.defenses.base import Defense, Share
from src.defenses.guarded import DefendedModel, Detection, answers
from src.errors import UserError


class MagNet(Defense):
    """Autoencoders of clean images: a large error, or a changed answer, gives an attack away; the rest is reformed.

    Paper: Meng, Chen 2017, "MagNet: a Two-Pronged Defense against Adversarial Examples",
    https://arxiv.org/abs/1705.09064. Broken by Carlini, Wagner 2017, https://arxiv.org/abs/1711.08478

    Args:
        detectors: any of ``l1`` and ``l2``, the mean absolute and squared error of a reconstruction, and ``jsd``, the
            Jensen-Shannon divergence between the classifier's answers to the image and to its reconstruction; none:
            nothing is rejected.
        temperatures: what the logits are divided by, one ``jsd`` detector each.
        reform: classify the reconstruction instead of the image.
        width: channels of the autoencoders; None: the paper's 3 for grey images, 32 for colour.
        noise: standard deviation of the Gaussian noise on the training images; the paper has 0.1 for MNIST and 0.025
            for CIFAR-10.
        fpr: share of clean validation images that all detectors together reject.

    As in the paper grey images have two autoencoders, one that pools (``l2``, ``jsd`` and the reformer) and one that
    does not (``l1``), colour images one for all. Where ours departs: both are trained at once, on the sum of their
    errors, with ReLU for sigmoid; all detectors may be used on either kind of image, and one threshold serves them
    together, where the paper gives each a rate of its own.

    The gradient is exact. Inputs and outputs are ``(B, C, H, W)`` in [0, 1].

    Raises:
        UserError: neither detectors nor reformer, or ``jsd`` without temperatures.
    """

    gradient = "exact"
    at_test = frozenset({"detectors", "temperatures", "reform", "fpr"})

    def __init__(
        self,
        *,
        channels: int,
        detectors: Sequence[Literal["l1", "l2", "jsd"]] = ("l1", "l2", "jsd"),
        temperatures: Sequence[PositiveFloat] = (10.0, 40.0),
        reform: bool = True,
        width: PositiveInt | None = None,
        noise: NonNegativeFloat = 0.1,
        fpr: Share = 0.05,
    ) -> None:
        super().__init__()
        if not detectors and not reform:
            raise UserError("defense=magnet: nothing to do; give it detectors, or defense.reform=true")
        if "jsd" in detectors and not temperatures:
            raise UserError("defense.temperatures=[]: the detector jsd needs at least one, such as [10, 40]")
        grey = channels == 1
        width = width or (3 if grey else 32)
        self.reformer = _autoencoder(channels, width, pool=grey)
        self.plain = _autoencoder(channels, width, pool=False) if grey else self.reformer
        self.detectors = tuple(detectors)
        self.temperatures = tuple(temperatures)
        self.reform = reform
        self.noise = noise
        self.fpr = fpr

    def reconstruct(self, images: Tensor) -> Tensor:
        """What the reformer makes of the images: same shape and range."""
        return self.reformer(images).float().sigmoid()

    def guard(self, classifier: nn.Module) -> DefendedModel:
        columns = sum(len(self.temperatures) if kind == "jsd" else 1 for kind in self.detectors)
        score = partial(self.scores, classify=answers(classifier))
        return DefendedModel(
            classifier=classifier,
            defense=self,
            purify=self.reconstruct if self.reform else None,
            detections=[Detection(score=score, columns=columns)] if columns else [],
            fpr=self.fpr,
        )

    def scores(self, images: Tensor, classify: Callable[[Tensor], Tensor]) -> Tensor:
        """What the detectors say, in their order: ``(B, columns)``, one for each error and each temperature."""
        again = self.reconstruct(images)
        columns = []
        for kind in self.detectors:
            if kind == "jsd":
                columns += self._divergences(classify(torch.cat([images, again])).float())
            elif kind == "l2":
                columns.append((images - again).square().mean(dim=(1, 2, 3)))
            else:
                plain = again if self.plain is self.reformer else self.plain(images).float().sigmoid()
                columns.append((images - plain).abs().mean(dim=(1, 2, 3)))
        return torch.stack(columns, dim=1)

    def _divergences(self, both: Tensor) -> list[Tensor]:
        """Jensen-Shannon divergence of the answers to images and to their reconstructions, ``(B,)`` each, nats."""
        found = []
        for temperature in self.temperatures:
            given, again = (both / temperature).log_softmax(dim=1).chunk(2)
            middle = torch.logaddexp(given, again) - math.log(2)
            parts = [F.kl_div(middle, each, log_target=True, reduction="none").sum(dim=1) for each in (given, again)]
            found.append((parts[0] + parts[1]) / 2)
        return found

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        images = batch.get("clean", batch["image"])
        loss = self._loss((images + self.noise * torch.randn_like(images)).clamp(0, 1), images)
        self.log("train_loss", loss, on_step=False, on_epoch=True, sync_dist=True)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        images = batch.get("clean", batch["image"])
        loss = self._loss(images, images)  # as they will be met: without noise
        self.log("val_loss", loss, batch_size=len(batch["image"]), sync_dist=True, prog_bar=True)

    def _loss(self, shown: Tensor, wanted: Tensor) -> Tensor:
        networks = [self.reformer] if self.plain is self.reformer else [self.reformer, self.plain]
        return torch.stack([F.mse_loss(network(shown).float().sigmoid(), wanted) for network in networks]).sum()


class _Pooled(nn.Module):
    """Averages 2x2 pixels before the layers inside and repeats them after; an odd row or column is kept."""

    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.inside = inside

    def forward(self, maps: Tensor) -> Tensor:
        return F.interpolate(self.inside(F.avg_pool2d(maps, 2, ceil_mode=True)), size=maps.shape[2:])


def _autoencoder(channels: int, width: int, *, pool: bool) -> nn.Module:
    """Images to the logits of their pixels, by 3x3 convolutions."""

    def convolution(before: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(before, width, 3, padding=1), nn.ReLU())

    inside = [_Pooled(nn.Sequential(convolution(width), convolution(width)))] if pool else []
    return nn.Sequential(convolution(channels), *inside, convolution(width), nn.Conv2d(width, channels, 3, padding=1))
