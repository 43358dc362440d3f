"""What the attacker knows: each access measures what it says, and refuses what it cannot."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from src import records
from src.attacks.pgd import PGD
from src.attacks.square import Square
from src.attacks.worst_case import WorstCase
from src.defenses.guarded import DefendedModel
from src.errors import UserError
from src.threat import ThreatModel
from tests.conftest import Linear, Outcome
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
        (["threat.access=transfer"], ["threat.access=transfer", "+classifier@surrogate=cnn3"]),
        (
            ["threat.access=transfer", "+classifier@surrogate=lenet", "+plan=true"],
            ["error: classifier@surrogate=lenet takes", "use classifier@surrogate=cnn3"],
        ),
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


def test_a_minimal_attack_answers_every_eps_from_one_search(command: Command, tmp_path: Path) -> None:
    small = [item for item in SMALL if not item.startswith("attack.steps")]
    radii = (0.2, 0.8, 3.0)
    outcome = ok(
        command(*small, "attack=deepfool", "threat=l2", f"threat.eps=[{','.join(map(str, radii))}]", "defense=vae")
    )
    found = records.find(outcome.runs())
    assert len(found) == 6
    for access in ("gray_box", "white_box"):
        accuracies = [record.robust_accuracy for record in found if record.access == access]
        assert accuracies == sorted(accuracies, reverse=True)
    gray = [record for record in found if record.access == "gray_box"]
    assert gray[0].robust_accuracy_bare > gray[2].robust_accuracy_bare
    assert len({record.distance_median for record in gray}) == 1  # the search's, whatever eps
    assert len(list(tmp_path.glob("artifacts/examples/[!.]*"))) == 2  # one on the classifier, one on the defense


def test_a_minimal_attack_gains_nothing_by_the_draws_of_a_random_defense(command: Command) -> None:
    """What lies beyond eps stays clean, and is right or wrong as clean images are: not right in any of two draws."""
    small = [item for item in SMALL if not item.startswith("attack.steps")]
    noisy = ("defense=smoothing", "defense.sigma=1.0", "defense.votes=1", "defense.certify_images=0", "eot_draws=2")
    outcome = ok(command(*small, *noisy, "attack=deepfool", "attack.steps=3", "threat=l2", "threat.eps=[0,0.2]"))
    for record in records.find(outcome.runs()):
        assert 0.2 < record.clean_accuracy_defended < 0.9  # draws disagree
        if record.eps == 0:
            assert record.robust_accuracy == record.clean_accuracy_defended
        assert record.robust_accuracy <= record.clean_accuracy_defended


def test_a_surrogate_is_part_of_the_cells_that_it_attacks_alone(command: Command) -> None:
    common = (*SMALL, "defense=none", "threat.eps=0.2", "+classifier@surrogate=cnn3", "surrogate.fit.epochs=1")
    both = by_access(ok(command(*common, "threat.access=[white_box,transfer]")))
    (alone,) = records.find(ok(command(*common, "threat.access=white_box")).runs()[-1:])
    assert alone == both["white_box"]
    assert "surrogate" in both["transfer"].stages
    assert "surrogate" not in alone.stages


def test_black_box_asks_the_defended_model_for_scores_only(command: Command) -> None:
    small = [item for item in SMALL if not item.startswith("attack.steps")]
    outcome = ok(
        command(
            *small, "attack=square", "attack.queries=100", "threat.eps=0.3", "defense=feature_squeezing",
            "threat.access=[black_box,gray_box]",
        )
    )  # fmt: skip
    found = by_access(outcome)
    assert found["black_box"].backward_passes == 0
    assert found["black_box"].forward_passes <= 100 + 3
    assert found["black_box"].robust_accuracy < found["black_box"].clean_accuracy_defended


def test_a_defense_without_gradient_meets_the_members_that_need_none() -> None:
    """An ensemble spares it the gradient attacks instead of pretending; alone they are refused."""
    classifier = Linear(side=4)
    x = torch.rand(8, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    labels = classifier(x).argmax(1)
    threat = ThreatModel(norm="linf", eps=0.3)
    closed = DefendedModel(classifier=classifier, purify=lambda images: images * 1.0, gradient="none").adaptive(1)
    both = WorstCase(members={"pgd": PGD(steps=3), "square": Square(queries=50)}, all_images=False)
    alone = WorstCase(members={"square": Square(queries=50)}, all_images=False)
    found, expected = both(closed, x, labels, threat), alone(closed, x, labels, threat)
    assert found.success.any()
    assert torch.equal(found.images, expected.images)
    assert not found.backward_passes.any()
    with pytest.raises(UserError, match="no gradient"):
        PGD(steps=3)(closed, x, labels, threat)


def test_black_box_says_which_members_it_could_not_use(command: Command) -> None:
    small = ["attack=adaptive", "attack.members.square.queries=20", "threat.eps=0.2", "threat.access=black_box"]
    common = [argument for argument in SMALL if argument != "attack.steps=5"]
    (record,) = by_access(ok(command(*common, *small))).values()
    assert record.flags == ["members_left_out", "few_images"]
    assert record.checks["members_left_out"] == 3  # those that need gradients; Square is left
    assert record.backward_passes == 0
    assert 0 < record.attack_success_rate < 1


def test_a_search_that_ends_before_eps_is_refused(command: Command) -> None:
    common = [argument for argument in SMALL if argument != "attack.steps=5"]
    done = command(*common, "attack=jsma", "threat=l0", "threat.eps=20")  # 14.5 % of 8x8 pixels are 10
    assert done.code != 0
    (line,) = done.error_lines
    assert "threat.eps=20: attack=jsma looks no farther than 10" in line
    assert "attack.max_pixels" in line
