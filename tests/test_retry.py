"""A sweep that is run again: which jobs, and what is left of the earlier try."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf
from pytorch_lightning import Callback

from src import job, records, report, retry
from src.errors import UserError
from tests.short_jobs import TINY, Command
from tests.test_pipeline import ok


class Fails(Callback):
    """An exception in job 1 as long as a file says so."""

    def on_test_start(self, trainer, pl_module) -> None:
        if Path("fail").exists() and HydraConfig.get().job.num == 1:
            raise RuntimeError("out of luck")


def test_retry_does_the_failed_jobs_only(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = ("-m", *TINY, "defense=none,feature_squeezing,jpeg", f"+callbacks.fails._target_={__name__}.Fails")
    started: list[int] = []
    run = job.run
    monkeypatch.setattr(job, "run", lambda *args: (started.append(HydraConfig.get().job.num), run(*args)))
    (tmp_path / "fail").touch()
    assert command(*sweep).code == 1
    assert started == [0, 1, 2]
    (folder,) = tmp_path.glob("multirun/*/*")
    assert "out of luck" in (folder / "results.csv").read_text()

    started.clear()
    (tmp_path / "fail").unlink()
    ok(command(*sweep, "+retry=failed"))
    assert started == [1]
    assert list(tmp_path.glob("multirun/*/*")) == [folder]
    found = records.find([folder])
    assert len(found) == 6
    assert {record.status for record in found} == {"done"}

    started.clear()
    next((folder / "2" / "records").glob("*.json")).unlink()
    ok(command(*sweep, "+retry=failed", f"hydra.sweep.dir={folder}"))
    assert started == [2]
    assert len(records.find([folder])) == 6

    started.clear()
    other = command(*(item.replace("0.2", "0.3") for item in sweep), "+retry=failed")
    assert other.code == 1
    assert "no earlier sweep of this command" in other.error_lines[0]
    ok(command(*(item.replace("0.2", "0.1") for item in sweep), "+retry=failed", f"hydra.sweep.dir={folder}"))
    assert started == [0, 1, 2]  # other settings in that folder are not done


def test_a_job_that_is_done_leaves_no_cell_of_an_earlier_try_in_its_folder_and_those_of_other_jobs_alone(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as one measured before the attack was mended: its key is another, its place in the table the same."""
    monkeypatch.setattr(report, "write_report", lambda *_: [])
    arguments = (*TINY, "limit.epochs=1", "defense=none", "threat.access=white_box", "hydra.run.dir=run")
    ok(command(*arguments))
    (path,) = (tmp_path / "run" / "records").glob("*.json")
    old = records.load(path).model_copy(update={"key": "0ld"})
    for folder in ("run", "artifacts"):
        records.save(old, tmp_path / folder / "records").with_suffix(".npz").touch()
    others = {"attack": "pgd", "defense": "vae", "variant": "defense.beta=2", "eps": 0.1, "access": "gray_box",
              "norm": "l2", "seed": 1, "targeted": True}  # fmt: skip
    strangers = {"not", *others}
    for name, value in others.items():  # jobs that were given the same folder
        other = old.model_copy(update={"key": name, name: value})
        records.save(other, tmp_path / "run" / "records").with_suffix(".npz").touch()
    (tmp_path / "run" / "records" / "not.json").write_text("a record")

    with monkeypatch.context() as patch:
        patch.setattr(report, "write_report", lambda *_: 1 / 0)
        assert command(*arguments).code == 1
    assert (tmp_path / "run" / "records" / "0ld.json").exists()  # until the job is done
    ok(command(*arguments))
    assert {file.stem for file in (tmp_path / "run" / "records").iterdir()} == {path.stem, *strangers}
    assert not (tmp_path / "run" / "records" / "0ld.npz").exists()
    ok(command(*arguments[:-1], "hydra.run.dir=artifacts"))
    assert {"0ld.json", "0ld.npz", path.name} <= {file.name for file in (tmp_path / "artifacts" / "records").iterdir()}


def test_a_mark_that_cannot_be_read_settles_nothing(tmp_path: Path) -> None:
    assert not retry.settled(tmp_path, "a")
    retry.mark(tmp_path, "a", [], {})
    assert retry.settled(tmp_path, "a")
    assert not retry.settled(tmp_path, "b")
    (tmp_path / retry.MARK).write_text("{")
    assert not retry.settled(tmp_path, "a")


def test_retry_without_a_sweep_to_retry_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no earlier sweep"):
        retry.with_folder(["-m", "attack=pgd", "+retry=failed"])
    assert retry.with_folder(["-m", "attack=pgd"]) == ["-m", "attack=pgd"]
    with pytest.raises(UserError, match="with -m"):
        retry.with_folder(["attack=pgd", "+retry=failed"])


def test_a_sweep_is_found_whatever_stands_beside_what_it_measures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    sweep = Path("multirun/day/time")
    sweep.mkdir(parents=True)
    OmegaConf.save({"hydra": {"overrides": {"task": ["attack=pgd", "~defense.fit"]}}}, sweep / "multirun.yaml")
    for beside in ((), ("--config-dir", "mine"), ("+plan=true",), ("hydra.verbose=true", "logger=none")):
        found = retry.with_folder(["-m", *beside, "attack=pgd", "~defense.fit", retry.FLAG])
        assert found[-1] == f"hydra.sweep.dir={sweep}", beside
    with pytest.raises(UserError, match="no earlier sweep"):
        retry.with_folder(["-m", "attack=pgd", retry.FLAG])


@pytest.mark.parametrize(
    "text", ["", "hydra:\n  overrides:\n    task", "hydra:\n  overrides:\n    'ta", "a: ${b", "\x00"]
)
def test_retry_passes_over_a_sweep_whose_settings_a_full_disk_cut_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("10-00-00", "11-00-00"):
        (Path("multirun/day") / name).mkdir(parents=True)
        OmegaConf.save({"hydra": {"overrides": {"task": ["logger=none"]}}}, f"multirun/day/{name}/multirun.yaml")
    Path("multirun/day/11-00-00/multirun.yaml").write_text(text)
    assert retry.with_folder(["-m", "logger=none", retry.FLAG])[-1] == "hydra.sweep.dir=multirun/day/10-00-00"
    Path("multirun/day/12-00-00").mkdir()
    shutil.copy("multirun/day/10-00-00/multirun.yaml", "multirun/day/12-00-00")
    newest = retry.with_folder(["-m", "logger=none", retry.FLAG])[-1]
    assert newest == "hydra.sweep.dir=multirun/day/12-00-00"


def test_a_sweep_with_other_callbacks_is_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is trained with them is another model."""
    monkeypatch.chdir(tmp_path)
    sweep = Path("multirun/day/time")
    sweep.mkdir(parents=True)
    asked = ["attack=pgd", "+callbacks.mine.rate=1"]
    OmegaConf.save({"hydra": {"overrides": {"task": asked}}}, sweep / "multirun.yaml")
    assert retry.with_folder(["-m", *asked, retry.FLAG, "logger=none"])[-1] == f"hydra.sweep.dir={sweep}"
    with pytest.raises(UserError, match="no earlier sweep"):
        retry.with_folder(["-m", "attack=pgd", "+callbacks.mine.rate=2", retry.FLAG])
    one, two = (retry.settings(OmegaConf.create({"callbacks": {"mine": {"rate": rate}}}), {}) for rate in (1, 2))
    assert one != two
