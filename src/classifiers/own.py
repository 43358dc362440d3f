"""A trained classifier of anybody's, as it is."""

from __future__ import annotations

import copy
import hashlib
import importlib
import inspect
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from src.errors import UserError
from src.keys import file_digest


def load(
    *,
    model: str,
    arguments: dict[str, Any] | None = None,
    channels: int,
    size: tuple[int, int],
    num_classes: int,
) -> nn.Module:
    """A network ``(B, C, H, W) in [0, 1] → logits`` that is not trained here.

    Args:
        model: ``package.module:name`` of a module, which is copied, or of a callable that returns one; it normalises
            its input itself. ``torchvision:resnet50`` and ``timm:resnet50`` are those libraries' pretrained models,
            with their normalisation put in front; the images have to have the size they were trained on.
        arguments: what the callable is called with.
        channels: channels of an image.
        size: height and width of an image, in pixels.
        num_classes: number of logits, which it has to have.

    Raises:
        UserError: it cannot be imported or made, is no module, or takes other images or knows other classes.
    """
    source, _, name = model.partition(":")
    if source in ("torchvision", "timm"):
        if arguments:
            raise UserError(f"classifier.arguments={arguments}: {model} takes none. Expected package.module:callable")
        network: Any = _from_torchvision(name) if source == "torchvision" else _from_timm(name)
    else:
        try:
            found = getattr(importlib.import_module(source), name)
            if arguments and isinstance(found, nn.Module):
                raise UserError(f"{model} is made already and takes no arguments; expected a callable")
            # A copy: a defense may train what it gets, and the next job wants the module as it was.
            network = copy.deepcopy(found) if isinstance(found, nn.Module) else found(**(arguments or {}))
        except Exception as error:  # it is someone else's code
            raise UserError(
                f"classifier.model={model}: cannot be loaded ({type(error).__name__}: {' '.join(str(error).split())}). "
                "Expected package.module:name of a module or of a callable that returns one"
            ) from None
    if not isinstance(network, nn.Module):
        raise UserError(f"classifier.model={model}: gives {type(network).__name__}. Expected a torch.nn.Module")
    _try(network, torch.zeros(1, channels, *size), num_classes, f"classifier.model={model}")
    network.is_trained = True  # type: ignore[assignment]
    return network


def _try(network: nn.Module, image: Tensor, num_classes: int, key: str) -> None:
    """One image through it, which leaves it as it was: labels of other classes than its own would mean nothing."""
    training = [module for module in network.modules() if module.training]
    device = next((weight.device for weight in network.parameters()), image.device)
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            logits = network.eval()(image.to(device))
    except Exception as error:  # it is someone else's code
        raise UserError(
            f"{key}: fails on an image of {'x'.join(map(str, image.shape[1:]))} "
            f"({type(error).__name__}: {' '.join(str(error).split())}). Expected a model for images of this dataset"
        ) from None
    finally:
        for module in training:
            module.training = True
    shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
    if shape != (1, num_classes):
        raise UserError(
            f"{key}: gives {shape} for an image. Expected logits (1, {num_classes}): one for each class of the "
            "dataset, in its order"
        )


def digest(network: nn.Module, model: str = "") -> str:
    """Of the weights and of the files that its modules' classes stand in, and that ``model`` names.

    Code in further files, which those import, does not count.
    """
    total = hashlib.blake2b(repr(type(network)).encode(), digest_size=8)
    for name, value in sorted(network.state_dict().items()):
        total.update(name.encode())
        total.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    for file in sorted(_files(network, model)):
        total.update(file_digest(Path(file)).encode())
    return total.hexdigest()


def _files(network: nn.Module, model: str) -> set[str]:
    source = sys.modules.get(model.partition(":")[0])
    files = {getattr(source, "__file__", None)}
    for kind in {type(module) for module in network.modules()}:
        with suppress(TypeError, OSError):  # typed in by hand, or generated: it stands in no file
            files.add(inspect.getsourcefile(kind))
    return {file for file in files if file is not None and Path(file).is_file()}


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
