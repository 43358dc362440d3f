"""W&B end to end, offline: what a job, a cached job and `report wandb` leave, read back from the run files."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import OmegaConf

from src import config, fit, job, pipeline, report, retry
from src import records as store
from src.audit import composed
from src.callbacks import results_table
from src.data.digits import Digits
from src.errors import UserError
from src.records import Record
from src.report.__main__ import _relog, main
from src.report.command import CONF
from src.report.command import command as copied
from src.stages import Stages
from src.subject import Names
from src.tracking import CSVTracker, NoTracker, dashboard, relog
from tests.cells import cell, pair, sidecar
from tests.conftest import Outcome
from tests.test_tracking import read_run


@pytest.mark.pictures
def test_a_job_is_a_run_and_goes_on_as_the_same_run(command: Callable[..., Outcome]) -> None:
    words = ["+debug=quick", "attack=fgsm", "defense=jpeg", "threat.eps=[0.2,0.3]"]  # at 0.1 gray_box is the stronger
    assert command(*words, "logger.tags=[mine]", "hydra.run.dir=a").code == 0
    one = next(record for record in store.find([Path("a")]) if record.access == "white_box")
    copy = command(*shlex.split(copied(one))[3:], "hydra.run.dir=b")
    folder = copy.folder
    assert f"found ({one.key})" in copy.out, "the command of a cell leads to it"
    assert not list((folder / "b").glob("wandb/*run-*")), "every cell was found: no empty run"
    (run,) = (folder / "a").glob("wandb/offline-run-*")
    found = read_run(run)
    assert set(found.tags) == {"mine", "digits", "cnn3", "jpeg", "fgsm", "gray_box", "white_box"}
    assert found.config["seed"] == 0
    assert found.config["cell"]["defense"] == "jpeg"
    assert [row["eps"] for row in found.history if "robust/white_box" in row] == [0.2, 0.3]
    assert [row for row in found.history if "classifier/train_loss" in row], "the classifier was trained here"
    assert found.summary["largest_eps/white_box"] == found.summary["robust_accuracy/white_box/eps_0.3"]
    assert len(found.tables["results"]["data"]) == 4
    assert found.tables["results"]["columns"][:3] == ["dataset", "classifier", "defense"]
    assert {path.name.split("_")[0] for path in run.glob("files/media/images/*.png")} >= {"pictures", "robustness"}

    # A third eps: another config, with cells and a classifier of the job before.
    command(*words[:3], "threat.eps=[0.25,0.3]", "hydra.run.dir=c")
    (other,) = (folder / "c").glob("wandb/offline-run-*")
    live = read_run(other)
    assert [row for row in live.history if "classifier/train_loss" in row], "its curves are told all the same"

    assert main(["wandb", str(folder / "c"), "--out", str(folder / "again")]) == 0
    assert len(list((folder / "again").glob("wandb/offline-run-*"))) == 2, "one job, and the results"
    (again,) = (folder / "again").glob(f"wandb/offline-run-*-{other.name.split('-')[-1]}")
    told = read_run(again)  # logged again, it continues the run of the job, with all it had
    assert told.tables["results"]["data"] == live.tables["results"]["data"]
    assert told.config["threat"] == live.config["threat"]


def test_records_are_logged_at_any_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cells = [r for attack in ("fgsm", "pgd") for r in pair(attack=attack, config={"seed": 0}, defense_ms_per_image=1.0)]
    for record in cells:
        store.save(record, tmp_path / "s" / "records")
        sidecar(record, tmp_path / "s" / "records")
    assert main(["wandb", str(tmp_path / "s"), "--group", "mine", "--out", str(tmp_path / "o")]) == 0
    runs = [read_run(path) for path in sorted((tmp_path / "o").glob("wandb/offline-run-*"))]
    assert "3 runs of group mine" in capsys.readouterr().out
    assert {run.group for run in runs} == {"mine"}
    (whole,) = [run for run in runs if run.name == "results"]
    table = whole.tables["results"]
    attacks = [row[table["columns"].index("attack")] for row in table["data"]]
    assert sorted(attacks) == ["fgsm", "fgsm", "pgd", "pgd", "worst_of_all", "worst_of_all"]
    assert {image.split("_")[0] for image in whole.images} == {"robustness", "cost", "attacks"}
    for run in runs:
        if run is not whole:
            assert run.summary["largest_eps/gap"] == pytest.approx(0.25)
            assert {image.split("_")[0] for image in run.images} == {"pictures", "robustness"}


def test_runs_lie_beside_a_folder_of_records_not_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their tables are JSON too, which a report would take for records."""
    asked: dict[str, Any] = {}
    monkeypatch.setattr(relog, "relog", lambda *_, **options: asked.update(options))
    store.save(cell(), tmp_path / "b" / "records")
    table = tmp_path / "b" / "records" / "wandb" / "offline-run-1" / "files" / "results.table.json"
    table.parent.mkdir(parents=True)
    table.write_text("{}")  # of an earlier version
    assert main(["wandb", str(tmp_path / "b" / "records")]) == 0
    assert (asked["out"], asked["group"], asked["folders"]) == (tmp_path / "b", "b", [tmp_path / "b"])


