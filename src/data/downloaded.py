"""What MNIST, Fashion-MNIST and CIFAR-10 share: torchvision finds the files or fetches them."""

from __future__ import annotations

import socket
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from filelock import FileLock
from pydantic import NonNegativeInt, PositiveInt

from src.data.augment import Augment
from src.data.base import DataSpec, Fraction, ImageDataModule, Split
from src.errors import UserError

STALLED_SECONDS = 30.0


class DownloadedData(ImageDataModule):
    """A dataset of torchvision; arguments as in :class:`ImageDataModule`.

    Args:
        download: fetch the files when ``root`` does not hold them; False never touches the network.
    """

    source: ClassVar[str]  # the class in torchvision.datasets
    files: ClassVar[str]  # what lies under root, for the message of who has to put it there

    def __init__(
        self,
        *,
        root: str | None = "data",
        validation: Fraction = 0.1,
        seed: NonNegativeInt = 0,
        limit_train: PositiveInt | None = None,
        limit_test: PositiveInt | None = None,
        augmentation: Augment | None = None,
        download: bool = True,
    ) -> None:
        super().__init__(
            root=root, validation=validation, seed=seed, limit_train=limit_train, limit_test=limit_test,
            augmentation=augmentation,
        )  # fmt: skip
        self.download = download

    @abstractmethod
    def describe(self) -> DataSpec:
        """The facts of this set."""

    def load(self) -> tuple[DataSpec, Split, Split]:
        """Read both parts through torchvision.

        Raises:
            UserError: no files and no download, or damaged files.
        """
        if self.root is None:
            raise UserError(f"dataset.root is needed: the folder that holds, or shall hold, {self.files}")
        return self.describe(), self._split(train=True), self._split(train=False)

    def _split(self, *, train: bool) -> Split:
        found = self._open(train)
        images = torch.as_tensor(found.data)
        # MNIST: (N, H, W); CIFAR: (N, H, W, C)
        images = images.unsqueeze(1) if images.ndim == 3 else images.permute(0, 3, 1, 2).contiguous()
        return Split(images=images, labels=torch.as_tensor(found.targets, dtype=torch.int64))

    def _open(self, train: bool) -> Any:
        """The torchvision dataset; downloaded only when it is not there."""
        import torchvision.datasets

        kind = getattr(torchvision.datasets, self.source)
        root = str(self.root)
        try:
            return kind(root, train=train, download=False)
        except RuntimeError as error:  # how torchvision says that files are missing
            missing = error
        except Exception as error:  # a damaged file fails anywhere in its reader
            raise UserError(
                f"{self.where}: {self.files} damaged ({_line(error)}). Delete them to fetch them again"
            ) from None
        if not self.download:
            what = "no such folder" if not Path(root).is_dir() else _line(missing)
            raise UserError(f"{self.where}: {what}. Put {self.files} there, or set dataset.download=true to fetch them")
        try:
            with _one_download(Path(root)):
                return kind(root, train=train, download=True)
        except Exception as error:  # network, disk, permissions, a checksum that does not fit
            raise UserError(
                f"{self.where}: {self.source} could not be downloaded ({_line(error)})."
                f" Put {self.files} there by hand, or name the folder that has them"
            ) from None


@contextmanager
def _one_download(root: Path) -> Iterator[None]:
    """One process fetches, the others wait and find it done; a silent server fails instead of hanging."""
    root.mkdir(parents=True, exist_ok=True)
    before = socket.getdefaulttimeout()
    with FileLock(root / ".download.lock"):
        socket.setdefaulttimeout(STALLED_SECONDS)
        try:
            yield
        finally:
            socket.setdefaulttimeout(before)


def _line(error: Exception) -> str:
    """An error as one line; torchvision's cause stands in its last."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
