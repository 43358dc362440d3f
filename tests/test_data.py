"""The data layer: what is read, how it is divided and dealt out, and what wrong input says."""

from __future__ import annotations

import inspect
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from hydra.utils import get_class
from omegaconf import OmegaConf
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor, nn

from src.audit import FIXED, composed
from src.data import picture_cache, pictures
from src.data.augment import Augment, augment_batch, to_float
from src.data.base import ImageDataModule
from src.data.digits import Digits
from src.data.image_folder import ImageFolder
from src.data.loaders import BatchPlan, FileLoader, MemoryLoader
from src.data.mnist import MNIST
from src.data.npz import NPZ
from src.errors import UserError
from src.stages import Stages
from src.threat import Norm
from src.tracking import NoTracker
from src.trained import Workshop

YAMLS = sorted((Path(__file__).parent.parent / "conf" / "dataset").glob("*.yaml"))


def draw(path: Path, *, seed: int, size: tuple[int, int] = (8, 8), mode: str = "RGB") -> None:
    """A PNG of noise; ``size`` is (width, height)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (size[1], size[0], 3) if mode == "RGB" else (size[1], size[0])
    pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """train/ with 12 pictures and test/ with 5 of each of two classes, and a hidden file as in real copies."""
    root = tmp_path / "pets"
    for part, count in (("train", 12), ("test", 5)):
        for number, name in enumerate(("cat", "dog")):
            for i in range(count):
                draw(root / part / name / f"{i:02}.png", seed=1000 * number + 100 * (part == "test") + i)
    (root / ".complete").touch()
    (root / "train" / "cat" / ".hidden.png").write_bytes(b"no picture")
    return root


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


def as_rank(module: ImageDataModule, rank: int, world: int, epoch: int = 0, training: bool = True) -> None:
    module.trainer = SimpleNamespace(  # type: ignore[assignment]
        global_rank=rank, world_size=world, current_epoch=epoch, training=training
    )


def prepared(module: ImageDataModule) -> ImageDataModule:
    module.prepare()
    return module


def indices(loader: MemoryLoader | FileLoader) -> list[list[int]]:
    return [batch["index"].tolist() for batch in loader]


# The choices


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


# Division


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


# Batches


@pytest.mark.parametrize("world", [1, 2, 3])
def test_every_device_count_sees_what_it_should(world: int) -> None:
    module = prepared(Digits())
    module.configure(batch_size=60, eval_batch_size=50)
    single_train, single_test = indices(module.train_dataloader()), indices(module.test_dataloader())
    train, val, test = [], [], []
    for rank in range(world):
        as_rank(module, rank, world)
        train.append(indices(module.train_dataloader()))
        val.append(indices(module.val_dataloader()))
        test.append(indices(module.test_dataloader()))
        assert [len(train[-1]), len(val[-1]), len(test[-1])] == [
            len(module.train_dataloader()), len(module.val_dataloader()), len(module.test_dataloader()),
        ]  # fmt: skip

    assert {len(batch) for one in train for batch in one} == {60 // world}
    joined = [[i for one in step for i in one] for step in zip(*train, strict=True)]
    assert joined == single_train
    assert sorted(i for one in val for batch in one for i in batch) == list(range(len(module.val)))
    dealt = sorted(batch for one in test for batch in one)
    assert dealt == sorted(single_test)
    assert [i for batch in dealt for i in batch] == list(range(len(module.test)))


def test_more_devices_than_test_batches() -> None:
    plans = [BatchPlan(kind="test", count=10, batch_size=8, rank=rank, world=3) for rank in range(3)]
    assert [len(plan) for plan in plans] == [1, 1, 0]
    assert [list(plan) for plan in plans] == [[list(range(8))], [[8, 9]], []]


def test_a_set_smaller_than_a_batch_is_one_batch() -> None:
    plans = [BatchPlan(kind="train", count=7, batch_size=64, rank=rank, world=2) for rank in range(2)]
    assert [len(plan) for plan in plans] == [1, 1]
    assert [len(batch) for plan in plans for batch in plan] == [3, 3]


def test_order_depends_on_seed_and_epoch_alone() -> None:
    module = prepared(Digits())
    module.configure(batch_size=64)

    def order(epoch: int) -> list[list[int]]:
        as_rank(module, 0, 1, epoch)
        return indices(module.train_dataloader())

    assert order(3) == order(3)
    assert order(3) != order(4)
    loader = module.train_dataloader()
    as_rank(module, 0, 1, 3)  # one loader serves all epochs
    assert indices(loader) == order(3)
    assert order(3) != indices(MemoryLoader(split=module.train, plan=BatchPlan(
        kind="train", count=len(module.train), batch_size=64, seed=1, epoch=lambda: 3)))  # fmt: skip
    flat = [i for batch in order(0) for i in batch]
    assert len(set(flat)) == len(flat) == len(module.train) // 64 * 64


@pytest.mark.parametrize("workers", [0, 2])
def test_files_and_memory_give_the_same_batches(folder: Path, workers: int) -> None:
    memory = prepared(ImageFolder(root=str(folder)))
    lazy = prepared(ImageFolder(root=str(folder), memory_limit_gib=1e-9, workers=workers))
    assert memory.spec == lazy.spec
    for epoch in range(2):
        for module in (memory, lazy):
            module.configure(batch_size=8, eval_batch_size=4)
            as_rank(module, 1, 2, epoch)
        for name in ("train_dataloader", "val_dataloader", "test_dataloader"):
            one, other = getattr(memory, name)(), getattr(lazy, name)()
            assert isinstance(one, MemoryLoader)
            assert isinstance(other, FileLoader)
            assert len(one) == len(other)
            for left, right in zip(one, other, strict=True):
                assert left.keys() == right.keys() == {"image", "label", "index"}
                assert all(torch.equal(left[key], right[key]) for key in left)


def test_global_generators_stay_untouched(folder: Path) -> None:
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()  # type: ignore[index]
    for memory_limit in (2.0, 1e-9):
        module = prepared(ImageFolder(root=str(folder), memory_limit_gib=memory_limit))
        module.configure(batch_size=8, augment=True)
        as_rank(module, 0, 1)
        for batch in module.train_dataloader():
            module.on_after_batch_transfer(module.on_before_batch_transfer(batch, 0), 0)
    assert torch.equal(torch.get_rng_state(), before)
    assert np.array_equal(np.random.get_state()[1], numpy_before)  # type: ignore[index]


# Augmentation


@pytest.mark.parametrize("kind", ["crop", "crop_flip"])
@pytest.mark.parametrize("size", [(8, 8), (32, 24), (1, 1)])
def test_augmentation_keeps_what_it_must_and_varies(kind: Augment, size: tuple[int, int]) -> None:
    images = torch.randint(1, 255, (64, 3, *size), dtype=torch.uint8)
    images[:] = images[:1]
    made = augment_batch(images, kind, torch.Generator().manual_seed(0))
    assert made.shape == images.shape
    assert made.dtype == torch.uint8
    assert made.is_contiguous()
    low, high = images.aminmax()
    assert low <= made.min() <= made.max() <= high
    assert torch.equal(made, augment_batch(images, kind, torch.Generator().manual_seed(0)))
    if size != (1, 1):
        assert len(torch.unique(made.flatten(1), dim=0)) > 6
    as_float = to_float(made)
    assert as_float.dtype == torch.float32
    assert as_float.min() >= 0
    assert as_float.max() <= 1


def test_crop_shifts_by_a_sixteenth_and_only_crop_flip_mirrors() -> None:
    ramp = torch.arange(32, dtype=torch.uint8).expand(200, 1, 32, 32).contiguous()
    middle = augment_batch(ramp, "crop", torch.Generator().manual_seed(0))[:, 0, 16, 16].tolist()
    assert set(middle) == set(range(14, 19))
    steps = augment_batch(ramp, "crop_flip", torch.Generator().manual_seed(0))[:, 0, 16, 10:20].int().diff()
    assert 60 < int((steps < 0).all(dim=1).sum()) < 140
    assert augment_batch(ramp, "none") is ramp


def test_only_training_batches_are_augmented() -> None:
    module = prepared(Digits())
    module.configure(batch_size=32, augment=True)
    batch = next(iter(module.train_dataloader()))
    plain = to_float(batch["image"])

    def seen(epoch: int = 0, training: bool = True) -> Tensor:
        as_rank(module, 0, 1, epoch, training)
        return module.on_after_batch_transfer(module.on_before_batch_transfer(batch, 0), 0)["image"]

    assert torch.equal(seen(training=False), plain)
    assert not torch.equal(seen(), plain)
    assert torch.equal(seen(), seen())
    assert not torch.equal(seen(epoch=0), seen(epoch=1))
    module.configure(batch_size=32, augment=False)
    assert torch.equal(seen(), plain)
    module.trainer = None
    assert torch.equal(module.on_after_batch_transfer(batch, 0)["image"], plain)
    assert batch["image"].dtype == torch.uint8


class Probe(pl.LightningModule):
    """Notes what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 10)
        self.seen: list[tuple[int, Tensor, Tensor]] = []
        self.tested: list[int] = []

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        self.seen.append((self.current_epoch, batch["index"], batch["image"]))
        return nn.functional.cross_entropy(self.layer(batch["image"].flatten(1)), batch["label"])

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.tested += batch["index"].tolist()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_a_resumed_training_sees_the_same_batches(tmp_path: Path) -> None:
    def run(epochs: int, resume: Path | None = None) -> Probe:
        module, probe = Digits(limit_train=200, limit_test=70), Probe()
        module.configure(batch_size=64, augment=True, eval_batch_size=32)
        trainer = pl.Trainer(
            max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False, default_root_dir=tmp_path,
            enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False, log_every_n_steps=1,
        )  # fmt: skip
        trainer.fit(probe, datamodule=module, ckpt_path=resume, weights_only=True)
        trainer.save_checkpoint(tmp_path / f"{epochs}.ckpt")
        trainer.test(probe, datamodule=module, verbose=False)
        return probe

    whole = run(3)
    run(2)
    resumed = run(3, tmp_path / "2.ckpt")
    last = [step for step in whole.seen if step[0] == 2]
    assert len(last) == len(resumed.seen) == 2
    for one, other in zip(last, resumed.seen, strict=True):
        assert torch.equal(one[1], other[1])
        assert torch.equal(one[2], other[2])
    assert whole.tested == list(range(70))


