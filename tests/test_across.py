"""Checks that compare cells of one job or sweep with one another."""

from __future__ import annotations

from typing import Any

import pytest

from src.checks.across import across
from tests.planted import (
    FGSM_CELL,
    NOISE_CELL,
    cell,
)  # fmt: skip


def test_across_twice_changes_nothing_and_keeps_the_order() -> None:
    cells = [cell(200, eps=0.2), cell(150), cell(100, access="gray_box"), cell(90, status="failed")]
    once = across(cells)
    assert across(once) == once
    assert [r.key for r in once] == [r.key for r in cells]
    assert once[0].flags == ["accuracy_rises_with_eps"]
    assert once[0].checks["accuracy_rises_with_eps"] == pytest.approx(50 / 359, abs=1e-6)
    assert once[1].flags == ["weaker_access_stronger"]
    assert once[3] == cells[3]


@pytest.mark.parametrize(
    "change",
    [
        {"variant": "attack.steps=5"}, {"seed": 1}, {"norm": "l2"}, {"n": 100}, {"stages": {"defense": "other"}},
        {"stages": {"classifier": "other"}}, {"stages": {"data": "other"}}, {"targeted": True}, {"defense": "jpeg"},
        {"classifier": "lenet"}, {"dataset": "mnist"},
    ],
)  # fmt: skip
def test_only_like_is_compared(change: dict[str, Any]) -> None:
    right = 30 if "n" in change else 150
    assert across([cell(150), cell(200, eps=0.2)])[1].flags
    assert [r.flags for r in across([cell(right, **change), cell(200, eps=0.2)])] == [[], []]


@pytest.mark.parametrize("rise", [0, 5, 15])
def test_a_rise_that_chance_explains_raises_nothing(rise: int) -> None:
    """15 of 359 around one half are 1.1 standard deviations of a difference."""
    assert across([cell(180), cell(180 + rise, eps=0.2)])[1].flags == []


@pytest.mark.parametrize(("more", "fewer", "found"), [(3, 0, False), (6, 1, False), (5, 0, True), (8, 1, True)])
def test_a_rise_of_a_few_images_is_left_to_chance(more: int, fewer: int, found: bool) -> None:
    """3 images of 6 in one cell by chance: 1 in 8, however many others fell in both."""
    for n in (64, 1000):
        assert bool(across([cell(fewer, n), cell(more, n, eps=0.2)])[1].flags) is found


@pytest.mark.parametrize(
    ("other", "flag"),
    [
        ({"eps": 0.05}, "accuracy_rises_with_eps"),
        (FGSM_CELL, "one_step_stronger"),
        (NOISE_CELL, "noise_stronger"),
    ],
)
def test_only_the_model_that_the_attack_saw_must_fall_further(other: dict[str, Any], flag: str) -> None:
    """A detector rejects more of what is stronger, and one step transfers better than many."""
    gray = {"access": "gray_box", "robust_accuracy_bare": 20 / 359}
    for access in ({"access": "transfer"}, gray):
        assert across([cell(200, **access), cell(150, **other, **access)])[0].flags == []
    stands = gray | {"robust_accuracy_bare": 80 / 359}
    assert across([cell(100, **stands), cell(150, **other, **gray)])[0].flags == [flag]


def test_noise_is_compared_with_attacks_of_its_access() -> None:
    flags = [cell.flags for cell in across([cell(200), cell(150, **NOISE_CELL, access="black_box")])]
    assert flags == [["weaker_access_stronger"], []]


SQUARE_CELL = NOISE_CELL | {"attack": "square"}
APGD_CELL = {"attack": "apgd", "config": {"attack": {"steps": 100}}}


@pytest.mark.parametrize("access", ["black_box", "transfer", "gray_box", "white_box"])
def test_no_attack_without_gradients_beats_many_steps_along_them(access: str) -> None:
    """The classic sign of masked gradients, and black_box refuses the attack that it is seen beside."""
    cells = across([cell(300), cell(50, **SQUARE_CELL, access=access)])
    assert [c.flags for c in cells] == [["weaker_access_stronger"], []]
    assert cells[0].checks["weaker_access_stronger"] == pytest.approx(250 / 359, abs=1e-6)


@pytest.mark.parametrize("other", [APGD_CELL | {"access": "transfer"}, FGSM_CELL | {"access": "gray_box"}])
def test_nor_does_an_attack_that_never_saw_the_model_or_took_one_step_without_its_defense(
    other: dict[str, Any],
) -> None:
    assert across([cell(300), cell(250, **other)])[0].flags == ["weaker_access_stronger"]


@pytest.mark.parametrize(
    ("white", "other"),
    [
        (FGSM_CELL, {}),
        (FGSM_CELL, SQUARE_CELL | {"access": "black_box"}),
        (NOISE_CELL, SQUARE_CELL | {"access": "black_box"}),
        (SQUARE_CELL, APGD_CELL | {"access": "transfer"}),
        ({}, APGD_CELL),
        ({}, APGD_CELL | {"access": "gray_box"}),
        ({"norm": "l0"}, SQUARE_CELL | {"attack": "one_pixel", "access": "black_box", "norm": "l0"}),
        ({"targeted": True}, SQUARE_CELL | {"access": "black_box", "targeted": True}),
        ({}, SQUARE_CELL | {"access": "black_box", "eps": 0.2}),
    ],
)
def test_a_better_search_is_no_sign_of_masked_gradients(white: dict[str, Any], other: dict[str, Any]) -> None:
    assert [c.flags for c in across([cell(300, **white), cell(50, **other)])] == [[], []]
