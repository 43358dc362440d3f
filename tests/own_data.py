"""Small data sets on disk, and data modules as one process of several sees them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from src.data.base import ImageDataModule
from src.errors import UserError


def draw(path: Path, *, seed: int, size: tuple[int, int] = (8, 8), mode: str = "RGB") -> None:
    """A PNG of noise; ``size`` is (width, height)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (size[1], size[0], 3) if mode == "RGB" else (size[1], size[0])
    pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def as_rank(module: ImageDataModule, rank: int, world: int, epoch: int = 0, training: bool = True) -> None:
    module.trainer = SimpleNamespace(  # type: ignore[assignment]
        global_rank=rank, world_size=world, current_epoch=epoch, training=training
    )


def prepared(module: ImageDataModule) -> ImageDataModule:
    module.prepare()
    return module


def read_all(module: ImageDataModule) -> None:
    module.prepare()
    for loader in (module.train_dataloader(), module.val_dataloader(), module.test_dataloader()):
        assert len(list(loader)) == len(loader)


def refused(module: ImageDataModule, *parts: str) -> None:
    with pytest.raises(UserError) as caught:
        read_all(module)
    message = str(caught.value)
    assert len(message.splitlines()) == 1, message
    for part in parts:
        assert part in message, message
