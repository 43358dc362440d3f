"""DiffPure: noise that drowns the attack, then a diffusion model that takes the noise away."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt
from torch import Tensor

from src.defenses.base import Purifier, Share
from src.errors import UserError

TIMES = 1000  # noise levels of the whole process, DDPM's number


class Diffusion(Purifier):
    """Adds Gaussian noise up to the time ``t_star`` of a diffusion process, then runs it back to a clean image.

    Papers: Nie, Guo, Huang, Xiao, Vahdat, Anandkumar 2022, "Diffusion Models for Adversarial Purification",
    https://arxiv.org/abs/2205.07460; Ho, Jain, Abbeel 2020, "Denoising Diffusion Probabilistic Models",
    https://arxiv.org/abs/2006.11239; steps back: Song, Meng, Ermon 2020, https://arxiv.org/abs/2010.02502

    Args:
        t_star: how far the image is noised, as a share of the whole process, DDPM's linear one: the paper takes 0.1
            against l-inf 8/255. At 1 nothing of the image would be left. Another ``t_star`` is another
            training; for a smaller one the weights can be given as ``checkpoint`` instead.
        steps: steps back from there, of equal length.
        eta: noise drawn anew at each step back; 0 is DDIM, 1 DDPM.
        gradient: ``exact`` through all steps, or ``bpda``: the gradient of a single step from ``t_star`` to the clean
            image, which costs an attacker less where there are many.
        widths: channels of the U-Net, one number a resolution, each half of the one before; multiples of 8.
        blocks: residual blocks a resolution.
        patch: side of the squares of pixels that the U-Net sees as channels of one position; 2 is four times as fast
            as 1 and misses little in images this size.

    The defense is stochastic. Inputs and outputs are ``(B, C, H, W)`` in [0, 1]; sides that the U-Net cannot halve are
    padded with their edge and cropped again.

    Where ours departs from the paper: a network of a million parameters trained here on the clean training images, not
    a pre-trained one, and only for the times up to ``t_star``, since it meets no others; a few steps of DDIM for the
    solver of the reverse SDE, so that its exact gradient needs no adjoint method.

    Raises:
        UserError: widths that are no multiples of 8, or steps that do not divide the noise levels up to ``t_star``, a
            thousand in all: others would end at another ``t_star``.
    """

    stochastic = True
    at_test = frozenset({"eta", "gradient", "steps"})  # training meets all levels up to t_star whatever the steps

    def __init__(
        self,
        *,
        channels: int,
        size: tuple[int, int],
        t_star: Share = 0.2,
        steps: PositiveInt = 4,
        eta: Annotated[float, Field(ge=0, le=1)] = 0.0,
        gradient: Literal["exact", "bpda"] = "exact",
        widths: tuple[PositiveInt, ...] = (32, 64),
        blocks: PositiveInt = 1,
        patch: PositiveInt = 2,
    ) -> None:
        super().__init__()
        # Seconds to import: only where a diffusion model is wanted.
        from diffusers.models.unets.unet_2d import UNet2DModel
        from diffusers.schedulers.scheduling_ddim import DDIMScheduler

        if any(width % 8 for width in widths):
            raise UserError(f"defense.widths={list(widths)}: expected multiples of 8, the groups of its normalisation")
        levels = round(t_star * TIMES)
        if levels < 1 or levels % steps:
            fit = [count for count in range(1, levels + 1) if levels % count == 0]
            near = sorted(sorted(fit, key=lambda count: abs(count - steps))[:3])
            raise UserError(
                f"defense.steps={steps}: does not divide the {levels} noise levels up to defense.t_star={t_star:g}. "
                f"Allowed: a divisor of them{', such as ' if near else ''}{', '.join(map(str, near))}"
            )
        self.gradient = gradient
        self.eta = eta
        self.patch = patch
        multiple = patch * 2 ** (len(widths) - 1)
        self.margin = (0, -size[1] % multiple, 0, -size[0] % multiple)
        self.network = UNet2DModel(
            in_channels=channels * patch**2,
            out_channels=channels * patch**2,
            layers_per_block=blocks,
            block_out_channels=widths,
            down_block_types=("DownBlock2D",) * len(widths),
            up_block_types=("UpBlock2D",) * len(widths),
            norm_num_groups=8,
            add_attention=False,
        )
        # The process as far as t_star and no further: the scheduler's steps divide what it is given.
        betas = DDIMScheduler(num_train_timesteps=TIMES).betas[:levels].tolist()
        self.scheduler = DDIMScheduler(num_train_timesteps=levels, trained_betas=betas, timestep_spacing="trailing")
        self.scheduler.set_timesteps(steps)
        self.times: list[int] = self.scheduler.timesteps.tolist()

    def purify(self, images: Tensor) -> Tensor:
        noisy = self._noised(images)
        for time in self.times:
            noise = self._noise_in(noisy, torch.tensor(time, device=noisy.device))
            noisy = self.scheduler.step(noise, time, noisy, eta=self.eta).prev_sample
        return self._image(noisy, images)

    def surrogate(self, images: Tensor) -> Tensor:
        noisy, time = self._noised(images), self.times[0]
        noise = self._noise_in(noisy, torch.tensor(time, device=noisy.device))
        return self._image(self.scheduler.step(noise, time, noisy).pred_original_sample, images)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = self._loss(batch.get("clean", batch["image"]), None)
        self.log("train_loss", loss, on_step=False, on_epoch=True, sync_dist=True)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        # The same noise every epoch: epochs are compared by this figure.
        clean = batch.get("clean", batch["image"])
        loss = self._loss(clean, torch.Generator().manual_seed(batch_idx))
        self.log("val_loss", loss, batch_size=len(clean), sync_dist=True, prog_bar=True)

    def _loss(self, clean: Tensor, generator: torch.Generator | None) -> Tensor:
        """Mean squared error of the noise found in clean images at random times up to ``t_star``."""
        pixels = self._pixels(clean)
        noise = torch.randn(pixels.shape, generator=generator).to(pixels)
        times = torch.randint(0, self.times[0] + 1, (len(pixels),), generator=generator).to(pixels.device)
        return F.mse_loss(self._noise_in(self.scheduler.add_noise(pixels, noise, times), times), noise)

    def _noise_in(self, noisy: Tensor, times: Tensor) -> Tensor:
        seen = F.pixel_unshuffle(noisy, self.patch)
        return F.pixel_shuffle(self.network(seen, times).sample.float(), self.patch)

    def _noised(self, images: Tensor) -> Tensor:
        pixels = self._pixels(images)
        return self.scheduler.add_noise(pixels, torch.randn_like(pixels), torch.tensor([self.times[0]]))

    def _pixels(self, images: Tensor) -> Tensor:
        """Padded, in [-1, 1]."""
        return 2 * F.pad(images, self.margin, mode="replicate") - 1

    def _image(self, pixels: Tensor, like: Tensor) -> Tensor:
        height, width = like.shape[-2:]
        return ((pixels[..., :height, :width] + 1) / 2).clamp(0, 1)
