"""From records to tables and figures, the command line, and the end of a sweep. No model is loaded anywhere here."""

from __future__ import annotations

import io
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from src import frame, report, sidecars, tables
from src import records as store
from src.analysis import curves, pictures, points
from src.callbacks import results_table
from src.errors import UserError
from src.records import Record
from src.report import page
from src.report.__main__ import main
from src.terminal import print_table

FIRST = [  # the columns others may rely on, in this order
    "dataset", "classifier", "defense", "attack", "norm", "eps", "access", "seed", "n", "clean_accuracy",
    "clean_accuracy_defended", "robust_accuracy", "robust_accuracy_low", "robust_accuracy_high", "attack_success_rate",
    "distance_median", "attack_ms_per_image", "defense_ms_per_image", "flags", "status", "reason", "key",
]  # fmt: skip


def cell(eps: float | None = 0.1, access: str = "gray_box", right: int = 60, n: int = 100, **changes: Any) -> Record:
    low, high = store.wilson(right, n)
    values: dict[str, Any] = {
        "dataset": "digits", "classifier": "lenet", "defense": "vae", "attack": "pgd", "norm": "linf", "eps": eps,
        "access": access, "seed": 0, "n": n, "correct_bare": 97, "correct_defended": 95, "correct_attacked": right,
        "correct_attacked_bare": 20 if access == "gray_box" else None, "clean_accuracy": 0.97,
        "clean_accuracy_defended": 0.95, "robust_accuracy": right / max(n, 1), "robust_accuracy_low": low,
        "robust_accuracy_high": high, "created": "2026-01-31T00:00:00+00:00",
    } | changes  # fmt: skip
    names = ("dataset", "defense", "attack", "eps", "access", "seed", "variant")
    return Record(**{"key": "-".join(str(values.get(name, "")) for name in names)} | values)


def failed(**changes: Any) -> Record:
    empty = dict.fromkeys(("robust_accuracy", "correct_attacked", "clean_accuracy", "clean_accuracy_defended"))
    return cell(**{"status": "failed", "reason": "it broke", "n": 0} | empty | changes)


def pair(eps: float = 0.1, **changes: Any) -> list[Record]:
    return [cell(eps, "gray_box", 60, **changes), cell(eps, "white_box", 35, **changes)]


def sidecar(record: Record, folder: Path, *, purifies: bool = True, channels: int = 1, rejected: bool = False) -> None:
    rng = np.random.default_rng(0)
    clean = rng.random((4, channels, 8, 8), dtype=np.float32)
    adversarial = (clean + 0.1 * rng.choice([-1, 1], clean.shape)).clip(0, 1).astype("float32")
    labels = np.arange(4)
    store.save_sidecar(
        folder / f"{record.key}.npz",
        {
            "clean": clean, "adversarial": adversarial, "purified": clean if purifies else adversarial,
            "picture_label": labels, "picture_clean_prediction": labels,
            "picture_prediction": np.full(4, 5) if rejected else labels, "picture_bare_prediction": labels + 1,
            "class_names": np.array([*"abcde", *(["rejected"] if rejected else [])]),
        },
    )  # fmt: skip


def printed(records: list[Record], width: int = 80, terminal: bool = False) -> str:
    text = io.StringIO()
    print_table(records, Console(file=text, width=width, force_terminal=terminal, color_system=None))
    return text.getvalue()


def is_drawn(path: Path) -> bool:
    from matplotlib.image import imread

    image = imread(path)
    return min(image.shape[:2]) > 300 and float(image[..., :3].std()) > 0.02


# --- results.csv ------------------------------------------------------------------------------------------------


def test_csv_columns_and_types(tmp_path: Path) -> None:
    records = [*pair(), cell(math.inf, flags=["x", "y"]), failed(eps=None, access="")]
    table = pd.read_csv(frame.write_csv(records, tmp_path / "results.csv"))
    assert list(table.columns[: len(FIRST)]) == FIRST
    assert len(table) == 4
    assert table["eps"].dtype == "float64"
    assert table["eps"].isin([math.inf]).any()
    assert table["n"].dtype == table["seed"].dtype == "int64"
    assert set(table["status"]) == {"done", "failed"}
    assert "x;y" in set(table["flags"])
    assert table["robust_accuracy"].dropna().between(0, 1).all()


