"""Detection from scores to record: thresholds, rejection, what an attack may count, chains."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import binom
from torch import Tensor, nn

from src import records
from src.attacks.apgd import APGD
from src.attacks.base import Attack
from src.attacks.deepfool import DeepFool
from src.attacks.fgsm import FGSM
from src.attacks.pgd import PGD
from src.attacks.square import Square
from src.build import build
from src.defenses.base import Detector, Harden, Purifier
from src.defenses.chain import Chain
from src.defenses.detect.vae_kl import VAEKL
from src.defenses.guarded import DefendedModel, Detection
from src.defenses.none import NoDefense
from src.defenses.purify.magnet import MagNet
from src.errors import UserError
from src.threat import Norm, ThreatModel
from tests.conftest import Linear, Outcome
from tests.test_pipeline import SMALL, figures, ok

Command = Callable[..., Outcome]


class Brightness(Detector):
    """Suspects bright images, and asks the classifier nothing."""

    def score(self, images: Tensor, classify: Callable[[Tensor], Tensor]) -> Tensor:
        return images.mean(dim=(1, 2, 3))


class Rough(Detector):
    """Suspects images whose neighbouring pixels differ."""

    def score(self, images: Tensor, classify: Callable[[Tensor], Tensor]) -> Tensor:
        return images.diff(dim=2).abs().mean(dim=(1, 2, 3)) + images.diff(dim=3).abs().mean(dim=(1, 2, 3))


class Change(Detector):
    """Suspects images whose logits are large."""

    def score(self, images: Tensor, classify: Callable[[Tensor], Tensor]) -> Tensor:
        return classify(images).abs().sum(dim=1)


class Halved(Purifier):
    def purify(self, images: Tensor) -> Tensor:
        return images / 2


def images(count: int = 64, side: int = 4, seed: int = 0) -> Tensor:
    return torch.rand(count, 1, side, side, generator=torch.Generator().manual_seed(seed))


def frozen(defended: DefendedModel, clean: Tensor) -> DefendedModel:
    with torch.no_grad():
        defended.set_thresholds(defended.scores(clean))
    return defended.eval()


@pytest.mark.parametrize("fpr", [0.02, 0.05, 0.2])
@pytest.mark.parametrize("detectors", [1, 3])
def test_false_positives_on_held_out_clean_images_lie_in_the_binomial_interval(fpr: float, detectors: int) -> None:
    generator = torch.Generator().manual_seed(0)
    # scores of different kinds, so that no two are on the same scale
    clean = torch.randn(5000, 3, generator=generator).exp() * torch.tensor([1e-4, 1.0, 50.0])
    chosen = [Brightness(fpr=fpr) for _ in range(detectors)]
    defended = Chain(parts=chosen).guard(Linear())
    validation, held_out = clean[:2500, :detectors], clean[2500:, :detectors]
    defended.set_thresholds(validation)
    rejected = [int((defended._together(list(part.T)) > 1).sum()) for part in (validation, held_out)]
    assert rejected[0] <= fpr * 2500
    assert rejected[0] >= fpr * 2500 - 2
    # both halves vary: the threshold as the held-out count
    low, high = binom.interval(0.999, 2500, fpr)
    spread = 2**0.5 - 1
    assert low - spread * (fpr * 2500 - low) <= rejected[1] <= high + spread * (high - fpr * 2500)


@pytest.mark.parametrize("threshold", [0.3, 0.6, -1.0])
def test_a_fixed_threshold_stands(threshold: float) -> None:
    x = images()
    defended = frozen(Brightness(threshold=threshold).guard(Linear()), x)  # the median is near 0.5
    rejected = defended(x).argmax(dim=1) == 2
    assert torch.equal(rejected, x.mean(dim=(1, 2, 3)) > threshold)
    assert torch.equal(rejected, defended.suspicion(x) > 1)


def test_rejection_is_the_largest_logit_and_the_rest_stays() -> None:
    x, classifier = images(), Linear()
    defended = frozen(Change(fpr=0.25).guard(classifier), x)
    answer = defended(x)
    torch.testing.assert_close(answer[:, :2], classifier(x))
    told = defended.test_step({"image": x}, 0)
    assert int(told["rejected"].sum()) in (15, 16)  # at most the stated share
    assert torch.equal(told["rejected"], told["suspicion"] > 1)
    assert torch.equal(told["behind"], classifier(x).argmax(dim=1))
    assert torch.equal(told["prediction"] == 2, told["rejected"])


def test_far_above_the_threshold_the_gradient_still_lowers_the_score() -> None:
    """A score of a thousand thresholds must not leave an attacker without direction."""
    classifier = Linear()
    clean, x = 1e-4 * images(), images(8, seed=1).requires_grad_()
    defended = frozen(Brightness().guard(classifier), clean)
    assert (defended.suspicion(x) > 1000).all()
    answer = defended(x)
    loss = nn.functional.cross_entropy(answer, torch.full((8,), 2))  # raised by an attacker
    (slope,) = torch.autograd.grad(loss, x)
    away = x.detach() + 1e-2 * slope / slope.abs().amax(dim=(1, 2, 3), keepdim=True)
    assert (defended.suspicion(away) < defended.suspicion(x)).all()


def test_without_thresholds_there_is_no_answer() -> None:
    with pytest.raises(RuntimeError, match="set_thresholds"):
        Brightness().guard(Linear())(images())


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize(
    "attack", [FGSM(), PGD(steps=10), APGD(steps=10), Square(queries=50), DeepFool()], ids=lambda a: type(a).__name__
)
def test_a_rejected_image_is_never_a_success(attack: Attack, targeted: bool) -> None:
    if targeted and not attack.can_target:
        pytest.skip(f"{type(attack).__name__} has no targeted mode")
    classifier, x = Linear(classes=3), images(200)
    labels = classifier(x).argmax(dim=1)
    norm = Norm.LINF if Norm.LINF in attack.norms else Norm.L2
    threat = ThreatModel(norm=norm, eps=0.3 if norm is Norm.LINF else 3.0, targeted=targeted)
    free = attack(classifier, x, labels, threat)
    for detector in (Brightness(fpr=0.3), Change(fpr=0.3)):
        defended = frozen(detector.guard(classifier), x)
        made = attack(defended.adaptive(1), x, labels, threat)
        told = defended.test_step({"image": made.images}, 0)
        assert not (made.success & told["rejected"]).any()
        assert (told["behind"][made.success] != labels[made.success]).all()
        assert (told["prediction"][made.success] == made.prediction[made.success]).all()
        assert made.success.sum() <= free.success.sum()
    assert free.success.any()


@pytest.mark.parametrize(
    "attack", [PGD(steps=20, loss="dlr"), APGD(steps=20, loss="dlr")], ids=lambda a: type(a).__name__
)
def test_the_ratio_reaches_a_target_past_a_detector(attack: Attack) -> None:
    """Rejection stands in for every class but the target: the spread of the largest logits says nothing then."""
    classifier, x = Linear(side=8, classes=6), images(100, side=8)
    labels, threat = classifier(x).argmax(dim=1), ThreatModel(norm=Norm.LINF, eps=0.25, targeted=True)
    defended = frozen(Rough(fpr=0.05).guard(classifier), x).adaptive(1)
    plain = PGD(steps=20, loss="margin")(defended, x, labels, threat)
    assert int(plain.success.sum()) > 90
    assert int(attack(defended, x, labels, threat).success.sum()) >= int(plain.success.sum()) - 3


def test_white_box_pgd_gets_past_a_detector_that_catches_gray_box() -> None:
    classifier, x = Linear(side=8, classes=3), images(200, side=8)
    labels, threat = classifier(x).argmax(dim=1), ThreatModel(norm=Norm.LINF, eps=0.2)
    defended = frozen(Change(fpr=0.05).guard(classifier), x)
    caught = []
    for target in (classifier, defended.adaptive(1)):
        told = defended.test_step({"image": PGD(steps=40)(target, x, labels, threat).images}, 0)
        wrong = told["behind"] != labels
        caught.append(float(told["rejected"][wrong].float().mean()))
        accepted_wrong = wrong & ~told["rejected"]
    assert caught[1] < caught[0]
    assert accepted_wrong.any()


def test_chains_give_what_composing_by_hand_gives() -> None:
    x, classifier = images(), Linear()
    behind = frozen(Chain(parts=[Change(fpr=0.1), Halved()]).guard(classifier), x)
    torch.testing.assert_close(behind(x)[:, :2], classifier(x / 2))
    torch.testing.assert_close(behind.scores(x)[:, 0], classifier(x / 2).abs().sum(dim=1))  # the defended answer
    first = frozen(Chain(parts=[Halved(), Change(fpr=0.1)]).guard(classifier), x)
    torch.testing.assert_close(first.scores(x), behind.scores(x))
    torch.testing.assert_close(first.purified(x), x / 2)
    own, seen = Chain(parts=[Brightness(), Halved()]), Chain(parts=[Halved(), Brightness()])
    torch.testing.assert_close(own.guard(classifier).scores(x)[:, 0], x.mean(dim=(1, 2, 3)))
    torch.testing.assert_close(seen.guard(classifier).scores(x)[:, 0], x.mean(dim=(1, 2, 3)) / 2)
    inner = Halved().guard(classifier)
    assert NoDefense().guard(inner) is inner  # a chain that opens with `none` is not the bare classifier


def test_what_the_parts_of_a_chain_declare_combines() -> None:
    def behind(classifier: nn.Module, **declared: Any) -> DefendedModel:
        return DefendedModel(classifier=classifier, purify=torch.relu, surrogate=torch.relu, **declared)

    by_hand = [Detection(score=torch.relu)]
    for first, last, worst in (("exact", "bpda", "bpda"), ("bpda", "none", "none"), ("none", "exact", "none")):
        assert behind(behind(Linear(), gradient=last), gradient=first).gradient == worst
    assert behind(behind(Linear(), votes=5)).votes == behind(behind(Linear()), votes=5).votes == 5
    assert behind(behind(Linear(), detections=by_hand, fpr=0.2), fpr=0.3).fpr == 0.2
    assert behind(behind(Linear(), detections=by_hand, fpr=0.2), detections=by_hand, fpr=0.3).fpr == 0.3


class Inverted(Harden):
    """A new classifier: the old one's answers turned round."""

    def __init__(self) -> None:
        super().__init__(fresh=lambda: nn.Sequential(Linear(), Negative()))


