"""Autoencoders and VAEs: shapes, ranges, sizes they refuse."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from src.defenses.purify.networks import VAEDecoder, VAEEncoder, build_autoencoder
from src.errors import UserError

SIZES = [(1, (8, 8)), (1, (28, 28)), (3, (32, 32)), (3, (9, 13)), (1, (33, 64))]


def check_images(images: Tensor, channels: int, size: tuple[int, int]) -> None:
    assert images.shape == (2, channels, *size)
    assert images.dtype == torch.float32
    assert images.min() >= 0
    assert images.max() <= 1


@pytest.mark.parametrize("activation", ["gelu", "relu"])
@pytest.mark.parametrize("architecture", ["auto", "dense", "conv"])
@pytest.mark.parametrize(("channels", "size"), SIZES)
def test_autoencoder(channels: int, size: tuple[int, int], architecture: Any, activation: Any) -> None:
    encoder, decoder = build_autoencoder(
        channels=channels, size=size, architecture=architecture, activation=activation, latent=7
    )
    images = torch.rand(2, channels, *size)
    code = encoder(images)
    vector = architecture == "dense" or (architecture == "auto" and channels == 1)
    assert code.shape == ((2, 7) if vector else (2, 64, size[0] // 4, size[1] // 4))
    check_images(decoder(code), channels, size)
    with torch.autocast("cpu", torch.bfloat16):
        check_images(decoder(encoder(images)), channels, size)


def test_autoencoder_is_that_of_system_a() -> None:
    def convolutions(module: nn.Module) -> list[tuple[int, int, Any]]:
        kinds = (nn.Conv2d, nn.ConvTranspose2d)
        return [(m.in_channels, m.out_channels, m.kernel_size[0]) for m in module.modules() if isinstance(m, kinds)]

    encoder, decoder = build_autoencoder(channels=1, size=(28, 28))
    assert convolutions(encoder) == [(1, 8, 3), (8, 16, 3), (16, 32, 3)]
    assert convolutions(decoder) == [(32, 16, 3), (16, 8, 3), (8, 1, 3)]
    encoder, decoder = build_autoencoder(channels=3, size=(32, 32))
    assert convolutions(encoder) == [(3, 16, 5), (16, 32, 5), (32, 32, 5), (32, 64, 5)]
    assert convolutions(decoder) == [(64, 32, 5), (32, 32, 5), (32, 16, 5), (16, 3, 5)]


def test_autoencoder_refuses_tiny_images() -> None:
    with pytest.raises(UserError, match="at least 4x4, this dataset has 3x8"):
        build_autoencoder(channels=1, size=(3, 8))


@pytest.mark.parametrize(("channels", "size"), [*SIZES, (3, (64, 64))])
def test_vae(channels: int, size: tuple[int, int]) -> None:
    encoder = VAEEncoder(channels=channels, size=size, latent=5, width=8)
    decoder = VAEDecoder(channels=channels, size=size, latent=5, width=8)
    images = torch.rand(2, channels, *size)
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            mean, logvar = encoder(images)
            logits = decoder.logits(mean)
            check_images(decoder(mean), channels, size)
        assert mean.shape == logvar.shape == (2, 5)
        assert logvar.abs().max() <= 10
        assert mean.dtype == logvar.dtype == logits.dtype == torch.float32
        torch.testing.assert_close(torch.sigmoid(logits), decoder(mean), atol=0.02, rtol=0)


def test_vae_gradients_in_bf16_channels_last() -> None:
    encoder = VAEEncoder(channels=3, size=(32, 32), latent=5).to(memory_format=torch.channels_last)
    decoder = VAEDecoder(channels=3, size=(32, 32), latent=5).to(memory_format=torch.channels_last)
    images = torch.rand(2, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        mean, logvar = encoder(images)
        logits = decoder.logits(mean + logvar.exp())
    nn.functional.binary_cross_entropy_with_logits(logits, images).backward()
    for parameter in [*encoder.parameters(), *decoder.parameters()]:
        assert parameter.grad is not None
        assert math.isfinite(float(parameter.grad.sum()))
