"""Any classification model of torchvision, by name."""

from __future__ import annotations

import difflib
import pickle
from collections.abc import Sequence
from http.client import HTTPException
from typing import Annotated, Any, Self

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch.func import functional_call

from src.classifiers.network import Network
from src.errors import UserError


class TorchvisionModel(Network):
    """A model of https://docs.pytorch.org/vision/stable/models.html#classification under a new last layer.

    Images are resized inside (bilinear with antialiasing, differentiable, to a square whatever their shape)
    and a single channel is repeated three times, so that any dataset fits and eps keeps its unit: pixels of
    the dataset. Auxiliary heads (Inception, GoogLeNet) are removed.

    Args:
        model: torchvision's name, as ``alexnet``, ``resnet50``, ``vgg16``, ``vit_b_16``.
        weights: None for random weights; ``DEFAULT`` or a name as ``IMAGENET1K_V1`` for trained ones,
            downloaded once into PyTorch's cache. With weights, pixels are normalised by the weights' own mean
            and std (those of ImageNet) in place of the dataset's.
        freeze: only the new last layer trains. The rest gets no gradient for its weights and stays in eval
            mode (batch norm, dropout) even after ``.train()``; gradients to the image still pass.
        resize: height and width the model sees, in pixels.

    ``channels`` is 1 or 3. The other arguments, shapes and ranges are those of :class:`Network`.

    Raises:
        UserError: unknown model (with close matches) or weights, weights that cannot be downloaded or read, a
            size the model does not take, images of other than 1 or 3 channels.

    Example:
        >>> spec = {"channels": 3, "size": (32, 32), "num_classes": 10, "mean": [0.5] * 3, "std": [0.25] * 3}
        >>> network = TorchvisionModel(**spec, model="vgg16", weights="DEFAULT", freeze=True)
    """

    def __init__(
        self,
        *,
        channels: int,
        size: tuple[int, int],
        num_classes: int,
        mean: Sequence[float],
        std: Sequence[float],
        model: str,
        weights: str | None = None,
        freeze: bool = False,
        resize: Annotated[int, Field(ge=32)] = 224,
    ) -> None:
        if channels not in (1, 3):
            raise UserError(
                f"classifier=torchvision takes images of 1 or 3 channels, this dataset has {channels}: "
                "use classifier=cnn6"
            )
        trained = find_weights(model, weights)
        body = build(model, trained)
        if trained is not None:
            preset = trained.transforms()
            mean, std = preset.mean, preset.std
        else:
            mean, std = [*mean] * (3 // channels), [*std] * (3 // channels)
        super().__init__(channels=3, size=size, num_classes=num_classes, mean=mean, std=std)
        self.freeze = freeze
        self.resize = resize
        width = cut_head(body)
        try:  # on the meta device: shapes only, nothing is computed
            state = {name: tensor.to("meta") for name, tensor in body.state_dict().items()}
            seen = functional_call(body.eval(), state, torch.empty(1, 3, resize, resize, device="meta"))
        except (AssertionError, RuntimeError, ValueError):
            best = trained.transforms().crop_size[0] if trained is not None else 224
            raise UserError(
                f"classifier.resize={resize}: {model} does not take images of this size. Use {best}"
            ) from None
        assert seen.shape == (1, width), f"{model}: the layer before the last one gives {tuple(seen.shape)}"
        self.body = body.requires_grad_(not freeze)
        self.head = nn.Linear(width, num_classes)
        self.train()

    def train(self, mode: bool = True) -> Self:
        """As usual, but a frozen body stays in eval mode."""
        super().train(mode)
        if self.freeze:
            self.body.eval()
        return self

    def features(self, images: Tensor) -> Tensor:
        """What the model's own last layer saw: ``(B, D)``."""
        images = images.expand(-1, 3, -1, -1)
        target = (self.resize, self.resize)
        if images.shape[-2:] != target:
            images = F.interpolate(images, target, mode="bilinear", align_corners=False, antialias=True)
        return self.body(self.normalise(images))


def find_weights(model: str, weights: str | None) -> Any:
    """torchvision's entry for the weights of a model, or None for random ones."""
    from torchvision import models  # here: it costs seconds

    names = models.list_models(module=models)
    if model not in names:
        raise UserError(
            f"classifier.model={model}: not a classification model of torchvision. "
            f"Closest: {closest(model, names) or 'none; common ones are alexnet, resnet50, vgg16'}"
        )
    if weights is None:
        return None
    known = models.get_model_weights(model)
    if weights not in known.__members__:
        raise UserError(
            f"classifier.weights={weights}: {model} has no such weights. "
            f"Allowed: null, DEFAULT, {', '.join(entry.name for entry in known)}"
        )
    return known[weights]


def closest(name: str, names: Sequence[str]) -> str:
    """Up to three names like this one."""
    return ", ".join(difflib.get_close_matches(name.lower(), names, n=3))


def build(model: str, trained: Any) -> nn.Module:
    """The model as torchvision makes it, without auxiliary heads."""
    from torchvision import models

    # These two warn, and draw their first weights by a minute of scipy, unless told not to.
    quick = {"init_weights": False} if model in ("googlenet", "inception_v3") else {}
    try:
        body: nn.Module = models.get_model(model, weights=trained, **quick)
    except (OSError, HTTPException, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        if trained is None:
            raise
        reason = " ".join(str(error).split())
        raise UserError(
            f"classifier.weights={trained.name}: cannot get {trained.url} ({reason}). "
            f"Use classifier.weights=null, or put the file into {torch.hub.get_dir()}/checkpoints"
        ) from None
    if hasattr(body, "aux_logits"):
        for name, value in (("aux_logits", False), ("aux1", None), ("aux2", None), ("AuxLogits", None)):
            if hasattr(body, name):
                setattr(body, name, value)
    return body


def cut_head(body: nn.Module) -> int:
    """Take the last linear layer out of a model and return the width of its input.

    SqueezeNet has none and ends in a 1x1 convolution, a ReLU and a mean over positions: there the convolution
    goes, and what is left is the mean of the maps it saw.
    """
    for kind, width in ((nn.Linear, "in_features"), (nn.Conv2d, "in_channels")):
        found = [(name, layer) for name, layer in body.named_modules() if isinstance(layer, kind)]
        if found:
            name, layer = found[-1]
            parent, _, child = name.rpartition(".")
            setattr(body.get_submodule(parent), child, nn.Identity())
            return int(getattr(layer, width))
    raise ValueError(f"{type(body).__name__} has neither a linear layer nor a convolution")
