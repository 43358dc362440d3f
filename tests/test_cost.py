"""Cost and several attacks beside one another: figures made of many records."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from src import memory, records, report, sidecars
from src.analysis import (
    cost,
    curves,
    side_by_side,
)
from tests.cells import cell, failed, is_drawn, sidecar
from tests.conftest import Linear


def test_cost_is_shown_at_the_one_eps_of_most_of_what_was_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Any] = []
    timed = [cell(eps, defense_ms_per_image=2.0) for eps in (0.1, 0.3, float("inf"))]
    timed += [cell(eps, right=40, defense="jpeg", defense_ms_per_image=3.0) for eps in (0.1, 0.3, 0.4)]
    timed += [cell(0.3, "white_box", 20, defense_ms_per_image=2.0), cell(0.4, defense="magnet", defense_ms_per_image=9)]
    (group,) = cost.figures([*timed, cell(0.5, defense="rbf"), failed()]).values()
    with monkeypatch.context() as patch:
        patch.setattr(cost, "save_figure", lambda figure, path: drawn.append(figure) or path)
        cost.cost_scatter(group, tmp_path / "cost.png")
    assert [line.get_ydata()[0] for line in drawn[0].axes[0].lines] == [40.0, 60.0, 20.0]
    bars = [bar.get_segments()[0][:, 1] for bar in drawn[0].axes[0].collections]
    assert bars[1] == pytest.approx([100 * bound for bound in records.wilson(60, 100)])
    said = " ".join(drawn[0]._supxlabel.get_text().split())
    assert "All at ε = 0.3." in said
    assert "Left out as not measured at ε = 0.3: magnet pgd gray_box." in said
    assert cost.figures([cell(), failed()]) == {}


def test_cost_of_each_dataset_classifier_and_norm_is_a_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cells = [cell(eps, dataset=name, defense_ms_per_image=2.0) for name, eps in (("digits", 0.1), ("cifar10", 0.3))]
    (path,) = report._costs(cells[:1], tmp_path, (".png",))
    assert path.name == "cost.png"
    assert is_drawn(path)
    monkeypatch.setattr(cost, "save_figure", lambda _, path: path)
    names = [path.name for path in report._costs(cells, tmp_path, (".png",))]
    assert sorted(names) == ["cost_cifar10-lenet-linf.png", "cost_digits-lenet-linf.png"]


def test_the_marker_grows_with_memory() -> None:
    sizes = [1.0, 10.0, 100.0]
    assert [cost._points(mib, sizes) for mib in sizes] == pytest.approx([4.0, 8.5, 13.0])
    assert cost._points(3.0, [3.0]) == 6.0
    assert cost._size(cell(), sizes) == 5.0, "a record of before"


class Greedy(Linear):
    """Keeps as many copies of its input at once as it is told."""

    copies = 10

    def forward(self, x: Tensor) -> Tensor:
        large = x.repeat(self.copies, 1, 1, 1)
        torch.rand(1)  # a stochastic defense
        return self.layer(large[: len(x)].flatten(1))


def test_memory_of_a_forward_pass_by_hand() -> None:
    images = torch.rand(64, 1, 8, 8)
    weights, answer = (64 * 3 + 3) * 4, 64 * 3 * 4
    for copies in (1, 10):
        model = Greedy(side=8, classes=3)
        model.copies = copies
        expected = weights + images.nbytes * (1 + copies) + answer
        state = torch.random.get_rng_state()
        assert memory.peak_mib(model, images) == pytest.approx(expected / memory.MIB, rel=0.01)
        assert torch.random.get_rng_state().equal(state)


def test_attacks_stand_side_by_side_on_the_same_images(tmp_path: Path) -> None:
    cells = [cell(eps, attack=a, norm="l2") for a in ("fgsm", "cw") for eps in (0.1, float("inf"))]
    for record in cells:
        sidecar(record, tmp_path)
    (group,) = side_by_side.groups([*cells, cell(defense="jpeg")]).values()
    assert [(r.attack, r.eps) for r in group] == [("cw", float("inf")), ("fgsm", float("inf"))]
    path = side_by_side.side_by_side(group, sidecars.find([tmp_path]), tmp_path / "a.png")
    assert path is not None
    assert is_drawn(path)
    assert side_by_side.side_by_side(group, {}, tmp_path / "b.png") is None


def test_attacks_side_by_side_are_on_one_model_and_the_largest_eps_of_each_stands() -> None:
    a, b = {"stages": {"defense": "a"}}, {"stages": {"defense": "b"}}
    one = [cell(attack="fgsm", **a), cell(attack="pgd", **a), cell(0.05, attack="pgd", variant="attack.steps=9", **a)]
    other = [cell(attack="fgsm", **b), cell(attack="pgd", **b, variant="defense.noise=0.5"), cell(attack="pgd", **b)]
    found = side_by_side.groups([*one, *other])
    assert [[(r.attack, r.variant, r.eps) for r in group] for group in found.values()] == [
        [("fgsm", "", 0.1), ("pgd", "", 0.1), ("pgd", "attack.steps=9", 0.05)], [("fgsm", "", 0.1), ("pgd", "", 0.1)],
    ]  # fmt: skip
    assert len(set(found)) == 2


def test_of_attacks_side_by_side_the_rejected_are_neither_right_nor_wrong(drawn: list[Any], tmp_path: Path) -> None:
    cells = [cell(attack="fgsm"), cell(attack="pgd")]
    for record in cells:
        sidecar(record, tmp_path, rejected=record.attack == "pgd")
    side_by_side.side_by_side(cells, sidecars.find([tmp_path]), tmp_path / "a.png")
    assert "untargeted, linf" in drawn[0].get_supxlabel()
    titles = [axis.title for axis in drawn[0].axes[4:]]
    assert [title.get_text() for title in titles] == ["0.1"] * 4 + ["0.1\nrejected"] * 4
    assert [title.get_color() for title in titles] == [curves.BLUE] * 4 + [curves.REJECTED] * 4


def test_sizes_of_a_change_by_hand() -> None:
    change = np.zeros((1, 2, 2, 2), dtype=np.float32)
    change[0, 0, 0, 0], change[0, 1, 0, 0], change[0, 0, 1, 1] = 3, -4, 12
    sizes = {norm: side_by_side.distance(change, norm)[0] for norm in ("l0", "l1", "l2", "linf")}
    assert sizes == {"l0": 2, "l1": 19, "l2": 13, "linf": 12}
