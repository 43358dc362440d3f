"""Wasserstein GANs for the defenses that need images of their own: networks, training, search in the latent space.

Papers: Arjovsky et al. 2017, "Wasserstein GAN", https://arxiv.org/abs/1701.07875; Gulrajani et al. 2017, "Improved
Training of Wasserstein GANs", https://arxiv.org/abs/1704.00028

Images are float ``(B, channels, H, W)`` in [0, 1], codes ``(B, latent)`` drawn from the unit normal.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from src.defenses.averaging import moving_average
from src.defenses.base import Defense
from src.defenses.purify.networks import Crop, halve
from src.errors import UserError

Decay = Annotated[float, Field(ge=0, lt=1)]


def plan(size: tuple[int, int], width: int) -> tuple[list[tuple[int, int]], list[int]]:
    """Sizes from the image inwards, halved to 7x7 or less, and the channels of each size but the image's."""
    sizes = [(size[0], size[1])]
    while max(sizes[-1]) > 7:
        sizes.append(halve(sizes[-1]))
    if len(sizes) < 2:
        raise UserError(
            f"dataset: images of {size[0]}x{size[1]} are too small for a GAN; expected 8x8 or more, use another defense"
        )
    return sizes, [width * min(2**stage, 4) for stage in range(len(sizes) - 1)]


class Generator(nn.Module):
    """Codes, and labels if it has classes, to images: transposed 4x4 convolutions of stride 2, batch norm, ReLU.

    Args:
        channels: channels of an image.
        size: height and width of an image, in pixels.
        latent: numbers in a code.
        width: channels before the image; twice, then four times as many before those.
        classes: labels it knows, each a learnt vector of ``latent`` numbers beside the code; 0: none.
    """

    def __init__(self, *, channels: int, size: tuple[int, int], latent: int, width: int, classes: int = 0) -> None:
        super().__init__()
        sizes, widths = plan(size, width)
        height, wide = sizes[-1]
        self.kind = nn.Embedding(classes, latent) if classes else None
        inputs = latent * (2 if classes else 1)
        layers: list[nn.Module] = [
            nn.Linear(inputs, widths[-1] * height * wide, bias=False),
            nn.Unflatten(1, (widths[-1], height, wide)),
        ]
        for stage in reversed(range(len(widths))):
            after = widths[stage - 1] if stage else channels
            layers += [
                nn.BatchNorm2d(widths[stage]),
                nn.ReLU(),
                nn.ConvTranspose2d(widths[stage], after, 4, stride=2, padding=1, bias=not stage),
                Crop(sizes[stage]),
            ]
        self.body = nn.Sequential(*layers)

    def forward(self, codes: Tensor, labels: Tensor | None = None) -> Tensor:
        """Images in [0, 1], float32 also under autocast."""
        if self.kind is not None:
            codes = torch.cat([codes, self.kind(labels)], dim=1)
        return torch.sigmoid(self.body(codes).float())


class Critic(nn.Module):
    """Images to a score, higher for real ones: 4x4 convolutions of stride 2 and leaky ReLU, no normalisation.

    With classes, the score has a part that depends on the label (projection, Miyato, Koyama 2018,
    https://arxiv.org/abs/1802.05637). The arguments are those of :class:`Generator`.
    """

    def __init__(self, *, channels: int, size: tuple[int, int], width: int, classes: int = 0) -> None:
        super().__init__()
        sizes, widths = plan(size, width)
        layers: list[nn.Module] = []
        for before, after, (height, wide) in zip([channels, *widths], widths, sizes, strict=False):
            # An odd side is rounded up, as the generator's sizes are.
            layers += [nn.ZeroPad2d((0, wide % 2, 0, height % 2)), nn.Conv2d(before, after, 4, stride=2, padding=1)]
            layers += [nn.LeakyReLU(0.2)]
        self.body = nn.Sequential(*layers, nn.Flatten())
        features = widths[-1] * sizes[-1][0] * sizes[-1][1]
        self.score = nn.Linear(features, 1)
        self.kind = nn.Embedding(classes, features) if classes else None
        if self.kind is not None:
            nn.init.zeros_(self.kind.weight)

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        """Scores ``(B,)``, float32 also under autocast."""
        features = self.body(images)
        score = self.score(features).squeeze(1).float()
        return score if self.kind is None else score + (features * self.kind(labels)).sum(dim=1).float()


def gradient_penalty(critic: nn.Module, real: Tensor, fake: Tensor, labels: Tensor | None = None) -> Tensor:
    """Mean of (gradient norm - 1)² between real and fake images (Gulrajani et al. 2017, section 4)."""
    share = torch.rand(len(real), 1, 1, 1, device=real.device)
    between = (real + share * (fake - real)).detach().requires_grad_()
    (slope,) = torch.autograd.grad(critic(between, labels).sum(), between, create_graph=True)
    return (torch.linalg.vector_norm(slope.float().flatten(1), dim=1) - 1).square().mean()


