"""What lies in the cache: listed, verified, freed."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock

from src import fit, pipeline, records
from src.audit import composed
from src.overview import YOUNG, human, main, scan
from src.records import Record
from src.stages import Stages
from src.subject import Names
from src.tracking import NoTracker
from tests.conftest import Outcome
from tests.test_pipeline import SMALL, ok


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A classifier, a defense made from it that one record needs, and another that none needs."""
    stages = Stages(tmp_path / "artifacts")

    def put(kind: str, key: str, **about: object) -> None:
        stages.make(kind, key, what=f"{kind} {key}", build=lambda p: _write(p / "weights.pt", key * 100), about=about)

    put("classifier", "aaaa")
    put("defense", "bbbb", trained_on={"classifier": "aaaa"})
    put("defense", "cccc", node={"_target_": "x"})
    cell = {"dataset": "d", "classifier": "c", "defense": "v", "attack": "a", "norm": "linf", "eps": 0.1}
    record = Record(key="eeee", access="gray_box", seed=0, uses=["bbbb"], **cell)  # type: ignore[arg-type]
    records.save(record, tmp_path / "artifacts" / "records")
    records.save_sidecar(tmp_path / "artifacts" / "records" / "eeee.npz", {"label": np.arange(9)})
    for folder in (tmp_path / "artifacts").glob("*/????"):
        _made(folder, hours_ago=YOUNG + 1)
    return tmp_path / "artifacts"


def _made(folder: Path, *, hours_ago: float) -> None:
    for path in (folder, *folder.iterdir()):
        os.utime(path, times=(time.time() - 3600 * hours_ago,) * 2)


def _write(path: Path, text: str) -> None:
    path.write_text(text)


def test_scan_knows_sizes_sources_and_users(root: Path) -> None:
    stages = {stage.key: stage for stage in scan(root, [records.load(root / "records" / "eeee.json")])}
    assert set(stages) == {"aaaa", "bbbb", "cccc"}
    assert stages["bbbb"].reads == ["aaaa"]
    assert [len(stages[key].users) for key in ("aaaa", "bbbb", "cccc")] == [1, 1, 0]  # aaaa through bbbb
    assert stages["aaaa"].size == sum(file.stat().st_size for file in (root / "classifier" / "aaaa").iterdir())


