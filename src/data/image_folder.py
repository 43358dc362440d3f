"""Pictures in one folder per class: DIR/train/cat/1.png and DIR/test/cat/2.png, or DIR/cat/1.png."""

from __future__ import annotations

from pathlib import Path

import torch
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt

from src.data import picture_cache, pictures
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
from src.data.split import ImageSource, hold_out, seeded
from src.errors import UserError

# Names, in any case, that parts of a set go by and classes hardly ever.
_PARTS = {"train", "training", "test", "testing", "val", "valid", "validation"}
_SAMPLED = 512  # pictures that mean and std of a set on disk are taken from


class ImageFolder(ImageDataModule):
    """What torchvision's ImageFolder reads; the other arguments as in :class:`ImageDataModule`.

    Args:
        root: folder with ``train/`` and ``test/``, or with the class folders themselves. What stands beside ``train/``
            and ``test/``, such as ``val/``, is left out: validation images come from ``train/``.
        size: side in pixels: the shorter side is scaled to it, the middle square kept; None: all have one.
        test: where there is no ``test/``: share of each class put aside for testing, the same for every seed.
        cache: folder that keeps the decoded pictures for the next run, which then reads them in a second.
        memory_limit_gib: GiB of uint8 pixels up to which the set is held in memory.
        workers: processes that decode pictures of a set over that limit; 0 decodes in the main process.
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
        size: PositiveInt | None = None,
        test: Fraction = 0.2,
        cache: str | None = None,
        memory_limit_gib: PositiveFloat = 2.0,
        workers: NonNegativeInt = 0,
    ) -> None:
        super().__init__(
            root=root, validation=validation, seed=seed, limit_train=limit_train, limit_test=limit_test,
            augmentation=augmentation,
        )  # fmt: skip
        self.size = size
        self.test_share = test
        self.cache = cache
        self.memory_limit_gib = memory_limit_gib
        self.workers = workers

    def load(self) -> tuple[DataSpec, Split, Split]:
        """List, decode or survey, divide.

        Raises:
            UserError: no folder, no pictures, one class, parts of other names, a picture that is damaged or of
                another size.
        """
        if self.root is None:
            raise UserError("dataset.root is needed: a folder with one folder per class, or train/ and test/ of those")
        root = Path(self.root).expanduser()
        if not root.is_dir():
            raise UserError(f"{self.where}: no such folder. Allowed: a folder of pictures, one folder per class")
        parts = [part for part in ("train", "test") if (root / part).is_dir()]
        if len(parts) == 1:
            raise UserError(
                f"{self.where}: has {parts[0]}/ alone. Allowed: both train/ and test/, or class folders only"
            )

        found = [pictures.scan(root, part, where=self.where) for part in parts or [""]]
        classes = tuple(found[0])
        if strange := sorted(set(found[-1]) - set(classes)):
            raise UserError(f"{self.where}: class '{strange[0]}' is in test/ only. Allowed: the classes of train/")
        nested = all(entry.path.count("/") > 1 for listed in found[0].values() for entry in listed)
        if not parts and (nested or any(name.lower() in _PARTS for name in classes)):
            raise UserError(
                f"{self.where}: {', '.join(f'{name}/' for name in classes[:3])} are parts of a set, not classes. "
                "Allowed: rename them to train/ and test/, or class folders with the pictures right in them"
            )
        entries = [entry for part in found for listed in part.values() for entry in listed]
        labels = torch.tensor([classes.index(name) for part in found for name, listed in part.items() for _ in listed])
        whole = Split(images=self._images(root, entries), labels=labels)
        if len(found) == 2:
            first = sum(map(len, found[0].values()))
            train, test = whole.take(slice(0, first)), whole.take(slice(first, None))
        else:
            # By no seed: weights trained under one are judged under another.
            kept, held = hold_out(labels, self.test_share, seeded("test"), classes=classes, key="dataset.test")
            train, test = whole.take(kept), whole.take(held)
        if isinstance(train.images, ImageSource):
            step = max(1, len(train) // _SAMPLED)
            mean, std = channel_statistics(train.images.read(range(0, len(train), step)))
        else:
            mean, std = channel_statistics(train.images)
        channels, height, width = whole.shape
        spec = DataSpec(
            name=root.resolve().name,
            classes=classes,
            channels=channels,
            size=(height, width),
            eps=default_eps(channels),
            augment=default_augment(channels),
            mean=mean,
            std=std,
        )
        return spec, train, test

    def _images(self, root: Path, entries: list[pictures.Entry]) -> torch.Tensor | ImageSource:
        """All pictures: decoded (or from the cache) where they fit the memory limit, else as files."""
        channels, height, width = pictures.probe(root, entries[0].path, where=self.where)
        try:
            return self._read(root, entries, (channels, self.size or height, self.size or width))
        except pictures.NotGreyError:  # the first was grey, a later one is not
            return self._read(root, entries, (3, self.size or height, self.size or width))

    def _read(
        self, root: Path, entries: list[pictures.Entry], shape: tuple[int, int, int]
    ) -> torch.Tensor | ImageSource:
        key = pictures.listing_key(root, entries, self.size)
        kept = None if self.cache is None else Path(self.cache).expanduser() / f"pictures-{key}"
        channels, height, width = shape
        if len(entries) * channels * height * width <= self.memory_limit_gib * 2**30:
            return picture_cache.cached_images(
                kept and kept.with_suffix(".npy"),
                lambda: pictures.decode_all(root, entries, shape=shape, resize=self.size, where=self.where),
            )
        content = picture_cache.cached_text(
            kept and kept.with_suffix(f".{channels}.json"),  # a survey for three says nothing of whether one suffices
            lambda: pictures.survey(root, entries, shape=shape, resize=self.size, where=self.where),
        )
        return pictures.PictureFiles(
            root=root, names=[entry.path for entry in entries], positions=torch.arange(len(entries)),
            shape=shape, resize=self.size, content=content, where=self.where,
        )  # fmt: skip
