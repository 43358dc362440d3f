"""Jobs that are told to leave, or that died: what is whole is kept, what failed is done again."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import hydra
import pytest
import torch
from hydra.core.plugins import Plugins
from pytorch_lightning import Callback

from src import curves, job, leaving, records, report, resuming
from src.measure import Bench
from src.records import Record
from src.stages import Stages, alone
from tests.short_jobs import TINY, Command
from tests.test_pipeline import figures, ok


class Told(Callback):
    """SIGTERM in the middle of the second epoch, or Ctrl-C when a training has stopped early, if a file says so."""

    def __init__(self, *, when: str) -> None:
        self.when = when

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if Path("tell").exists() and self.when == "epoch" and trainer.current_epoch == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    def on_train_end(self, trainer, pl_module) -> None:
        if Path("tell").exists() and self.when == "stopped" and trainer.should_stop:
            raise KeyboardInterrupt


def swallowed(*_: Any) -> None:
    """Ctrl-C in the C code of a library, which makes an exception of its own of it."""
    try:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)
    except KeyboardInterrupt:
        raise ValueError("Invalid affine transformation matrix") from None


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Heard: a script starts what it puts into the background with Ctrl-C ignored, the tests too."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize("where", ["src.retry.settings", "src.job._measure", "src.callbacks.results_table.gather"])
def test_ctrl_c_is_one_whatever_a_library_makes_of_it(
    command: Command, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    monkeypatch.setattr(where, swallowed)
    stopped = command("-m", *TINY, "limit.epochs=1", "defense=none,jpeg", "threat.access=gray_box")
    assert stopped.code == 130
    assert stopped.error_lines == [f"error: {leaving.INTERRUPTED}"]
    done = [record.status for record in records.find(stopped.folder.glob("multirun/*/*"))]
    assert done == (["done"] * 2 if "gather" in where else []), "none has failed"
    assert leaving._told is None


@pytest.mark.parametrize("when", ["epoch", "stopped"])
def test_a_training_told_to_leave_ends_as_one_that_was_not(command: Command, tmp_path: Path, when: str) -> None:
    # A learning rate that spoils the weights: no epoch after the first is better, and patience ends soon.
    more = ("classifier.fit.lr=1.0", "classifier.fit.patience=1", "limit.epochs=8") if when == "stopped" else ()
    arguments = (*TINY, *more, f"+callbacks.told._target_={__name__}.Told", f"+callbacks.told.when={when}")
    ok(command(*arguments, "paths.artifacts=undisturbed"))
    (tmp_path / "tell").touch()
    told = command(*arguments)
    (tmp_path / "tell").unlink()
    assert told.code == (143 if when == "epoch" else 130)
    assert told.error_lines == [told.err.strip().splitlines()[-1]]
    assert "run the same command again" in told.err
    assert "Traceback" not in told.err
    assert "resuming" in ok(command(*arguments)).out
    one, two = (next(tmp_path.glob(f"{place}/classifier/[!.]*")) for place in ("undisturbed", "artifacts"))
    weights, again = (torch.load(stage / "weights.pt", weights_only=True) for stage in (one, two))
    assert all(torch.equal(weights[key], again[key]) for key in weights)
    assert (one / "metrics.csv").read_text() == (two / "metrics.csv").read_text()
    first, second = ([figures(r) for r in records.find([tmp_path / place])] for place in ("undisturbed", "artifacts"))
    assert first == second


def test_a_training_whose_weights_could_not_be_written_is_not_made_again(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    epochs: list[int] = []
    monkeypatch.setattr(resuming.Seeded, "on_train_epoch_start", lambda _, trainer, *__: epochs.append(1))
    arguments = (*TINY, "limit.epochs=2", "defense=none", "attack=noise", "threat.access=white_box")
    with monkeypatch.context() as patch:
        patch.setattr(records, "save_tensors", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
        assert command(*arguments).code == 1
    assert len(epochs) == 2
    ok(command(*arguments))
    assert len(epochs) == 2
    (made,) = tmp_path.glob("artifacts/classifier/[!.]*")
    assert sorted(file.name for file in made.iterdir()) == ["meta.json", "metrics.csv", "weights.pt"]


def test_curves_of_several_tries_are_those_of_one(tmp_path: Path) -> None:
    tries = (
        "epoch,step,loss\n0,9,3\n1,19,2\n",
        "epoch,lr,step,loss\n1,,19,2.5\n2,0.1,29,1\n3,0.1,3",  # killed while it wrote
        "",  # killed before it logged
        "acc,epoch,loss,step\n0.5,3,0.5,39\n",
    )
    (tmp_path / "curves").mkdir()
    for text in tries:
        (tmp_path / "curves" / "metrics.csv").write_text(text)
        curves.gather(tmp_path)
    assert (tmp_path / "metrics.csv").read_text().split() == [
        "acc,epoch,loss,lr,step", ",0,3,,9", ",1,2.5,,19", ",2,1,0.1,29", "0.5,3,0.5,,39"
    ]  # fmt: skip


def test_what_fails_after_the_last_cell_is_a_row_and_takes_no_figure_with_it(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "_pictures", lambda *_: [])  # half of this test's time
    arguments = (*TINY, "limit.epochs=1", "defense=none", "threat.access=white_box", "analysis=distances")
    swept = command("-m", *arguments)  # fgsm searches no smallest change: that analysis cannot be drawn
    assert swept.code == 1
    (sweep,) = tmp_path.glob("multirun/*/*")
    assert "1 of 2 cells failed" in swept.err
    assert "analysis=distances" in (sweep / "results.csv").read_text()

    single = command(*arguments)
    assert single.code == 1
    assert len(single.error_lines) == 1
    (run,) = single.runs()
    (row,) = [record for record in records.find([run]) if record.status == "failed"]
    assert (row.eps, row.access) == (None, "")
    assert "analysis=distances" in row.reason
    assert ",done," in (run / "results.csv").read_text()
    assert "white_box" in single.out  # the table


def test_of_a_job_that_fails_midway_the_cells_that_are_left_are_rows(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    cell = Bench.cell
    usual: list[float] = []

    def unlucky(self: Bench, eps: float, *rest: Any) -> Record:
        usual.append(eps)
        if len(set(usual)) > 1:
            raise RuntimeError("out of luck")
        return cell(self, eps, *rest)

    monkeypatch.setattr(Bench, "cell", unlucky)
    outcome = command(*TINY, "limit.epochs=1", "defense=none", "threat.eps=null")
    assert outcome.code == 1
    found = records.find(outcome.runs())
    assert [r.eps for r in found if r.status == "done"] == usual[:2]
    left = {(r.eps, r.access) for r in found if r.status == "failed"}
    assert None not in {eps for eps, _ in left}
    assert not left & {(r.eps, r.access) for r in found if r.status == "done"}
    assert (usual[-1], "white_box") in left

    monkeypatch.setattr(Bench, "cell", cell)
    monkeypatch.setattr(report, "write_report", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
    outcome = command(*TINY, "limit.epochs=1", "defense=none", "threat.eps=null", "hydra.run.dir=full")
    assert outcome.code == 1
    found = records.find([outcome.folder / "full"])
    assert [(r.eps, r.access) for r in found if r.status == "failed"] == [(None, "")]  # all the cells are done


@pytest.mark.parametrize("mode", ["run", "sweep"])
def test_runs_of_the_same_second_have_a_folder_each(
    command: Command, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    """An array of Slurm jobs, several agents: in one folder they would overwrite each other's results."""

    class Clock(datetime):
        ticks = 0

        @classmethod
        def now(cls, tz: Any = None) -> datetime:
            cls.ticks += 1
            return datetime(2026, 1, 31, 12, 0, 0, cls.ticks)

    monkeypatch.setattr(hydra.core.utils, "datetime", Clock)
    one, two = (ok(command("--cfg", "hydra", "-p", f"hydra.{mode}.dir", "--resolve")).out for _ in range(2))
    assert "12-00-00-00000" in one
    assert one != two


