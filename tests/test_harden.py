"""Every defense that is a new classifier, found by itself, trained on the digits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from src.attacks.fgsm import FGSM
from src.defenses.harden.squeezed_training import SqueezedTraining
from tests.hardening import HARDEN, LINF, Trained, fresh

LEARNT = ("defense.trained_on.eps=0.15", "defense.fit.batch_size=64")
SHORT = (*LEARNT, "defense.fit.epochs=8", "defense.trained_on.validation.steps=5")
STEPS = (*SHORT, "defense.trained_on.attack.steps=3", "defense.fit.epochs=6")
# What makes each train in seconds, the clean accuracy it has to reach, and how far above the bare classifier's its
# accuracy under a white_box attack.
ON_DIGITS = {
    "adversarial_training": (0.9, 0.2, *STEPS),
    "adversarial_training_fgsm": (0.9, None, *LEARNT, "defense.fit.epochs=8"),
    "adversarial_training_fast": (0.9, 0.2, *SHORT),
    "adversarial_training_free": (0.9, 0.08, *SHORT, "defense.replays=4", "defense.fit.epochs=4"),
    "adversarial_training_trades": (0.85, 0.2, *STEPS),
    "adversarial_training_mart": (0.85, 0.2, *STEPS),
    "squeezed_training": (0.75, None, "defense.fit.epochs=8"),
    "distillation": (0.85, None, "defense.fit.epochs=16", "defense.temperature=5", "defense.fit.lr=1e-2"),
    "rbf": (0.85, None, "defense.fit.epochs=8"),
    "smoothing": (0.9, None, "defense.fit.epochs=16", "defense.sigma=0.25"),
}
UNLISTED = (0.75, None, "limit.epochs=16")  # of a defense that is new here

# These two learn as long as `adversarial_training`, of which they are variants; their losses have tests of their own.
LONG = {"adversarial_training_mart", "adversarial_training_trades"}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in LONG else ()) for name in HARDEN]
)
def test_learns_the_digits_and_loads_as_it_was_saved(artifacts: Path, name: str) -> None:
    least, gain, *overrides = ON_DIGITS.get(name, UNLISTED)
    made, found = (Trained(artifacts, name, *overrides) for _ in range(2))
    assert made.accuracy(made.defended) >= least
    answers = []
    for each in (made, found):
        torch.manual_seed(0)
        answers.append(each.defended(made.images[:32]))
    assert torch.equal(*answers)
    if gain is not None:
        assert made.under_attack(made.defended) >= made.under_attack(made.classifier) + gain


def test_fgsm_holds_against_images_made_on_the_bare_classifier(artifacts: Path) -> None:
    """System B's protocol: gray_box. What is true under white_box stands in the table beside it."""
    made = Trained(artifacts, "adversarial_training_fgsm", *ON_DIGITS["adversarial_training_fgsm"][2:])
    attacked = FGSM()(made.classifier, made.images, made.labels, LINF)
    assert made.accuracy(made.defended, attacked.images) >= made.accuracy(made.classifier, attacked.images) + 0.3


def test_squeezed_training_keeps_the_filter_at_test() -> None:
    module = SqueezedTraining(fresh=fresh, window=3)
    salted = torch.full((1, 1, 8, 8), 0.5)
    salted[0, 0, 3, 3] = 1.0
    plain = torch.full((1, 1, 8, 8), 0.5)
    defended = module.guard(fresh())
    torch.testing.assert_close(defended(salted), module.network(plain))
    torch.testing.assert_close(module(salted), module.network(plain))  # in training as well
    assert torch.equal(defended.purified(salted), plain)
