"""Backward passes of what has no useful gradient."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

ImageMap = Callable[[Tensor], Tensor]


def bpda(value: ImageMap, stand_in: ImageMap) -> ImageMap:
    """``value`` forwards, the gradient of ``stand_in`` backwards.

    Paper: Athalye, Carlini, Wagner 2018, "Obfuscated Gradients Give a False Sense of Security",
    https://arxiv.org/abs/1802.00420, section 4.1
    """

    return partial(_replaced, value=value, stand_in=stand_in)


def _replaced(images: Tensor, *, value: ImageMap, stand_in: ImageMap) -> Tensor:
    before = _random_state(images.device)
    with torch.no_grad():
        true = value(images)
    if not torch.is_grad_enabled():
        return true
    with torch.random.fork_rng(devices=[images.device] if images.is_cuda else []):
        _random_state(images.device, before)  # where both draw, the gradient is to be of the draw that answers
        smooth = stand_in(images)
    return smooth + (true - smooth).detach()


def _random_state(device: torch.device, state: list[Tensor] | None = None) -> list[Tensor]:
    """The global random state of the CPU and of a GPU; set first, where one is given."""
    if state is not None:
        torch.set_rng_state(state[0])
        if device.type == "cuda":
            torch.cuda.set_rng_state(state[1], device)
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]
