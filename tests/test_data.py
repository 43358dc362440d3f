"""The data layer: what is read, how it is divided, and what wrong data says."""

from __future__ import annotations

import inspect
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import numpy as np
import pytest
import torch
from hydra.utils import get_class
from omegaconf import OmegaConf
from sklearn.datasets import load_digits

from src.data.base import ImageDataModule
from src.data.digits import Digits
from src.data.image_folder import ImageFolder
from src.data.loaders import BatchPlan
from src.data.mnist import MNIST
from src.data.npz import NPZ
from src.errors import UserError
from src.threat import Norm
from tests.own_data import as_rank, draw, prepared, refused

YAMLS = sorted((Path(__file__).parent.parent / "conf" / "dataset").glob("*.yaml"))


def arrays(**changed: Any) -> dict[str, np.ndarray]:
    """A good npz of 3 classes, with changes."""
    draw = np.random.default_rng(0)
    good = {
        "x_train": draw.integers(0, 256, (30, 6, 5, 3), dtype=np.uint8),
        "y_train": np.arange(30) % 3,
        "x_test": draw.integers(0, 256, (9, 6, 5, 3), dtype=np.uint8),
        "y_test": np.arange(9) % 3,
    }
    return {name: value for name, value in {**good, **changed}.items() if value is not None}


def npz(tmp_path: Path, **changed: Any) -> str:
    path = tmp_path / "shapes.npz"
    np.savez(path, **arrays(**changed))
    return str(path)


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: path.stem)
def test_yaml_names_every_argument_with_a_comment(path: Path) -> None:
    config = OmegaConf.load(path)
    target = get_class(config._target_)
    assert target.__module__ == f"src.data.{path.stem}"
    parameters = inspect.signature(target).parameters
    unused = {"root"} if path.stem == "digits" else set()  # they come with scikit-learn
    assert {key for key in config if key != "_target_"} == set(parameters) - unused
    assert all(p.kind is inspect.Parameter.KEYWORD_ONLY for p in parameters.values())
    assert set(get_type_hints(target.__init__, include_extras=True)) >= set(parameters)
    lines = path.read_text().splitlines()
    assert lines[0].startswith("# ")
    assert f"python -m src.train dataset={path.stem}" in lines[0]
    assert all("  # " in line for line in lines[2:])


def test_fractions_are_bounded_by_their_annotation() -> None:
    hints = get_type_hints(ImageFolder.__init__, include_extras=True)
    for name in ("validation", "test"):
        assert get_origin(hints[name]) is Annotated
        assert get_args(hints[name])[1].metadata


def test_digits() -> None:
    module = prepared(Digits())
    spec = module.spec
    assert (spec.name, spec.num_classes, spec.channels, spec.size) == ("digits", 10, 1, (8, 8))
    assert set(spec.eps) == set(Norm)
    assert len(module.train) + len(module.val) + len(module.test) == 1797
    assert module.train.images.dtype == torch.uint8
    assert int(module.train.images.max()) == 255
    bunch = load_digits()
    known = zip(np.rint(bunch.data * 255 / 16).astype(np.uint8), bunch.target, strict=True)
    whole = [split.batch(range(len(split))) for split in (module.train, module.val, module.test)]
    read = [pair for part in whole for pair in zip(part["image"].numpy(), part["label"], strict=True)]
    assert sorted((bytes(x), int(y)) for x, y in read) == sorted((bytes(x), int(y)) for x, y in known)


def test_mnist_from_unpacked_files_without_network(tmp_path: Path) -> None:
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part, count in (("train", 40), ("t10k", 20)):
        pixels = np.random.default_rng(count).integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        header = np.array([2051, count, 28, 28], dtype=">i4").tobytes()
        (raw / f"{part}-images-idx3-ubyte").write_bytes(header + pixels.tobytes())
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(
            np.array([2049, count], dtype=">i4").tobytes() + labels.tobytes()
        )
    module = prepared(MNIST(root=str(tmp_path), download=True))
    assert (len(module.train), len(module.val), len(module.test)) == (30, 10, 20)
    assert module.train.images.shape[1:] == (1, 28, 28)

    (raw / "train-images-idx3-ubyte").write_bytes(b"damaged")
    with pytest.raises(UserError, match="damaged"):
        MNIST(root=str(tmp_path)).prepare()