def test_ls_shows_them(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ls", "--artifacts", str(root)]) == 0
    out = capsys.readouterr().out
    assert "3 stages" in out
    assert "1 records" in out
    assert "classifier aaaa" in out


def test_ls_of_a_stage_names_the_records_that_need_it(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = root.parent / "run" / "records"
    shutil.copytree(root / "records", run)
    assert main(["ls", "aaaa", "cccc", "--artifacts", str(root), "--records", str(run)]) == 0
    out = capsys.readouterr().out
    assert out.count("eeee: d c v a linf eps 0.1 gray_box seed 0") == 1
    assert "bbbb" not in out
    assert main(["ls", "zzzz", "--artifacts", str(root)]) == 1
    assert "zzzz: no such stage" in capsys.readouterr().err
    assert main(["gc", "cccc", "--yes", "--artifacts", str(root)]) == 1
    assert "only ls takes keys" in capsys.readouterr().err
    assert (root / "defense" / "cccc").exists()


def test_verify_finds_damage_and_says_so_by_its_exit_code(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "--artifacts", str(root)]) == 0
    (root / "defense" / "bbbb" / "weights.pt").write_text("other")
    (root / "classifier" / "aaaa" / "weights.pt").unlink()
    (root / "records" / "eeee.json").write_text("{")
    assert main(["verify", "--artifacts", str(root)]) == 1
    out = capsys.readouterr().out
    assert "bbbb: damaged: weights.pt" in out
    assert "aaaa: damaged: weights.pt" in out
    assert "eeee.json: not a record" in out
    assert "3 damaged" in out


@pytest.mark.parametrize("fault", ["truncated", "deleted"])
def test_verify_looks_at_the_verdicts_beside_a_record(
    root: Path, capsys: pytest.CaptureFixture[str], fault: str
) -> None:
    elsewhere = root.parent / "run" / "records"
    shutil.copytree(root / "records", elsewhere)
    verdicts = root / "records" / "eeee.npz"
    verdicts.write_bytes(verdicts.read_bytes()[:100])
    if fault == "deleted":
        verdicts.unlink()
    assert main(["verify", "--artifacts", str(root), "--records", str(elsewhere)]) == 1
    out = capsys.readouterr().out
    assert "eeee.npz: damaged" in out
    assert "1 damaged" in out


def test_gc_shows_first_and_frees_only_what_nothing_needs(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in (".dddd.partial", "bbbb.damaged-1"):
        (root / "defense" / name).mkdir()
        _made(root / "defense" / name, hours_ago=YOUNG + 1)
    assert main(["gc", "--artifacts", str(root)]) == 0
    shown = capsys.readouterr().out
    assert "cccc" in shown
    assert "interrupted" in shown
    assert "aaaa" not in shown
    assert (root / "defense" / "cccc").exists()
    assert main(["gc", "--artifacts", str(root), "--yes"]) == 0
    left = {path.name for kind in ("classifier", "defense") for path in (root / kind).iterdir() if path.is_dir()}
    assert left == {"aaaa", "bbbb"}
    assert main(["gc", "--artifacts", str(root)]) == 0
    assert "nothing to free" in capsys.readouterr().out


def test_gc_frees_nothing_where_a_folder_of_records_is_misspelled(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["gc", "--artifacts", str(root), "--records", str(root / "record"), "--yes"]) == 1
    assert "no such folder" in capsys.readouterr().err
    assert (root / "defense" / "cccc").exists()


def test_gc_spares_what_is_being_made_and_what_older_records_name(root: Path) -> None:
    (root / "defense" / ".dddd.partial").mkdir()
    _made(root / "defense" / ".dddd.partial", hours_ago=YOUNG + 1)
    old = records.load(root / "records" / "eeee.json").model_copy(update={"uses": [], "stages": {"defense": "cccc"}})
    records.save(old, root / "records")
    with FileLock(root / "defense" / ".dddd.lock"):
        assert main(["gc", "--artifacts", str(root), "--yes"]) == 0
    assert (root / "defense" / ".dddd.partial").exists()
    assert (root / "defense" / "cccc").exists()
    assert not (root / "defense" / "bbbb").exists()
    assert main(["gc", "--artifacts", str(root), "--yes"]) == 0
    assert not (root / "defense" / ".dddd.partial").exists()


def test_gc_spares_what_a_job_may_be_at_work_with_before_its_first_record(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (root / "records" / "eeee.json").unlink()
    _made(root / "defense" / "bbbb", hours_ago=YOUNG - 1)
    assert main(["gc", "--artifacts", str(root), "--yes"]) == 0
    assert f"2 that no record needs are spared: made in the last {YOUNG} hours" in capsys.readouterr().out
    assert (root / "classifier" / "aaaa").exists()  # older, but what the young one was made from
    assert (root / "defense" / "bbbb").exists()
    assert not (root / "defense" / "cccc").exists()


@pytest.mark.parametrize("at_work", [True, False])
def test_gc_spares_what_is_needed_for_a_stage_that_is_being_made(root: Path, at_work: bool) -> None:
    """What it is made from, and the model that its job had trained before, all of them days old."""
    (root / "records" / "eeee.json").unlink()
    job = Stages(root)
    for kind, key in (("classifier", "aaaa"), ("defense", "cccc")):
        job.make(kind, key, what="found", build=lambda _: pytest.fail("made again"), about={})

    def training(folder: Path) -> None:
        (folder / "last.ckpt").touch()
        for path in (folder, *root.glob("*/????")):
            _made(path, hours_ago=YOUNG + 1)
        assert main(["gc", "--artifacts", str(root), "--yes"]) == 0
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        job.make("defense", "dddd", what="a long training", build=training, about={"classifier": "aaaa"})
    if not at_work:
        assert main(["gc", "--artifacts", str(root), "--yes"]) == 0
    left = {path.name for path in root.glob("*/*") if path.is_dir()}
    assert left == ({"aaaa", "cccc", ".dddd.partial"} if at_work else set())


def test_gc_spares_the_checkpoint_of_a_training_that_waits_to_go_on(root: Path) -> None:
    partial = root / "defense" / ".dddd.partial"
    partial.mkdir()
    (partial / "last.ckpt").touch()
    os.utime(partial, times=(0, 0))  # begun long ago; the checkpoint was written over an hour ago
    os.utime(partial / "last.ckpt", times=(time.time() - 3600,) * 2)
    assert main(["gc", "--artifacts", str(root), "--yes"]) == 0
    assert (partial / "last.ckpt").exists()
    _made(partial, hours_ago=YOUNG + 1)
    assert main(["gc", "--artifacts", str(root), "--yes"]) == 0
    assert not partial.exists()


@pytest.mark.parametrize(
    ("defense", "kind", "overrides"),
    [
        ("vae_kl", "thresholds", []),
        ("vae", "examples", ["attack=deepfool", "threat=l2"]),
        ("smoothing", "certificate", [f"defense.{name}=2" for name in ("votes", "select_draws", "certify_images")]),
    ],
)
def test_gc_spares_the_training_behind_a_stage_made_lately(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, defense: str, kind: str, overrides: list[str]
) -> None:
    """Also where how it is used is part of the defense's key, which then is that of no stage."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        fit, "fit", lambda module, *_, folder, **__: torch.save(module.state_dict(), folder / "weights.pt")
    )
    arguments = ["logger=none", "callbacks=none", "limit.train_images=60", "limit.test_images=4", "threat.eps=0.1",
                 "threat.access=white_box", "attack=fgsm", f"defense={defense}", *overrides]  # fmt: skip
    job, chosen = composed(arguments)
    names = Names(**{name: chosen[name] for name in ("dataset", "classifier", "defense", "attack")})
    root = tmp_path / "artifacts"
    bench, radii = pipeline.prepare(job, names, Stages(root), NoTracker())
    if kind != "thresholds":
        list(pipeline.run(bench, radii, tmp_path))
    shutil.rmtree(root / "records", ignore_errors=True)
    stages = {stage.kind: stage for stage in scan(root)}
    assert {stages["classifier"].key, stages["defense"].key} <= set(stages[kind].reads)
    for stage in stages.values():
        _made(stage.path, hours_ago=YOUNG + (-1 if stage.kind == kind else 1))
    assert main(["gc", "--artifacts", str(root), "--yes"]) == 0
    assert {stage.kind for stage in scan(root)} >= {"classifier", "defense", kind}


def test_gc_frees_nothing_while_a_record_cannot_be_read(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root / "records" / "eeee.json").write_text("{")
    assert main(["gc", "--artifacts", str(root), "--yes"]) == 1
    said = capsys.readouterr()
    assert "eeee.json: not a record" in said.out
    assert said.err.startswith("error: gc: what the records above need")
    assert said.err.count("\n") == 1
    assert {path.name for path in root.glob("*/????")} == {"aaaa", "bbbb", "cccc"}


def test_a_folder_without_artifacts_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ls", "--artifacts", str(tmp_path / "none")]) == 1
    assert "no such folder" in capsys.readouterr().err


def test_a_meta_that_cannot_be_read_is_a_leftover(root: Path) -> None:
    (root / "defense" / "cccc" / "meta.json").write_text(json.dumps({"what": "x"}))
    (stage,) = [stage for stage in scan(root) if stage.key == "cccc"]
    assert "meta.json" in stage.leftover


def test_records_name_all_they_were_made_from(command: Callable[..., Outcome], tmp_path: Path) -> None:
    outcome = ok(command(*SMALL, "threat.eps=[0.1,0.2]", "threat.access=[gray_box,white_box]"))
    artifacts = tmp_path / "artifacts"
    by_key = {stage.key: stage for stage in scan(artifacts, records.find(outcome.runs()))}
    kinds = [sorted(by_key[key].kind for key in record.uses) for record in records.find(outcome.runs())]
    gray = ["classifier", "defense", "examples"]
    assert sorted(kinds) == sorted([gray, gray[:2], gray, gray[:2]])
    assert all(stage.users for stage in by_key.values())


@pytest.mark.parametrize(("size", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (3 * 2**30, "3.0 GiB")])
def test_sizes_for_people(size: int, text: str) -> None:
    assert human(size) == text