@pytest.mark.parametrize("records", [[], [failed(eps=None)]])
def test_types_do_not_depend_on_what_succeeded(records: list[Record]) -> None:
    assert dict(frame.to_frame(records).dtypes) == dict(frame.to_frame(pair()).dtypes)


# --- side by side -----------------------------------------------------------------------------------------------


def test_accesses_of_one_eps_share_a_row() -> None:
    rows = tables.side_by_side([*pair(0.2), *pair(0.1)])
    assert [(row.first.eps, sorted(row.cells)) for row in rows] == [
        (0.1, ["gray_box", "white_box"]),
        (0.2, ["gray_box", "white_box"]),
    ]
    assert rows[0].gap == pytest.approx(0.25)
    assert rows[0].bare is not None
    assert rows[0].bare[0] == pytest.approx(0.2)


def test_one_access_alone_has_no_gap() -> None:
    (row,) = tables.side_by_side([cell()])
    assert row.gap is None


def test_no_cell_hides_another() -> None:
    twice = [cell(key="a"), cell(key="b"), cell(0.1, "white_box")]
    assert sum(len(row.cells) for row in tables.side_by_side(twice)) == 3
    weights = [r.model_copy(update={"stages": {"defense": w}, "key": w + r.access}) for w in "vw" for r in pair()]
    assert [sorted(row.cells) for row in tables.side_by_side(weights)] == [["gray_box", "white_box"]] * 2


def test_only_cells_that_differ_in_nothing_but_access_share_a_row() -> None:
    for change in (
        {"dataset": "mnist"}, {"classifier": "cnn3"}, {"defense": "jpeg"}, {"attack": "fgsm"}, {"norm": "l2"},
        {"eps": 0.2}, {"seed": 1}, {"targeted": True}, {"variant": "defense.noise=1"}, {"stages": {"classifier": "x"}},
    ):  # fmt: skip
        rows = tables.side_by_side([cell(), cell(**{"access": "white_box", **change})])
        assert [row.gap for row in rows] == [None, None], change


def test_failed_cells_are_rows_that_say_why(tmp_path: Path) -> None:
    records = [cell(), failed(access="white_box"), failed(eps=None, access="", reason="no | such\nthing")]
    for text in (printed(records), tables.write_markdown(records, tmp_path / "r.md").read_text()):
        assert "failed (white_box): it broke" in text
        assert "failed (job): no" in text
        assert "60.0 [50.2, 69.1]" in text


def test_markdown_says_how_to_read_it(tmp_path: Path) -> None:
    text = tables.write_markdown([*pair(8 / 255), *pair(math.inf)], tmp_path / "r.md").read_text()
    for fact in ("8/255", "inf", "25.0", "100 test images", "95 %", "pgd (untargeted, linf)", "2026-01-31"):
        assert fact in text
    for interval in ("97.0 [91.5, 99.0]", "95.0 [88.8, 97.8]", "20.0 [13.3, 28.9]"):
        assert text.count(interval) == 2


@pytest.mark.parametrize(("width", "terminal"), [(40, False), (40, True), (100, True), (120, True), (200, True)])
def test_no_cell_of_the_printed_table_is_cut(width: int, terminal: bool) -> None:
    datasets, defenses = ("digits", "fashion_mnist"), ("none", "autoencoder", "feature_squeezing")
    records = [r for d in datasets for f in defenses for e in (0.1, 8 / 255) for r in pair(e, dataset=d, defense=f)]
    text = printed([*records, failed(reason="why " * 40)], width, terminal)
    assert "…" not in text
    assert text.count("[50.2, 69.1]") == 12
    assert all(len(line) <= width for line in text.splitlines() if "60.0" in line) or width < 100 or not terminal
    if width >= 120 or not terminal:  # names fold in a narrower terminal, numbers never do
        assert text.count("feature_squeezing") == 4


def test_hundreds_of_rows_print() -> None:
    records = [r for seed in range(200) for r in pair(seed=seed)]
    assert printed(records).count("60.0 [50.2, 69.1]") == 200
    assert "nothing was measured" in printed([])


