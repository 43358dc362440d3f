"""What every dataset shares: read once, checked, divided, fingerprinted, dealt out in batches of uint8.

Adding a dataset is two files: ``src/data/x.py`` with a class that defines :meth:`ImageDataModule.load`, and
``conf/dataset/x.yaml``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Annotated, Any

import torch
from pydantic import Field, NonNegativeInt, PositiveInt
from pytorch_lightning import LightningDataModule
from torch import Tensor

from src.data.augment import Augment, augment_batch, to_float
from src.data.loaders import BatchPlan, Loader, make_loader
from src.data.spec import DataSpec, channel_statistics, default_augment, default_eps
from src.data.split import (
    ImageSource,
    Split,
    check_split,
    fingerprint,
    fixed_order,
    hold_out,
    seed_from,
    seeded,
    stratified_order,
)
from src.errors import UserError

__all__ = [
    "DataSpec",
    "Fraction",
    "ImageDataModule",
    "ImageSource",
    "Split",
    "channel_statistics",
    "default_augment",
    "default_eps",
]

Fraction = Annotated[float, Field(gt=0, lt=1)]


class ImageDataModule(LightningDataModule, ABC):
    """A dataset: uint8 pictures in three splits, batches as dicts of ``image``, ``label``, ``index``.

    After :meth:`prepare` (Lightning's ``setup`` calls it) there are ``spec``, ``train``, ``val``, ``test``
    and the two fingerprints.

    Args:
        root: folder (or file) the data lies in; None where none is needed.
        validation: fraction of the training images of each class kept for validation, at least one of each.
        seed: decides the validation split, the training order and the augmentation. Never the test split.
        limit_train: images to take for training and validation together, the first of a seeded shuffle in
            which every beginning has nearly the class shares of the whole; None takes all.
        limit_test: test images to take, the first of one shuffle for every seed; None takes all.
        augmentation: how to augment when the training asks for it; None is what suits the data. ``crop`` also says
            that a mirrored image is of another class, ``crop_flip`` that it is not.
    """

    spec: DataSpec
    train: Split
    val: Split
    test: Split
    train_fingerprint: str  # of what is trained on
    fingerprint: str  # of that and the test images
    workers: int = 0  # processes that decode pictures; 0: this one

    def __init__(
        self,
        *,
        root: str | None = None,
        validation: Fraction = 0.1,
        seed: NonNegativeInt = 0,
        limit_train: PositiveInt | None = None,
        limit_test: PositiveInt | None = None,
        augmentation: Augment | None = None,
    ) -> None:
        super().__init__()
        self.root = root
        self.validation = validation
        self.on_validation = False  # whether validation images stand for the test images
        self.seed = seed
        self.limit_train = limit_train
        self.limit_test = limit_test
        self.augmentation = augmentation
        self.batch_size = 128
        self.eval_batch_size = 256
        self.augment = False
        self.epoch = 0  # the epoch of train_dataloader where there is no trainer to ask
        self.allow_zero_length_dataloader_with_multiple_devices = True  # more devices than test batches
        self._prepared = False
        self._first_index: int | None = None

    @abstractmethod
    def load(self) -> tuple[DataSpec, Split, Split]:
        """Read the data: its facts, all training examples, all test examples. What an author writes.

        Import heavy libraries here, not at the top of the module.

        Raises:
            UserError: the data is missing or unusable; one line with key, value and how to mend it.
        """

    @property
    def where(self) -> str:
        """The key and value that messages about this data start with."""
        return f"dataset.root={self.root}"

    def prepare(self) -> None:
        """Load, check, divide; the second call does nothing.

        Raises:
            UserError: unusable data; a validation split or a limit that leaves a class without images.
        """
        if self._prepared:
            return
        spec, train, test = self.load()
        kind = spec.augment if self.augmentation is None else self.augmentation
        shape = (spec.channels, *spec.size)
        for part, split, least in (("training data", train, 2), ("test data", test, 0)):
            if split.shape != shape:
                raise UserError(f"{self.where}: {part} is {split.shape} (C, H, W). Allowed: {shape}")
            check_split(split, classes=spec.classes, where=f"{self.where}: {part}", least=least)
        # Apart, so that testing on fewer images trains nothing again.
        self.train_fingerprint = fingerprint(
            (train,), spec.classes, spec.mean, spec.std, kind, self.validation, self.seed, self.limit_train
        )
        self.fingerprint = fingerprint((test,), self.train_fingerprint, self.limit_test)

        if self.limit_train is not None and self.limit_train < len(train):
            train = train.take(stratified_order(train.labels, seeded("limit", self.seed))[: self.limit_train])
            check_split(train, classes=spec.classes, where=f"limit.train_images={self.limit_train}", least=2)
        kept, held = hold_out(
            train.labels,
            self.validation,
            seeded("validation", self.seed),
            classes=spec.classes,
            key="dataset.validation",
        )
        self.spec = spec
        self.train, self.val = train.take(kept), train.take(held)
        self.test = test.take(fixed_order(len(test))[: self.limit_test])
        self._kind: Augment = kind
        self._prepared = True

    def judge_on_validation(self) -> None:
        """Let the validation images stand for the test images: choosing by test images would spoil their figures."""
        self.prepare()
        self.test, self.on_validation = self.val.take(slice(0, self.limit_test)), True
        self.fingerprint = fingerprint((), "validation", self.train_fingerprint, self.limit_test)

    def setup(self, stage: str | None = None) -> None:
        """Lightning's hook."""
        self.prepare()

    def configure(self, *, batch_size: int, augment: bool = False, eval_batch_size: int | None = None) -> None:
        """What the loaders will use from now on.

        Args:
            batch_size: training images per step, all devices together.
            augment: augment training batches the way the spec says.
            eval_batch_size: validation and test images per batch of one device; None leaves it (256).
        """
        self.batch_size = batch_size
        self.augment = augment
        if eval_batch_size is not None:
            self.eval_batch_size = eval_batch_size

    def _current_epoch(self) -> int:
        return self.epoch if self.trainer is None else self.trainer.current_epoch

    def _plan(self, **keywords: Any) -> BatchPlan:
        rank, world = (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)
        return BatchPlan(rank=rank, world=world, seed=self.seed, epoch=self._current_epoch, **keywords)

    def train_dataloader(self) -> Loader:
        """Shuffled by (seed, epoch); equal batches on all devices, see :class:`BatchPlan`."""
        self.prepare()
        plan = self._plan(kind="train", count=len(self.train), batch_size=self.batch_size)
        return make_loader(self.train, plan, workers=self.workers)

    def val_dataloader(self) -> Loader:
        """Every validation image once over all devices."""
        self.prepare()
        plan = self._plan(kind="val", count=len(self.val), batch_size=self.eval_batch_size)
        return make_loader(self.val, plan, workers=self.workers)

    def test_dataloader(self) -> Loader:
        """Every test image once over all devices, in batches that do not depend on their number."""
        self.prepare()
        plan = self._plan(kind="test", count=len(self.test), batch_size=self.eval_batch_size)
        return make_loader(self.test, plan, workers=self.workers)

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Note which batch this is while its index is on the CPU: asking a GPU would wait for it."""
        self._first_index = int(batch["index"][0])
        return batch

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """On the device: augment in training where asked for, then uint8 → float32 in [0, 1]."""
        images: Tensor = batch["image"]
        if self.augment and self.trainer is not None and self.trainer.training:
            # Seeded by epoch and batch: a resumed training continues exactly, and no global state moves.
            first = int(batch["index"][0]) if self._first_index is None else self._first_index
            generator = torch.Generator(images.device)
            generator.manual_seed(seed_from("augment", self.seed, self._current_epoch(), first))
            images = augment_batch(images, self._kind, generator)
        return {**batch, "image": to_float(images)}
