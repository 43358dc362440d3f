"""Folders of picture files: list them, decode them all with threads, or one by one when asked for."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from src.data.split import ImageSource
from src.errors import UserError

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".ppm", ".pgm", ".bmp", ".tif", ".tiff", ".webp"})
_FORMAT = 1  # of the files in the cache: raise it when decoding or layout changes
_CHUNK = 128  # pictures a thread takes at once


class Entry(NamedTuple):
    """A picture file."""

    path: str  # relative to the root
    size: int  # bytes
    mtime_ns: int


class NotGreyError(Exception):
    """A coloured picture in a set that looked grey: decode again with three channels."""


def scan(root: Path, part: str, *, where: str) -> dict[str, list[Entry]]:
    """Pictures by class = folder under ``root/part``; hidden files and other kinds of file are left out.

    Raises:
        UserError: no such folder, or no pictures in it.
    """
    folder = root / part
    try:
        names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and entry.name[0] != ".")
        found = {name: _walk(folder / name, f"{part}/{name}".lstrip("/")) for name in names}
    except OSError as error:
        raise UserError(f"{where}: cannot read {part or 'it'} ({error.strerror}). Allowed: a readable folder") from None
    if not any(found.values()):
        raise UserError(
            f"{where}: no images{f' in {part}/' if part else ''}."
            f" Allowed: one folder per class with {', '.join(sorted(SUFFIXES))} files"
        )
    return found


def _walk(folder: Path, prefix: str) -> list[Entry]:
    found: list[Entry] = []
    for entry in os.scandir(folder):
        name = entry.name
        if name[0] == ".":
            continue
        if entry.is_dir():
            found += _walk(folder / name, f"{prefix}/{name}")
        elif f".{name.rpartition('.')[2].lower()}" in SUFFIXES:
            status = entry.stat()
            found.append(Entry(f"{prefix}/{name}", status.st_size, status.st_mtime_ns))
    return sorted(found)


def listing_key(root: Path, entries: Sequence[Entry], resize: int | None) -> str:
    """Name of a cached file: changes when a picture is added, removed, renamed or written again.

    The folder counts: copies of it with changed pixels may keep names, sizes and times.
    """
    text = "\n".join(f"{entry.path}\t{entry.size}\t{entry.mtime_ns}" for entry in entries)
    return hashlib.blake2b(f"{_FORMAT} {resize} {root.resolve()}\n{text}".encode(), digest_size=16).hexdigest()


class PictureFiles(ImageSource):
    """Pictures that are decoded when read. Holds names only, so a copy in each worker costs little.

    Args:
        root: folder the names are relative to.
        names: all files of the folder.
        positions: int64, which of them these are.
        shape: ``(C, H, W)`` after decoding.
        resize: side to resize and crop to, or None.
        content: digest of all files (:func:`survey`).
        where: key and value for messages.
    """

    def __init__(
        self, *, root: Path, names: Sequence[str], positions: Tensor, shape: tuple[int, int, int],
        resize: int | None, content: str, where: str,
    ) -> None:  # fmt: skip
        self.root, self.names, self.positions = root, names, positions
        self._shape, self.resize, self.content, self.where = shape, resize, content, where

    def __len__(self) -> int:
        return len(self.positions)

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(C, H, W)``."""
        return self._shape

    def take(self, positions: Tensor | slice) -> PictureFiles:
        """A selection, still on disk."""
        return PictureFiles(
            root=self.root, names=self.names, positions=self.positions[positions], shape=self._shape,
            resize=self.resize, content=self.content, where=self.where,
        )  # fmt: skip

    def read(self, positions: Sequence[int]) -> Tensor:
        """Decode these, uint8 ``(len(positions), C, H, W)``."""
        chosen = [self.names[i] for i in self.positions[torch.tensor(positions, dtype=torch.int64)].tolist()]
        images = np.empty((len(chosen), *self._shape), dtype=np.uint8)
        for image, name in zip(images, chosen, strict=True):
            image[:] = decode(self.root, name, shape=self._shape, resize=self.resize, where=self.where)
        return torch.from_numpy(images)

    def digest(self) -> bytes:
        """Over the files' bytes and the selection: other files with the same pixels are other content."""
        return hashlib.blake2b(self.content.encode() + self.positions.numpy().tobytes()).digest()


