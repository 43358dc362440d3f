"""The table at the end of a sweep, and what it says of jobs that failed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from src import records as store
from src import tables
from src.callbacks import results_table
from src.errors import UserError
from tests.cells import cell, failed, pair

APP = """
import os, sys
from pathlib import Path
import hydra
from hydra.core.hydra_config import HydraConfig
sys.path.insert(0, {tests!r})

@hydra.main(version_base="1.3", config_path="conf", config_name="c")
def main(cfg):
    if cfg.x == 1:
        raise ValueError("x is 1")
    from cells import pair
    from src import records
    for record in pair(seed=cfg.x):
        records.save(record, Path(HydraConfig.get().runtime.output_dir) / "records")

main()
"""
CONF = """
x: 0
seed: ${x}
threat: {norm: linf, eps: 8/255}
logger: {_target_: src.tracking.CSVTracker, dir: "${hydra:runtime.output_dir}"}
hydra:
  callbacks: {table: {_target_: src.callbacks.results_table.ResultsTable}}
  sweep: {dir: sweep, subdir: "${hydra.job.num}"}
"""


def sweep(folder: Path, values: str) -> subprocess.CompletedProcess[str]:
    (folder / "conf").mkdir(exist_ok=True)
    (folder / "conf" / "c.yaml").write_text(CONF)
    (folder / "app.py").write_text(APP.format(tests=str(Path(__file__).parent)))
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    command = [sys.executable, "app.py", "-m", f"x={values}"]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)


def test_a_sweep_ends_with_one_table_and_says_what_failed(tmp_path: Path) -> None:
    done = sweep(tmp_path, "1,0,2")
    assert done.returncode == 1, done.stdout + done.stderr
    frame = pd.read_csv(tmp_path / "sweep" / "results.csv")
    assert list(frame["status"]).count("done") == 4, "the jobs after the failed one ran"
    (row,) = frame[frame["status"] == "failed"].to_dict("records")
    assert (row["reason"], row["eps"], row["seed"]) == ("ValueError: x is 1", pytest.approx(8 / 255), 1)
    assert "ValueError: x is 1" in (tmp_path / "sweep" / "0" / "app.log").read_text()
    assert "sweep/results.csv" in done.stdout
    assert "failed (job): ValueError: x is 1" in done.stdout
    for name in ("results.md", "robustness_curve.png"):
        assert (tmp_path / "sweep" / name).exists()


def test_a_job_that_works_at_last_is_no_longer_a_failure(tmp_path: Path) -> None:
    from hydra.core.utils import JobReturn, JobStatus
    from hydra.types import RunMode
    from omegaconf import OmegaConf

    runtime = {"output_dir": str(tmp_path / "0"), "choices": {"dataset": "digits"}}
    config = OmegaConf.create({"seed": 1, "hydra": {"mode": RunMode.MULTIRUN, "runtime": runtime}})
    for error, left in ((UserError("no such norm"), ["no such norm"]), (None, [])):
        job = JobReturn(status=JobStatus.FAILED if error else JobStatus.COMPLETED)
        job.return_value = error
        results_table.ResultsTable().on_job_end(config, job)
        assert job.status == JobStatus.COMPLETED, "the sweep goes on"
        assert [record.reason for record in store.find([tmp_path])] == left


def test_a_job_that_died_and_a_broken_record_are_noticed(tmp_path: Path) -> None:
    store.save(cell(), tmp_path / "0" / "records")
    for job in ("0", "1"):
        (tmp_path / job / ".hydra").mkdir(parents=True, exist_ok=True)
        (tmp_path / job / ".hydra" / "config.yaml").write_text(
            "seed: 3\nthreat: {norm: l2, eps: [1, 2], targeted: true}"
        )
        (tmp_path / job / ".hydra" / "hydra.yaml").write_text(
            "hydra: {runtime: {choices: {dataset: mnist}}, overrides: {task: [seed=3, defense.noise=0]}}"
        )
    (tmp_path / "0" / "records" / "broken.json").write_text("{")
    records, problems = results_table.collect(tmp_path)
    assert [(r.dataset, r.norm, r.seed, r.eps, r.status) for r in records] == [
        ("digits", "linf", 0, 0.1, "done"),
        ("mnist", "l2", 3, None, "failed"),
    ]
    assert "left no record" in records[1].reason
    assert (records[1].targeted, records[1].variant) == (True, "defense.noise=0")
    assert len(problems) == 1
    assert "broken.json" in problems[0]


def test_rows_that_data_or_weights_alone_tell_apart_say_so() -> None:
    def of(root: str, weights: str | None = None, **changes: object) -> list[store.Record]:
        config = {"dataset": {"root": root}, "classifier": {"checkpoint": weights}, "paths": {"data": "data"}}
        return pair(config=config, stages={"data": root, "classifier": weights or "trained"}, **changes)

    one, two, other = of("x/a.npz"), of("x/b.npz"), of("x/b.npz", "y/w.pt", variant="v")
    rows = tables.side_by_side([*one, *two, *other])
    assert [row.variant for row in rows] == ["dataset.root=a.npz", "dataset.root=b.npz", "v"]
    assert [len(row.cells) for row in rows] == [2, 2, 2]
    rows = tables.side_by_side([*one, *of("x/a.npz", "y/w.pt")])
    assert sorted(row.variant for row in rows) == ["", "classifier.checkpoint=y/w.pt"]
    assert [row.variant for row in tables.side_by_side(other)] == ["v"]


def test_what_failed_stands_beside_what_was_done() -> None:
    """It failed before it knew what it would be made from."""
    gray, white = pair(stages={"data": "d", "defense": "w"}, config={"dataset": {"root": "photos"}})
    lost = failed(access="white_box", key="x")
    (row,) = tables.side_by_side([lost, gray])
    assert row.cells == {"gray_box": gray, "white_box": lost}
    assert row.variant == ""
    both, alone = tables.side_by_side([gray, white, lost])
    assert (both.cells, alone.cells) == ({"gray_box": gray, "white_box": white}, {"white_box": lost})
    assert both.variant == alone.variant == ""


def test_each_transfer_figure_has_the_name_of_its_own_surrogate() -> None:
    def config(weights: str) -> dict[str, object]:
        return {"config": {"surrogate": {"checkpoint": f"{weights}/w.pt"}}}

    shared = cell(**config("a"))
    transfers = [cell(access="transfer", right=right, key=w, **config(w)) for w, right in (("c", 30), ("a", 10))]
    rows = tables.side_by_side([shared, *transfers])
    said = {row.variant: row.cells["transfer"].correct_attacked for row in rows}
    assert said == {"surrogate.checkpoint=a/w.pt": 10, "surrogate.checkpoint=c/w.pt": 30}


def test_tables_show_what_a_detector_rejects_and_what_is_certified() -> None:
    detected, certified = {"detection_tpr": 0.5, "detection_n": 70}, {"certified": {"0.5": 0.8, "1": 0.24}}
    known = {"clean_rejected": 0.04, "certified_n": 50, **detected, **certified}
    rows = tables.side_by_side(
        [cell(**known), cell(0.1, "white_box", 35, **known | {"detection_tpr": 0.25, "detection_n": 80})]
    )
    shown = {name: value(rows[0]) for name, value in tables._measures(rows)}
    assert shown["clean rejected"] == "4.0 [1.6, 9.8]"
    assert (shown["detected gray_box"], shown["detected white_box"]) == ("50.0 [38.6, 61.4]", "25.0 [16.8, 35.5]")
    assert shown["certified n"] == "50"
    assert (shown["certified l2 0.5"], shown["certified l2 1"]) == ("80.0 [67.0, 88.8]", "24.0 [14.3, 37.4]")
    plain = tables.side_by_side([cell()])
    assert not {"clean rejected", "certified n", "certified l2 1"} & {name for name, _ in tables._measures(plain)}
