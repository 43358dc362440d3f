"""A trained classifier of anybody's, as it is."""

from __future__ import annotations

import copy
import hashlib
import importlib
import inspect
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from src.errors import UserError
from src.keys import file_digest


def load(*, model: str) -> nn.Module:
    """A network ``(B, C, H, W) in [0, 1] → logits`` that is not trained here.

    Args:
        model: ``package.module:name`` of a module, which is copied, or of a callable without arguments that returns
            one; it normalises its input itself. ``torchvision:resnet50`` and ``timm:resnet50`` are those libraries'
            pretrained models, with their normalisation put in front; the images have to have the size they were
            trained on.

    Raises:
        UserError: it cannot be imported or made, or is no module.
    """
    source, _, name = model.partition(":")
    if source in ("torchvision", "timm"):
        network: Any = _from_torchvision(name) if source == "torchvision" else _from_timm(name)
    else:
        try:
            found = getattr(importlib.import_module(source), name)
            # A copy: a defense may train what it gets, and the next job wants the module as it was.
            network = copy.deepcopy(found) if isinstance(found, nn.Module) else found()
        except Exception as error:  # it is someone else's code
            raise UserError(
                f"classifier.model={model}: cannot be loaded ({type(error).__name__}: {' '.join(str(error).split())}). "
                "Expected package.module:name of a module or of a callable that returns one"
            ) from None
    if not isinstance(network, nn.Module):
        raise UserError(f"classifier.model={model}: gives {type(network).__name__}. Expected a torch.nn.Module")
    network.is_trained = True  # type: ignore[assignment]
    return network


def digest(network: nn.Module) -> str:
    """Of the weights, and of the file that the network's class stands in."""
    total = hashlib.blake2b(repr(type(network)).encode(), digest_size=8)
    for name, value in sorted(network.state_dict().items()):
        total.update(name.encode())
        total.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    file = inspect.getsourcefile(type(network))
    if file is not None and Path(file).is_file():
        total.update(file_digest(Path(file)).encode())
    return total.hexdigest()


class Normalised(nn.Module):
    """A network behind the mean and the spread that it was trained with; grey images are repeated three times."""

    mean: Tensor
    std: Tensor

    def __init__(self, body: nn.Module, mean: Any, std: Any) -> None:
        super().__init__()
        self.body = body
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        return self.body((images.expand(-1, len(self.mean), -1, -1) - self.mean) / self.std)


def _from_torchvision(name: str) -> nn.Module:
    from src.classifiers.torchvision import build, find_weights

    trained = find_weights(name, "DEFAULT")
    preset = trained.transforms()
    return Normalised(build(name, trained), preset.mean, preset.std)


def _from_timm(name: str) -> nn.Module:
    try:
        import timm  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        raise UserError(f"classifier.model=timm:{name}: timm is not installed; pip install timm") from None
    try:
        body = timm.create_model(name, pretrained=True)
    except Exception as error:
        raise UserError(f"classifier.model=timm:{name}: {' '.join(str(error).split())}") from None
    facts = body.pretrained_cfg
    return Normalised(body, facts["mean"], facts["std"])
