"""counterGAN: a generator of noise that cancels the attack's."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, NonNegativeFloat, PositiveInt
from torch import Tensor, nn

from src.defenses.base import Purifier
from src.defenses.purify.counter_gan_networks import DISCRIMINATORS, GENERATORS, Condition, Kind, greys
from src.defenses.purify.gan import Decay, gradient_penalty

LATENT = 16  # numbers drawn at random for a repair, where several vote
SHARPNESS = 20.0  # of the smooth stand-in for a sketch, per unit of grey


class CounterGAN(Purifier):
    """Adds to the image a noise image made by a generator, which learns to undo attacks on the target classifier.

    Source: counterGAN, system D (docs/systems.md). It is a relative of APE-GAN, Shen,
    Jin, Gao, Zhang 2017, https://arxiv.org/abs/1707.05474, which makes the whole image anew. Losses: Goodfellow et al.
    2014, https://arxiv.org/abs/1406.2661 (bce); Mao et al. 2016, https://arxiv.org/abs/1611.04076 (mse); Gulrajani et
    al. 2017, https://arxiv.org/abs/1704.00028 (wgan_gp).

    The generator lowers the adversarial loss, plus ``classification`` times the target's cross-entropy on the repaired
    image, plus its mean squared error to the clean one. Inference is one pass of the generator.

    Args:
        classifier: the target. Its weights neither change nor are saved with the defense.
        network: generator and discriminator of ``linear`` layers or ``conv`` (convolutional).
        loss: what the discriminator and, against it, the generator lower: ``bce``, ``mse`` or ``wgan_gp``.
        condition: what the generator sees: the ``image``; or, as theirs did, only a ``sketch``: 100 bits, which of its
            10x10 coarse pixels are lighter than their mean.
        votes: repairs of an image of which the majority is given. With several, the generator gets random numbers
            beside its condition, and the defense is stochastic.
        width: channels of the convolutions at half of the size; linear layers have eight times as many units.
        classification: weight of the cross-entropy.
        likeness: weight of the squared error, the mean over pixels of [0, 1].
        adversarial: weight of the adversarial loss.
        every: batches for one step of the discriminator.
        penalty: weight of the gradient penalty (wgan_gp only).
        clean_share: share of each training batch that is left clean, so that clean images come through.
        betas: decay rates of Adam's moments.

    The gradient is exact for ``image``. A sketch has none, or only in theory; there the white_box attacker takes that
    of a smooth sketch (``bpda``). Inputs and outputs are ``(B, C, H, W)`` in [0, 1].

    Departures from theirs: ``condition: image``; clean images in the training; the radius of the attacks learnt from is
    drawn anew for each batch; the repaired image is cut to [0, 1].

    Raises:
        UserError: ``network="conv"`` and images under 8x8.
    """

    monitor = ("val_accuracy", "max")

    def __init__(
        self,
        *,
        channels: int,
        size: tuple[int, int],
        classifier: nn.Module,
        network: Kind = "conv",
        loss: Literal["bce", "mse", "wgan_gp"] = "bce",
        condition: Condition = "image",
        votes: PositiveInt = 1,
        width: PositiveInt = 64,
        classification: NonNegativeFloat = 10.0,
        likeness: NonNegativeFloat = 1.0,
        adversarial: NonNegativeFloat = 1.0,
        every: PositiveInt = 10,
        penalty: NonNegativeFloat = 10.0,
        clean_share: Annotated[float, Field(ge=0, le=1)] = 0.25,
        betas: tuple[Decay, Decay] = (0.5, 0.999),
    ) -> None:
        super().__init__()
        self.gradient = "exact" if condition == "image" else "bpda"
        self.stochastic = votes > 1
        self.votes = votes
        self.loss, self.condition, self.betas = loss, condition, betas
        self.weights = {"classification": classification, "likeness": likeness, "adversarial": adversarial}
        self.every, self.penalty, self.clean_share = every, penalty, clean_share
        self.latent = LATENT if votes > 1 else 0
        self.generator = GENERATORS[network](
            channels=channels, size=size, condition=condition, latent=self.latent, width=width
        )
        self.discriminator = DISCRIMINATORS[network](channels=channels, size=size, width=width)
        self._target = (classifier,)  # in a tuple it is no part of this module: neither trained nor saved
        self._turn = True  # of the discriminator, in the batch at hand

    def purify(self, images: Tensor) -> Tensor:
        seen = images if self.condition == "image" else (greys(images) > 0).to(images)
        return self._repaired(images, seen)

    def surrogate(self, images: Tensor) -> Tensor:
        return self._repaired(images, torch.sigmoid(SHARPNESS * greys(images)))

    def _repaired(self, images: Tensor, seen: Tensor) -> Tensor:
        code = torch.randn(len(images), self.latent, device=images.device)
        return (images + self.generator(seen, code)).clamp(0, 1)

    def on_fit_start(self) -> None:
        self._target[0].to(self.device).eval()

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        clean = batch.get("clean", batch["image"])
        kept = round(self.clean_share * len(clean))
        repaired = self.purify(torch.cat([clean[:kept], batch["image"][kept:]]))
        parts = {
            "classification": F.cross_entropy(frozen(self._target[0], repaired).float(), batch["label"]),
            "likeness": F.mse_loss(repaired, clean),
            "adversarial": self._fooling(frozen(self.discriminator, repaired)),
        }
        loss = torch.stack([self.weights[name] * part for name, part in parts.items()]).sum()
        told = {"train_loss": loss, **{f"train_{name}": part for name, part in parts.items()}}
        self._turn = batch_idx % self.every == 0
        if self._turn:
            told["train_discriminator"] = judging = self._judging(clean, repaired.detach())
        else:  # DDP wants a gradient for each weight
            judging = 0 * torch.stack([weight.sum() for weight in self.discriminator.parameters()]).sum()
        self.log_dict(told, on_step=False, on_epoch=True, sync_dist=True)
        return loss + judging  # of different weights, so that they can be lowered together

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        if not self._turn:
            for weight in self.discriminator.parameters():
                weight.grad = None  # a zero would move it on by Adam's momentum

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Share of the images that the target gets right once repaired: attacked and clean ones, and clean ones."""
        right = {name: self._right(batch[name], batch["label"]) for name in ("image", "clean") if name in batch}
        told = {"val_accuracy": torch.stack(list(right.values())).mean()}
        if "clean" in right:
            told["val_accuracy_clean"] = right["clean"]
        self.log_dict(told, batch_size=len(batch["label"]), sync_dist=True, prog_bar=True)

    def _right(self, images: Tensor, labels: Tensor) -> Tensor:
        return (self._target[0](self.purify(images)).argmax(dim=1) == labels).float().mean()

    def _fooling(self, scores: Tensor) -> Tensor:
        """What the generator lowers: the repaired images are to score as clean ones do."""
        if self.loss == "wgan_gp":
            return -scores.mean()
        return self._distance(scores, torch.ones_like(scores))

    def _judging(self, clean: Tensor, repaired: Tensor) -> Tensor:
        """What the discriminator lowers: clean images are to score high, repaired ones low."""
        high, low = self.discriminator(torch.cat([clean, repaired])).split(len(clean))
        if self.loss == "wgan_gp":
            return low.mean() - high.mean() + self.penalty * gradient_penalty(self.discriminator, clean, repaired)
        return self._distance(high, torch.ones_like(high)) + self._distance(low, torch.zeros_like(low))

    def _distance(self, scores: Tensor, wanted: Tensor) -> Tensor:
        return (F.binary_cross_entropy_with_logits if self.loss == "bce" else F.mse_loss)(scores, wanted)

    def configure_optimizers(self) -> Any:
        assert self.recipe is not None, "a defense is trained through src.fit, which gives it a recipe"
        return self.recipe.optimizers(self, betas=self.betas)


def frozen(network: nn.Module, images: Tensor) -> Tensor:
    """What a network answers, without gradients for its own weights."""
    weights = {name: weight.detach() for name, weight in network.named_parameters()}
    answer: Tensor = torch.func.functional_call(network, weights, (images,))
    return answer