@pytest.mark.parametrize("layout", ["NHW", "NHWC", "NCHW", "float"])
def test_npz_layouts(tmp_path: Path, layout: str) -> None:
    stored = arrays()
    x = {part: stored[f"x_{part}"] for part in ("train", "test")}
    convert: Callable[[np.ndarray], np.ndarray] = {
        "NHW": lambda a: a[..., 0],
        "NHWC": lambda a: a,
        "NCHW": lambda a: a.transpose(0, 3, 1, 2),
        "float": lambda a: a.astype(np.float64) / 255,
    }[layout]
    path = npz(tmp_path, x_train=convert(x["train"]), x_test=convert(x["test"]))
    spec, train, _ = NPZ(root=path).load()
    expected = torch.from_numpy(x["train"]).permute(0, 3, 1, 2)
    assert torch.equal(torch.as_tensor(train.images), expected[:, :1] if layout == "NHW" else expected)
    assert train.labels.tolist() == stored["y_train"].tolist()
    assert spec.name == "shapes"
    assert spec.augment == ("crop" if layout == "NHW" else "crop_flip")
    prepared(NPZ(root=str(tmp_path)))  # the folder that holds just this file


def test_validation_is_stratified_and_disjoint() -> None:
    first, again, other = (prepared(Digits(seed=seed)) for seed in (0, 0, 1))
    total = len(first.train) + len(first.val)
    assert len(first.val) == round(0.1 * total)
    shares = first.val.labels.bincount() / (first.val.labels.bincount() + first.train.labels.bincount())
    assert shares.min() > 0.09
    assert shares.max() < 0.11
    assert torch.equal(first.val.images, again.val.images)
    assert not torch.equal(first.val.images, other.val.images)
    assert torch.equal(first.test.images, other.test.images)  # the seed never touches the test split

    whole = Digits().load()[1]
    rows = sorted(map(bytes, whole.images.flatten(1).numpy()))
    divided = torch.cat([first.train.images, first.val.images])
    assert sorted(map(bytes, divided.flatten(1).numpy())) == rows


def test_limits_take_the_first_of_their_order() -> None:
    whole, small, smaller = (prepared(Digits(limit_train=k, limit_test=k)) for k in (None, 100, 50))
    assert (len(small.train) + len(small.val), len(small.test)) == (100, 100)
    assert torch.equal(small.test.images, whole.test.images[:100])
    assert torch.equal(smaller.test.images, small.test.images[:50])
    counts = small.train.labels.bincount() + small.val.labels.bincount()
    assert counts.min() >= 8
    assert counts.max() <= 12


def test_fingerprint_follows_content_not_path(folder: Path, tmp_path: Path) -> None:
    def of(root: Path, **keywords: Any) -> str:
        return prepared(ImageFolder(root=str(root), **keywords)).fingerprint

    before = of(folder)
    copy = shutil.copytree(folder, tmp_path / "elsewhere" / "animals")
    assert of(copy) == before
    assert of(copy, seed=1) != before
    assert of(copy, validation=0.2) != before
    assert of(copy, limit_train=20) != before
    draw(copy / "test" / "dog" / "00.png", seed=77)
    assert of(copy) != before
    (folder / "train" / "cat").rename(folder / "train" / "cow")
    (folder / "test" / "cat").rename(folder / "test" / "cow")
    assert of(folder) != before


@pytest.mark.parametrize("kind", [ImageFolder, NPZ])
def test_root_is_needed_and_must_exist(kind: type[ImageDataModule], tmp_path: Path) -> None:
    refused(kind(), "dataset.root is needed")
    refused(kind(root=str(tmp_path / "nowhere")), f"dataset.root={tmp_path / 'nowhere'}", "no such")