def test_a_cell_belongs_to_every_job_that_asked_for_it(tmp_path: Path) -> None:
    names = {"dataset": "digits", "classifier": "lenet", "defense": "vae", "attack": "pgd", "variant": ""}
    configs = [{"threat": {"eps": eps}, "logger": {}} for eps in ([0.1], [0.1, 0.2], [0.3])]
    cells = [cell(eps, config=configs[place]) for place, eps in enumerate((0.1, 0.2, 0.3))]
    for place in (0, 1):  # the second found a cell of the first; the third was killed before its mark
        (tmp_path / str(place)).mkdir()
        retry.mark(tmp_path / str(place), "", [each.key for each in cells[: place + 1]], configs[place])
    (tmp_path / "done.json").write_text("[]")  # not ours
    jobs = relog._jobs(cells, retry.marked([tmp_path]))
    asked = ([0.1], [0.1, 0.2], [0.3])
    assert {key: [each.eps for each in found] for key, (_, found) in jobs.items()} == {
        relog.run_id(names, config): eps for config, eps in zip(configs, asked, strict=True)
    }
    own = {"logger": {"run_id": "mine"}}
    assert next(iter(relog._jobs(cells, [(["none", cells[0].key], own)]))) == "mine"


class Heard(CSVTracker):
    runs: ClassVar[list[Path]] = []

    def summary(self, values: Mapping[str, Any]) -> None:
        assert "largest_eps/white_box" in values, "the objective of conf/wandb_sweep.yaml"
        self.runs.append(self.dir)


def test_found_cells_are_told_where_nobody_has_heard_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def recall(_job: config.Job, _names: Names, out: Path) -> list[Record]:
        for record in pair():
            store.save(record, out / "records")
        return pair()

    def run(name: str) -> int:
        groups = ("dataset", "classifier", "defense", "attack", "threat")
        runtime = SimpleNamespace(output_dir=str(tmp_path / name), choices=dict.fromkeys(groups, "x"))
        of_job = {"overrides": SimpleNamespace(task=[]), "job": SimpleNamespace(num=0)}
        hydra = SimpleNamespace(mode=RunMode.MULTIRUN, runtime=runtime, **of_job)
        with monkeypatch.context() as patch:
            patch.setattr(HydraConfig, "get", lambda: hydra)
            patch.setattr(config, "parse", lambda _: asked)
            job.run(OmegaConf.create({}), "")
        assert retry.settled(tmp_path / name, "")
        return len(Heard.runs)

    monkeypatch.setattr(pipeline, "recall", recall)
    monkeypatch.setattr(report, "write_report", lambda *_: [])
    monkeypatch.setattr(Heard, "runs", [])
    monkeypatch.delenv("WANDB_SWEEP_ID", raising=False)
    asked = job_of("logger=csv", f"logger._target_={__name__}.Heard")
    assert run("0") == 0, "other jobs measured them, and told"
    assert run("0") == 0
    (tmp_path / "0" / retry.MARK).unlink()
    assert run("0") == 1, "the job was killed after its last record"
    assert run("0") == 1
    monkeypatch.setenv("WANDB_SWEEP_ID", "s")
    assert run("1") == 2, "an agent waits for its objective"


class Results(NoTracker):
    told: ClassVar[list[tuple[str, list[str]]]] = []

    def __init__(self, *, dir: str, group: str, run_id: str) -> None:
        self.run_id = run_id

    def log_table(self, records: Iterable[Record], name: str = "results") -> None:
        self.told.append((self.run_id, [record.attack for record in records]))


