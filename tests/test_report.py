"""From records to tables and figures, the command line, and the end of a sweep. No model is loaded anywhere here."""

from __future__ import annotations

import io
import math
from pathlib import Path

import pandas as pd
import pytest
from rich.console import Console

from src import frame, report, tables
from src import records as store
from src.records import Record
from src.report.__main__ import _folder, main
from src.terminal import print_table
from tests.cells import cell, failed, pair, sidecar

FIRST = [  # the columns others may rely on, in this order
    "dataset", "classifier", "defense", "attack", "norm", "eps", "access", "seed", "n", "clean_accuracy",
    "clean_accuracy_defended", "robust_accuracy", "robust_accuracy_low", "robust_accuracy_high", "attack_success_rate",
    "distance_median", "attack_ms_per_image", "defense_ms_per_image", "flags", "status", "reason", "key",
]  # fmt: skip


def printed(records: list[Record], width: int = 80, terminal: bool = False) -> str:
    text = io.StringIO()
    print_table(records, Console(file=text, width=width, force_terminal=terminal, color_system=None))
    return text.getvalue()


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


def test_what_is_made_of_a_record_lies_beside_its_folder(tmp_path: Path) -> None:
    store.save(cell(), tmp_path / "records")
    (path,) = (tmp_path / "records").glob("*.json")
    assert _folder(path) == _folder(path.parent) == _folder(tmp_path) == tmp_path
