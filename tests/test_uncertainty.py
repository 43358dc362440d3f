"""Intervals and tests against closed forms and published examples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from src import report, sidecars
from src.report import comparison
from src.report.comparison import against_best
from src.uncertainty import exact, excess, over_seeds, paired
from tests.planted import cell
from tests.test_tables import verdicts


def outcomes(both: int, first: int, second: int, neither: int) -> tuple[np.ndarray, np.ndarray]:
    rows = [(1, 1)] * both + [(1, 0)] * first + [(0, 1)] * second + [(0, 0)] * neither
    one, two = np.array(rows, dtype=bool).T
    return one, two


@pytest.mark.parametrize(
    ("counts", "low", "high"),
    [  # Newcombe 1998, Statistics in Medicine 17:2635, table III, method 10
        ((36, 12, 2, 0), 0.0569, 0.3404),
        ((36, 14, 0, 0), 0.1528, 0.4167),
    ],
)
def test_the_interval_of_a_paired_difference(counts: tuple[int, int, int, int], low: float, high: float) -> None:
    found = paired(*outcomes(*counts))
    assert (found.low, found.high) == pytest.approx((low, high), abs=2e-3)
    assert found.difference == pytest.approx((counts[1] - counts[2]) / sum(counts))
    assert (found.n, found.only_first, found.only_second) == (sum(counts), counts[1], counts[2])
    other = paired(*reversed(outcomes(*counts)))
    assert (other.low, other.high, other.p) == pytest.approx((-found.high, -found.low, found.p))


def test_mcnemar_is_the_binomial_of_the_images_that_differ() -> None:
    assert paired(*outcomes(50, 8, 2, 40)).p == pytest.approx(2 * (1 + 10 + 45) / 2**10)
    assert exact(5, 0) == pytest.approx(1 / 32)
    assert exact(0, 0) == 1


def test_no_difference_is_no_evidence() -> None:
    found = paired(*outcomes(30, 0, 0, 10))
    assert found.p == 1
    assert found.low <= found.difference == 0 <= found.high


def test_an_excess_is_zero_where_chance_explains_it() -> None:
    assert excess(*outcomes(10, 4, 0, 50)) == 0
    assert excess(*outcomes(10, 6, 0, 48)) == pytest.approx(6 / 64)
    assert excess(*outcomes(10, 0, 6, 48)) == 0


@pytest.mark.parametrize("second", [[True], [[True, False]], []])
def test_outcomes_that_do_not_pair_are_refused(second: list[object]) -> None:
    with pytest.raises(ValueError, match="expected one of each"):
        paired([True, False] if second else [], second)


def test_over_seeds() -> None:
    """Student's t with two degrees of freedom: 4.303 standard errors."""
    cells = [cell(right, n=100, seed=seed) for seed, right in enumerate((40, 50, 60))]
    others = [cell(10, n=100, seed=3, **change) for change in ({"eps": 0.3}, {"access": "gray_box"}, {"norm": "l2"},
              {"targeted": True}, {"variant": "defense.x=1"}, {"status": "failed"})]  # fmt: skip
    (found,) = over_seeds([*cells, *others])
    assert (found.seeds, found.first.seed) == (3, 0)
    assert found.mean == pytest.approx(0.5)
    assert found.spread == pytest.approx(0.1)
    assert found.high - found.mean == pytest.approx(4.3027 * 0.1 / 3**0.5, abs=1e-4)


def test_other_data_and_other_weights_are_no_other_seeds() -> None:
    def found(at: str, weights: str, folder: str) -> list[Any]:
        config = {"dataset": {"root": at}, "defense": {"parts": {"a": {"checkpoint": weights}}}, "paths": {"data": "d"}}
        first = [cell(right, n=100, seed=seed, config=config) for seed, right in enumerate((40, 50))]
        moved = {"dataset": {"root": folder}, "defense": config["defense"], "paths": {"data": folder}}
        return over_seeds([*first, cell(90, n=100, seed=2, config=moved)])

    assert [each.seeds for each in found("a.npz", "x/weights.pt", "b.npz")] == [2]
    assert [each.seeds for each in found("d", "x/weights.pt", "e")] == [3]  # where downloads lie says nothing
    one, two = (cell(50, n=100, seed=0, config={"dataset": {"root": name}}) for name in ("m/a.npz", "n/a.npz"))
    assert len(over_seeds([one, two.model_copy(update={"seed": 1})])) == 1  # another machine's folder
    one, two = (cell(50, n=100, config={"defense": {"checkpoint": f"{name}/weights.pt"}}) for name in "ab")
    assert over_seeds([one, two.model_copy(update={"seed": 1})]) == []


