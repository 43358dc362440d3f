"""Defenses that change or flag the input, trained on the digits: what they keep, what they hold, what they reject."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from scipy.stats import betabinom

from src.attacks.pgd import PGD
from src.train import CONF
from tests.conftest import choices
from tests.hardening import HARDEN, LINF, Trained


def _rebuilding(key: str) -> tuple[str, ...]:
    """An autoencoder of few steps: without the noise against which a code has first to grow."""
    learnt = ("architecture=conv", "noise=0", "fit.epochs=10", "fit.batch_size=32", "fit.lr=4e-3")
    return tuple(f"{key}.{item}" for item in learnt)


UNLISTED = (0.5, 0.0, "limit.epochs=15")  # of a defense that is new here
# The clean accuracy each has to keep, how far above the bare classifier's its accuracy in gray_box, and what makes it
# train in seconds.
ON_DIGITS = {
    "jpeg": (0.9, 0.01),
    "feature_squeezing": (0.65, 0.01),  # a median of 3x3 takes much of an 8x8 digit away
    "squeezing_detector": (0.85, 0.01),
    "vae": (0.9, 0.15, "defense.fit.epochs=15"),
    "vae_kl": (0.85, 0.15, "defense.fit.epochs=15", "defense.latent=16"),
    "autoencoder": (0.8, 0.3, *_rebuilding("defense")),
    "autoencoder_pgd": (0.8, 0.3, *_rebuilding("defense")),
    "magnet": (
        0.8,
        0.3,
        "defense.fit.epochs=12",
        "defense.fit.batch_size=32",
        "defense.fit.lr=1e-2",
        "defense.width=16",
    ),
    "diffusion": (0.7, 0.05, "defense.fit.epochs=10"),
    "counter_gan": (0.9, 0.5, "defense.fit.epochs=10"),
    "counter_gan_sketch": (0.85, 0.4, "defense.fit.epochs=15"),
    "cwgan_gp": (0.75, 0.15, "defense.fit.epochs=20", "defense.draws=20"),
    "cwgan_gp_siamese": (0.65, 0.2, "defense.fit.epochs=20", "defense.draws=20"),
    "defense_gan": (
        0.7,
        0.05,
        "defense.fit.epochs=20",
        "defense.steps=20",
        "defense.restarts=2",
        "defense.candidates=200",
    ),
    "chain": (0.75, 0.3, *_rebuilding("defense.parts.last")),
}


def _marked(name: str) -> object:
    text = (CONF / "defense" / f"{name}.yaml").read_text()
    trains = "_target_" not in text or "/fit@fit" in text or "parts." in text
    return pytest.param(name, marks=[pytest.mark.slow] if trains else [])


ASKED = [_marked(name) for name in choices("defense") if name not in HARDEN and name != "none"]


@pytest.mark.parametrize("name", ASKED)
def test_keeps_the_digits_holds_in_gray_box_and_rejects_no_more_than_it_says(artifacts: Path, name: str) -> None:
    least, gain, *overrides = ON_DIGITS.get(name, UNLISTED)
    made = Trained(artifacts, name, *overrides)
    assert made.accuracy(made.defended) >= least
    attacked = PGD(steps=10)(made.classifier, made.images, made.labels, LINF).images
    torch.manual_seed(0)
    with torch.no_grad():
        answer, said = made.defended(attacked).argmax(dim=1), made.defended(made.images).argmax(dim=1)
    held = float(((answer == made.labels) | (answer > 9)).float().mean())  # beside the ten digits stands the rejection
    assert held >= made.accuracy(made.classifier, attacked) + gain
    if made.defended.rejects:
        # At most `fpr` of the validation images score above the threshold: what that says of others is beta-binomial.
        above = int(made.defended.fpr * made.validated)
        low, high = betabinom.interval(0.999, len(said), above + 1, made.validated - above)
        assert low <= int((said > 9).sum()) <= high