def test_results_of_a_sweep_are_the_same_run_at_once_and_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One sweep never replaces the results of another of its group."""
    monkeypatch.setattr(Results, "told", [])
    node = {"_target_": f"{__name__}.Results", "dir": "x", "group": "mine", "run_id": None}
    cells = [cell(attack=attack) for attack in ("fgsm", "pgd")]
    for name in ("a", "a", "b"):
        results_table.log_results(OmegaConf.create({"logger": node}), tmp_path / name, cells, [])
    monkeypatch.chdir(tmp_path)
    attacks = ["fgsm", "pgd", "worst_of_all"]
    assert Results.told == [(relog.results_id([Path(name)]), attacks) for name in ("a", "a", "b")]
    assert Results.told[0] != Results.told[2]


@pytest.mark.parametrize(("parts", "prefixes"), [(["a"], ["defense"]), (["a", "b"], ["defense_1", "defense_2"])])
def test_curves_of_every_training_are_found(parts: list[str], prefixes: list[str], tmp_path: Path) -> None:
    """A surrogate lies among the classifiers; the key of a detector or, in older records, a chain is no folder."""
    for place, (kind, key) in enumerate([("classifier", "c"), ("classifier", "s"), *(("defense", k) for k in parts)]):
        (tmp_path / kind / key).mkdir(parents=True)
        (tmp_path / kind / key / "metrics.csv").write_text(f"epoch,step,loss\n0,0,{place}\n")
    record = cell(stages={"data": "d", "classifier": "c", "surrogate": "s", "defense": "made"}, uses=["c", "s", *parts])
    found: dict[str, float] = {}

    class Heard(NoTracker):
        def log_curves(self, rows: Sequence[Mapping[str, Any]], prefix: str) -> None:
            found[prefix] = rows[0]["loss"]

    relog.log_job(Heard(), [record], {"paths": {"artifacts": str(tmp_path)}}, [])
    assert found == {name: place for place, name in enumerate(["classifier", "surrogate", *prefixes])}


def test_curves_have_one_name_while_they_are_made_and_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That of what is trained, whatever else was found, and of the part of a chain, whatever its key."""
    live: list[str] = []
    later: dict[str, float] = {}

    class Heard(NoTracker):
        def lightning_logger(self, prefix: str) -> bool:
            live.append(prefix)
            return False

        def log_curves(self, rows: Sequence[Mapping[str, Any]], prefix: str) -> None:
            later[prefix] = rows[0]["loss"]

    def trained(module: torch.nn.Module, *_: Any, folder: Path, **__: Any) -> None:
        torch.save(module.state_dict(), folder / "weights.pt")
        (folder / "metrics.csv").write_text(f"epoch,step,loss\n0,0,{len(live)}\n")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fit, "fit", trained)
    few = ["logger=none", "callbacks=none", "limit.train_images=60", "limit.test_images=5", "attack=fgsm"]
    parts = ["defense=chain", "defense@defense.parts.first=autoencoder", "defense@defense.parts.last=magnet"]
    names = Names(dataset="digits", classifier="cnn3", defense="chain", attack="fgsm")
    stages = Stages(Path("artifacts"))
    for more in (["defense=none"], [*parts, "threat.access=transfer", "+classifier@surrogate=cnn3"]):
        job, _ = composed([*few, "threat.eps=0.1", *more])
        bench, radii = pipeline.prepare(job, names, stages, Heard())
    assert live == ["classifier", "defense_first", "defense_last", "surrogate"]
    (record,) = pipeline.run(bench, radii, tmp_path)
    relog.log_job(Heard(), [record], job.model_dump(mode="json"), [])
    assert later == {name: place for place, name in enumerate(live, 1)}


def test_the_id_of_a_run_knows_what_is_measured_and_nothing_else() -> None:
    names = {"dataset": "digits", "classifier": "c", "defense": "d", "attack": "a"}
    first = relog.run_id(names, {"seed": 0, "logger": {"mode": "offline"}, "paths": {"data": "x"}})
    assert first == relog.run_id(names, {"seed": 0, "logger": {"mode": "online"}, "trainer": {}})
    assert first != relog.run_id(names, {"seed": 1})
    placed = {"accelerator": "gpu", "devices": 2, "enable_progress_bar": False}
    assert first == relog.run_id(names, {"seed": 0, "trainer": placed})
    taught = [{"trainer": {**placed, "gradient_clip_val": clip}} for clip in (0.1, 1)]
    taught += [{"callbacks": {"mine": {"_target_": "a.B", "rate": rate}}} for rate in (0.1, 1)]
    assert len({first, *(relog.run_id(names, {"seed": 0, **node}) for node in taught)}) == 5
    radii = {eps: job_of(f"threat.eps={eps}").model_dump(mode="json") for eps in ("inf", "null", "[0.1,inf]")}
    assert [config_["threat"]["eps"] for config_ in radii.values()] == ["Infinity", None, [0.1, "Infinity"]]
    assert len({relog.run_id(names, config_) for config_ in radii.values()}) == 3
    assert first != relog.run_id({**names, "attack": "b"}, {"seed": 0})


def job_of(*overrides: str) -> config.Job:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return config.parse(compose("train", overrides=[*overrides, "logger.dir=x", "callbacks=none"]))


def test_the_dashboard_shows_what_runs_log() -> None:
    model = json.loads(dashboard.workspace("e", "p")._to_model().model_dump_json())
    text = json.dumps(model)
    values = relog._summary(pair(defense_ms_per_image=1.0))
    for name in ("largest_eps/gray_box", "largest_eps/white_box", "clean_accuracy_defended", "defense_ms_per_image"):
        assert f"summary:{name}" in text or name in text
        assert name in values
    assert "robust/white_box" in text
    with pytest.raises(UserError, match="online"):
        _relog([".", "--dashboard"])


def test_the_wandb_sweep_tunes_on_validation_images() -> None:
    sweep: dict[str, Any] = yaml.safe_load((CONF / "wandb_sweep.yaml").read_text())
    drawn = [f"{name}={each.get('values', [each.get('min')])[0]}" for name, each in sweep["parameters"].items()]
    fixed = [word for word in sweep["command"] if "=" in word]
    job = job_of(*fixed, *drawn)
    assert job.split == "validation"
    assert sweep["metric"]["name"] in relog._summary(pair())
    assert job.access == ("white_box",)


def test_validation_images_stand_for_test_images() -> None:
    usual, judged = Digits(), Digits()
    usual.prepare()
    judged.judge_on_validation()
    assert judged.test.images.equal(usual.val.images)
    assert judged.train_fingerprint == usual.train_fingerprint, "nothing is trained again"
    assert judged.fingerprint != usual.fingerprint