def test_the_report_compares_seeds_and_defenses(tmp_path: Path) -> None:
    """Two defenses over two seeds: a mean for each, and each seed's defenses image by image."""
    cells, rng = [], np.random.default_rng(0)
    for seed in (0, 1):
        vae = rng.random(100) < 0.5
        none = vae & (np.arange(100) >= 30)
        for name, held in (("vae", vae), ("none", none)):
            record = cell(int(held.sum()), n=100, seed=seed, defense=name, key=f"{name}{seed}")
            cells.append(verdicts(record, tmp_path, ~held))
    found = against_best(cells, {"vae0": vae, "none0": none, "vae1": vae})
    assert [(each.best.key, each.other.key) for each in found] == [("vae0", "none0")]
    report.write_report(cells, tmp_path, tmp_path / "out")
    text = (tmp_path / "out" / "results.md").read_text()
    assert "## Over seeds" in text
    assert len([line for line in text.splitlines() if "| vae " in line and "| none " in line]) == 2
    assert len([line for line in text.splitlines() if "| pgd " in line and line.count("|") == 12]) >= 2


def test_one_model_under_two_attackers_is_no_two_defenses() -> None:
    cells = [
        cell(right, n=100, key=str(right), access="transfer", variant=variant, stages={"surrogate": made})
        for right, variant, made in (
            (30, "classifier@surrogate=cnn3", "a"), (40, "classifier@surrogate=lenet", "b"), (50, "", "c"),
            (60, "threat.quantize=true", "c"),
        )
    ]  # fmt: skip
    assert against_best(cells, {record.key: [True] * 100 for record in cells}) == []


def test_a_defense_is_not_compared_under_another_attack_nor_with_itself() -> None:
    cells = [
        cell(right, n=100, defense=defense, key=f"{defense}{steps}", variant=f"attack.steps={steps},defense.x=1")
        for defense, steps, right in (("vae", 10, 60), ("none", 10, 30), ("vae", 100, 40), ("none", 100, 5))
    ]
    cells += [cell(right, n=100, defense="chain", key=k, stages={"defense": k}) for k, right in (("a", 50), ("b", 20))]
    held = {record.key: np.arange(100) < 100 * (record.robust_accuracy or 0) for record in cells}
    assert {(each.best.key, each.other.key) for each in against_best(cells, held)} == {
        ("vae10", "none10"), ("vae100", "none100"), ("a", "b")
    }  # fmt: skip
    for change in (
        {"dataset": "mnist"}, {"classifier": "lenet"}, {"norm": "l2"}, {"eps": 0.2}, {"access": "gray_box"},
        {"targeted": True}, {"seed": 1}, {"stages": {"data": "other"}}, {"status": "failed"},
    ):  # fmt: skip
        two = [cell(60, n=100, key="vae"), cell(**{"right": 30, "n": 100, "key": "jpeg", "defense": "jpeg", **change})]
        assert against_best(two, dict.fromkeys(("vae", "jpeg"), held["a"])) == [], change


def test_the_draw_that_counts_is_one_of_the_redraws() -> None:
    text = comparison.to_markdown([cell(60, n=100, robust_accuracy_redraws=[0.5, 0.7])], {})
    (row,) = [line for line in text.splitlines() if line.startswith("| digits")]
    assert [field.strip() for field in row.split("|")][7:12] == ["vae", "3", "60.0", "10.0", "50.0 to 70.0"]


def test_verdicts_of_other_images_are_not_compared(tmp_path: Path) -> None:
    cells = [cell(2, n=4, defense=name, key=name) for name in ("vae", "jpeg")]
    for record, count in zip(cells, (4, 3), strict=True):
        verdicts(record, tmp_path, [0, 0, 1, 1][:count])
    assert comparison.to_markdown(cells, sidecars.find([tmp_path])) == ""


def test_one_seed_and_one_defense_need_no_further_section(tmp_path: Path) -> None:
    report.write_report([cell(50, n=100)], tmp_path, tmp_path)
    assert "##" not in (tmp_path / "results.md").read_text()
