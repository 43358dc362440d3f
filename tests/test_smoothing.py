"""Smoothing: votes, bounds and radii by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from scipy.stats import binomtest, norm
from torch import Tensor

from src import records
from src.defenses.harden import smoothing
from src.defenses.harden.smoothing import Smoothing
from tests.conftest import Linear, Outcome
from tests.hardening import images


class TwoSided(Linear):
    """``w x > b`` or not."""

    def __init__(self) -> None:
        super().__init__(side=4)
        with torch.no_grad():
            self.layer.weight[1] = -self.layer.weight[0]
            self.layer.bias[1] = -self.layer.bias[0]

    def distance(self, x: Tensor) -> Tensor:
        """To the hyperplane, positive on the side of class 0."""
        weight = self.layer.weight[0]
        return (x.flatten(1) @ weight + self.layer.bias[0]) / weight.norm()


def test_certified_radius_of_a_linear_classifier_is_the_distance_to_the_hyperplane() -> None:
    """Cohen et al. 2019, appendix B: smoothing a linear classifier changes nothing, and the radius is tight."""
    linear = TwoSided()
    module = Smoothing(fresh=lambda: linear, sigma=0.5, certify_draws=20_000)
    torch.manual_seed(0)
    with torch.no_grad():
        x = images(64, side=4) * 2 - 0.5
        x = x[linear.distance(x).abs() < 1.5 * module.sigma]
        distance = linear.distance(x)
    labels = (distance < 0).long()
    radius = module.certify(x, labels)
    told = distance.abs().double()
    sure = radius > 0
    assert len(x) > 15
    assert sure.double().mean() > 0.8
    assert (radius[sure] <= told[sure] + 1e-6).double().mean() > 0.95  # a bound, but for 1 in a thousand
    torch.testing.assert_close(radius[sure], told[sure], atol=0.05, rtol=0.0)
    assert (module.certify(x, 1 - labels) == -1).all()


def test_the_bound_is_clopper_pearsons_and_a_tie_is_withheld() -> None:
    linear = TwoSided()
    module = Smoothing(fresh=lambda: linear, sigma=0.3, certify_draws=500, alpha=0.01)
    weight = linear.layer.weight.detach()[0]
    on_plane = (-linear.layer.bias[0].detach() * weight / weight.norm() ** 2).view(1, 1, 4, 4)
    far = on_plane + 50 * (weight / weight.norm()).view(1, 1, 4, 4)
    torch.manual_seed(0)
    radius = module.certify(torch.cat([far, on_plane]), torch.tensor([0, 0]))
    assert float(radius[0]) == pytest.approx(0.3 * float(norm.ppf(0.01 ** (1 / 500))))
    assert float(radius[1]) == -1
    hits = torch.tensor([[300, 200]])
    module.counts = lambda images, draws: hits  # type: ignore[method-assign]
    low = binomtest(300, 500).proportion_ci(confidence_level=0.98, method="exact").low
    assert float(module.certify(far, torch.tensor([0]))) == pytest.approx(0.3 * float(norm.ppf(low)))
    for chosen, radius in (([60, 40], 0.3 * float(norm.ppf(0.01 ** (1 / 500)))), ([40, 60], -1.0)):
        draws = iter([torch.tensor([chosen]), torch.tensor([[500, 0]])])  # the class and its bound: of draws apart
        module.counts = lambda images, draws_, draws=draws: next(draws)  # type: ignore[method-assign, misc]
        assert float(module.certify(far, torch.tensor([0]))) == pytest.approx(radius)


def test_smoothing_counts_every_draw_and_answers_by_majority(monkeypatch: pytest.MonkeyPatch) -> None:
    linear = TwoSided()
    monkeypatch.setattr(smoothing, "AT_ONCE", 100_000)
    module = Smoothing(fresh=lambda: linear, sigma=1.0, votes=9, certify_images=0)
    counts = module.counts(images(3, side=4), 5000)  # more than one pass
    assert counts.sum(dim=1).tolist() == [5000] * 3
    share = torch.special.ndtr(linear.distance(images(3, side=4)) / 1.0)
    torch.testing.assert_close(counts[:, 0] / 5000, share, atol=0.03, rtol=0.0)
    defended = module.guard(linear)
    assert defended.certify is None
    answer = defended(images(3, side=4))
    assert answer.sum(dim=1).tolist() == pytest.approx([10.0] * 3, abs=1e-4)  # nine votes and a probability
    answers = defended.logits(images(3, side=4).repeat(4000, 1, 1, 1)).argmax(dim=1)
    met = (answers == 0).float().view(4000, 3).mean(dim=0)
    torch.testing.assert_close(met, share, atol=0.03, rtol=0.0)  # attackers meet the noise of the training


def test_the_record_carries_the_certified_curve(artifacts: Path, command: Callable[..., Outcome]) -> None:
    outcome = command(
        "defense=smoothing", "attack=noise", "threat.eps=0.1", f"paths.artifacts={artifacts}", "limit.test_images=40",
        "defense.fit.epochs=16", "defense.sigma=0.25", "defense.certify_draws=200", "defense.certify_images=30",
        "defense.votes=5", "classifier.fit.epochs=8", "logger=none", "callbacks=none", "threat.access=gray_box",
        "trainer.enable_progress_bar=false",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    (record,) = records.find(outcome.runs())
    assert record.certified_n == 30
    curve = [share for _, share in sorted((float(r), share) for r, share in record.certified.items())]
    assert curve == sorted(curve, reverse=True)
    assert curve[0] > 0.7
    assert curve[-1] == 0.0  # no radius of 3 is proven with 200 draws
