"""What an attack is given: images, labels and targets that make sense, or one line that says what does not."""

from __future__ import annotations

import torch
from torch import Tensor

from src.errors import UserError


def check(images: Tensor, labels: Tensor) -> None:
    """Refuse what is not ``(B, C, H, W)`` float32 in [0, 1], or labels that are not ``(B,)`` int64, 0 or more."""
    if images.ndim != 4 or images.dtype != torch.float32:
        raise UserError(f"images are {tuple(images.shape)} {images.dtype}; expected (B, C, H, W) float32 in [0, 1]")
    if labels.shape != images.shape[:1] or labels.dtype != torch.int64:
        raise UserError(f"labels are {tuple(labels.shape)} {labels.dtype}; expected ({len(images)},) int64")
    if images.numel() and not (images.min() >= 0 and images.max() <= 1):
        raise UserError(
            f"images range from {images.min():.4g} to {images.max():.4g}; expected [0, 1]: "
            "put the normalisation inside the model"
        )
    if labels.numel() and int(labels.min()) < 0:
        raise UserError(f"labels go down to {int(labels.min())}; expected 0 or more")


def targets(labels: Tensor, classes: int, generator: torch.Generator, given: Tensor | None) -> Tensor:
    """Wanted classes ``(B,)``: the given ones, checked, or drawn among the wrong ones."""
    if classes < 2:
        raise UserError("a targeted attack needs a model with at least two classes")
    if given is None:
        shift = torch.randint(1, classes, labels.shape, generator=generator).to(labels.device)
        return (labels + shift) % classes
    if given.shape != labels.shape or given.dtype != torch.int64:
        raise UserError(f"target is {tuple(given.shape)} {given.dtype}; expected {tuple(labels.shape)} int64")
    if given.numel() and not (int(given.min()) >= 0 and int(given.max()) < classes):
        raise UserError(
            f"target goes from {int(given.min())} to {int(given.max())}, but the model has {classes} classes"
        )
    if bool((given == labels).any()):
        raise UserError("target equals the label of an image: a targeted attack needs a wrong class")
    return given
