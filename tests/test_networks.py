"""Networks of the classifiers and of the purifiers: shapes, sizes, normalisation, refusals, gradients."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from src.classifiers.cnn3 import CNN3
from src.classifiers.cnn6 import CNN6
from src.classifiers.lenet import LeNet
from src.classifiers.network import Network
from src.classifiers.resnet18 import ResNet18
from src.classifiers.torchvision import TorchvisionModel
from src.classifiers.vgg16_bn import VGG16BN
from src.classifiers.whitening import Whitening, patch_covariance
from src.errors import UserError
from tests.made_networks import OWN, make


def fits(kind: type[Network], size: int) -> bool:
    return size >= kind.smallest


@pytest.mark.parametrize(("channels", "size"), [(1, 8), (1, 28), (3, 32), (3, 33)])
@pytest.mark.parametrize("kind", [*OWN, TorchvisionModel])
def test_logits_and_features(kind: type[Network], channels: int, size: int) -> None:
    if not fits(kind, size):
        with pytest.raises(UserError, match="use classifier="):
            make(kind, channels, size)
        return
    network = make(kind, channels, size).eval()
    images = torch.rand(2, channels, size, size)
    features, logits = network.features(images), network(images)
    assert features.ndim == 2
    assert logits.shape == (2, 10)
    torch.testing.assert_close(network.head(features), logits)
    last = [layer for layer in network.modules() if isinstance(layer, nn.Linear)][-1]
    assert last.in_features == features.shape[1]


@pytest.mark.parametrize("kind", [LeNet, CNN3, CNN6])
def test_images_need_not_be_square(kind: type[Network]) -> None:
    facts = {"patches": torch.eye(4).tolist(), "symmetric": False} if kind is CNN6 else {}
    network = kind(channels=1, size=(28, 20), num_classes=4, mean=[0.5], std=[0.5], **facts)
    assert network(torch.rand(2, 1, 28, 20)).shape == (2, 4)


@pytest.mark.parametrize(("kind", "smallest"), [(LeNet, 16), (CNN3, 7), (CNN6, 9), (VGG16BN, 32), (ResNet18, 16)])
def test_the_smallest_size_works_and_one_less_is_refused_in_one_line(kind: type[Network], smallest: int) -> None:
    make(kind, 1, smallest).eval()(torch.rand(1, 1, smallest, smallest))
    with pytest.raises(UserError) as caught:
        make(kind, 1, smallest - 1)
    message = str(caught.value)
    stem = kind.__module__.rpartition(".")[2]
    assert message.startswith(f"classifier={stem} takes images of at least {smallest}x{smallest}")
    assert f"{smallest - 1}x{smallest - 1}" in message
    assert "\n" not in message


def test_the_refusal_of_lenet_on_digits_reads_as_promised() -> None:
    expected = "classifier=lenet takes images of at least 16x16, this dataset has 8x8: use classifier=cnn3"
    with pytest.raises(UserError) as caught:
        make(LeNet, 1, 8)
    assert str(caught.value) == expected


def test_lenet_has_the_parameters_of_system_a() -> None:
    assert sum(parameter.numel() for parameter in make(LeNet, 1, 28).parameters()) == 21_840


def test_a_convolution_under_batch_norm_has_no_bias() -> None:
    def biases(network: Network) -> list[bool]:
        return [layer.bias is not None for layer in network.modules() if isinstance(layer, nn.Conv2d)]

    assert biases(make(CNN6, 3, 32)) == [False] * 6
    assert biases(make(CNN6, 3, 32, batch_norm=False)) == [True] * 6


def test_widths_are_the_channels_of_the_convolutions() -> None:
    assert make(CNN3, 1, 28, widths=(4, 5, 6)).features(torch.rand(2, 1, 28, 28)).shape == (2, 6 * 36)
    assert make(CNN6, 1, 28, widths=(4, 5, 6)).features(torch.rand(2, 1, 28, 28)).shape == (2, 6)


def test_normalisation_is_inside_and_saved() -> None:
    network = make(CNN3, 3, 32)
    assert {"mean", "std"} <= network.state_dict().keys()
    images = torch.full((1, 3, 32, 32), 0.6)
    torch.testing.assert_close(network.normalise(images), torch.ones(1, 3, 32, 32))

    plain = CNN3(channels=3, size=(32, 32), num_classes=10, mean=[0.0] * 3, std=[1.0] * 3)
    plain.load_state_dict(network.state_dict() | {"mean": plain.mean, "std": plain.std})
    torch.testing.assert_close(plain((images - 0.4) / 0.2), network(images))


def test_a_constant_channel_is_refused() -> None:
    with pytest.raises(UserError, match="same value everywhere"):
        CNN3(channels=1, size=(8, 8), num_classes=2, mean=[0.5], std=[0.0])
    with pytest.raises(ValueError, match="3 channels, but 1 means"):
        CNN3(channels=3, size=(8, 8), num_classes=2, mean=[0.5], std=[0.2])


@pytest.mark.parametrize("kind", [*OWN, TorchvisionModel])
def test_gradients_reach_weights_and_pixels_in_bf16_channels_last(kind: type[Network]) -> None:
    network = make(kind, 3, 32).to(memory_format=torch.channels_last)
    images = torch.rand(4, 3, 32, 32).contiguous(memory_format=torch.channels_last).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = nn.functional.cross_entropy(network(images), torch.arange(4))
    loss.backward()
    assert images.grad is not None
    assert images.grad.isfinite().all()
    assert images.grad.any()
    assert all(parameter.grad is not None for parameter in network.parameters())


def test_whitening_takes_the_correlation_out() -> None:
    """Patches of images like those it was made from have unit spread in every component and no correlation."""
    blurred = torch.nn.functional.avg_pool2d(
        torch.rand(64, 3, 17, 17, generator=torch.Generator().manual_seed(0)), 2, 1
    )
    mean, std = blurred.mean(dim=(0, 2, 3)).tolist(), blurred.std(dim=(0, 2, 3)).tolist()
    layer = Whitening(patch_covariance(blurred, mean, std), floor=0.0)
    shift, scale = (torch.tensor(v).view(-1, 1, 1) for v in (mean, std))
    seen = layer((blurred - shift) / scale)
    assert seen.shape == (64, 24, 15, 15)
    torch.testing.assert_close(seen[:, :12], -seen[:, 12:])
    columns = seen[:, :12].transpose(0, 1).flatten(1)
    torch.testing.assert_close(columns @ columns.T / columns.shape[1], torch.eye(12), atol=1e-3, rtol=0)
    assert not list(layer.parameters())


def test_cnn6_starts_out_passing_its_input_on() -> None:
    network = make(CNN6, 3, 32)
    first = next(m for m in network.modules() if isinstance(m, torch.nn.Conv2d))
    x = torch.rand(2, 24, 8, 8)
    torch.testing.assert_close(first(x)[:, :24], x)


def test_cnn6_answers_a_mirrored_image_alike_where_that_keeps_its_class() -> None:
    x = torch.rand(3, 3, 32, 32)
    network = make(CNN6, 3, 32).eval()
    torch.testing.assert_close(network(x), network(x.flip(3)))
    plain = make(CNN6, 3, 32, mirror=False).eval()
    torch.testing.assert_close(network(x), (plain(x) + plain(x.flip(3))) / 2)
    signs = make(CNN6, 3, 32, symmetric=False).eval()
    assert torch.equal(signs(x), plain(x))
    network.train()
    plain.train()
    assert torch.equal(network(x), plain(x))  # learns from the image as it comes