@pytest.mark.parametrize(
    ("eps", "text"),
    [
        (8 / 255, "8/255"), (0.3, "0.3"), (0.2, "0.2"), (0, "0"), (12, "12"), (math.inf, "inf"), (None, "-"),
        (0.0123456, "0.01235"),
    ],
)  # fmt: skip
def test_eps_is_written_as_people_do(eps: float | None, text: str) -> None:
    assert tables.format_eps(eps) == text


# --- figures ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "records",
    [
        [*pair(0.1), *pair(8 / 255), *pair(math.inf), failed(eps=0.3)],
        [r for d in ("none", "vae", "autoencoder") for a in ("fgsm", "pgd") for r in pair(defense=d, attack=a)],
        [cell(math.inf, norm="l2")],
    ],
    ids=["one", "many", "only-inf"],
)
def test_curve_is_drawn(tmp_path: Path, records: list[Record]) -> None:
    assert is_drawn(curves.robustness_curve(records, tmp_path / "c.png"))


@pytest.mark.parametrize("split", ["test", "validation"])
def test_what_was_judged_is_said(split: str, tmp_path: Path) -> None:
    cells = [*pair(config={"split": split}), cell(attack="worst_of_all")]
    said = f" {split} images"
    assert said in tables.reading(cells)
    assert said in curves.caption(cells)
    assert f'"images":"{split} images"' in page.write_page(cells, tmp_path / "report.html").read_text()
    assert ("test images" in tables.reading(cells) + curves.caption(cells)) == (split == "test")


def test_no_point_of_a_curve_hides_another(tmp_path: Path) -> None:
    """Variants of the attack, other accesses of ``none`` and other weights are lines of their own."""
    steps = [
        cell(0.1, "white_box", right, defense="none", variant=f"attack.members=[a,b],attack.steps={n},defense.x=[1,2]")
        for n, right in ((1, 70), (2, 50), (10, 5))
    ]
    accesses = [cell(0.1, access, 20, defense="none") for access in ("gray_box", "white_box")]
    accesses.append(cell(0.1, "transfer", 80, defense="none", variant="classifier@surrogate=lenet"))
    parts = "attack@defense.trained_on.attack=fgsm,defense@defense.parts.first=jpeg,~defense.activation"
    accesses.append(cell(0.1, "gray_box", attack="fgsm", variant=f"{parts},~attack.steps"))
    weights = [cell(0.1, right=right, defense="chain", stages={"defense": d}) for d, right in (("a", 60), ("b", 40))]
    found = points.bare_lines([*steps, *accesses, *weights])
    assert {(name, line[-1].accuracy) for name, line in found} == {
        ("no defense (attack.members=[a,b],attack.steps=1)", 0.7),
        ("no defense (attack.members=[a,b],attack.steps=2)", 0.5),
        ("no defense (attack.members=[a,b],attack.steps=10)", 0.05),
        ("no defense", 0.2),
        ("no defense (~attack.steps)", 0.2),
        ("no defense, transfer (classifier@surrogate=lenet)", 0.8),
    }
    assert [line[-1].accuracy for _, line in points.defended_lines(weights)] == [0.6, 0.4]
    twice = [cell(0.1, right=right, key=str(right)) for right in (60, 40)]
    assert [line[-1].accuracy for _, line in points.defended_lines(twice)] == [0.6, 0.4]
    assert is_drawn(curves.robustness_curve([*steps, *accesses, *weights], tmp_path / "c.png"))


def test_the_same_records_draw_the_same_bytes(tmp_path: Path) -> None:
    first, second = (curves.robustness_curve(pair(), tmp_path / name) for name in ("a.png", "b.png"))
    assert first.read_bytes() == second.read_bytes()


def test_pictures_show_the_largest_finite_eps_under_both_accesses(tmp_path: Path) -> None:
    records = [*pair(0.1), *pair(0.2), *pair(math.inf), cell(0.5)]  # 0.5 has no white_box
    for record in records:
        sidecar(record, tmp_path)
    shown = pictures.choose(records, sidecars.find([tmp_path]))
    assert [(r.eps, r.access) for r in shown] == [(0.2, "gray_box"), (0.2, "white_box")]
    path = pictures.picture_grid(records, tmp_path, tmp_path / "p.png")
    assert path is not None
    assert is_drawn(path)


