"""Curves and pictures that are drawn of records."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from src import frame, report, sidecars, tables
from src import records as store
from src.analysis import curves, pictures, points
from src.records import Record
from src.report import page
from tests.cells import cell, failed, is_drawn, pair, sidecar


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


def test_weights_of_ones_own_have_names_of_their_own(drawn: list[Any], tmp_path: Path) -> None:
    def measured(*names: str) -> list[Record]:
        return [cell(right=n, key=name, config=own(name)) for n, name in enumerate(names)]

    def own(name: str) -> dict[str, Any]:
        return {"defense": {"checkpoint": f"runs/{name}/weights.pt"}}

    curves.robustness_curve(measured("a", "b"), tmp_path / "c.png")
    curves.robustness_curve(measured("a", "a"), tmp_path / "c.png")
    apart, alike = ([text.get_text() for text in figure.legends[0].get_texts()] for figure in drawn)
    assert [f"vae (defense.checkpoint={name}/weights.pt), gray_box" in apart for name in "ab"] == [True, True]
    assert "gray_box" in alike
    said = [figure._supxlabel.get_text() for figure in drawn]
    assert ["With defense.checkpoint=a/weights.pt." in text for text in said] == [False, True]


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


def test_pictures_of_other_weights_are_not_shown_as_one_setting(tmp_path: Path) -> None:
    records = [r.model_copy(update={"key": f"{w}{r.access}"}) for w in "ab" for r in pair(stages={"defense": w})]
    for record in records:
        sidecar(record, tmp_path)
    shown = pictures.choose(records, sidecars.find([tmp_path]))
    assert len({record.stages["defense"] for record in shown}) == 1
    assert len(shown) == 2


def test_a_long_setting_makes_no_file_name_too_long(tmp_path: Path) -> None:
    variant = ",".join(f"attack.argument_{i}={i}" for i in range(20))
    cells = [r for a in ("fgsm", "pgd") for r in pair(variant=f"{variant},attack.{a}=1", attack=a)]
    cells = [record.model_copy(update={"key": str(i)}) for i, record in enumerate(cells)]
    for record in cells:
        sidecar(record, tmp_path)
    written = report.write_report(cells, tmp_path, tmp_path / "out")
    assert len([path for path in written if path.name.startswith("pictures_")]) == 2


@pytest.mark.parametrize("channels", [1, 3])
def test_pictures_of_a_defense_that_purifies_nothing(tmp_path: Path, channels: int) -> None:
    sidecar(cell(defense="none"), tmp_path, purifies=False, channels=channels)
    path = pictures.picture_grid([cell(defense="none")], tmp_path, tmp_path / "p.png")
    assert path is not None
    assert is_drawn(path)


@pytest.mark.parametrize("of", [("clean_", "", "bare_"), ("bare_",), ()])
def test_pictures_say_how_sure_the_model_is_where_it_is_known(
    of: tuple[str, ...], tmp_path: Path, drawn: list[Any]
) -> None:
    record = cell(targeted=True)
    sidecar(record, tmp_path)
    with np.load(tmp_path / f"{record.key}.npz") as file:
        arrays = dict(file)
    shares = dict.fromkeys((f"picture_{name}confidence" for name in of), np.full(4, 0.731))
    store.save_sidecar(tmp_path / f"{record.key}.npz", arrays | shares)
    pictures.picture_grid([record], tmp_path, tmp_path / "p.png")
    texts = [" ".join(text.get_text().split()) for text in drawn[0].axes[0].texts]
    known, random = len(of) == 3, of == ("bare_",)
    assert ("a ✓ 73 %" in texts) == known
    assert ("a ✓" in texts) != known
    assert ("shown in another draw than was judged" in texts[-1]) == random
    assert "n = 4 of 100 images" in texts[-1]
    assert "pgd (targeted), linf, ε = 0.1, gray_box" in texts[-1]


def test_no_pictures_without_sound_sidecars(tmp_path: Path) -> None:
    assert pictures.picture_grid(pair(), tmp_path, tmp_path / "p.png") is None
    (tmp_path / f"{cell().key}.npz").write_bytes(b"damaged")
    assert pictures.picture_grid(pair(), tmp_path, tmp_path / "p.png") is None
    assert not (tmp_path / "p.png").exists()


def test_data_sets_of_one_choice_are_told_apart(tmp_path: Path) -> None:
    """Two files that are both dataset=npz: two lines, two pictures, two rows, two places of the cube."""
    cells = [
        r for name in "ab"
        for r in pair(config={"dataset": {"root": f"x/{name}.npz"}}, stages={"data": name}, key=name)
    ]  # fmt: skip
    cells = [r.model_copy(update={"key": f"{r.key}{r.access}"}) for r in cells]
    wanted = {"dataset.root=a.npz", "dataset.root=b.npz"}
    named, shared = points.told_apart(cells)
    assert ({r.variant for r in named}, shared) == (wanted, "")
    assert {key[-1] for key in pictures.groups(cells)} == wanted
    table = frame.to_frame(cells)
    assert set(table["variant"]) == wanted
    assert table.to_xarray().sizes["variant"] == 2
    text = page.write_page(cells, tmp_path / "report.html").read_text()
    assert all(f'"{name}"' in text for name in wanted)
    assert points.told_apart(cells[:2])[1] == "", "one alone is called as before"
