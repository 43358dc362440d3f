"""Folders of pictures: sizes, colours, the cache, and what a wrong folder says."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from src.audit import FIXED, composed
from src.data import picture_cache, pictures
from src.data.augment import Augment
from src.data.image_folder import ImageFolder
from src.stages import Stages
from src.tracking import NoTracker
from src.trained import Workshop
from tests.own_data import draw, prepared, refused


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