@pytest.mark.parametrize("channels", [1, 3])
def test_pictures_of_a_defense_that_purifies_nothing(tmp_path: Path, channels: int) -> None:
    sidecar(cell(defense="none"), tmp_path, purifies=False, channels=channels)
    path = pictures.picture_grid([cell(defense="none")], tmp_path, tmp_path / "p.png")
    assert path is not None
    assert is_drawn(path)


@pytest.mark.parametrize("known", [True, False])
def test_pictures_say_how_sure_the_model_is_where_it_is_known(
    known: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda self, *_, **__: drawn.append(self))
    record = cell(targeted=True)
    sidecar(record, tmp_path)
    if known:
        with np.load(tmp_path / f"{record.key}.npz") as file:
            arrays = dict(file)
        shares = dict.fromkeys((f"picture_{of}confidence" for of in ("clean_", "", "bare_")), np.full(4, 0.731))
        store.save_sidecar(tmp_path / f"{record.key}.npz", arrays | shares)
    pictures.picture_grid([record], tmp_path, tmp_path / "p.png")
    texts = [" ".join(text.get_text().split()) for text in drawn[0].axes[0].texts]
    assert ("a ✓ 73 %" in texts) == known
    assert ("a ✓" in texts) != known
    assert "n = 4 of 100 images" in texts[-1]
    assert "pgd (targeted), linf, ε = 0.1, gray_box" in texts[-1]


def test_no_pictures_without_sound_sidecars(tmp_path: Path) -> None:
    assert pictures.picture_grid(pair(), tmp_path, tmp_path / "p.png") is None
    (tmp_path / f"{cell().key}.npz").write_bytes(b"damaged")
    assert pictures.picture_grid(pair(), tmp_path, tmp_path / "p.png") is None
    assert not (tmp_path / "p.png").exists()


# --- the command ------------------------------------------------------------------------------------------------


def test_report_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for record in pair():
        store.save(record, tmp_path / "run" / "records")
        sidecar(record, tmp_path / "run" / "records")
    assert main([str(tmp_path / "run"), "--out", str(tmp_path / "out")]) == 0
    tables_ = {f"results.{kind}" for kind in ("csv", "parquet", "md", "tex")}
    names = tables_ | {"robustness_curve.png", "robustness_curve.pdf", "pictures.png", "report.html"}
    assert {p.name for p in (tmp_path / "out").iterdir()} == names
    out = capsys.readouterr().out
    assert "60.0 [50.2, 69.1]" in out
    assert all(name in out for name in names), "the paths are printed"


@pytest.mark.parametrize("what", ["missing", "empty", "broken"])
def test_report_says_what_is_wrong_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], what: str) -> None:
    folder = tmp_path / what
    if what != "missing":
        (folder / "records").mkdir(parents=True)
    if what == "broken":
        (folder / "records" / "x.json").write_text("{")
    assert main([str(folder)]) == 1
    said = capsys.readouterr()
    assert said.err.startswith("error: ")
    assert said.err.count("\n") == 1
    assert what in said.err


def test_many_settings_have_a_picture_each_up_to_a_limit(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    records = [cell(defense=f"d{i}") for i in range(3)]
    for record in records:
        sidecar(record, tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "MAX_GRIDS", 2)
        paths = report.write_report(records, tmp_path, tmp_path / "out")
    assert [p.name for p in paths if p.name.startswith("pictures")] == [
        "pictures_digits-lenet-d0-pgd-linf.png",
        "pictures_digits-lenet-d1-pgd-linf.png",
    ]
    assert "left out 1" in caplog.text, "skips are loud"


# --- the end of a sweep -----------------------------------------------------------------------------------------

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
    from test_report import pair
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
        (tmp_path / job / ".hydra" / "config.yaml").write_text("seed: 3\nthreat: {norm: l2, eps: [1, 2]}")
        (tmp_path / job / ".hydra" / "hydra.yaml").write_text("hydra: {runtime: {choices: {dataset: mnist}}}")
    (tmp_path / "0" / "records" / "broken.json").write_text("{")
    records, problems = results_table.collect(tmp_path)
    assert [(r.dataset, r.norm, r.seed, r.eps, r.status) for r in records] == [
        ("digits", "linf", 0, 0.1, "done"),
        ("mnist", "l2", 3, None, "failed"),
    ]
    assert "left no record" in records[1].reason
    assert len(problems) == 1
    assert "broken.json" in problems[0]


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