class Negative(nn.Module):
    def forward(self, logits: Tensor) -> Tensor:
        return -logits


def test_only_the_last_part_of_a_chain_may_replace_the_classifier() -> None:
    x, classifier = images(), Linear(seed=1)
    for parts in ([Inverted(), Change()], [Halved(), Chain(parts=[Inverted()]), Change()]):
        with pytest.raises(UserError, match=r"replaces the classifier, so it has to be the last part"):
            Chain(parts=parts)
    defended = frozen(Chain(parts=[Change(fpr=0.1), Chain(parts=[Halved(), Inverted()])]).guard(classifier), x)
    torch.testing.assert_close(defended(x)[:, :2], -Linear()(x / 2))
    torch.testing.assert_close(defended.scores(x)[:, 0], Linear()(x / 2).abs().sum(dim=1))


def test_a_detector_behind_a_random_purifier_judges_the_image_that_is_classified() -> None:
    class Noise(Purifier):
        stochastic = True

        def purify(self, images: Tensor) -> Tensor:
            return images + torch.randn_like(images)

    class Flat(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images.mean(dim=(1, 2, 3))[:, None].expand(-1, 2)

    logits, scores = Chain(parts=[Noise(), Brightness()]).guard(Flat())._observed(images())
    torch.testing.assert_close(logits[:, 0], scores[0])


def test_vae_kl_scores_the_divergence_of_the_answers() -> None:
    torch.manual_seed(0)
    detector, classifier = VAEKL(channels=1, size=(8, 8)).eval(), Linear(side=8, classes=3)
    x = images(side=8)
    given, again = (classifier(each).softmax(dim=1) for each in (x, detector.vae.purify(x)))
    torch.testing.assert_close(detector.score(x, classifier), (given * (given / again).log()).sum(dim=1))


def test_magnet_detects_and_reforms_as_it_is_told() -> None:
    torch.manual_seed(0)
    classifier, x = Linear(side=8, classes=3), images(side=8)
    magnet = MagNet(channels=1, detectors=["l2", "jsd"], temperatures=[10.0]).eval()
    defended = magnet.guard(classifier)
    rebuilt = magnet.reconstruct(x)
    torch.testing.assert_close(defended.logits(x), classifier(rebuilt))
    given, again = (classifier(each).div(10).softmax(dim=1) for each in (x, rebuilt))
    middle = (given + again) / 2
    divergence = ((given * (given / middle).log()).sum(dim=1) + (again * (again / middle).log()).sum(dim=1)) / 2
    expected = torch.stack([(x - rebuilt).square().mean(dim=(1, 2, 3)), divergence], dim=1)
    torch.testing.assert_close(defended.scores(x), expected, atol=1e-6, rtol=1e-3)
    assert not MagNet(channels=1, detectors=[]).guard(classifier).rejects
    only = MagNet(channels=3, reform=False).guard(Linear(3, 8))
    assert only.scores(torch.rand(5, 3, 8, 8)).shape == (5, 4)
    assert torch.equal(only.purified(torch.ones(1, 3, 8, 8)), torch.ones(1, 3, 8, 8))
    with pytest.raises(UserError, match="nothing to do"):
        MagNet(channels=1, detectors=[], reform=False)


def test_magnet_has_two_autoencoders_for_grey_images_and_trains_both_on_noisy_ones() -> None:
    torch.manual_seed(0)
    magnet, x = MagNet(channels=1, detectors=["l1"], noise=0.3), images(side=8)
    errors = (x - magnet.plain(x).sigmoid()).abs().mean(dim=(1, 2, 3))
    torch.testing.assert_close(magnet.guard(Linear(side=8)).scores(x)[:, 0], errors)
    assert not torch.allclose(magnet.plain(x), magnet.reformer(x), atol=1e-3)
    magnet.log = lambda *_, **__: None  # type: ignore[method-assign]
    torch.manual_seed(1)
    loss = magnet.training_step({"image": x}, 0)
    torch.manual_seed(1)
    shown = (x + 0.3 * torch.randn_like(x)).clamp(0, 1)
    both = [nn.functional.mse_loss(part(shown).sigmoid(), x) for part in (magnet.reformer, magnet.plain)]
    torch.testing.assert_close(loss, both[0] + both[1])


def test_a_defended_model_travels_to_another_process() -> None:
    x = images(side=8)
    defended = frozen(MagNet(channels=1).guard(Linear(side=8)), x)
    again = pickle.loads(pickle.dumps(defended))
    torch.testing.assert_close(again(x), defended(x))


def test_a_detectors_record_and_its_thresholds_found_again(command: Command, tmp_path: Path) -> None:
    arguments = (
        *SMALL, "threat.eps=0.2", "defense=chain", "defense@defense.parts.last=feature_squeezing", "attack.steps=20"
    )  # fmt: skip
    first = ok(command(*arguments))
    found = {record.access: record for record in records.find(first.runs())}
    for record in found.values():
        told = (record.detection_auc, record.detection_tpr, record.clean_rejected, record.accepted_wrong)
        assert all(value is not None and 0 <= value <= 1 for value in told)
        assert record.robust_accuracy <= record.clean_accuracy_defended <= 1 - record.clean_rejected
        assert record.robust_accuracy + record.accepted_wrong <= 1
        missed = record.correct_defended - record.correct_attacked
        assert missed == round((1 - record.detection_tpr) * record.detection_n) > 0
    assert found["white_box"].detection_tpr < found["gray_box"].detection_tpr
    (threshold,) = tmp_path.glob("artifacts/thresholds/[!.]*")
    for record in (tmp_path / "artifacts" / "records").glob("*"):
        record.unlink()
    second = ok(command(*arguments))
    assert "thresholds of the detector: making it" not in second.out + second.err
    assert "thresholds of the detector: found" in second.out + second.err
    again = {record.access: record for record in records.find([second.runs()[-1]])}
    assert {name: figures(r) for name, r in again.items()} == {name: figures(r) for name, r in found.items()}
    assert list(tmp_path.glob("artifacts/thresholds/[!.]*")) == [threshold]


def test_black_box_search_meets_a_rejecting_model(command: Command) -> None:
    small = [item for item in SMALL if not item.startswith("attack.steps")]
    outcome = ok(
        command(
            *small, "attack=square", "attack.queries=100", "threat.eps=0.3", "threat.access=black_box",
            "defense=squeezing_detector",
        )
    )  # fmt: skip
    (record,) = records.find(outcome.runs())
    assert record.backward_passes == 0
    assert record.robust_accuracy < record.clean_accuracy_defended
    assert record.accepted_wrong > 0


def test_magnet_learns_from_clean_images_beside_an_attack() -> None:
    magnet, seen = MagNet(channels=1, noise=0.0), []
    magnet._loss = lambda shown, wanted: seen.append((shown, wanted)) or torch.zeros(())
    magnet.log = lambda *_, **__: None
    clean = images(side=8)
    for step in (magnet.training_step, magnet.validation_step):
        step({"image": 1 - clean, "clean": clean}, 0)
    assert all(torch.equal(each, clean) for pair in seen for each in pair)


def test_no_threshold_is_nan() -> None:
    with pytest.raises(UserError, match="threshold"):
        build(
            {"_target_": "src.defenses.detect.vae_kl.VAEKL", "threshold": math.nan}, "defense", channels=1, size=(8, 8)
        )
