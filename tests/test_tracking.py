"""What W&B and CSV are given, and that W&B neither asks, blocks, sends nor spreads."""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from src import fit, pipeline, tracking
from src.audit import composed
from src.frame import COLUMNS
from src.records import Record
from src.stages import Stages
from src.subject import Names
from src.tracking import CSVTracker, NoTracker, Tracker, relog
from tests.conftest import two_cores


def cell(eps: float, **changes: Any) -> Record:
    values: dict[str, Any] = {
        "key": f"k{eps}", "dataset": "digits", "classifier": "lenet", "defense": "vae", "attack": "pgd", "norm": "linf",
        "eps": eps, "access": "gray_box", "seed": 0, "n": 10, "robust_accuracy": 0.5,
    }  # fmt: skip
    return Record(**(values | changes))


@pytest.fixture(scope="module")
def patch() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, patch: pytest.MonkeyPatch) -> Path:
    """An empty home folder: no login, and whatever W&B writes there shows."""
    home = tmp_path_factory.mktemp("home")
    for name in ("WANDB_API_KEY", "WANDB_CACHE_DIR", "WANDB_DATA_DIR", "WANDB_ERROR_REPORTING", "NETRC"):
        patch.delenv(name, raising=False)
    for name in ("HOME", "USERPROFILE", "XDG_CONFIG_HOME", "XDG_CACHE_HOME"):
        patch.setenv(name, str(home))
    return home


