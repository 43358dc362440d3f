"""Which images each batch holds on each device, and two loaders that do so: from memory, from files."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from src.data.split import Split, seeded
from src.errors import UserError

Batch = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class BatchPlan:
    """Lists of positions, batch after batch, for one of ``world`` devices. Build the Trainer with
    ``use_distributed_sampler=False``: the sharding is here.

    - ``train``: ``batch_size`` is that of all devices together. Every device takes its slice of every
      batch of a permutation seeded by (seed, epoch); all have as many batches of the same size, the ragged
      tail is left out. A set smaller than one batch is one batch.
    - ``val``: device r takes images r, r + world, ...; nothing is padded or dropped.
    - ``test``: whole batches are dealt out, device r takes batches r, r + world, ..., so that a batch holds
      the same images however many devices there are (attacks are seeded by batch). Nothing is padded or
      dropped; a device may get no batch at all.

    Raises:
        UserError: a training batch that the devices cannot share equally.
    """

    kind: Literal["train", "val", "test"]
    count: int  # images in the split
    batch_size: int
    seed: int = 0
    rank: int = 0
    world: int = 1
    epoch: Callable[[], int] = lambda: 0  # asked when a pass begins, so a resumed training sees the order it would have

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise UserError(f"batch_size={self.batch_size}: no batch. Allowed: 1 or more")
        if self.kind != "train":
            return
        if self.batch_size % self.world:
            raise UserError(
                f"batch_size={self.batch_size}: {self.world} devices cannot share it equally."
                f" Allowed: a multiple of {self.world}, since it counts the images of all devices together"
            )
        if self.count < self.world:
            raise UserError(
                f"trainer.devices={self.world}: only {self.count} training image(s). Allowed: no more devices"
            )

    @property
    def _global_batch(self) -> int:
        whole = min(self.batch_size, self.count)
        return whole - whole % self.world

    def __len__(self) -> int:
        if self.kind == "train":
            return self.count // self._global_batch if self.count >= self.batch_size else 1
        if self.kind == "val":
            return -(-len(range(self.rank, self.count, self.world)) // self.batch_size)
        return len(range(self.rank, -(-self.count // self.batch_size), self.world))

    def __iter__(self) -> Iterator[list[int]]:
        if self.kind == "train":
            order = torch.randperm(self.count, generator=seeded("train order", self.seed, self.epoch())).tolist()
            share = self._global_batch // self.world
            for batch in range(len(self)):
                start = batch * self._global_batch + self.rank * share
                yield order[start : start + share]
        elif self.kind == "val":
            mine = range(self.rank, self.count, self.world)
            for start in range(0, len(mine), self.batch_size):
                yield list(mine[start : start + self.batch_size])
        else:
            step = self.batch_size * self.world
            for start in range(self.rank * self.batch_size, self.count, step):
                yield list(range(start, min(start + self.batch_size, self.count)))


class MemoryLoader:
    """Batches sliced from tensors in memory: no worker, no collation, one indexing a batch."""

    def __init__(self, *, split: Split, plan: BatchPlan) -> None:
        self.split = split
        self.plan = plan

    def __len__(self) -> int:
        return len(self.plan)

    def __iter__(self) -> Iterator[Batch]:
        for positions in self.plan:
            yield self.split.batch(positions)


class _Pictures(Dataset[Batch | UserError]):
    """A split as torch's DataLoader wants it; whole batches are asked for at once."""

    def __init__(self, split: Split) -> None:
        self.split = split

    def __getitems__(self, positions: list[int]) -> Batch | UserError:
        try:
            return self.split.batch(positions)
        except UserError as error:  # raised in a worker it would arrive wrapped in that worker's traceback
            return error


def _as_it_is(batch: Any) -> Any:
    return batch


class FileLoader:
    """The same batches from pictures on disk, decoded by ``workers`` processes (0: in this one)."""

    def __init__(self, *, split: Split, plan: BatchPlan, workers: int) -> None:
        self.plan = plan
        self.loader: DataLoader[Batch | UserError] = DataLoader(
            _Pictures(split),
            batch_sampler=plan,
            num_workers=workers,
            collate_fn=_as_it_is,
            persistent_workers=workers > 0,
            generator=torch.Generator(),  # else each pass draws its base seed from the global one
        )

    def __len__(self) -> int:
        return len(self.plan)

    def __iter__(self) -> Iterator[Batch]:
        # A generator: workers start and the epoch is read at the first batch, not at Lightning's iter().
        for batch in self.loader:
            if isinstance(batch, UserError):
                raise batch
            yield batch


Loader = MemoryLoader | FileLoader


def make_loader(split: Split, plan: BatchPlan, *, workers: int) -> Loader:
    """The loader that fits where the pictures of ``split`` are."""
    if isinstance(split.images, Tensor):
        return MemoryLoader(split=split, plan=plan)
    return FileLoader(split=split, plan=plan, workers=workers)
