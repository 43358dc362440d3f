"""``+plan=true``: what would be done, before it is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from filelock import FileLock, Timeout
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.hydra_config import HydraConfig

from src import job, records
from src.attacked import AttackedImages
from src.measure import Bench
from src.plan import Plan, report, show
from src.records import Record
from src.threat import Access
from src.tracking import NoTracker
from tests.conftest import Outcome
from tests.test_keys import planned
from tests.test_pipeline import SMALL, ok

Command = Callable[..., Outcome]
CELLS = ("threat.eps=[0.1,0.2]", "threat.access=[gray_box,white_box]")


def test_a_plan_makes_nothing_and_is_kept_to(command: Command, tmp_path: Path) -> None:
    before = ok(command(*SMALL, *CELLS, "+plan=true")).out
    assert "4 cells: 0 found, 4 to measure" in before
    assert "4 stages: 0 found, 4 to make" in before  # classifier, defense, examples of two eps
    assert not list((tmp_path / "artifacts").rglob("*.pt"))
    ok(command(*SMALL, *CELLS))
    after = ok(command(*SMALL, *CELLS, "+plan=true")).out
    assert "4 cells: 4 found, 0 to measure" in after
    assert "2 stages: 2 found, 0 to make" in after  # the examples are not asked for again
    more = ok(command(*SMALL, CELLS[1], "threat.eps=[0.1,0.3]", "+plan=true")).out
    assert "4 cells: 2 found, 2 to measure" in more
    assert "1 to make" in more
    assert "by what such cells and stages took so far" in more


def test_a_sweep_counts_what_its_jobs_share_once(command: Command) -> None:
    swept = ok(command("-m", *SMALL, *CELLS, "defense=none,vae,feature_squeezing", "+plan=true")).out
    assert "12 cells: 0 found, 12 to measure" in swept
    # a classifier, a VAE, the examples of two eps
    assert "4 stages: 0 found, 4 to make" in swept


def test_the_plan_of_a_sweep_names_the_cells_that_its_jobs_make(command: Command) -> None:
    """Values that vary beside choices: the seed, which the data's config refers to, and one that names the cells."""
    sweep = (
        "-m", *SMALL, "limit.epochs=1", "threat.access=gray_box", "threat.eps=0.1", "seed=0,1", "attack.steps=1,2",
        "defense=none",
    )  # fmt: skip
    assert "4 cells: 0 found, 4 to measure" in ok(command(*sweep, "+plan=true")).out
    ok(command(*sweep))
    assert "4 cells: 4 found, 0 to measure" in ok(command(*sweep, "+plan=true")).out


def test_the_plan_of_a_sweep_over_parts_of_an_attack(command: Command) -> None:
    sweep = (
        "-m",
        *SMALL[:-2],
        "attack=worst_case",
        "attack@attack.members.pgd=apgd,fgsm",
        "~attack@attack.members.square",
    )
    planned = ok(command(*sweep, "threat.eps=0.1", "defense=none", "threat.access=white_box", "+plan=true"))
    assert "2 cells: 0 found, 2 to measure" in planned.out


def test_a_plan_says_which_jobs_cannot_work_and_launches_none(command: Command, tmp_path: Path) -> None:
    refused = command("-m", *SMALL, *CELLS, "classifier=cnn3,lenet", "+plan=true")
    assert refused.code == 1
    assert "4 cells: 0 found, 4 to measure" in refused.out
    assert len(refused.error_lines) == 1
    assert "cnn3" in refused.error_lines[0]
    assert not list(tmp_path.rglob("records"))


def test_what_one_of_a_list_makes_impossible_is_no_fault_of_the_others(command: Command) -> None:
    refused = command(
        "-m", *SMALL, "attack=fgsm", "defense=none", "threat.eps=0.1", "threat.access=[gray_box,white_box],black_box",
        "+plan=true",
    )  # fmt: skip
    assert refused.code == 1
    assert "2 cells: 0 found, 2 to measure" in refused.out
    assert "needs gradients" in refused.error_lines[0]


class Witness(NoTracker):
    """Counts the runs that were started."""

    started = 0

    def __init__(self) -> None:
        type(self).started += 1