def state() -> dict[str, Any]:
    """What a library must leave as it was; WANDB_SERVICE is how W&B's processes find each other."""
    found = {name: value for name, value in os.environ.items() if name not in ("WANDB_SERVICE", "PYTEST_CURRENT_TEST")}
    signals = {str(number): signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    return found | signals | {"exit": sys.exit, "excepthook": sys.excepthook, "cwd": os.getcwd()}


@pytest.fixture(scope="module")
def run(home: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tracker, list[str]]:
    """One offline run that had everything logged and then an error. W&B takes a second to start: started once."""
    from matplotlib.image import imsave

    folder = tmp_path_factory.mktemp("job")
    imsave(folder / "picture.png", np.random.default_rng(0).random((8, 8, 3)))
    import pytorch_lightning.loggers  # noqa: F401 (it sets variables of its own when first imported)

    before = state()
    tracker = Tracker(dir=str(folder), group="sweep", tags=["a"])
    with pytest.raises(ValueError, match="on purpose"), tracker:  # noqa: PT012 (the error ends the whole block)
        assert not list(folder.glob("wandb")), "nothing is started before it is needed"
        tracker.log_config({"seed": 3})
        for stage in ("classifier", "defense"):
            logger = tracker.lightning_logger(stage)
            assert not isinstance(logger, bool)
            for step in (0, 10, 20):
                logger.log_metrics({"loss": 1.0 / (step + 1)}, step=step)
            logger.finalize("success")
        tracker.log_curves([{"epoch": 0, "loss": 2.0}, {"epoch": 1, "loss": 1.0}], "late")
        tracker.log_table([cell(0.1), cell(math.inf)])
        tracker.log_image("picture", folder / "picture.png")
        tracker.summary({"robust": 0.25})
        raise ValueError("on purpose")
    after = state()
    return (
        folder,
        tracker,
        [name for name, value in before.items() if after.get(name) != value] + [*set(after) - set(before)],
    )


@dataclass
class Run:
    """What an offline run file holds."""

    name: str = ""
    group: str = ""
    tags: list[str] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    tables: dict[str, Any] = field(default_factory=dict)
    images: list[str] = field(default_factory=list)
    exit: int | None = None


def read_run(folder: Path) -> Run:
    """What W&B wrote of a run that is over; its last record may come some moments after the run was closed."""
    for _ in range(100):
        run = read_so_far(folder)
        if run.exit is not None:
            break
        time.sleep(0.2)
    return run


def read_so_far(folder: Path) -> Run:
    """The record stream of a run: W&B's own messages, in LevelDB's log format after a header of 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    (path,) = folder.glob("run-*.wandb")
    data, place, parts, run = path.read_bytes(), 7, b"", Run()
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        size, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        if place + 7 + size > len(data):
            break  # it is being written
        parts += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind not in (1, 4):  # a whole record, or the last part of one
            continue
        record = wandb_internal_pb2.Record.FromString(parts)
        parts = b""
        if record.HasField("run"):
            run.name, run.group, run.tags = record.run.display_name, record.run.run_group, list(record.run.tags)
        for told in (record.run.config, record.config):
            run.config |= {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in told.update}
        run.summary |= {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.summary.update}
        if record.history.item:
            row = {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.history.item}
            run.history.append(row)
        if record.HasField("exit"):
            run.exit = record.exit.exit_code
    for file in folder.glob("files/media/table/*.table.json"):
        text = file.read_text()
        run.tables[file.name.split("_")[0]] = json.loads(text, parse_constant=lambda n: pytest.fail(f"{n} is no JSON"))
    run.images = [file.name for file in folder.glob("files/media/images/*.png")]
    return run


def only_run(folder: Path) -> Run:
    (found,) = folder.glob("wandb/offline-run-*")
    return read_run(found)


def test_table_holds_columns_and_rows(run: tuple[Path, Tracker, list[str]]) -> None:
    table = only_run(run[0]).tables["results"]
    assert table["columns"] == list(COLUMNS)
    assert [row[COLUMNS.index("eps")] for row in table["data"]] == [0.1, "inf"]
    assert [row[COLUMNS.index("detection_auc")] for row in table["data"]] == [None, None]


def test_pictures_are_kept(run: tuple[Path, Tracker, list[str]]) -> None:
    assert [name.split("_")[0] for name in only_run(run[0]).images] == ["picture"]


def test_each_stage_has_its_own_axis(run: tuple[Path, Tracker, list[str]]) -> None:
    rows = only_run(run[0]).history
    for stage in ("classifier", "defense"):
        assert [row[f"{stage}/step"] for row in rows if f"{stage}/loss" in row] == [0, 10, 20]
    assert [(row["late/step"], row["late/loss"]) for row in rows if "late/loss" in row] == [(0, 2.0), (1, 1.0)]
    assert not any("trainer/global_step" in row for row in rows)


def test_the_run_is_closed_as_failed_after_an_error(run: tuple[Path, Tracker, list[str]]) -> None:
    assert run[1]._run is None
    assert only_run(run[0]).exit == 1


def test_nothing_global_changes_and_nothing_is_written_elsewhere(
    run: tuple[Path, Tracker, list[str]], home: Path
) -> None:
    assert run[2] == []
    assert not [path for path in home.rglob("*") if "wandb" in path.relative_to(home).as_posix()]
    import wandb

    assert wandb.run is None


def test_online_without_login_goes_offline_and_says_so(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asked"))
    with Tracker(mode="online", dir=str(tmp_path)) as tracker:
        tracker.summary({"x": 1})
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("W&B: ")]
    assert len(said) == 1
    assert all(part in said[0] for part in ("no login found", "offline", "wandb login", "wandb sync"))
    assert list(tmp_path.glob("wandb/offline-run-*"))


@pytest.mark.parametrize(("key", "why"), [("0" * 40, "no answer from the server (timed out)"), ("short", "not usable")])
def test_online_without_server_or_with_a_wrong_key_goes_offline(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, key: str, why: str
) -> None:
    import wandb

    start = wandb.init

    def no_server(**settings: Any) -> wandb.Run:  # a test never tries the real one
        if settings["mode"] == "online":
            raise wandb.errors.CommError("timed out\nConsider increasing the init_timeout setting")
        return start(**settings)

    monkeypatch.setattr(wandb, "init", no_server)
    monkeypatch.setenv("WANDB_API_KEY", key)
    with Tracker(mode="online", dir=str(tmp_path)) as tracker:
        tracker.summary({"x": 1})
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("W&B: ")]
    assert len(said) == 1
    assert why in said[0]
    assert key not in said[0]
    assert list(tmp_path.glob("wandb/offline-run-*"))


@pytest.mark.parametrize("kind", ["disabled", "none"])
def test_switched_off_does_nothing(tmp_path: Path, kind: str) -> None:
    with NoTracker() if kind == "none" else Tracker(mode="disabled", dir=str(tmp_path)) as tracker:
        tracker.log_config({"x": 1})
        tracker.log_table([cell(0.1)])
        tracker.log_image("x", tmp_path / "x.png")
        tracker.summary({"x": 1})
        tracker.log_curves([{"loss": 1.0}], "x")
        assert tracker.lightning_logger("x") is False
    assert not list(tmp_path.iterdir())


def test_csv_writes_a_file_for_each_stage(tmp_path: Path) -> None:
    with CSVTracker(dir=str(tmp_path)) as tracker:
        for stage in ("classifier", "defense"):
            logger = tracker.lightning_logger(stage)
            logger.log_metrics({"loss": 0.5}, step=7)
            logger.save()
        tracker.log_curves([{"step": 0, "loss": 2.0}, {"step": 1, "accuracy": 1.0}], "late")
    for stage in ("classifier", "defense"):
        assert "0.5" in (tmp_path / "metrics" / stage / "metrics.csv").read_text()
    assert (tmp_path / "metrics" / "late" / "metrics.csv").read_text().splitlines()[0] == "step,loss,accuracy"


def test_the_curves_of_a_defense_are_those_of_the_training_it_used(tmp_path: Path) -> None:
    """Its own key says how it is used as well, and no stage bears it."""
    folder = tmp_path / "artifacts" / "defense" / "training"
    folder.mkdir(parents=True)
    (folder / "metrics.csv").write_text("epoch,step,train_loss\n0,9,3\n")
    used = cell(0.1, stages={"classifier": "c", "defense": "d"}, uses=["c", "training", "thresholds"])
    with CSVTracker(dir=str(tmp_path / "run")) as tracker:
        relog.log_job(tracker, [used], {"paths": {"artifacts": str(tmp_path / "artifacts")}}, [])
    assert [path.parent.name for path in tmp_path.glob("run/metrics/*/metrics.csv")] == ["defense"]


class BegunError(Exception):
    """A training is about to start."""


@pytest.mark.parametrize(
    ("trainer", "defense", "live", "strategy"),
    [
        ("cpu", "distillation", ["defense"], None),
        pytest.param("ddp_cpu", "distillation", [], "ddp_fork_find_unused_parameters_true", marks=two_cores),
        pytest.param("ddp_cpu", "squeezed_training", [], None, marks=two_cores),
    ],
)
def test_a_training_in_processes_is_logged_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trainer: str, defense: str, live: list[str], strategy: str | None
) -> None:
    """A logger made for it would be thrown away, and its stage taken for one that is logged already."""
    asked: list[str] = []
    runs: list[fit.Run] = []

    class Asked(NoTracker):
        def lightning_logger(self, prefix: str) -> bool:
            asked.append(prefix)
            return False

    def begun(run: fit.Run) -> None:
        runs.append(run)
        raise BegunError

    arguments = ["logger=none", "callbacks=none", f"trainer={trainer}", f"defense={defense}"]
    names = Names(dataset="digits", classifier="cnn3", defense=defense, attack="pgd")
    monkeypatch.chdir(tmp_path)
    stages = Stages(Path("artifacts"), plan=True)
    network = pipeline.prepare(composed(arguments)[0], names, stages, NoTracker())[0].subject.classifier
    torch.save(network.state_dict(), "w.pt")
    monkeypatch.setattr(fit, "_together", begun)
    job, _ = composed([*arguments, "classifier.checkpoint=w.pt"])
    with pytest.raises(BegunError):
        pipeline.prepare(job, names, Stages(Path("artifacts")), Asked())
    assert asked == live
    assert runs[0].options.get("strategy") == strategy


@pytest.mark.parametrize("name", ["wandb", "csv", "none"])
def test_each_yaml_builds(tmp_path: Path, name: str) -> None:
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    config = OmegaConf.load(Path(__file__).parent.parent / "conf" / "logger" / f"{name}.yaml")
    if "dir" in config:
        config.dir = str(tmp_path)
    assert isinstance(instantiate(config), NoTracker)


@pytest.mark.parametrize(
    ("folder", "group"),
    [
        ("multirun/2026-01-31/12-00-00", "2026-01-31_12-00-00"),
        ("multirun/2026-01-31/12-00-00-012345", "2026-01-31_12-00-00-012345"),
        ("sweeps/mnist", "mnist"),
    ],
)
def test_group_is_named_after_the_sweep(folder: str, group: str) -> None:
    assert tracking.group_of(folder) == group