@pytest.mark.parametrize(
    ("changed", "parts"),
    [
        ({"y_test": None}, ["y_test is missing"]),
        ({"y_train": np.zeros(29, dtype=int)}, ["y_train is int64(29,)", "(30,)"]),
        ({"y_train": np.zeros((30, 3), dtype=int)}, ["y_train", "(30, 3)"]),
        ({"y_train": np.zeros(30)}, ["y_train is float64", "whole numbers"]),
        ({"y_train": np.arange(30) % 3 - 1}, ["labels from -1 to 1"]),
        ({"y_train": np.zeros(30, dtype=int), "y_test": np.zeros(9, dtype=int)}, ["only one class"]),
        ({"y_train": np.arange(30) // 29}, ["class '1' has 1 image"]),
        ({"y_train": np.arange(30) % 2}, ["test data", "labels from 0 to 2"]),
        ({"x_train": np.full((30, 6, 5), np.nan)}, ["x_train contains NaN"]),
        ({"x_train": np.full((30, 6, 5), 1.5)}, ["from 1.5 to 1.5", "[0, 1]"]),
        ({"x_train": np.full((30, 6, 5), -np.inf)}, ["from -inf", "[0, 1]"]),
        ({"x_train": np.zeros((30, 6, 5), dtype=np.int64)}, ["x_train is int64", "uint8"]),
        ({"x_train": np.zeros((30, 6), dtype=np.uint8)}, ["x_train has shape (30, 6)"]),
        ({"x_train": np.zeros((30, 6, 5, 7), dtype=np.uint8)}, ["x_train has shape", "C 1 or 3"]),
        ({"x_test": np.zeros((9, 7, 5, 3), dtype=np.uint8)}, ["x_test holds images (3, 7, 5)", "one shape"]),
        ({"x_test": np.zeros((0, 6, 5, 3), np.uint8), "y_test": np.zeros(0, int)}, ["x_test holds no images"]),
        ({"x_train": np.array([object()] * 30)}, ["not a readable .npz"]),
    ],
)  # fmt: skip
def test_wrong_npz(tmp_path: Path, changed: dict[str, Any], parts: list[str]) -> None:
    path = npz(tmp_path, **changed)
    refused(NPZ(root=path), f"dataset.root={path}", *parts)


def test_damaged_or_too_large_npz(tmp_path: Path) -> None:
    path = Path(npz(tmp_path))
    refused(NPZ(root=str(path), memory_limit_gib=1e-9), "dataset.memory_limit_gib=1e-09", "raise the limit")
    path.write_bytes(path.read_bytes()[:200])
    refused(NPZ(root=str(path)), "not a readable .npz")
    path.unlink()
    refused(NPZ(root=str(tmp_path)), "has 0 .npz files")


def test_validation_or_limit_that_empties_a_class() -> None:
    refused(Digits(validation=0.999), "dataset.validation=0.999", "takes all", "fraction")
    refused(Digits(limit_train=11), "limit.train_images=11", "at least 2")


def test_batch_the_devices_cannot_share() -> None:
    module = prepared(Digits())
    module.configure(batch_size=64)
    as_rank(module, 0, 3)
    refused(module, "batch_size=64", "multiple of 3")
    with pytest.raises(UserError, match=r"trainer\.devices=4"):
        BatchPlan(kind="train", count=3, batch_size=4, world=4)
    with pytest.raises(UserError, match="batch_size=0"):
        BatchPlan(kind="val", count=3, batch_size=0)


def test_download_that_fails_says_where_files_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from urllib.error import URLError

    def offline(*_: object, **__: object) -> None:
        raise URLError("Name or service not known")

    monkeypatch.setattr("urllib.request.urlopen", offline)
    for kind, name in ((MNIST, "MNIST/raw"), (get_class("src.data.cifar10.CIFAR10"), "cifar-10-batches-py")):
        root = tmp_path / "new"
        refused(kind(root=str(root), download=False), f"dataset.root={root}", "download=true", name)
        refused(kind(root=str(root)), f"dataset.root={root}", "could not be downloaded", name, "by hand")
        shutil.rmtree(root)