def descend(
    loss: Callable[[Tensor], Tensor],
    codes: Tensor,
    *,
    steps: int,
    rate: float,
    momentum: float,
    differentiable: bool = False,
) -> Tensor:
    """Codes after gradient descent with momentum on ``loss(codes) → (N,)``, each code by its own loss.

    The rate falls to a tenth for the last fifth of the steps, as in Defense-GAN's code. Gradients must be enabled.

    Args:
        differentiable: keep the graph of all the steps, so that what comes out can be differentiated by what the loss
            holds; takes memory that grows with ``steps``.
    """
    codes = codes.detach().requires_grad_()
    velocity = torch.zeros_like(codes)
    for step in range(steps):
        (slope,) = torch.autograd.grad(loss(codes).sum(), codes, create_graph=differentiable)
        velocity = momentum * velocity + slope
        codes = codes - velocity * (rate if step < 0.8 * steps else rate / 10)
        if not differentiable:
            codes = codes.detach().requires_grad_()
    return codes


class WassersteinGAN(Defense, ABC):
    """A defense with a generator, trained against a critic with gradient penalty.

    Every batch is a step of the critic, every ``n_critic``-th one of the generator as well. Outside of training a
    running average of the generator's weights (:attr:`average`) is used: it is steadier than the last ones.

    Args:
        latent: numbers in a code.
        width: channels of the generator's and critic's convolutions next to the image.
        n_critic: steps of the critic for one of the generator.
        penalty: weight of the gradient penalty.
        betas: decay rates of Adam's moments.
        averaging: decay of the running average of the generator, per step of it; less at the beginning.
        classes: labels that the generator makes images of; 0: it is not told.
    """

    automatic_optimization = False

    def __init__(
        self,
        *,
        channels: int,
        size: tuple[int, int],
        latent: int,
        width: int,
        n_critic: int,
        penalty: float,
        betas: tuple[float, float],
        averaging: float,
        classes: int = 0,
    ) -> None:
        super().__init__()
        self.latent, self.n_critic, self.penalty, self.betas = latent, n_critic, penalty, betas
        self.generator = Generator(channels=channels, size=size, latent=latent, width=width, classes=classes)
        self.critic = Critic(channels=channels, size=size, width=width, classes=classes)
        self.average = moving_average(self.generator, averaging)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        real = batch.get("clean", batch["image"])
        labels = batch["label"]
        codes = torch.randn(len(real), self.latent, device=real.device)
        told = self._step(0, self._critic_losses(real, codes, labels))
        seen = self.trainer.current_epoch * int(self.trainer.num_training_batches) + batch_idx + 1
        if seen % self.n_critic == 0:
            told |= self._step(1, {"train_loss": -self.critic(self.generator(codes, labels), labels).mean()})
            self.average.update_parameters(self.generator)
        self.log_dict(told, on_step=False, on_epoch=True, sync_dist=True)

    def _critic_losses(self, real: Tensor, codes: Tensor, labels: Tensor) -> dict[str, Tensor]:
        with torch.no_grad():
            fake = self.generator(codes, labels)
        scores = self.critic(torch.cat([real, fake]), torch.cat([labels, labels]))
        distance = scores[: len(real)].mean() - scores[len(real) :].mean()
        penalty = gradient_penalty(self.critic, real, fake, labels)
        return {"train_critic": self.penalty * penalty - distance, "train_wasserstein": distance}

    def _step(self, which: int, losses: dict[str, Tensor]) -> dict[str, Tensor]:
        """One step of an optimiser on the first of the losses; all of them, to be logged."""
        optimizer, schedule = self.optimizers()[which], self.lr_schedulers()  # type: ignore[index]
        optimizer.zero_grad()
        self.manual_backward(next(iter(losses.values())))
        optimizer.step()
        if isinstance(schedule, list):
            schedule[which].step()  # type: ignore[call-arg]
        return {name: value.detach() for name, value in losses.items()}

    def configure_optimizers(self) -> Any:
        rare = max(1, self._steps // self.n_critic)
        return [self._optimizer(self.critic, self._steps), self._optimizer(self.generator, rare)]

    @property
    def _steps(self) -> int:
        """Batches of the whole training."""
        return int(self.trainer.estimated_stepping_batches)

    def _optimizer(self, part: nn.Module, steps: int) -> dict[str, Any]:
        assert self.recipe is not None, "a defense is trained through src.fit, which gives it a recipe"
        return self.recipe.optimizers(part, steps=steps, betas=self.betas)


class ClassifierFeatures:
    """The bare classifier's last hidden layer, ``(B, D)`` float32; its logits where it names no features.

    No module: the classifier's weights are not the defense's.
    """

    def __init__(self, classifier: nn.Module) -> None:
        network = getattr(classifier, "network", classifier)
        self.network: nn.Module = network
        self.answer: Callable[[Tensor], Tensor] = getattr(network, "features", network)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        self.network.to(images.device)
        return self.answer(images).flatten(1).float()

    def count(self, channels: int, size: tuple[int, int]) -> int:
        """How many numbers an image has, D."""
        return self(torch.zeros(1, channels, *size)).shape[1]
