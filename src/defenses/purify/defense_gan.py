"""Defense-GAN: the nearest image that a generator of clean images can make."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor

from src.defenses.base import Purifier
from src.defenses.purify.gan import Decay, WassersteinGAN, descend
from src.errors import UserError

TRIAL = 10  # steps of the short search by which epochs are compared
LAST = 20  # steps of the descent that the attacker differentiates


class DefenseGAN(WassersteinGAN, Purifier):
    """Replaces the image by the nearest one that a generator of clean images makes.

    Paper: Samangouei, Kabkab, Chellappa 2018, "Defense-GAN: Protecting Classifiers Against Adversarial Attacks Using
    Generative Models", https://arxiv.org/abs/1805.06605. Broken through its gradient: Athalye et al. 2018,
    https://arxiv.org/abs/1802.00420, section 5.4.2.

    Inputs and outputs are ``(B, C, H, W)`` in [0, 1]. For each image ``restarts`` codes descend at once on the mean
    squared error, and the generator's image for the best of them is taken.

    Departures: the starting codes are the same in every call and for every image, drawn from a generator of their own
    with a fixed seed, so the defense is deterministic and an attacker needs no average over draws; ``candidates``
    can choose among more of them, which makes up for many steps; they have variance 1 as in training, not the
    1/latent of the authors' code; the networks are smaller, and a running average of the generator's weights is used.

    Args:
        latent: numbers in a code.
        width: channels of the generator's and critic's convolutions next to the image.
        restarts: codes that descend for each image (R in the paper).
        steps: steps of the descent (L in the paper).
        rate: step size on the squared error, mean over pixels; a tenth of it for the last fifth of the steps.
        momentum: of the descent.
        candidates: codes of which each image starts from the nearest ``restarts``; equal to them: the paper's.
        backward: what the white_box attacker differentiates. ``bpda``: 20 more steps of the descent, from the code that
            it found: nearly the derivative of the nearest image, at the memory of 20 passes. The identity, which
            Athalye et al. took for it, was weaker under PGD. ``unrolled``: all steps of the descent for all restarts,
            exact and for few steps.
        n_critic: steps of the critic for one of the generator.
        penalty: weight of the gradient penalty.
        betas: decay rates of Adam's moments.
        averaging: decay of the running average of the generator's weights.

    Raises:
        UserError: images under 8x8, fewer candidates than restarts.
    """

    at_test = frozenset({"restarts", "steps", "backward"})  # validation searches too, with steps of its own

    def __init__(
        self,
        *,
        channels: int,
        size: tuple[int, int],
        latent: PositiveInt = 64,
        width: PositiveInt = 32,
        restarts: PositiveInt = 10,
        steps: PositiveInt = 200,
        rate: PositiveFloat = 10.0,
        momentum: Decay = 0.7,
        candidates: PositiveInt = 10,
        backward: Literal["bpda", "unrolled"] = "bpda",
        n_critic: PositiveInt = 5,
        penalty: NonNegativeFloat = 10.0,
        betas: tuple[Decay, Decay] = (0.5, 0.9),
        averaging: Decay = 0.999,
    ) -> None:
        if candidates < restarts:
            raise UserError(
                f"defense.candidates={candidates}: fewer than defense.restarts={restarts}, which are chosen of them; "
                f"expected {restarts} or more"
            )
        super().__init__(
            channels=channels,
            size=size,
            latent=latent,
            width=width,
            n_critic=n_critic,
            penalty=penalty,
            betas=betas,
            averaging=averaging,
        )
        self.restarts, self.steps, self.candidates = restarts, steps, candidates
        self.rate, self.momentum = rate, momentum
        self.gradient = "exact" if backward == "unrolled" else "bpda"

    def purify(self, images: Tensor) -> Tensor:
        if self.gradient == "exact" and torch.is_grad_enabled() and images.requires_grad:
            return self.average(self._nearest(images, restarts=self.restarts, steps=self.steps, unrolled=True))
        return self._project(images, restarts=self.restarts, steps=self.steps)

    def surrogate(self, images: Tensor) -> Tensor:
        """The last steps of the descent alone, from the codes that it finds."""
        codes = self._nearest(images, restarts=self.restarts, steps=self.steps)
        return self.average(self._descended(images, codes, steps=LAST, differentiable=True))

    @torch.no_grad()
    def samples_to_show(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
        """Images of the averaged generator."""
        return self.average(torch.randn(count, self.latent, generator=generator).to(self.device)), None

    def _project(self, images: Tensor, *, restarts: int, steps: int) -> Tensor:
        """The nearest images that were found, without a gradient."""
        codes = self._nearest(images, restarts=restarts, steps=steps)
        with torch.no_grad():
            return self.average(codes)

    def _nearest(self, images: Tensor, *, restarts: int, steps: int, unrolled: bool = False) -> Tensor:
        """For each image the best code of its restarts, ``(B, latent)``; a constant unless ``unrolled``."""
        # The search has gradients of its own, also where the caller wants none.
        with torch.inference_mode(False), torch.enable_grad():
            target = (images if unrolled else images.detach()).clone()
            starts = self._starts(target.detach(), restarts)
            wanted = target.repeat_interleave(restarts, dim=0)
            codes = self._descended(wanted, starts, steps=steps, differentiable=unrolled)
            with torch.no_grad():
                best = _error(self.average(codes), wanted).view(-1, restarts).argmin(dim=1)
            chosen = codes[torch.arange(len(target), device=best.device) * restarts + best]
        return chosen if unrolled else chosen.detach()

    def _descended(self, wanted: Tensor, codes: Tensor, *, steps: int, differentiable: bool) -> Tensor:
        return descend(
            lambda codes: _error(self.average(codes), wanted),
            codes,
            steps=steps,
            rate=self.rate,
            momentum=self.momentum,
            differentiable=differentiable,
        )

    @torch.no_grad()
    def _starts(self, images: Tensor, restarts: int) -> Tensor:
        """For each image the candidates whose images are nearest to it: ``(B * restarts, latent)``."""
        codes = torch.randn(self.candidates, self.latent, generator=torch.Generator().manual_seed(0)).to(images)
        if self.candidates == restarts:
            return codes.repeat(len(images), 1)
        distance = torch.cdist(images.flatten(1), self.average(codes).flatten(1))
        return codes[distance.topk(restarts, dim=1, largest=False).indices.flatten()]

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """The error that a short search from one start leaves on clean images."""
        images = batch.get("clean", batch["image"])
        error = _error(self._project(images, restarts=1, steps=TRIAL), images).mean()
        self.log("val_loss", error, batch_size=len(images), sync_dist=True, prog_bar=True)


def _error(made: Tensor, wanted: Tensor) -> Tensor:
    """Mean squared error of each image, ``(B,)``."""
    return (made - wanted).square().flatten(1).mean(dim=1)
