"""Variational autoencoder trained on clean images."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pydantic import NonNegativeFloat, PositiveInt
from torch import Tensor

from src.defenses.base import Defense, Purifier
from src.defenses.purify.networks import VAEDecoder, VAEEncoder


class VAE(Purifier):
    """Reconstructs the image from a code learnt on clean images only, so that what is not of their kind is lost.

    Paper: Kingma, Welling 2013, "Auto-Encoding Variational Bayes", https://arxiv.org/abs/1312.6114; beta: Higgins et
    al. 2017, https://openreview.net/forum?id=Sy2fzU9gl

    Args:
        latent: size of the code.
        width: channels of the first convolution; deeper ones double it.
        beta: weight of the KL term against the reconstruction's cross-entropy, both summed over an image.
        sample: draw the code at test time (stochastic; the white_box attacker averages) instead of its mean.

    The gradient is exact. Inputs and outputs are ``(B, C, H, W)`` in [0, 1].
    """

    gradient = "exact"
    at_test = frozenset({"sample"})

    def __init__(
        self,
        *,
        channels: int,
        size: tuple[int, int],
        latent: PositiveInt = 32,
        width: PositiveInt = 32,
        beta: NonNegativeFloat = 1.0,
        sample: bool = False,
    ) -> None:
        super().__init__()
        self.encoder = VAEEncoder(channels=channels, size=size, latent=latent, width=width)
        self.decoder = VAEDecoder(channels=channels, size=size, latent=latent, width=width)
        self.beta = beta
        self.stochastic = sample

    def purify(self, images: Tensor) -> Tensor:
        mean, logvar = self.encoder(images)
        return self.decoder(_draw(mean, logvar) if self.stochastic else mean)

    @torch.no_grad()
    def samples_to_show(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
        """Images of codes drawn from the prior, the unit normal."""
        weight = self.decoder.code[0].weight
        assert isinstance(weight, Tensor)
        return self.decoder(torch.randn(count, weight.shape[1], generator=generator).to(weight)), None

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return learnt(self, self.loss(batch))

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch)[0], batch_size=len(batch["image"]), sync_dist=True, prog_bar=True)

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """The whole, the reconstruction and the KL term, each a mean over the batch of sums over an image."""
        images = batch.get("clean", batch["image"])
        mean, logvar = self.encoder(batch["image"])
        mean, logvar = mean.float(), logvar.float()
        logits = self.decoder.logits(_draw(mean, logvar)).float()
        reconstruction = F.binary_cross_entropy_with_logits(logits, images, reduction="sum") / len(images)
        kl = -0.5 * (1 + logvar - mean.square() - logvar.exp()).sum(dim=1).mean()
        return reconstruction + self.beta * kl, reconstruction, kl


def learnt(defense: Defense, losses: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """The loss of a training step, logged with its two terms by the defense that is trained."""
    told = dict(zip(("train_loss", "train_reconstruction", "train_kl"), losses, strict=True))
    defense.log_dict(told, on_step=False, on_epoch=True, sync_dist=True)
    return losses[0]


def _draw(mean: Tensor, logvar: Tensor) -> Tensor:
    return mean + (0.5 * logvar).exp() * torch.randn_like(mean)
