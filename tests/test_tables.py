"""Worst cases, pivots, LaTeX, Parquet and the labelled cube: what a paper is made of."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from src import frame, report, sidecars
from src import records as store
from src.errors import UserError
from src.records import Record
from src.report import latex, pivot
from src.report.__main__ import main
from src.worst import WORST, worst_cases
from tests.cells import cell, failed, pair


def verdicts(
    record: Record, folder: Path, said: Any, *, rejects: bool = False, clean: Any = None, attempted: Any = None
) -> Record:
    """A record of images that are all of class 0, with what the defended model says of each, attacked and clean."""
    names = ["0", "1", "rejected"] if rejects else ["0", "1"]
    label, answers = np.zeros(len(said), dtype=int), np.array(said, dtype=int)
    before = np.array(clean if clean is not None else [0] * len(said))
    held = (before == 0) & ((answers == 0) | (answers == 2)) if rejects else answers == 0
    low, high = store.wilson(int(held.sum()), len(said))
    changes = {
        "n": len(said), "correct_attacked": int(held.sum()), "robust_accuracy": float(held.mean()),
        "robust_accuracy_low": low, "robust_accuracy_high": high,
    } | ({"clean_rejected": float((before == 2).mean())} if rejects else {})  # fmt: skip
    record = record.model_copy(update=changes)
    arrays = {
        "label": label, "prediction": answers, "clean_prediction": before, "class_names": np.array(names),
        "attempted": np.array(attempted) if attempted is not None else before == 0,
    }  # fmt: skip
    store.save_sidecar(folder / "records" / f"{record.key}.npz", arrays)
    store.save(record, folder / "records")
    return record


def both(folder: Path, first: list[int], second: list[int], **known: Any) -> list[Record]:
    return [verdicts(cell(attack=a), folder, said, **known) for a, said in (("fgsm", first), ("pgd", second))]


def test_the_worst_case_is_counted_image_by_image(tmp_path: Path) -> None:
    cells = both(tmp_path, [1, 1, 0, 0, 0], [0, 1, 1, 0, 0])
    (row,) = worst_cases(cells, sidecars.find([tmp_path]))
    assert (row.attack, row.status, row.n) == (WORST, "done", 5)
    assert row.robust_accuracy == pytest.approx(2 / 5), "each attack alone leaves 3 of 5"
    assert (row.robust_accuracy_low, row.robust_accuracy_high) == pytest.approx(store.wilson(2, 5))
    assert row.attack_success_rate == pytest.approx(3 / 5)
    assert row.reason == "per image over fgsm, pgd"


def test_the_rate_of_the_worst_case_is_that_of_the_cells(tmp_path: Path) -> None:
    """Over the images that were right before and attacked; of a targeted attack no verdict says what reached it."""
    cells = both(tmp_path, [1, 0, 0, 1], [1, 1, 0, 1], clean=[0, 0, 0, 1], attempted=[True, True, False, True])
    (row,) = worst_cases(cells, sidecars.find([tmp_path]))
    assert row.attack_success_rate == 1
    assert row.robust_accuracy == 1 / 4
    aimed = [record.model_copy(update={"targeted": True}) for record in cells]
    (row,) = worst_cases(aimed, sidecars.find([tmp_path]))
    assert row.attack_success_rate is None


def test_a_rejected_image_has_held_unless_its_clean_version_was_rejected(tmp_path: Path) -> None:
    cells = both(tmp_path, [2, 2, 0], [0, 0, 1], rejects=True, clean=[0, 2, 0])
    (row,) = worst_cases(cells, sidecars.find([tmp_path]))
    assert row.correct_attacked == 1
    assert row.attack_success_rate == 1 / 2, "of the two that were right before"


def test_a_class_of_the_data_may_be_called_rejected(tmp_path: Path) -> None:
    """Of loans, say: such an answer is a wrong one like any other."""
    cells = both(tmp_path, [2, 0, 0], [0, 1, 0])
    for path in sidecars.find([tmp_path]).values():
        with np.load(path) as arrays:
            renamed = {**arrays, "class_names": np.array(["0", "1", "rejected"])}
        store.save_sidecar(path, renamed)
    (row,) = worst_cases(cells, sidecars.find([tmp_path]))
    assert (row.status, row.correct_attacked) == ("done", 1)


@pytest.mark.parametrize("what", ["missing", "damaged", "of another record"])
def test_without_verdicts_the_row_says_so_and_gives_the_bound(tmp_path: Path, what: str) -> None:
    cells = both(tmp_path, [1, 1, 0, 0, 0], [0, 1, 0, 0, 0])
    path = tmp_path / "records" / f"{cells[0].key}.npz"
    if what == "of another record":
        path.write_bytes((tmp_path / "records" / f"{cells[1].key}.npz").read_bytes())
    else:
        path.write_bytes(b"damaged") if what == "damaged" else path.unlink()
    (row,) = worst_cases(cells, sidecars.find([tmp_path]))
    assert (row.status, row.robust_accuracy) == ("failed", None)
    assert row.reason == "no verdicts per image of fgsm; at most 0.6000"


def test_only_cells_of_one_threat_and_one_model_are_compared(tmp_path: Path) -> None:
    one = verdicts(cell(attack="fgsm"), tmp_path, [0, 0])
    for change in (
        {"eps": 0.2}, {"access": "white_box"}, {"defense": "jpeg"}, {"seed": 1}, {"targeted": True}, {"norm": "l2"},
        {"variant": "defense.noise=1"}, {"variant": "defense@defense.parts.first=vae_kl"},
        {"variant": "attack@defense.trained_on.attack=fgsm"}, {"variant": "~attack@defense.trained_on.validation"},
        {"stages": {"defense": "other"}}, {"stages": {"data": "other"}},
        {"attack": "fgsm"},
    ):  # fmt: skip
        other = verdicts(cell(**{"attack": "pgd", "key": "other", **change}), tmp_path, [1, 1])
        assert worst_cases([one, other], sidecars.find([tmp_path])) == [], change
    for surrogates, count in (("aa", 1), ("ab", 0)):
        seen = [
            verdicts(
                cell(attack=name, access="transfer", key=f"{name}-t", stages={"surrogate": each}), tmp_path, [0, 1]
            )
            for name, each in zip(("fgsm", "pgd"), surrogates, strict=True)
        ]
        assert len(worst_cases(seen, sidecars.find([tmp_path]))) == count
    fewer = verdicts(cell(attack="pgd", key="fewer"), tmp_path, [1])
    assert worst_cases([one, fewer], sidecars.find([tmp_path])) == []
    more = verdicts(cell(attack="fgsm", variant="attack.steps=9", key="more"), tmp_path, [1, 0])
    (row,) = worst_cases([one, more], sidecars.find([tmp_path]))
    assert row.robust_accuracy == 0.5
    assert row.variant == ""
    of_the_attack = "attack@attack.members.pgd=apgd,eot_draws=2,~attack@attack.members.square"
    (row,) = worst_cases([one, more.model_copy(update={"variant": of_the_attack})], sidecars.find([tmp_path]))
    assert (row.robust_accuracy, row.variant) == (0.5, "")


def test_a_worst_case_is_unreliable_where_only_noise_is_beside_attacks_that_fail(tmp_path: Path) -> None:
    """Noise takes no gradients, so nothing is ever said against them in its cell."""

    def flags(*others: str) -> list[str]:
        cells = [verdicts(cell(attack="pgd", flags=["few_images", "gradient_missing"]), tmp_path, [0, 0])]
        cells += [verdicts(cell(attack=name, key=name), tmp_path, [0, 0]) for name in others]
        (row,) = worst_cases(cells, sidecars.find([tmp_path]))
        return row.flags

    assert flags("noise") == ["few_images", "gradient_missing"]
    assert flags("noise", "square") == ["few_images"]


def test_load_gives_a_frame_and_a_cube(tmp_path: Path) -> None:
    both(tmp_path, [1, 0], [0, 1])
    found = report.load(tmp_path)
    assert isinstance(found, pd.DataFrame)
    assert sorted(found["attack"]) == ["fgsm", "pgd", WORST]
    cube = found.to_xarray()
    assert cube["robust_accuracy"].dims == frame.DIMENSIONS
    assert float(cube["robust_accuracy"].sel(attack=WORST).squeeze()) == 0.0
    assert str(cube["norm"].values) == "linf"
    assert len(report.load([str(tmp_path)], worst=False)) == 2
    with pytest.raises(UserError, match="no such file"):
        report.load(tmp_path / "nothing")


def test_a_cube_has_further_dimensions_where_needed_and_holds_nothing_twice() -> None:
    cells = [*pair(), cell(norm="l2", key="x"), cell(math.inf), failed(eps=0.4)]
    cube = frame.to_frame(cells).to_xarray()
    assert "norm" in cube.dims
    assert cube["robust_accuracy"].sel(norm="l2", eps=math.inf).isnull().all()
    assert float(cube["robust_accuracy"].sel(norm="linf", eps=math.inf, access="gray_box").squeeze()) == 0.6
    with pytest.raises(UserError, match="share a place"):
        frame.to_frame([*pair(), cell(key="again", stages={"defense": "x"})]).to_xarray()


def test_parquet_is_the_csv_with_types(tmp_path: Path) -> None:
    cells = [*pair(), cell(math.inf, flags=["a", "b"]), failed(eps=None)]
    found = pd.read_parquet(frame.write_parquet(cells, tmp_path / "r.parquet"))
    table = pd.read_csv(frame.write_csv(cells, tmp_path / "r.csv"), keep_default_na=True)
    assert list(found.columns) == list(table.columns)
    assert found["eps"].tolist()[:3] == table["eps"].tolist()[:3]
    assert found["seed"].dtype == "int64"


def test_every_share_has_its_interval_from_its_own_count() -> None:
    known = {"clean_rejected": 0.04, "accepted_wrong": 0.3, "detection_tpr": 0.5, "detection_n": 70}
    all_rejected = {"detection_tpr": 1.0}
    old = cell(0.3, clean_accuracy=None, correct_attacked_bare=None)
    cells = [cell(0.1, robust_accuracy_bare=0.2, **known), cell(0.2, **known | all_rejected), old]
    table = frame.to_frame(cells)

    def bounds(name: str, place: int = 0) -> tuple[float, ...]:
        return tuple(table.loc[place, [f"{name}_low", f"{name}_high"]])

    counts = {"clean_accuracy": 97, "clean_accuracy_defended": 95, "robust_accuracy": 60, "robust_accuracy_bare": 20,
              "clean_rejected": 4, "accepted_wrong": 30}  # fmt: skip
    assert {name: bounds(name) for name in counts} == {name: store.wilson(n, 100) for name, n in counts.items()}
    assert (bounds("detection_tpr"), bounds("detection_tpr", 1)) == (store.wilson(35, 70), store.wilson(70, 70))
    assert np.isnan(
        [*bounds("detection_tpr", 2), *bounds("clean_accuracy", 2), *bounds("robust_accuracy_bare", 2)]
    ).all()


# --- pivot and LaTeX --------------------------------------------------------------------------------------------


def many() -> pd.DataFrame:
    return frame.to_frame(
        [r for d in ("vae", "none") for a in ("fgsm", "pgd") for r in pair(8 / 255, defense=d, attack=a)]
    )


def test_pivot_by_any_keys() -> None:
    table = pivot.pivot(many(), ["defense", "eps"], ["attack", "access"])
    assert table.index.tolist() == [("none", "8/255"), ("vae", "8/255")]
    assert table.columns.tolist() == [(a, b) for a in ("fgsm", "pgd") for b in ("gray_box", "white_box")]
    assert table.loc[("vae", "8/255"), ("pgd", "white_box")] == "35.0 [26.4, 44.7]"
    one = pivot.pivot(pivot.select(many(), ["attack=pgd", "access=gray_box", "eps=8/255"]), ["defense"], [], "n")
    assert one["n"].tolist() == ["100", "100"]
    some = pivot.pivot(frame.to_frame([*pair(), failed(access="white_box", key="x")]), ["defense"], ["access"])
    assert some.loc["vae"].tolist() == ["60.0 [50.2, 69.1]", "35.0 [26.4, 44.7]"], "what failed has no place"
    clean = pivot.pivot(many(), ["defense"], ["attack", "access"], "clean_accuracy")
    assert set(clean.loc["vae"]) == {"97.0 [91.5, 99.0]"}


@pytest.mark.parametrize(
    ("rows", "cols", "where", "value", "said"),
    [
        (["defense"], ["access"], [], "robust_accuracy", "differ in attack; figures are never averaged"),
        (["colour"], [], [], "robust_accuracy", "unknown key 'colour'"),
        (["defense", "defense"], ["access"], [], "robust_accuracy", "defense is named twice"),
        (["defense"], ["eps", "defense"], [], "robust_accuracy", "defense is named twice"),
        (["defense"], [], ["eps=0.5"], "robust_accuracy", "no such row. eps has 8/255"),
        (["defense"], [], ["eps=x"], "robust_accuracy", "expected a number"),
        (["defense"], ["attack", "access"], [], "flags", "not a column of numbers"),
        (["eps"], ["attack", "access"], [], "eps", "--value eps: is in --rows or --cols already"),
    ],
)
def test_a_pivot_never_averages_and_says_what_is_wrong(
    rows: list[str], cols: list[str], where: list[str], value: str, said: str
) -> None:
    with pytest.raises(UserError, match=said):
        pivot.pivot(pivot.select(many(), where), rows, cols, value)


def test_pivot_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for record in [*pair(), cell(attack="fgsm", n=200, right=100)]:
        store.save(record, tmp_path / "records")
    words = [str(tmp_path), "--rows", "defense", "--cols", "attack,access", "--where", "attack=pgd"]
    assert main(words) == 0
    caption = (tmp_path / "pivot.tex").read_text()
    assert "pgd (untargeted, linf)" in caption
    assert "fgsm" not in caption, "what is not in the table is not told of"
    assert {p.name for p in tmp_path.glob("pivot.*")} == {"pivot.csv", "pivot.md", "pivot.tex"}
    assert "35.0" in capsys.readouterr().out
    assert main([str(tmp_path), "--cols", "access"]) == 1
    assert "--rows" in capsys.readouterr().err


def test_latex_is_booktabs_and_escapes(tmp_path: Path) -> None:
    cells = [r for e in (0.1, 0.2) for r in pair(e, defense="a_b%")]
    text = latex.write_latex(cells, tmp_path / "r.tex").read_text()
    for part in ("\\toprule", "\\midrule", "\\bottomrule", "robust gray\\_box", "60.0 {\\scriptsize [50.2, 69.1]}",
                 "95.0 {\\scriptsize [88.8, 97.8]}", "clean bare 97.0 [91.5, 99.0]"):  # fmt: skip
        assert part in text
    assert "defense a\\_b\\%" in text, "what all rows share stands in the caption"
    assert text.count("{") == text.count("}")
    long = latex.write_latex([r for s in range(30) for e in (0.1, 0.2) for r in pair(e, seed=s)], tmp_path / "l.tex")
    assert "\\begin{longtable}" in long.read_text()
    assert "\\caption[]{(continued)}" in long.read_text()
    assert latex.write_latex([], tmp_path / "none.tex").read_text()


def test_ten_thousand_records_make_a_table_in_seconds(tmp_path: Path) -> None:
    import time

    cells = [r.model_copy(update={"key": f"{i}-{r.access}", "seed": i}) for i in range(5000) for r in pair()]
    started = time.process_time()
    frame.write_csv(cells, tmp_path / "r.csv")
    frame.write_parquet(cells, tmp_path / "r.parquet")
    assert time.process_time() - started < 10


def test_what_is_wrong_with_data_or_verdicts_is_wrong_of_the_worst_case_too(tmp_path: Path) -> None:
    """One attack may have been looked at more closely; but that one attack failed is nothing where another did not."""
    one, other = both(tmp_path, [1, 0], [0, 1])
    for flag, counts in (("test_in_training", True), ("threshold_not_clean", True), ("gradient_missing", False)):
        flagged = [one.model_copy(update={"flags": [flag]}), other]
        (row,) = worst_cases(flagged, sidecars.find([tmp_path]))
        assert (row.flags == [flag]) == counts, flag
