"""A labelled set of pictures: divided, checked, fingerprinted. All randomness is local and seeded by name."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from src.errors import UserError


class ImageSource(ABC):
    """Pictures that stay on disk and are decoded when read."""

    @abstractmethod
    def __len__(self) -> int:
        """Number of pictures."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int, int]:
        """``(C, H, W)`` of every picture."""

    @abstractmethod
    def take(self, positions: Tensor | slice) -> ImageSource:
        """The pictures at these positions, in this order, still on disk."""

    @abstractmethod
    def read(self, positions: Sequence[int]) -> Tensor:
        """Decode: uint8 ``(len(positions), C, H, W)``."""

    @abstractmethod
    def digest(self) -> bytes:
        """A hash of the content, not of where it lies."""


@dataclass(frozen=True, kw_only=True)
class Split:
    """Pictures and their classes.

    Attributes:
        images: uint8 ``(N, C, H, W)`` in memory, or a source that reads them from disk.
        labels: int64 ``(N,)``, class numbers from 0.
    """

    images: Tensor | ImageSource
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(C, H, W)`` of one picture."""
        if isinstance(self.images, ImageSource):
            return self.images.shape
        _, channels, height, width = self.images.shape
        return channels, height, width

    def take(self, positions: Tensor | slice) -> Split:
        """The examples at these positions, int64 ``(M,)``, in this order; a slice copies nothing."""
        images = self.images
        chosen = images.take(positions) if isinstance(images, ImageSource) else images[positions]
        return Split(images=chosen, labels=self.labels[positions])

    def batch(self, positions: Sequence[int]) -> dict[str, Tensor]:
        """``image`` uint8 ``(B, C, H, W)``; ``label`` and ``index`` (position here) int64 ``(B,)``."""
        index = torch.tensor(positions, dtype=torch.int64)
        images = self.images
        chosen = images.read(positions) if isinstance(images, ImageSource) else images[index]
        return {"image": chosen, "label": self.labels[index], "index": index}


def seeded(*parts: object) -> torch.Generator:
    """A CPU generator of its own for this purpose: the global one is neither used nor moved."""
    return torch.Generator().manual_seed(seed_from(*parts))


def seed_from(*parts: object) -> int:
    """63 bits from a purpose and numbers: seeds 0 and 1, or epochs 0 and 1, have nothing in common."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big") >> 1


def fixed_order(count: int) -> Tensor:
    """The order of every test split, int64 ``(count,)``: one shuffle for all seeds.

    So the first k images are the same k whatever the seed, and a set stored class by class is mixed.
    """
    return torch.randperm(count, generator=seeded("test order"))


def stratified_order(labels: Tensor, generator: torch.Generator) -> Tensor:
    """A shuffle, int64 ``(N,)``, of which every beginning has nearly the class shares of the whole."""
    grouped, rank, counts = _ranks(labels, generator)
    share = (rank + torch.rand(len(labels), generator=generator, dtype=torch.float64)) / counts[labels[grouped]]
    return grouped[share.argsort(stable=True)]


def hold_out(
    labels: Tensor, fraction: float, generator: torch.Generator, *, classes: Sequence[str], key: str
) -> tuple[Tensor, Tensor]:
    """Positions kept and positions held out, each shuffled; of every class its share, at least one image.

    Raises:
        UserError: a class would be left with no image to keep; the message starts with ``key``.
    """
    grouped, rank, counts = _ranks(labels, generator)
    share = counts.double() * fraction
    quota = share.long()
    missing = round(len(labels) * fraction) - int(quota.sum())  # largest remainders, so that the total is exact
    quota[(share - quota).argsort(descending=True, stable=True)[:missing]] += 1
    quota = quota.clamp_min(1)
    if empty := ((quota >= counts) & (counts > 0)).nonzero().flatten().tolist():
        raise UserError(
            f"{key}={fraction}: takes all {int(counts[empty[0]])} image(s) of class '{classes[empty[0]]}'."
            " Allowed: a fraction that leaves each class at least one, or add images"
        )
    held = rank < quota[labels[grouped]]
    kept_positions, held_positions = grouped[~held], grouped[held]
    return (
        kept_positions[torch.randperm(len(kept_positions), generator=generator)],
        held_positions[torch.randperm(len(held_positions), generator=generator)],
    )


def _ranks(labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Positions grouped by class and shuffled within, each one's rank in its class, images per class."""
    shuffled = torch.randperm(len(labels), generator=generator)
    by_class, order = labels[shuffled].sort(stable=True)
    counts = torch.bincount(labels)
    starts = counts.cumsum(0) - counts
    return shuffled[order], torch.arange(len(labels)) - starts[by_class], counts


def check_split(split: Split, *, classes: Sequence[str], where: str, least: int) -> None:
    """Refuse labels that fit no class, one class only, and fewer than ``least`` images in a class.

    Args:
        split: what to look at.
        classes: names, by number.
        where: key and value that the message starts with, such as ``dataset.root=data``.
        least: images every class must have.

    Raises:
        UserError: naming the class and what is missing.
    """
    if len(classes) < 2:
        raise UserError(f"{where}: only one class ({', '.join(classes)}). Allowed: two or more")
    if len(split) == 0:
        raise UserError(f"{where}: no images. Allowed: at least one")
    low, high = int(split.labels.min()), int(split.labels.max())
    if low < 0 or high >= len(classes):
        raise UserError(f"{where}: labels from {low} to {high}. Allowed: 0 to {len(classes) - 1}, one for each class")
    counts = torch.bincount(split.labels, minlength=len(classes)).tolist()
    for name, count in zip(classes, counts, strict=True):
        if count < least:
            raise UserError(
                f"{where}: class '{name}' has {count} image(s)."
                f" Allowed: at least {least} (one to train on, one to validate with)"
            )


def fingerprint(splits: Sequence[Split], *parameters: object) -> str:
    """Hex hash of content: pixels, labels and whatever else decides what is trained on; never a path.

    184 MB of CIFAR-10 take about 0.3 s.
    """
    total = hashlib.blake2b(repr(parameters).encode(), digest_size=16)
    for split in splits:
        images = split.images
        total.update(repr((len(split), split.shape)).encode())
        if isinstance(images, ImageSource):
            total.update(images.digest())
        else:
            total.update(images.contiguous().numpy().data)
        total.update(split.labels.contiguous().numpy().data)
    return total.hexdigest()