def test_a_launcher_that_gives_up_leaves_a_table_and_one_line(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As joblib's and submitit's do when one of their workers is killed."""
    launcher = Plugins.instance().class_name_to_class["hydra._internal.core_plugins.basic_launcher.BasicLauncher"]
    launch = launcher.launch

    def killed(self: Any, jobs: Any, initial_job_idx: int) -> Any:
        launch(self, jobs[:1], initial_job_idx)
        sweep = Path(self.config.hydra.sweep.dir)
        shutil.copytree(sweep / "0" / ".hydra", sweep / "1" / ".hydra")  # a job before its first cell
        (sweep / "0" / "done.json").unlink()  # one before its last
        raise RuntimeError("A worker process\nwas unexpectedly terminated")

    monkeypatch.setattr(launcher, "launch", killed)
    monkeypatch.setattr(report, "_pictures", lambda *_: [])
    ended = command("-m", *TINY, "limit.epochs=1", "defense=none", "threat.access=white_box", "threat.eps=0.1,0.2,0.3")
    assert ended.code == 1
    assert "Traceback" not in ended.err
    (line,) = ended.error_lines
    assert "RuntimeError: A worker process was unexpectedly terminated" in line
    assert "+retry=failed" in line
    assert "2 of 3 cells failed" in line
    (sweep,) = tmp_path.glob("multirun/*/*")
    assert (sweep / "results.csv").read_text().count("left no record of its end") == 2

    refused = command("-m", *TINY, "defence=none,jpeg", f"hydra.sweep.dir={sweep}")
    assert "cells failed" not in refused.err  # wrong input is no sweep that ended early


def _hold(path: Path, word: Path) -> None:
    with alone(path, "it"):
        word.touch()
        time.sleep(60)


def test_the_lock_of_a_holder_that_was_killed_is_free(tmp_path: Path) -> None:
    (tmp_path / "kind").mkdir()
    holder = multiprocessing.get_context("fork").Process(
        target=_hold, args=(tmp_path / "kind" / ".k.lock", tmp_path / "held")
    )
    holder.start()
    while not (tmp_path / "held").exists():
        time.sleep(0.01)
    os.kill(holder.pid or 0, signal.SIGKILL)
    holder.join()
    started = time.perf_counter()
    Stages(tmp_path).make("kind", "k", what="it", build=lambda folder: (folder / "a").touch(), about={})
    assert time.perf_counter() - started < 5
    assert json.loads((tmp_path / "kind" / "k" / "meta.json").read_text())["key"] == "k"
    assert not (tmp_path / "kind" / ".k.lock").exists()


def test_a_full_disk_is_said_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device", "weights.pt")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space") as raised:
        records.save_tensors({"a": torch.zeros(3)}, tmp_path / "weights.pt")
    assert "no space left on the device (weights.pt)" in job.explain(raised.value)
    assert list(tmp_path.iterdir()) == []
