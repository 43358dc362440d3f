"""Generators and discriminators of counter_gan: plain modules, any image size from 8x8 up.

A generator gets an image or its sketch, and numbers drawn at random where the repairs vote; it emits a noise image in
[-1, 1], float32 also under autocast. A discriminator gives a score ``(B,)``, higher for clean images.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from src.defenses.purify.gan import Critic

Condition = Literal["image", "sketch"]
Kind = Literal["linear", "conv"]

SIDE = 10  # of a sketch


def greys(images: Tensor) -> Tensor:
    """The mean over colours at 10x10 pixels, less the image's own mean: ``(B, 100)``."""
    small = F.adaptive_avg_pool2d(images.mean(dim=1, keepdim=True), SIDE).flatten(1)
    return small - small.mean(dim=1, keepdim=True)


def _wide(inputs: int, outputs: int) -> list[nn.Module]:
    return [nn.Linear(inputs, outputs, bias=False), nn.BatchNorm1d(outputs), nn.GELU()]


def _conv(inputs: int, outputs: int, stride: int = 1) -> list[nn.Module]:
    layers = [nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.GELU()]
    return list(layers)


def _quiet(layer: nn.Linear | nn.Conv2d) -> nn.Module:
    """A last layer that begins with faint noise: the image as it is makes a better start."""
    layer.weight.data.mul_(0.1)
    return layer


class LinearGenerator(nn.Module):
    """Three linear layers.

    Args:
        channels: channels of an image.
        size: height and width of an image, in pixels.
        condition: what it gets to see.
        latent: numbers drawn at random; 0: none.
        width: units of the hidden layers are eight times as many.
    """

    def __init__(self, *, channels: int, size: tuple[int, int], condition: Condition, latent: int, width: int) -> None:
        super().__init__()
        pixels, hidden = channels * size[0] * size[1], 8 * width
        seen = SIDE**2 if condition == "sketch" else pixels
        self.body = nn.Sequential(
            *_wide(seen + latent, hidden),
            *_wide(hidden, hidden),
            _quiet(nn.Linear(hidden, pixels)),
            nn.Unflatten(1, (channels, *size)),
        )

    def forward(self, seen: Tensor, code: Tensor) -> Tensor:
        """``(B, C, H, W)`` or ``(B, 100)``, and ``(B, latent)`` → ``(B, C, H, W)``."""
        return torch.tanh(self.body(torch.cat([seen.flatten(1), code], dim=1)).float())


class Residual(nn.Module):
    """Two 3x3 convolutions around which the input is led."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(*_conv(width, width), *_conv(width, width))

    def forward(self, maps: Tensor) -> Tensor:
        return maps + self.body(maps)


class ConvGenerator(nn.Module):
    """Convolutions at a half and a quarter of the size, which is where they are cheap, and a bridge at the half.

    A sketch has no place for the bridge: one linear layer lays it out at a quarter of the size.

    Args:
        width: channels at half of the size; twice as many at a quarter, in three residual blocks.

    The other arguments are those of :class:`LinearGenerator`.
    """

    def __init__(self, *, channels: int, size: tuple[int, int], condition: Condition, latent: int, width: int) -> None:
        super().__init__()
        self.size = tuple(size)
        self.margin = (0, -size[1] % 4, 0, -size[0] % 4)
        quarter = (-(-size[0] // 4), -(-size[1] // 4))
        self.near: nn.Sequential | None = None
        if condition == "image":
            self.near = nn.Sequential(*_conv(4 * channels + latent, width))
            self.far = nn.Sequential(*_conv(width, 2 * width, stride=2))
        else:
            flat = 2 * width * quarter[0] * quarter[1]
            self.far = nn.Sequential(*_wide(SIDE**2 + latent, flat), nn.Unflatten(1, (2 * width, *quarter)))
        self.middle = nn.Sequential(*[Residual(2 * width) for _ in range(3)])
        self.back = nn.ConvTranspose2d(2 * width, width, 2, stride=2)
        self.noise = nn.Sequential(*_conv(width, width), _quiet(nn.Conv2d(width, 4 * channels, 3, padding=1)))

    def forward(self, seen: Tensor, code: Tensor) -> Tensor:
        """``(B, C, H, W)`` or ``(B, 100)``, and ``(B, latent)`` → ``(B, C, H, W)``."""
        if self.near is None:
            maps = self.back(self.middle(self.far(torch.cat([seen, code], dim=1))))
        else:
            seen = F.pixel_unshuffle(F.pad(seen, self.margin, mode="replicate"), 2)
            near = self.near(torch.cat([seen, code[:, :, None, None].expand(-1, -1, *seen.shape[-2:])], dim=1))
            maps = near + self.back(self.middle(self.far(near)))
        noise = F.pixel_shuffle(self.noise(maps).float(), 2)
        return torch.tanh(noise[..., : self.size[0], : self.size[1]])


class LinearDiscriminator(nn.Module):
    """Three linear layers with leaky ReLU, no normalisation; hidden layers of eight times ``width`` units."""

    def __init__(self, *, channels: int, size: tuple[int, int], width: int) -> None:
        super().__init__()
        hidden = 8 * width
        self.body = nn.Sequential(
            nn.Flatten(),
            nn.Linear(channels * size[0] * size[1], hidden),
            nn.LeakyReLU(0.2),
            nn.Linear(hidden, hidden),
            nn.LeakyReLU(0.2),
            nn.Linear(hidden, 1),
        )

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        """Scores ``(B,)``; the labels are not looked at."""
        return self.body(images).squeeze(1).float()


GENERATORS: dict[str, type[LinearGenerator | ConvGenerator]] = {"linear": LinearGenerator, "conv": ConvGenerator}
DISCRIMINATORS: dict[str, type[LinearDiscriminator | Critic]] = {"linear": LinearDiscriminator, "conv": Critic}
