"""Networks of the classifiers and of the purifiers: shapes, sizes, normalisation, refusals, gradients."""

from __future__ import annotations

import ast
import inspect
import math
from typing import Any
from urllib.error import URLError

import pytest
import torch
from torch import Tensor, nn

from src.classifiers.cnn3 import CNN3
from src.classifiers.cnn6 import CNN6
from src.classifiers.lenet import LeNet
from src.classifiers.network import Network
from src.classifiers.resnet18 import ResNet18
from src.classifiers.torchvision import TorchvisionModel
from src.classifiers.vgg16_bn import VGG16BN
from src.classifiers.whitening import Whitening, patch_covariance
from src.defenses.purify.networks import VAEDecoder, VAEEncoder, build_autoencoder
from src.errors import UserError

OWN: list[type[Network]] = [LeNet, CNN3, CNN6, VGG16BN, ResNet18]
SMALL = {"model": "mobilenet_v3_small", "resize": 32}


def make(kind: type[Network], channels: int, size: int, **options: Any) -> Network:
    torch.manual_seed(0)
    if kind is TorchvisionModel:
        options = SMALL | options
    if kind is CNN6:
        options = {"patches": torch.eye(4 * channels).tolist(), "symmetric": True} | options
    return kind(
        channels=channels,
        size=(size, size),
        num_classes=10,
        mean=[0.4] * channels,
        std=[0.2] * channels,
        **options,
    )


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


def test_a_frozen_model_trains_its_head_only_and_keeps_its_statistics() -> None:
    network = make(TorchvisionModel, 1, 8, freeze=True)
    assert isinstance(network, TorchvisionModel)
    trained = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    assert trained == {"head.weight", "head.bias"}
    network.train()
    assert network.training
    assert network.head.training
    assert not any(module.training for module in network.body.modules())
    before = {name: value.clone() for name, value in network.state_dict().items()}
    images = torch.rand(4, 1, 8, 8, requires_grad=True)
    optimiser = torch.optim.SGD([p for p in network.parameters() if p.requires_grad], lr=0.1)
    nn.functional.cross_entropy(network(images), torch.arange(4)).backward()
    optimiser.step()
    changed = {name for name, value in network.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"head.weight", "head.bias"}
    assert images.grad is not None
    assert images.grad.any()


def test_an_open_model_trains_everything() -> None:
    network = make(TorchvisionModel, 1, 8)
    assert all(parameter.requires_grad for parameter in network.parameters())
    assert all(module.training for module in network.modules())
    assert not any(module.training for module in network.eval().modules())


@pytest.mark.parametrize(
    ("model", "width"),
    [
        ("alexnet", 4096),
        ("squeezenet1_1", 512),
        ("googlenet", 1024),
        ("densenet121", 1024),
        ("shufflenet_v2_x0_5", 1024),
        ("vit_b_32", 768),
        ("swin_t", 768),
        ("convnext_tiny", 768),
        ("inception_v3", 2048),
    ],
)
def test_any_torchvision_model_gets_a_new_head(
    model: str, width: int, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    from torchvision import models

    real = models.get_model

    def on_meta(*args: Any, **options: Any) -> nn.Module:  # shapes without the minutes of initialisation
        with torch.device("meta"):
            return real(*args, **options)

    monkeypatch.setattr(models, "get_model", on_meta)
    network = make(TorchvisionModel, 3, 32, model=model, resize=224)
    network.to("meta")
    for mode in (True, False):
        features = network.train(mode).features(torch.empty(2, 3, 224, 224, device="meta"))
        assert features.shape == (2, width)
        assert network.head(features).shape == (2, 10)
    assert not [warning for warning in recwarn if issubclass(warning.category, FutureWarning)]


def one_line(**options: Any) -> str:
    with pytest.raises(UserError) as caught:
        make(TorchvisionModel, 3, 32, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_torchvision_refusals() -> None:
    message = one_line(model="resnet51")
    assert message.startswith("classifier.model=resnet51: not a classification model of torchvision. Closest:")
    assert "resnet50" in message
    assert "alexnet" in one_line(model="zzz")
    message = one_line(model="alexnet", weights="IMAGENET")
    assert "classifier.weights=IMAGENET" in message
    assert "null, DEFAULT, IMAGENET1K_V1" in message
    with pytest.raises(UserError, match="1 or 3 channels, this dataset has 4"):
        make(TorchvisionModel, 4, 32)


def test_a_size_the_model_does_not_take_is_refused() -> None:
    message = one_line(model="alexnet", resize=32)
    assert message == "classifier.resize=32: alexnet does not take images of this size. Use 224"


@pytest.mark.parametrize(
    "error",
    [URLError("no route to host\nreally"), RuntimeError('invalid hash value (expected "a", got "b")')],
)
def test_weights_that_cannot_be_had_are_one_line(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", fail)
    message = one_line(weights="DEFAULT")
    assert message.startswith("classifier.weights=IMAGENET1K_V1: cannot get https://")
    assert "Use classifier.weights=null" in message


def test_trained_weights_bring_their_own_normalisation(monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.models import mobilenet_v3_small

    state = mobilenet_v3_small().state_dict()
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda *args, **options: state)
    network = make(TorchvisionModel, 1, 28, weights="DEFAULT")
    assert network.mean.flatten().tolist() == pytest.approx([0.485, 0.456, 0.406])
    assert network.std.flatten().tolist() == pytest.approx([0.229, 0.224, 0.225])
    torch.testing.assert_close(network.state_dict()["body.features.0.0.weight"], state["features.0.0.weight"])
    assert network(torch.rand(2, 1, 28, 28)).shape == (2, 10)


@pytest.mark.parametrize("kind", [*OWN, TorchvisionModel])
def test_torchvision_is_imported_only_when_a_network_is_made(kind: type[Network]) -> None:
    for statement in ast.parse(inspect.getsource(inspect.getmodule(kind) or kind)).body:
        if isinstance(statement, ast.Import):
            assert not any(name.name.startswith("torchvision") for name in statement.names)
        if isinstance(statement, ast.ImportFrom):
            assert not (statement.module or "").startswith("torchvision")


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
