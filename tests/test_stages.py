"""Fit-or-load: made once, found again, set aside when damaged, never half there."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from pathlib import Path

import pytest

from src.attacks.base import Attack
from src.attacks.fgsm import FGSM
from src.attacks.pgd import PGD
from src.errors import UserError
from src.keys import _code_digest, content_key, seed_of, source_digest
from src.stages import Stages


def write_result(folder: Path) -> None:
    (folder / "result.txt").write_text("42")


def make(stages: Stages, build=write_result, key: str = "k1") -> Path:
    return stages.make("kind", key, what="a stage", build=build, about={"why": "test"})


def test_made_once_then_found(tmp_path: Path) -> None:
    calls = []

    def build(folder: Path) -> None:
        calls.append(folder)
        write_result(folder)

    stages = Stages(tmp_path)
    assert make(stages, build) == make(stages, build)
    assert len(calls) == 1
    meta = json.loads((tmp_path / "kind" / "k1" / "meta.json").read_text())
    assert meta["about"] == {"why": "test"}
    assert list(meta["files"]) == ["result.txt"]


@pytest.mark.parametrize("damage", ["change", "truncate", "remove", "meta"])
def test_damaged_is_set_aside_and_made_again(tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    stages = Stages(tmp_path)
    folder = make(stages)
    file = folder / ("meta.json" if damage == "meta" else "result.txt")
    if damage == "remove":
        file.unlink()
    else:
        file.write_text("" if damage == "truncate" else "[]")
    assert (make(stages) / "result.txt").read_text() == "42"
    assert len(list((tmp_path / "kind").glob("k1.damaged-*"))) == 1
    assert "damaged" in caplog.text


def test_a_build_that_fails_leaves_no_stage_and_the_next_goes_on_from_its_files(tmp_path: Path) -> None:
    def dies(folder: Path) -> None:
        (folder / "epoch-1").write_text("half")
        raise OSError(28, "No space left on device")

    stages = Stages(tmp_path)
    with pytest.raises(OSError, match="No space"):
        make(stages, dies)
    assert not (tmp_path / "kind" / "k1").exists()

    seen = []
    make(stages, lambda folder: (seen.extend(p.name for p in folder.iterdir()), write_result(folder)))
    assert sorted(seen) == ["epoch-1", "meta.json"]


def test_a_stage_that_a_job_works_with_is_one_used_lately(tmp_path: Path) -> None:
    stages = Stages(tmp_path)
    first = make(stages)
    for later in ("k1", "k2"):  # found again, and while another is made
        os.utime(first, times=(0, 0))
        make(stages, key=later)
        assert first.stat().st_mtime > time.time() - 60


@pytest.mark.parametrize("ends", ["while writing", "before the rename"])
def test_a_stage_interrupted_at_its_last_file_is_whole_when_made_again(
    tmp_path: Path, ends: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    stages = Stages(tmp_path)
    with monkeypatch.context() as patch:
        if ends == "while writing":  # a disk full at the first of many bytes, and no time to clean up
            patch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
            patch.setattr(Path, "unlink", lambda *_, **__: None)
        else:
            patch.setattr(Path, "rename", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises((OSError, KeyboardInterrupt)):
            make(stages)
    made = make(stages)
    assert sorted(file.name for file in made.iterdir()) == ["meta.json", "result.txt"]
    assert list(json.loads((made / "meta.json").read_text())["files"]) == ["result.txt"]
    make(stages, lambda _: pytest.fail("made twice"))
    assert "damaged" not in caplog.text


def _race(root: Path) -> None:
    def build(folder: Path) -> None:
        with open(root / "calls", "a") as file:
            file.write(f"{os.getpid()}\n")
        time.sleep(0.3)
        write_result(folder)

    make(Stages(root), build)


def test_racing_processes_make_it_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    racers = [context.Process(target=_race, args=(tmp_path,)) for _ in range(4)]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join()
    assert [racer.exitcode for racer in racers] == [0] * 4
    assert len((tmp_path / "calls").read_text().split()) == 1


def test_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"paths\.artifacts=.*cannot be created"):
        Stages(tmp_path / "file" / "artifacts")


def test_keys_depend_on_content_not_on_order() -> None:
    assert content_key(a=1, b=[2, 3]) == content_key(b=[2, 3], a=1)
    assert content_key(a=1) != content_key(a=2)


def test_source_counts_but_comments_do_not(tmp_path: Path) -> None:
    assert source_digest(FGSM) != source_digest(PGD)
    assert source_digest(FGSM) != source_digest(Attack)
    texts = ["def f():\n    return 1\n", "# why\ndef f():\n    '''Doc.'''\n    return 1\n", "def f():\n    return 2\n"]
    digests = []
    for number, text in enumerate(texts):
        (tmp_path / f"{number}.py").write_text(text)
        digests.append(_code_digest(str(tmp_path / f"{number}.py")))
    assert digests[0] == digests[1] != digests[2]


def test_what_only_pictures_are_made_of_counts_for_no_stage(tmp_path: Path) -> None:
    methods = ["", "    def samples_to_show(self):\n        return 1\n", "    def loss(self):\n        return 1\n"]
    digests = []
    for method in methods:
        (tmp_path / "x.py").write_text(f"class A:\n    b = 1\n{method}")
        _code_digest.cache_clear()
        digests.append(_code_digest(str(tmp_path / "x.py")))
    assert digests[0] == digests[1] != digests[2]


def test_seeds_differ_by_every_part() -> None:
    assert len({seed_of(0, 0), seed_of(0, 1), seed_of(1, 0), seed_of(0), seed_of(0, 0, 0)}) == 5
    assert 0 <= seed_of(1, 2) < 2**62
