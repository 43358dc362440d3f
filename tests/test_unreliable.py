"""A cell that failed a decisive check shows *unreliable* in place of its figure, wherever people read it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from src import frame, sidecars, tables
from src.analysis import cost, curves, points
from src.records import Record
from src.report import comparison, latex, page, pivot
from src.tracking import relog
from tests.cells import cell, pair
from tests.test_tables import verdicts

FLAG = "weaker_access_stronger"
SAYS = "an attacker who knows less does more harm"


def three() -> list[Record]:
    """White_box at 0.2 is unreliable, and so is nothing else."""
    cells = [r for eps in (0.1, 0.2, 0.3) for r in pair(eps, defense_ms_per_image=1.0, attack_success_rate=0.5)]
    return [doubt(r) if (r.eps, r.access) == (0.2, "white_box") else r for r in cells]


def doubt(record: Record) -> Record:
    return record.model_copy(update={"flags": [FLAG, "few_images"]})


@pytest.fixture
def figure(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that are drawn."""
    found: list[Any] = []

    def keep(drawn: Any, path: Path) -> Path:
        found.append(drawn)
        return path

    for module in (curves, cost):
        monkeypatch.setattr(module, "save_figure", keep)
    return found


def words(drawn: Any) -> str:
    return " ".join(drawn._supxlabel.get_text().split())


def test_latex_has_the_word_and_the_reason(tmp_path: Path) -> None:
    text = latex.write_latex(three(), tmp_path / "r.tex").read_text()
    (row,) = [line for line in text.splitlines() if line.startswith("0.2 ")]
    assert "unreliable" in row
    assert "35.0" not in row
    assert SAYS in text
    assert "unreliable" not in latex.write_latex(pair(), tmp_path / "s.tex").read_text()


def test_the_curve_has_a_gap_with_a_hollow_marker(figure: list[Any], tmp_path: Path) -> None:
    curves.robustness_curve(three(), tmp_path / "c.png")
    drawn = {tuple(line.get_xdata()): line for line in figure[0].axes[0].lines}
    (white,) = [x for x in figure[0].axes[0].lines if x.get_color() == curves.VERMILLION and len(x.get_xdata()) == 4]
    assert [math.isnan(y) for y in white.get_ydata()] == [False, False, True, False]
    hollow = drawn[(0.2,)]
    assert (hollow.get_ydata()[0], hollow.get_markerfacecolor()) == (35.0, "white")
    assert f"Hollow, not joined: unreliable ({FLAG}: {SAYS}" in words(figure[0])
    curves.robustness_curve(pair(), tmp_path / "c.png")
    assert "unreliable" not in words(figure[1])


def test_the_bare_classifier_is_not_doubted_for_what_one_defense_raised() -> None:
    sound, doubtful = cell(0.1, defense="vae"), doubt(cell(0.1, defense="jpeg"))
    for cells in ([sound, doubtful], [doubtful, sound]):
        assert [p.sound for p in points.bare_points(cells)] == [True, True]
    assert [p.sound for p in points.bare_points([doubtful])] == [True, False]


def test_cost_leaves_it_out_and_says_so(figure: list[Any], tmp_path: Path) -> None:
    cells = [doubt(r) if r.eps == 0.3 and r.access == "white_box" else r for r in three()]
    cost.cost_scatter(cells, tmp_path / "c.png")
    assert [line.get_ydata()[0] for line in figure[0].axes[0].lines] == [60.0], "no smaller eps in its place"
    assert "Left out as unreliable: vae pgd white_box." in words(figure[0])
    assert "All at ε = 0.3." in words(figure[0])
    assert cost.cost_scatter([doubt(r) for r in cells], tmp_path / "c.png") is None


def test_programs_get_the_number_and_a_column_people_the_word() -> None:
    table = frame.to_frame(three())
    assert table["robust_accuracy"].notna().all()
    assert list(table["unreliable"]) == [False, False, False, True, False, False]
    shown = frame.shown(table)
    row = shown[shown["robust_accuracy"] == "unreliable"]
    assert (row["eps"].item(), row["access"].item()) == (0.2, "white_box")
    assert row[["robust_accuracy_low", "attack_success_rate"]].isna().all(axis=None)
    assert row["clean_accuracy_defended"].item() == 0.95
    assert table["robust_accuracy"].notna().all(), "the table itself is left alone"


def test_pivot(tmp_path: Path) -> None:
    table = frame.to_frame(three())
    assert pivot.pivot(table, ["eps"], ["access"]).loc["0.2"].tolist() == ["60.0 [50.2, 69.1]", "unreliable"]
    assert pivot.pivot(table, ["eps"], ["access"], "clean_accuracy").loc["0.2"].tolist() == ["97.0 [91.5, 99.0]"] * 2
    one = pivot.pivot(table[table["access"] == "white_box"], ["eps"], [])
    assert one["robust_accuracy"].tolist() == ["35.0 [26.4, 44.7]", "unreliable", "35.0 [26.4, 44.7]"]


