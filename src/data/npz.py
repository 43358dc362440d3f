"""Any dataset as NumPy arrays in one file: x_train, y_train, x_test, y_test."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import torch
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt

from src.data.augment import Augment
from src.data.base import (
    DataSpec,
    Fraction,
    ImageDataModule,
    Split,
    channel_statistics,
    default_augment,
    default_eps,
)
from src.errors import UserError

_ARRAYS = ("x_train", "y_train", "x_test", "y_test")


class NPZ(ImageDataModule):
    """Images ``(N, H, W)``, ``(N, H, W, C)`` or ``(N, C, H, W)`` with C 1 or 3, labels ``(N,)`` from 0.

    Images are uint8, or floats in [0, 1], which are rounded to the 256 levels of uint8. ``root`` is the file
    or a folder that holds just one such file. Nothing pickled is ever read. Other arguments as in
    :class:`ImageDataModule`.

    Args:
        memory_limit_gib: GiB of arrays; a larger file is refused, since it cannot be read in pieces.
    """

    def __init__(
        self,
        *,
        root: str | None = None,
        validation: Fraction = 0.1,
        seed: NonNegativeInt = 0,
        limit_train: PositiveInt | None = None,
        limit_test: PositiveInt | None = None,
        augmentation: Augment | None = None,
        memory_limit_gib: PositiveFloat = 2.0,
    ) -> None:
        super().__init__(
            root=root, validation=validation, seed=seed, limit_train=limit_train, limit_test=limit_test,
            augmentation=augmentation,
        )  # fmt: skip
        self.memory_limit_gib = memory_limit_gib

    def load(self) -> tuple[DataSpec, Split, Split]:
        """Read and convert.

        Raises:
            UserError: no file, arrays missing or of the wrong shape, type or range, NaN.
        """
        path = self._file()
        arrays = self._arrays(path)
        splits = [self._split(part, arrays[f"x_{part}"], arrays[f"y_{part}"]) for part in ("train", "test")]
        train, test = splits
        if train.shape != test.shape:
            raise UserError(
                f"{self.where}: x_test holds images {test.shape}, x_train {train.shape} (C, H, W)."
                " Allowed: one shape for both"
            )
        assert isinstance(train.images, torch.Tensor)
        mean, std = channel_statistics(train.images)
        channels, height, width = train.shape
        spec = DataSpec(
            name=path.stem,
            classes=tuple(str(number) for number in range(int(train.labels.max()) + 1)),
            channels=channels,
            size=(height, width),
            eps=default_eps(channels),
            augment=default_augment(channels),
            mean=mean,
            std=std,
        )
        return spec, train, test

    def _file(self) -> Path:
        if self.root is None:
            raise UserError("dataset.root is needed: an .npz file with the arrays x_train, y_train, x_test, y_test")
        path = Path(self.root).expanduser()
        if path.is_dir():
            inside = sorted(path.glob("*.npz"))
            if len(inside) != 1:
                raise UserError(f"{self.where}: has {len(inside)} .npz files. Allowed: a file, or a folder with one")
            return inside[0]
        if not path.is_file():
            raise UserError(f"{self.where}: no such file. Allowed: an .npz file with {', '.join(_ARRAYS)}")
        return path

    def _arrays(self, path: Path) -> dict[str, np.ndarray]:
        try:
            with zipfile.ZipFile(path) as archive:
                needed = sum(item.file_size for item in archive.infolist()) / 2**30
            if needed > self.memory_limit_gib:
                raise UserError(
                    f"dataset.memory_limit_gib={self.memory_limit_gib}: {path.name} takes {needed:.1f} GiB."
                    " Allowed: raise the limit, or store the pictures as files and use dataset=image_folder"
                )
            with np.load(path, allow_pickle=False) as stored:
                if missing := [name for name in _ARRAYS if name not in stored.files]:
                    raise UserError(f"{self.where}: array {missing[0]} is missing. Allowed: {', '.join(_ARRAYS)}")
                return {name: stored[name] for name in _ARRAYS}
        except UserError:
            raise
        except Exception as error:  # a damaged archive fails anywhere in zip, zlib or the array header
            first = (str(error) or type(error).__name__).splitlines()[0]
            raise UserError(f"{self.where}: not a readable .npz of plain arrays ({first})") from None

    def _split(self, part: str, images: np.ndarray, labels: np.ndarray) -> Split:
        """Checked and converted: uint8 ``(N, C, H, W)`` and int64 ``(N,)``."""
        if labels.shape != images.shape[:1] or labels.dtype.kind not in "iu":
            raise UserError(
                f"{self.where}: y_{part} is {labels.dtype}{labels.shape} for x_{part} {images.shape}."
                f" Allowed: whole numbers ({len(images) if images.ndim else 0},), one for each image"
            )
        if len(images) == 0:
            raise UserError(f"{self.where}: x_{part} holds no images. Allowed: at least one")
        if images.ndim == 3:
            images = images[:, None]
        elif images.ndim == 4 and images.shape[1] not in (1, 3) and images.shape[3] in (1, 3):
            images = images.transpose(0, 3, 1, 2)
        if images.ndim != 4 or images.shape[1] not in (1, 3) or 0 in images.shape:
            raise UserError(
                f"{self.where}: x_{part} has shape {images.shape}."
                " Allowed: (N, H, W), (N, H, W, C) or (N, C, H, W) with C 1 or 3"
            )
        return Split(
            images=torch.from_numpy(self._to_uint8(part, images)),
            labels=torch.from_numpy(labels.astype(np.int64)),
        )

    def _to_uint8(self, part: str, images: np.ndarray) -> np.ndarray:
        if images.dtype.kind == "f":
            low, high = float(images.min()), float(images.max())
            if np.isnan(low):  # min of an array with a NaN is NaN
                raise UserError(f"{self.where}: x_{part} contains NaN. Allowed: uint8, or floats in [0, 1]")
            if low < 0 or high > 1:
                raise UserError(
                    f"{self.where}: x_{part} has values from {low:g} to {high:g}. Allowed: uint8, or floats in [0, 1]"
                )
            images = np.rint(images * np.float32(255)).astype(np.uint8)
        elif images.dtype != np.uint8:
            raise UserError(f"{self.where}: x_{part} is {images.dtype}. Allowed: uint8 0..255, or floats in [0, 1]")
        return np.ascontiguousarray(images)