# Folders of pictures


def test_one_folder_has_the_same_test_images_for_every_seed(folder: Path) -> None:
    one, other = (prepared(ImageFolder(root=str(folder / "train"), seed=seed, test=0.25)) for seed in (0, 1))
    assert [len(one.test), len(one.val), len(one.train)] == [6, 2, 16]
    assert one.spec.name == "train"
    assert torch.equal(one.test.images, other.test.images)
    assert torch.equal(one.test.labels, other.test.labels)
    assert not torch.equal(one.val.images, other.val.images)
    assert one.fingerprint != other.fingerprint


def test_resize_takes_pictures_of_any_size(folder: Path) -> None:
    draw(folder / "train" / "cat" / "00.png", seed=5, size=(20, 11))
    for limit in (2.0, 1e-9):
        module = prepared(ImageFolder(root=str(folder), size=6, memory_limit_gib=limit))
        assert module.spec.size == (6, 6)
        assert next(iter(module.train_dataloader()))["image"].shape[1:] == (3, 6, 6)


@pytest.mark.parametrize("limit", [2.0, 1e-9])
def test_grey_pictures_have_one_channel_until_one_is_coloured(tmp_path: Path, limit: float) -> None:
    root, cache = tmp_path / "set", str(tmp_path / "kept")
    for i in range(8):
        draw(root / f"{i % 2}" / f"{i}.png", seed=i, mode="L")
    assert prepared(ImageFolder(root=str(root), memory_limit_gib=limit, cache=cache)).spec.channels == 1
    draw(root / "1" / "9.png", seed=9, mode="RGB")
    for _ in range(2):  # the second time by what the first left in the cache
        assert prepared(ImageFolder(root=str(root), memory_limit_gib=limit, cache=cache)).spec.channels == 3


