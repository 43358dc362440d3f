"""torchvision's models as classifiers: heads, frozen features, weights, refusals."""

from __future__ import annotations

import ast
import inspect
from typing import Any
from urllib.error import URLError

import pytest
import torch
from torch import nn

from src.classifiers.network import Network
from src.classifiers.torchvision import TorchvisionModel
from src.errors import UserError
from tests.made_networks import OWN, make


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
