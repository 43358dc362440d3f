"""What the attacker knows: each access measures what it says, and refuses what it cannot."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from src import records
from tests.conftest import Outcome
from tests.test_pipeline import SMALL, ok

Command = Callable[..., Outcome]


def by_access(outcome: Outcome) -> dict[str, records.Record]:
    return {record.access: record for record in records.find(outcome.runs())}


def test_transfer_attacks_a_surrogate_and_never_sees_the_classifier(command: Command, tmp_path: Path) -> None:
    outcome = ok(command(*SMALL, "threat.eps=0.2", "threat.access=[gray_box,transfer]", "+classifier@surrogate=cnn3"))
    found = by_access(outcome)
    assert found["transfer"].stages["surrogate"] != found["transfer"].stages["classifier"]
    assert found["transfer"].robust_accuracy >= found["gray_box"].robust_accuracy
    assert found["transfer"].robust_accuracy_bare is None
    assert len(list(tmp_path.glob("artifacts/classifier/[!.]*"))) == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["threat.access=transfer"], ["threat.access=transfer", "+classifier@surrogate=lenet"]),
        (["threat.access=black_box"], ["threat.access=black_box", "attack=pgd", "scores"]),
    ],
)
def test_refused_in_one_line(command: Command, arguments: list[str], words: list[str]) -> None:
    outcome = command(*SMALL, *arguments)
    assert outcome.code == 1
    (line,) = outcome.error_lines
    assert all(word in line for word in words)


def test_gray_box_and_white_box_show_the_same_images(command: Command, tmp_path: Path) -> None:
    found = by_access(ok(command(*SMALL, "threat.eps=0.1", "defense=feature_squeezing")))
    gray, white = (
        np.load(tmp_path / "artifacts" / "records" / f"{found[access].key}.npz") for access in ("gray_box", "white_box")
    )
    assert np.array_equal(gray["clean"], white["clean"])
    assert not np.array_equal(gray["adversarial"], white["adversarial"])
    assert (gray["picture_clean_prediction"] == gray["picture_label"]).all()


def test_8_bit_verdicts(command: Command, tmp_path: Path) -> None:
    found = by_access(ok(command(*SMALL, "threat.eps=0.1", "threat.quantize=true")))
    for record in found.values():
        with np.load(tmp_path / "artifacts" / "records" / f"{record.key}.npz") as arrays:
            levels = arrays["adversarial"] * 255
            np.testing.assert_allclose(levels, levels.round(), atol=1e-3)
        assert record.distance_max <= 0.1 + 1e-6