@pytest.mark.parametrize("limit", [2.0, 1e-9])
def test_cache_spares_the_reading_and_survives_damage(
    folder: Path, tmp_path: Path, limit: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = "decode_all" if limit == 2.0 else "survey"
    calls, real = [], getattr(pictures, work)
    monkeypatch.setattr(pictures, work, lambda *a, **k: calls.append(1) or real(*a, **k))

    def load() -> str:
        return prepared(ImageFolder(root=str(folder), cache=str(tmp_path / "kept"), memory_limit_gib=limit)).fingerprint

    first = load()
    assert load() == first
    assert len(calls) == 1
    (file,) = (tmp_path / "kept").iterdir()
    content = bytearray(file.read_bytes())
    for damaged in (content[:-100], b"", content[:-20] + b"\xff" * 16 + content[-4:]):
        file.write_bytes(damaged)
        assert load() == first
    assert len(calls) == 4
    draw(folder / "test" / "dog" / "00.png", seed=99)
    assert load() != first
    assert len(calls) == 5


@pytest.mark.parametrize("limit", [2.0, 1e-9])
def test_a_cache_keeps_folders_apart_that_differ_in_pixels_only(tmp_path: Path, limit: float) -> None:
    for number, name in enumerate(("clean", "noisy")):
        for i in range(12):
            path = tmp_path / name / str(i % 2) / f"{i}.bmp"
            draw(path, seed=100 * number + i)
            os.utime(path, (0, 0))
    clean, noisy, again = (
        prepared(ImageFolder(root=str(tmp_path / name), cache=str(tmp_path / "kept"), memory_limit_gib=limit))
        for name in ("clean", "noisy", "clean")
    )
    assert clean.fingerprint != noisy.fingerprint
    assert clean.fingerprint == again.fingerprint
    assert len(list((tmp_path / "kept").iterdir())) == 2


def test_a_cache_that_cannot_be_written_is_no_error(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert prepared(ImageFolder(root=str(folder), cache=str(tmp_path / "file"))).spec.num_classes == 2
    assert picture_cache.cached_text(None, lambda: "made") == "made"


@pytest.mark.parametrize(
    ("augmentation", "symmetric"), [(None, True), ("none", True), ("crop_flip", True), ("crop", False)]
)
def test_networks_mirror_only_what_the_user_lets_be_mirrored(
    folder: Path, tmp_path: Path, augmentation: Augment | None, symmetric: bool
) -> None:
    job, _ = composed([*FIXED, "attack=noise"])
    data = prepared(ImageFolder(root=str(folder), augmentation=augmentation))
    assert data.spec.augment == "crop_flip"
    assert Workshop(job, data, Stages(tmp_path), NoTracker()).shape["symmetric"] == symmetric


# Wrong input: one line that names key, value and what is allowed


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


@pytest.mark.parametrize("kind", [ImageFolder, NPZ])
def test_root_is_needed_and_must_exist(kind: type[ImageDataModule], tmp_path: Path) -> None:
    refused(kind(), "dataset.root is needed")
    refused(kind(root=str(tmp_path / "nowhere")), f"dataset.root={tmp_path / 'nowhere'}", "no such")


@pytest.mark.parametrize("limit", [2.0, 1e-9])
@pytest.mark.parametrize(
    ("spoil", "parts"),
    [
        (lambda root: shutil.rmtree(root / "test"), ["train/ alone", "both train/ and test/"]),
        (lambda root: [p.unlink() for p in root.rglob("*.png")], ["no images in train/", ".png"]),
        (lambda root: [p.unlink() for p in (root / "test").rglob("*.png")], ["no images in test/"]),
        (lambda root: [shutil.rmtree(root / p / "dog") for p in ("train", "test")], ["only one class (cat)"]),
        (lambda root: shutil.rmtree(root / "train" / "dog"), ["class 'dog' is in test/ only"]),
        (lambda root: [p.unlink() for p in [*(root / "train" / "dog").iterdir()][1:]], ["'dog' has 1", "2"]),
        (lambda root: draw(root / "train/dog/03.png", seed=1, size=(9, 8)), ["dog/03.png is 9x8", "dataset.size"]),
        (lambda root: _rename(root, train="Train", test="Test"), ["Test/, Train/", "rename them to train/ and test/"]),
        (lambda root: _rename(root, train="fold1", test="fold2"), ["fold1/, fold2/", "rename them to train/"]),
        (lambda root: _rename(root, test="val"), ["train/ alone", "both train/ and test/"]),
        (lambda root: (root / "train/dog/03.png").write_bytes(b"no"), ["train/dog/03.png", "not a readable"]),
        (lambda root: _cut(root / "train/dog/03.png"), ["train/dog/03.png", "not a readable"]),
        (lambda root: Image.new("I;16", (8, 8)).save(root / "train/dog/03.png"), ["train/dog/03.png", "8-bit"]),
    ],
    ids=["no test", "no images", "no test images", "one class", "strange class", "one image", "other size",
         "Train and Test", "other parts", "train and val", "no picture", "cut picture", "16 bit"],
)  # fmt: skip
def test_wrong_folder(folder: Path, spoil: Callable[[Path], object], parts: list[str], limit: float) -> None:
    spoil(folder)
    refused(ImageFolder(root=str(folder), memory_limit_gib=limit, workers=0), f"dataset.root={folder}", *parts)


def _rename(root: Path, **names: str) -> None:
    for before, after in names.items():
        (root / before).rename(root / after)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-60])


def test_a_cut_picture_found_by_a_worker_is_still_one_line(folder: Path) -> None:
    _cut(folder / "test" / "dog" / "03.png")
    module = ImageFolder(root=str(folder), memory_limit_gib=1e-9, workers=1)
    refused(module, "test/dog/03.png", "not a readable picture")


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