def probe(root: Path, name: str, *, where: str) -> tuple[int, int, int]:
    """``(C, H, W)`` from the header of one picture."""
    with _opened(root, name, where) as image:
        return (1 if image.mode in ("1", "L") else 3), image.height, image.width


def decode(root: Path, name: str, *, shape: tuple[int, int, int], resize: int | None, where: str) -> np.ndarray:
    """One picture as uint8 ``(C, H, W)``; with ``resize`` its shorter side is scaled and the middle kept.

    Raises:
        UserError: not a readable 8-bit picture, or of another size; names the file.
        NotGreyError: one channel asked for, and it is coloured.
    """
    channels, height, width = shape
    with _opened(root, name, where) as image:
        if resize is None:
            _check_size(name, image.size, (width, height), where)
        if channels == 1 and image.mode not in ("1", "L"):
            raise NotGreyError
        plain = image.convert("L" if channels == 1 else "RGB")
        if resize is not None:
            from PIL import Image, ImageOps

            plain = ImageOps.fit(plain, (width, height), method=Image.Resampling.BILINEAR)
        pixels = np.asarray(plain)
        return pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)


def decode_all(
    root: Path, entries: Sequence[Entry], *, shape: tuple[int, int, int], resize: int | None, where: str
) -> Tensor:
    """All pictures in order, uint8 ``(N, C, H, W)``. The decoders release the GIL, so threads suffice."""
    images = np.empty((len(entries), *shape), dtype=np.uint8)

    def work(start: int) -> None:
        for i in range(start, min(start + _CHUNK, len(entries))):
            images[i] = decode(root, entries[i].path, shape=shape, resize=resize, where=where)

    _in_threads(work, len(entries))
    return torch.from_numpy(images)


def survey(root: Path, entries: Sequence[Entry], *, shape: tuple[int, int, int], resize: int | None, where: str) -> str:
    """Read every file once without decoding: sizes and colours are checked, the bytes hashed; the hash.

    Raises:
        UserError: not a picture, or of another size; names the file.
        NotGreyError: one channel asked for, and one is coloured.
    """
    digests = [b""] * len(entries)

    def work(start: int) -> None:
        for i in range(start, min(start + _CHUNK, len(entries))):
            name = entries[i].path
            channels, height, width = probe(root, name, where=where)
            if resize is None:
                _check_size(name, (width, height), (shape[2], shape[1]), where)
            if channels > shape[0]:
                raise NotGreyError
            digests[i] = hashlib.blake2b((root / name).read_bytes(), digest_size=16).digest()

    _in_threads(work, len(entries))
    return hashlib.blake2b(b"".join(digests), digest_size=16).hexdigest()


def _in_threads(work: Callable[[int], None], count: int) -> None:
    pool = ThreadPoolExecutor(max_workers=os.cpu_count())
    try:
        list(pool.map(work, range(0, count, _CHUNK)))
    finally:  # the first bad file ends it, not the last
        pool.shutdown(cancel_futures=True)


@contextmanager
def _opened(root: Path, name: str, where: str) -> Iterator[Any]:
    """Open a picture; whatever goes wrong while it is open becomes one line that names the file."""
    from PIL import Image

    try:
        with Image.open(root / name) as image:
            if image.mode[0] in "IF":
                raise UserError(f"{where}: {name} has more than 8 bits a channel. Allowed: 8-bit pictures")
            yield image
    except (UserError, NotGreyError):
        raise
    except Exception as error:  # decoders raise anything: OSError, SyntaxError, ValueError, struct.error
        first = (str(error) or type(error).__name__).splitlines()[0].replace(str(root / name), name)
        raise UserError(f"{where}: {name} is not a readable picture ({first}). Mend or remove it") from None


def _check_size(name: str, found: tuple[int, int], expected: tuple[int, int], where: str) -> None:
    if found != expected:
        raise UserError(
            f"{where}: {name} is {found[0]}x{found[1]} pixels, the first picture {expected[0]}x{expected[1]}."
            " Allowed: one size, or set dataset.size to resize them all"
        )
