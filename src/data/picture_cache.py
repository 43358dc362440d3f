"""What an earlier run worked out from the same pictures, kept in files that are whole or not there."""

from __future__ import annotations

import json
import logging
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch import Tensor

from src import records

_log = logging.getLogger(__name__)


def cached_images(path: Path | None, make: Callable[[], Tensor]) -> Tensor:
    """The array in ``path``, or what ``make`` returns, then kept there. A damaged file is made again."""
    if path is not None and path.exists():
        try:
            with open(path, "rb") as file:
                array = np.load(file, allow_pickle=False)
                intact = file.read() == _checksum(array)
            if intact and array.ndim == 4 and array.dtype == np.uint8:
                return torch.from_numpy(array)
            raise ValueError("checksum differs")
        except (OSError, ValueError, EOFError, MemoryError) as error:
            _log.warning("%s is damaged (%s): decoding the pictures again", path, error)
    images = make()

    def write(file: IO[bytes]) -> None:
        array = images.numpy()
        np.save(file, array, allow_pickle=False)
        file.write(_checksum(array))

    _keep(path, write)
    return images


def cached_text(path: Path | None, make: Callable[[], str]) -> str:
    """As :func:`cached_images`, for one string."""
    if path is not None and path.exists():
        try:
            content = json.loads(path.read_bytes())["content"]
            if isinstance(content, str):
                return content
            raise ValueError("not a text")
        except (OSError, ValueError, KeyError, TypeError) as error:
            _log.warning("%s is damaged (%s): reading the pictures again", path, error)
    content = make()
    _keep(path, lambda file: file.write(json.dumps({"content": content}).encode()))
    return content


def _checksum(array: np.ndarray) -> bytes:
    return zlib.crc32(array.data).to_bytes(4, "big")


def _keep(path: Path | None, write: Callable[[IO[bytes]], object]) -> None:
    """A cache that cannot be written costs time, not the run."""
    if path is None:
        return
    try:
        with records.whole(path) as file:
            write(file)
    except OSError as error:
        _log.warning("%s cannot be written (%s): the next run decodes the pictures again", path, error.strerror)
