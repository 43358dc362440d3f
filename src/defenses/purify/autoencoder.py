"""Denoising autoencoder trained from attacked to clean images."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import NonNegativeFloat, PositiveInt
from torch import Tensor

from src.defenses.base import Purifier
from src.defenses.purify.networks import build_autoencoder


class Autoencoder(Purifier):
    """Reconstructs the image, having learnt to map attacked images to clean ones (mean squared error).

    Related paper: Gu, Rigazio 2014, "Towards Deep Neural Network Architectures Robust to Adversarial Examples",
    https://arxiv.org/abs/1412.5068; the shapes are those of system A (docs/systems.md).

    Args:
        architecture: ``dense`` (strided convolutions, then a flat code), ``conv`` (the code is a feature map) or
            ``auto``: dense for one channel, conv for colour.
        activation: ``gelu`` or ``relu``.
        latent: numbers in the flat code (dense only).
        noise: standard deviation of the Gaussian noise added to the code, in training and at test ("noisy"); 0:
            none ("vanilla"). With noise the defense is stochastic and the white_box attacker averages over draws.

    The gradient is exact. Inputs and outputs are ``(B, C, H, W)`` in [0, 1].

    Raises:
        UserError: images under 4x4.
    """

    gradient = "exact"

    def __init__(
        self,
        *,
        channels: int,
        size: tuple[int, int],
        architecture: Literal["auto", "dense", "conv"] = "auto",
        activation: Literal["gelu", "relu"] = "gelu",
        latent: PositiveInt = 10,
        noise: NonNegativeFloat = 1.0,
    ) -> None:
        super().__init__()
        self.encoder, self.decoder = build_autoencoder(
            channels=channels, size=size, architecture=architecture, activation=activation, latent=latent
        )
        self.noise = noise
        self.stochastic = noise > 0

    def purify(self, images: Tensor) -> Tensor:
        code = self.encoder(images)
        if self.noise:
            code = code + self.noise * torch.randn_like(code)
        return self.decoder(code)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = self._loss(batch)
        self.log("train_loss", loss, on_step=False, on_epoch=True, sync_dist=True)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log("val_loss", self._loss(batch), batch_size=len(batch["image"]), sync_dist=True, prog_bar=True)

    def _loss(self, batch: dict[str, Tensor]) -> Tensor:
        clean = batch.get("clean", batch["image"])  # present when the AttackCallback attacked the batch
        return F.mse_loss(self.purify(batch["image"]).float(), clean)
