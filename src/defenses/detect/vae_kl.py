"""A detector that compares what the classifier says of an image and of its reconstruction."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from pydantic import NonNegativeFloat, PositiveInt
from torch import Tensor

from src.defenses.base import Detector, Share, Threshold
from src.defenses.purify.vae import VAE, learnt


class VAEKL(Detector):
    """Flags an image whose reconstruction, by a VAE of clean images, the classifier sees otherwise.

    The score is the KL divergence of the classifier's probabilities for the image from those for the reconstruction
    of the mean code, 0 or more, in nats. After the detector of system C (docs/systems.md), which has two numbers in the
    code and a fixed threshold of 0.3. VAE: Kingma, Welling 2013, https://arxiv.org/abs/1312.6114

    Args:
        latent: numbers in the code.
        width: channels of the VAE's first convolution.
        beta: weight of the VAE's KL term against the reconstruction's cross-entropy.
        fpr: share of clean validation images that are rejected.
        threshold: a fixed threshold of the score instead; system C's is 0.3.

    Shapes: images ``(B, C, H, W)`` in [0, 1], scores ``(B,)``.

    The gradient is exact. Where ours departs from system C: its threshold was chosen by eye, ours is set on clean
    validation images unless given; the VAE has batch norm.
    """

    gradient = "exact"
    at_test = frozenset({"fpr", "threshold"})

    def __init__(
        self,
        *,
        channels: int,
        size: tuple[int, int],
        latent: PositiveInt = 2,
        width: PositiveInt = 32,
        beta: NonNegativeFloat = 1.0,
        fpr: Share = 0.05,
        threshold: Threshold | None = None,
    ) -> None:
        super().__init__(fpr=fpr, threshold=threshold)
        self.vae = VAE(channels=channels, size=size, latent=latent, width=width, beta=beta)

    def score(self, images: Tensor, classify: Callable[[Tensor], Tensor]) -> Tensor:
        given = classify(images).float().log_softmax(dim=1)
        again = classify(self.vae.purify(images)).float().log_softmax(dim=1)
        return F.kl_div(again, given, log_target=True, reduction="none").sum(dim=1)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return learnt(self, self.vae.loss(batch))

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.vae.loss(batch)[0], batch_size=len(batch["image"]), sync_dist=True, prog_bar=True)