def test_detection_figures_go_with_the_cell() -> None:
    known = {
        "clean_rejected": 0.04,
        "detection_tpr": 0.5,
        "detection_n": 70,
        "detection_auc": 0.75,
        "accepted_wrong": 0.3,
    }
    cells = [doubt(cell(**known)), cell(access="white_box", **known)]
    rows = tables.side_by_side(cells)
    shown = {name: value(rows[0]) for name, value in tables._measures(rows)}
    assert [shown[f"detected {access}"] for access in ("gray_box", "white_box")] == ["unreliable", "50.0 [38.6, 61.4]"]
    assert shown["clean rejected"] == "4.0 [1.6, 9.8]"
    table = frame.to_frame(cells)
    for name, sound in (("detection_tpr", "50.0 [38.6, 61.4]"), ("detection_auc", "0.75")):
        assert pivot.pivot(table, ["eps"], ["access"], name).loc["0.1"].tolist() == ["unreliable", sound]
    people = frame.shown(table).iloc[0]
    assert people[["detection_tpr", "detection_tpr_low", "detection_auc", "accepted_wrong_high"]].isna().all()
    assert people["clean_rejected"] == 0.04


def test_bare_figure_and_gap_go_with_the_cell() -> None:
    sound, weak = tables.side_by_side([*pair(), *(doubt(r) if r.access == "gray_box" else r for r in pair(0.2))])
    assert sound.bare is not None
    assert (weak.bare, weak.gap) == (None, None)


def test_comparisons_take_sound_cells_only(tmp_path: Path) -> None:
    seeds = [cell(right=right, seed=seed, key=str(seed)) for seed, right in enumerate((50, 60, 90))]
    text = comparison.to_markdown([*seeds[:2], doubt(seeds[2])], {})
    row = [field.strip() for field in text.splitlines()[4].split("|")]
    assert row[7:10] == ["vae", "2", "55.0"]
    said = "Left out as unreliable: digits lenet pgd linf 0.1 gray_box vae seed"
    assert text.endswith(f"\n\n{said} 2.\n")
    none = comparison.to_markdown([doubt(r) for r in seeds], {})
    assert said in none
    assert "|" not in none
    alone = doubt(cell(0.2, seed=3))
    assert "0.2" not in comparison.to_markdown([*seeds, alone], {}), "with nothing to compare it with"


def test_defenses_are_compared_without_the_doubtful_and_it_is_said(tmp_path: Path) -> None:
    cells = [cell(right=right, defense=name, key=name) for name, right in (("vae", 60), ("jpeg", 30), ("none", 90))]
    for record in cells:
        verdicts(record, tmp_path, np.arange(100) >= 100 * (record.robust_accuracy or 0))
    text = comparison.to_markdown([*cells[:2], doubt(cells[2])], sidecars.find([tmp_path]))
    (row,) = [line for line in text.splitlines() if line.startswith("| digits")]
    assert [field.strip() for field in row.split("|")][7:10] == ["vae", "jpeg", "30.0"]
    assert "Left out as unreliable: digits lenet pgd linf 0.1 gray_box none seed 0." in text


def test_wandb_shows_a_gap_and_the_word() -> None:
    radii = relog._radii(three())
    assert [row["eps"] for row in radii] == [0.1, 0.2, 0.3]
    assert [row.get("white_box") for row in radii] == [0.35, None, 0.35]
    assert "gap" not in radii[1]
    said = relog._summary(three())
    assert said["robust_accuracy/white_box/eps_0.2"] == "unreliable"
    assert (said["robust_accuracy/white_box/eps_0.3"], said["largest_eps/white_box"]) == (0.35, 0.35)
    assert str(said["unreliable"]).startswith(f"{FLAG}: {SAYS}")
    last = relog._summary([doubt(r) if r.access == "white_box" else r for r in three()])
    assert (last["largest_eps/white_box"], last["largest_eps/gap"], last["largest_eps/gray_box"]) == (None, None, 0.6)
    assert "unreliable" not in relog._summary(pair())
    assert relog.counts(three()) == {"cells": 6, "failed": 0, "unreliable": 1}


def test_wandb_takes_it(tmp_path: Path) -> None:
    from src.tracking import Tracker
    from tests.test_tracking import only_run

    with Tracker(dir=str(tmp_path)) as tracker:
        relog.log_job(tracker, three(), {}, [])
    found = only_run(tmp_path)
    table = found.tables["results"]
    column = [row[table["columns"].index("robust_accuracy")] for row in table["data"]]
    assert column == [0.6, 0.35, 0.6, "unreliable", 0.6, 0.35]


def test_the_page_has_the_word_in_place_of_every_figure_of_the_attack(tmp_path: Path) -> None:
    from tests.test_page import content

    found = content(page.write_page(three(), tmp_path / "report.html"))
    at = {column["name"]: place for place, column in enumerate(found["columns"])}
    (row,) = [row for row in found["rows"] if row["unreliable"]]
    assert row["unreliable"] == [FLAG], "advice is not a reason"
    assert [row["c"][at[name]] for name in ("robust", "gap", "success")] == [None, None, None]
    assert (row["low"], row["hollow"]) == (None, 35.0)
    assert row["c"][at["clean"]] == 95.0
    sound = found["rows"][0]
    assert (sound["c"][at["robust"]], sound["c"][at["gap"]], sound["hollow"]) == (60.0, 25.0, None)
    gray = next(row for row in found["rows"] if row["eps"] == "0.2" and not row["unreliable"])
    assert gray["c"][at["gap"]] is None, "half of it is unreliable"