def test_cached_cells_start_no_run_and_draw_nothing(command: Command, tmp_path: Path) -> None:
    sweep = (
        "-m", *SMALL, "limit.epochs=1", *CELLS, "defense=none,feature_squeezing", f"logger._target_={__name__}.Witness",
    )  # fmt: skip
    Witness.started = 0
    ok(command(*sweep, "hydra.sweep.dir=first"))
    assert Witness.started == 3  # two jobs and the sweep's own
    ok(command(*sweep, "hydra.sweep.dir=second"))
    assert Witness.started == 4  # the sweep's own
    assert (tmp_path / "first" / "0" / "results.csv").exists()
    assert {path.name for path in (tmp_path / "second" / "0").iterdir()} == {
        ".hydra", "done.json", "records", "train.log"
    }  # fmt: skip
    assert records.find([tmp_path / "first"]) == records.find([tmp_path / "second"])


@pytest.mark.parametrize("text", ["", "[]", '{"what": "x"}'])
def test_a_plan_passes_over_what_a_run_would_mend(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    like = ("classifier x on d", "classifier on d")
    whole = json.dumps({"like": like, "images": 100, "seconds": 40})
    for name, meta in (("aaaa", whole), ("bbbb", text), ("cccc.damaged-1", text), (".dddd.partial", text)):
        (tmp_path / "classifier" / name).mkdir(parents=True)
        (tmp_path / "classifier" / name / "meta.json").write_text(meta)
    (tmp_path / "records").mkdir()
    (tmp_path / "records" / "eeee.json").write_text(text)
    stage = {"what": "classifier x on d", "like": like, "images": 100, "present": False}
    show(Plan(stages={"s": stage}, artifacts=str(tmp_path)))
    assert "about 40 s" in capsys.readouterr().out


def cell(**changes: object) -> dict[str, object]:
    known = {"dataset": "d", "classifier": "c", "attack": "pgd", "defense": "vae", "access": "white_box", "variant": ""}
    return known | {"n": 100, "present": False, "same": object()} | changes


def took(seconds: float, **changes: object) -> Record:
    shape = {name: value for name, value in cell(**changes).items() if name not in ("present", "same")}
    return Record(**shape, key="k", norm="linf", eps=0.1, seed=0, wall_seconds=seconds)  # type: ignore[arg-type]


def stage(name: str, dataset: str = "d", images: int = 100) -> dict[str, object]:
    what = f"classifier {name} on {dataset}"
    return {"what": what, "like": (what, f"classifier on {dataset}"), "images": images, "present": False}


def test_time_is_that_of_the_most_alike() -> None:
    before = [took(100.0), took(200.0), took(5.0, access="gray_box"), took(1000.0, attack="square")]
    plan = Plan(cells={"a": cell(), "b": cell(access="gray_box"), "c": cell(defense="other"), "d": cell(present=True)})
    # 150 (median of the same), 5, 100 (median of pgd on d); the one that is there costs nothing
    assert "about 4 min" in report(plan, before, [])
    plan = Plan(stages={"s": stage("x")})
    assert "about 40 s" in report(plan, [], [stage("y") | {"seconds": 40}])
    assert "1 of which nothing is known yet" in report(plan, [], [])


def test_time_of_another_size_counts_image_for_image() -> None:
    """A short try beforehand tells how long the whole takes, until there is one of the same size."""
    plan = Plan(cells={"a": cell(n=10_000)}, stages={"s": stage("x", images=600_000)})
    short = [took(6.0, n=100, variant="debug=quick")]
    trial = stage("x", images=500) | {"seconds": 1}
    assert "about 30 min" in report(plan, short, [trial])  # 600 s and 1200 s
    whole = stage("x", images=600_000) | {"seconds": 180}
    assert "about 4 min" in report(plan, [*short, took(60.0, n=10_000)], [trial, whole])


def test_other_attacks_and_other_data_tell_nothing_of_the_time() -> None:
    plan = Plan(cells={"a": cell()}, stages={"s": stage("x")})
    told = report(plan, [took(9.0, attack="fgsm"), took(9.0, dataset="e")], [stage("x", "e") | {"seconds": 40}])
    assert "time unknown; 2 of which nothing is known yet" in told


def test_what_a_stage_took_is_no_time_of_the_cell_that_was_first_to_need_it(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    test = AttackedImages.test

    def slow(self: AttackedImages, *args: Any, **options: Any) -> Any:
        clock[0] += 1000 if options.get("path") else 1  # a stage's images are kept in a file
        return test(self, *args, **options)

    monkeypatch.setattr(AttackedImages, "test", slow)
    small = ("limit.epochs=1", "limit.train_images=60", "limit.test_images=4", "threat.access=gray_box")
    ok(command(*SMALL, *small, "threat.eps=0.1", "defense=none"))
    (record,) = records.find([tmp_path / "artifacts"])
    (examples,) = (tmp_path / "artifacts" / "examples").glob("*/meta.json")
    assert json.loads(examples.read_text())["seconds"] == 1000
    assert 1 <= record.wall_seconds < 1000


def test_a_cell_without_its_verdicts_is_to_be_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    bench = planned("defense=jpeg")
    verdicts = tmp_path / "artifacts" / "records" / f"{bench.planned(0.1, Access.WHITE_BOX)['key']}.npz"
    records.save_sidecar(verdicts, {"label": np.arange(9)})
    verdicts.with_suffix(".json").touch()
    assert bench.planned(0.1, Access.WHITE_BOX)["present"]
    verdicts.write_bytes(verdicts.read_bytes()[:100])
    assert not bench.planned(0.1, Access.WHITE_BOX)["present"]
    verdicts.unlink()
    assert not bench.planned(0.1, Access.WHITE_BOX)["present"]


def test_a_cell_is_measured_once_and_by_one_process_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    bench = planned("defense=jpeg")

    def measured(self: Bench, threat: Any, access: Access, key: str) -> Record:
        store = tmp_path / "artifacts" / "records"
        (lock,) = store.glob(".*.lock")
        with pytest.raises(Timeout):  # held
            FileLock(lock).acquire(timeout=0)
        records.save_sidecar(store / f"{key}.npz", {"label": np.arange(9)})
        return took(1.0).model_copy(update={"key": key})

    monkeypatch.setattr(Bench, "_measured", measured)
    first = bench.cell(0.1, Access.WHITE_BOX, tmp_path / "run")
    monkeypatch.setattr(Bench, "_measured", lambda *_: pytest.fail("measured twice"))
    assert bench.cell(0.1, Access.WHITE_BOX, tmp_path / "again") == first
    assert len(list((tmp_path / "again").iterdir())) == 2  # with its verdicts


def test_the_certificate_is_part_of_the_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    bench = planned("defense=smoothing")
    bench.planned(0.1, Access.WHITE_BOX)
    assert sorted(stage["kind"] for stage in bench.stages.asked.values()) == ["certificate", "classifier", "defense"]


def test_each_job_of_a_sweep_is_composed_once_and_has_a_config_of_its_own(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    composed: list[list[str]] = []
    compose = ConfigLoaderImpl.load_sweep_config

    def counted(self: ConfigLoaderImpl, master_config: Any, sweep_overrides: list[str]) -> Any:
        composed.append(sweep_overrides)
        return compose(self, master_config, sweep_overrides)

    ran: list[tuple[int, str, Any]] = []

    def run(cfg: Any, settings: str) -> None:
        ran.append((HydraConfig.get().job.num, str(cfg.attack._target_).rsplit(".", 1)[-1], cfg))

    monkeypatch.setattr(ConfigLoaderImpl, "load_sweep_config", counted)
    monkeypatch.setattr(job, "run", run)
    command("-m", "attack=fgsm,deepfool,cw", "logger=none")
    assert [(number, attack) for number, attack, _ in ran] == [(0, "FGSM"), (1, "DeepFool"), (2, "CW")]
    assert len(composed) == 3

    ran.clear()
    command("-m", "attack=fgsm,fgsm", "logger=none")
    assert [(number, attack) for number, attack, _ in ran] == [(0, "FGSM"), (1, "FGSM")]
    assert ran[0][2] is not ran[1][2]


def test_cells_that_differ_in_what_they_are_called_are_one_to_measure(command: Command) -> None:
    of_none = ("defense=none", "threat.eps=0.1", "threat.access=white_box")  # nothing is random
    planned = ok(command("-m", *SMALL, *of_none, "eot_draws=10,20", "+plan=true")).out
    assert "2 cells: 0 found, 1 to measure, 1 the same" in planned
