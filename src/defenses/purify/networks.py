"""The encoders and decoders of image-to-image defenses: plain modules, any image size.

Images are float ``(B, channels, H, W)`` in [0, 1] on both sides; decoders return float32 of exactly the size
asked for, also under bf16 autocast. Training them, and any noise between the two halves, is up to the caller.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from src.errors import UserError

Activation = Literal["gelu", "relu"]
Architecture = Literal["auto", "dense", "conv"]

ACTIVATIONS: dict[str, type[nn.Module]] = {"gelu": nn.GELU, "relu": nn.ReLU}


def halve(size: tuple[int, int]) -> tuple[int, int]:
    """The size after a 3x3 convolution of stride 2 and padding 1: half, rounded up."""
    return (size[0] + 1) // 2, (size[1] + 1) // 2


class DenseEncoder(nn.Module):
    """Convolutions 8, 16, 32 (3x3, stride 2, padding 1), linear 128, linear to the code: ``(B, latent)``."""

    def __init__(self, *, channels: int, size: tuple[int, int], latent: int, activation: Activation) -> None:
        super().__init__()
        act = ACTIVATIONS[activation]
        height, width = halve(halve(halve(size)))
        self.body = nn.Sequential(
            nn.Conv2d(channels, 8, 3, stride=2, padding=1),
            act(),
            nn.Conv2d(8, 16, 3, stride=2, padding=1),
            act(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1),
            act(),
            nn.Flatten(),
            nn.Linear(32 * height * width, 128),
            act(),
            nn.Linear(128, latent),
        )

    def forward(self, images: Tensor) -> Tensor:
        """The code ``(B, latent)``, unbounded."""
        return self.body(images)


class DenseDecoder(nn.Module):
    """The mirror of :class:`DenseEncoder`, ended by a sigmoid."""

    def __init__(self, *, channels: int, size: tuple[int, int], latent: int, activation: Activation) -> None:
        super().__init__()
        act = ACTIVATIONS[activation]
        sizes = [size, halve(size), halve(halve(size)), halve(halve(halve(size)))]
        height, width = sizes[3]

        def grow(inputs: int, outputs: int, step: int) -> nn.ConvTranspose2d:
            """From sizes[step] to sizes[step - 1]: twice as large, less one where that was odd."""
            (small_h, small_w), (large_h, large_w) = sizes[step], sizes[step - 1]
            extra = (large_h - 2 * small_h + 1, large_w - 2 * small_w + 1)
            return nn.ConvTranspose2d(inputs, outputs, 3, stride=2, padding=1, output_padding=extra)

        self.body = nn.Sequential(
            nn.Linear(latent, 128),
            act(),
            nn.Linear(128, 32 * height * width),
            act(),
            nn.Unflatten(1, (32, height, width)),
            grow(32, 16, 3),
            act(),
            grow(16, 8, 2),
            act(),
            grow(8, channels, 1),
        )

    def forward(self, code: Tensor) -> Tensor:
        """Images in [0, 1]."""
        return torch.sigmoid(self.body(code).float())


class ConvEncoder(nn.Module):
    """5x5 convolutions 16, 32, max pooling, 32, 64, max pooling; the code is a map."""

    def __init__(self, *, channels: int, activation: Activation) -> None:
        super().__init__()
        act = ACTIVATIONS[activation]
        self.body = nn.Sequential(
            nn.Conv2d(channels, 16, 5, padding=2),
            act(),
            nn.Conv2d(16, 32, 5, padding=2),
            act(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 32, 5, padding=2),
            act(),
            nn.Conv2d(32, 64, 5, padding=2),
            act(),
            nn.MaxPool2d(2),
        )

    def forward(self, images: Tensor) -> Tensor:
        """The code ``(B, 64, H // 4, W // 4)``."""
        return self.body(images)


class ConvDecoder(nn.Module):
    """The mirror of :class:`ConvEncoder`: nearest-neighbour upsampling for pooling; ended by a sigmoid."""

    def __init__(self, *, channels: int, size: tuple[int, int], activation: Activation) -> None:
        super().__init__()
        act = ACTIVATIONS[activation]
        self.body = nn.Sequential(
            nn.Upsample(size=(size[0] // 2, size[1] // 2)),
            nn.Conv2d(64, 32, 5, padding=2),
            act(),
            nn.Conv2d(32, 32, 5, padding=2),
            act(),
            nn.Upsample(size=tuple(size)),
            nn.Conv2d(32, 16, 5, padding=2),
            act(),
            nn.Conv2d(16, channels, 5, padding=2),
        )

    def forward(self, code: Tensor) -> Tensor:
        """Images in [0, 1]."""
        return torch.sigmoid(self.body(code).float())


def build_autoencoder(
    *,
    channels: int,
    size: tuple[int, int],
    architecture: Architecture = "auto",
    activation: Activation = "gelu",
    latent: int = 10,
) -> tuple[nn.Module, nn.Module]:
    """The two halves of system A's autoencoder: ``images → code`` and ``code → images``.

    Args:
        channels: channels of an image.
        size: height and width of an image, in pixels.
        architecture: ``dense``, system A's for MNIST, whose code is a vector; ``conv``, its one for CIFAR-10,
            whose code is a map of 64 channels at a quarter of the size; ``auto``, dense for one channel, else
            conv.
        activation: between the layers.
        latent: numbers in the code of ``dense``; ``conv`` has no such choice and does not read it.

    Raises:
        UserError: images under 4x4.
    """
    if min(size) < 4:
        raise UserError(
            f"defense=autoencoder takes images of at least 4x4, this dataset has {size[0]}x{size[1]}: use defense=none"
        )
    if architecture == "dense" or (architecture == "auto" and channels == 1):
        return (
            DenseEncoder(channels=channels, size=size, latent=latent, activation=activation),
            DenseDecoder(channels=channels, size=size, latent=latent, activation=activation),
        )
    return (
        ConvEncoder(channels=channels, activation=activation),
        ConvDecoder(channels=channels, size=size, activation=activation),
    )


def vae_plan(size: tuple[int, int], width: int) -> tuple[list[tuple[int, int]], list[int]]:
    """Sizes and widths of a VAE's stages, from the image inwards: halved to 4x4 or less, at least twice."""
    stages = max(2, math.ceil(math.log2(max(size) / 4)))
    sizes = [(size[0], size[1])]
    for _ in range(stages):
        sizes.append(halve(sizes[-1]))
    return sizes, [width * min(2**stage, 4) for stage in range(stages)]


class Crop(nn.Module):
    """Keep the top left ``size`` of a map: undoes the rounding up of an encoder's halving."""

    def __init__(self, size: tuple[int, int]) -> None:
        super().__init__()
        self.size = size

    def forward(self, maps: Tensor) -> Tensor:
        """``(B, C, *size)``."""
        return maps[..., : self.size[0], : self.size[1]]


class VAEEncoder(nn.Module):
    """3x3 convolutions of stride 2 with batch norm and SiLU, then one linear layer for mean and log-variance.

    Args:
        channels: channels of an image.
        size: height and width of an image, in pixels; any from 8 to 64 is sensible.
        latent: numbers in the code.
        width: channels of the first stage; the later ones have 2 and 4 times as many.
    """

    def __init__(self, *, channels: int, size: tuple[int, int], latent: int, width: int = 32) -> None:
        super().__init__()
        sizes, widths = vae_plan(size, width)
        layers: list[nn.Module] = []
        before = channels
        for after in widths:
            layers += [
                nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(after),
                nn.SiLU(),
            ]
            before = after
        self.body = nn.Sequential(*layers, nn.Flatten())
        self.code = nn.Linear(before * sizes[-1][0] * sizes[-1][1], 2 * latent)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of the code, ``(B, latent)`` float32; the latter in [-10, 10]."""
        mean, logvar = self.code(self.body(images)).float().chunk(2, dim=1)
        return mean, logvar.clamp(-10.0, 10.0)


class VAEDecoder(nn.Module):
    """The mirror of :class:`VAEEncoder`: transposed convolutions, then one plain one; ended by a sigmoid.

    The arguments are those of :class:`VAEEncoder`.
    """

    def __init__(self, *, channels: int, size: tuple[int, int], latent: int, width: int = 32) -> None:
        super().__init__()
        sizes, widths = vae_plan(size, width)
        height, wide = sizes[-1]
        self.code = nn.Sequential(
            nn.Linear(latent, widths[-1] * height * wide),
            nn.Unflatten(1, (widths[-1], height, wide)),
            nn.SiLU(),
        )
        layers: list[nn.Module] = []
        before = widths[-1]
        for after, larger in zip([*reversed(widths[:-1]), width], reversed(sizes[:-1]), strict=True):
            layers += [
                nn.ConvTranspose2d(before, after, 4, stride=2, padding=1, bias=False),
                Crop(larger),
                nn.BatchNorm2d(after),
                nn.SiLU(),
            ]
            before = after
        self.body = nn.Sequential(*layers)
        self.image = nn.Conv2d(before, channels, 3, padding=1)

    def logits(self, code: Tensor) -> Tensor:
        """Images before the sigmoid, float32: what ``binary_cross_entropy_with_logits`` takes."""
        return self.image(self.body(self.code(code))).float()

    def forward(self, code: Tensor) -> Tensor:
        """Images in [0, 1]."""
        return torch.sigmoid(self.logits(code))
