"""Defenses that are a new classifier: what each learns from, what it holds, what it proves."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from pytorch_lightning import Trainer
from scipy.stats import binomtest, norm
from torch import Tensor, nn
from torch.utils.data import DataLoader

from src import records
from src.attacks.fgsm import FGSM
from src.attacks.pgd import PGD
from src.build import build
from src.callbacks.attack_callback import AttackCallback
from src.classifiers.module import Classifier
from src.config import parse
from src.data.augment import to_float
from src.data.base import ImageDataModule
from src.defenses.harden.adversarial_training import AdversarialTraining, mart, moved, trades
from src.defenses.harden.distillation import Distillation
from src.defenses.harden.rbf import RBF
from src.defenses.harden.smoothing import Smoothing
from src.defenses.harden.squeezed_training import SqueezedTraining
from src.errors import UserError
from src.recipe import Recipe
from src.stages import Stages
from src.threat import ThreatModel
from src.tracking import NoTracker
from src.train import CONF
from src.trained import Workshop
from src.weights import load_weights
from tests.conftest import Linear, Outcome, choices

LINF = ThreatModel(norm="linf", eps=0.15, exhaust=True)
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


class Trained:
    """A defense trained on the digits, the test images, and the classifier it is compared with."""

    def __init__(self, artifacts: Path, name: str, *overrides: str) -> None:
        quick = ("callbacks=none", "logger=none", "trainer.enable_progress_bar=false", f"paths.artifacts={artifacts}")
        with initialize_config_dir(str(CONF), version_base="1.3"):
            job = parse(compose("train", overrides=[f"defense={name}", *quick, "classifier.fit.epochs=8", *overrides]))
        data: ImageDataModule = build(job.dataset, "dataset")
        data.prepare()
        data.eval_batch_size = 256
        workshop = Workshop(job, data, Stages(artifacts), NoTracker())
        self.classifier, key = workshop.classifier("cnn3")
        self.defended, _ = workshop.defense(name, self.classifier, key)
        batch = data.test.batch(list(range(len(data.test))))
        self.images, self.labels = to_float(batch["image"]), batch["label"]
        self.validated = len(data.val)

    def accuracy(self, model: nn.Module, images: Tensor | None = None) -> float:
        torch.manual_seed(0)
        with torch.no_grad():
            right = model(self.images if images is None else images).argmax(dim=1) == self.labels
        return float(right.float().mean())

    def under_attack(self, model: nn.Module) -> float:
        return self.accuracy(model, PGD(steps=10)(model, self.images, self.labels, LINF).images)


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("artifacts")


HARDEN = [
    name
    for name in choices("defense")
    if ".harden." in (text := (CONF / "defense" / f"{name}.yaml").read_text()) or "- adversarial_training\n" in text
]


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


def images(count: int = 4, side: int = 8) -> Tensor:
    return torch.rand(count, 1, side, side, generator=torch.Generator().manual_seed(1))


def fresh() -> nn.Module:
    return Linear(side=8, classes=3)


def batch(count: int = 4) -> dict[str, Tensor]:
    clean = images(count)
    attacked = (clean + 0.1 * images(count).flip(0)).clamp(0, 1)
    return {"image": attacked, "clean": clean, "label": torch.arange(count) % 3}


def adversarial(**options) -> AdversarialTraining:
    module = AdversarialTraining(fresh=fresh, classifier=fresh(), **options)
    module.threat = LINF
    return module


def test_trades_and_mart_by_hand() -> None:
    clean, attacked, labels = torch.tensor([[2.0, 0.0, 1.0]]), torch.tensor([[0.5, 1.0, 0.0]]), torch.tensor([0])
    p, q = clean.softmax(1)[0].tolist(), attacked.softmax(1)[0].tolist()
    kl = sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True))
    assert float(trades(clean, attacked, labels, 6.0)) == pytest.approx(-math.log(p[0]) + 6 * kl, rel=1e-5)
    boosted = -math.log(q[0]) - math.log(1 - max(q[1], q[2]))
    assert float(mart(clean, attacked, labels, 5.0)) == pytest.approx(boosted + 5 * kl * (1 - p[0]), rel=1e-5)
    assert torch.isfinite(mart(clean, torch.tensor([[0.0, 99.0, 0.0]]), labels, 5.0))  # sure and wrong


def test_objectives_learn_from_what_they_say() -> None:
    data = batch()
    losses = {name: adversarial(objective=name).loss(data) for name in ("pgd", "fast", "fgsm")}
    clean, attacked = (F.cross_entropy(fresh()(data[name]), data["label"]) for name in ("clean", "image"))
    torch.testing.assert_close(losses["pgd"], attacked)
    torch.testing.assert_close(losses["fast"], attacked)
    torch.testing.assert_close(losses["fgsm"], (clean + attacked) / 2)
    for name, term in (("trades", trades), ("mart", mart)):
        by_hand = term(fresh()(data["clean"]), fresh()(data["image"]), data["label"], 3.0)
        torch.testing.assert_close(adversarial(objective=name, beta=3.0).loss(data), by_hand)


def free(replays: int, monkeypatch: pytest.MonkeyPatch) -> AdversarialTraining:
    """An untrained one, with the optimiser that Lightning would give it."""
    module = adversarial(objective="free", replays=replays, ema=0)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.0)
    monkeypatch.setattr(module, "optimizers", lambda: optimizer)
    monkeypatch.setattr(module, "lr_schedulers", lambda: None)
    monkeypatch.setattr(module, "manual_backward", lambda loss: loss.backward())
    return module


def test_free_with_one_replay_has_the_gradients_of_plain_training(monkeypatch: pytest.MonkeyPatch) -> None:
    module, data, plain = free(1, monkeypatch), {"image": images(), "label": batch()["label"]}, fresh()
    module.training_step(data, 0)
    F.cross_entropy(plain(data["image"]), data["label"]).backward()
    torch.testing.assert_close(module.network.layer.weight.grad, plain.layer.weight.grad)


def test_free_moves_the_perturbation_up_the_gradient_and_keeps_it(monkeypatch: pytest.MonkeyPatch) -> None:
    module, data, plain = free(1, monkeypatch), {"image": images(), "label": batch()["label"]}, fresh()
    x = data["image"].clone().requires_grad_()
    (slope,) = torch.autograd.grad(F.cross_entropy(plain(x), data["label"]), x)
    module.training_step(data, 0)
    torch.testing.assert_close(module.perturbation, LINF.eps * slope.sign())
    module.training_step(data, 1)  # the next batch meets it
    seen = LINF.project(data["image"], data["image"] + LINF.eps * slope.sign())
    plain.zero_grad()
    F.cross_entropy(plain(seen), data["label"]).backward()
    torch.testing.assert_close(module.network.layer.weight.grad, plain.layer.weight.grad)
    module.on_train_epoch_start()
    assert module.perturbation is None


def test_free_moves_the_weights_in_each_replay_and_the_schedule_once_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    module, steps = free(3, monkeypatch), []
    optimizer, schedule = module.optimizers(), SimpleNamespace(step=lambda: steps.append("schedule"))
    monkeypatch.setattr(optimizer, "step", lambda: steps.append("weights"))
    monkeypatch.setattr(module, "lr_schedulers", lambda: schedule)
    module.training_step({"image": images(), "label": batch()["label"]}, 0)
    assert steps == ["weights"] * 3 + ["schedule"]


@pytest.mark.parametrize("value", [0.5, 1.0])  # within the box, and at its edge
def test_free_leaves_the_edge_of_ball_and_box(value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    module = free(2, monkeypatch)
    module.network = Linear(side=8, classes=2)
    with torch.no_grad():
        module.network.layer.weight.mul_(0.01)  # nowhere is the answer so sure that the gradient vanishes
    up = (module.network.layer.weight[1] - module.network.layer.weight[0]).detach().sign().view(1, 1, 8, 8)
    data = {"image": torch.full((4, 1, 8, 8), value), "label": torch.zeros(4, dtype=torch.long)}
    module.perturbation = (-LINF.eps * up).expand(4, -1, -1, -1)  # where the loss is least
    module.training_step(data, 0)
    torch.testing.assert_close(module.perturbation, (LINF.eps * up).expand(4, -1, -1, -1))


@pytest.mark.parametrize(
    ("name", "objective", "words"),
    [
        ("adversarial_training", "free", r"trained_on\.attack: objective=free makes its own images"),
        ("adversarial_training_free", "pgd", r"trained_on\.attack=null: objective=pgd learns from an attack's images"),
        ("adversarial_training_free", "mart", r"trained_on\.attack=null: objective=mart"),
    ],
)
def test_only_free_learns_without_an_attack(artifacts: Path, name: str, objective: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        Trained(artifacts, name, f"defense.objective={objective}")


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_moved_perturbation_stays_in_the_ball(norm: str) -> None:
    threat, slope = ThreatModel(norm=norm, eps=0.3), images() - 0.5
    once = moved(torch.zeros_like(slope), slope, threat)
    torch.testing.assert_close(threat.distance(torch.zeros_like(slope), once), torch.full((4,), 0.3))
    again = moved(once, slope.flip(0), threat)
    assert (threat.distance(torch.zeros_like(slope), again) <= 0.3 + 1e-6).all()
    assert (torch.linalg.vecdot(again.flatten(1), slope.flip(0).flatten(1)) > 0).all()


def test_free_refuses_norms_it_does_not_have_and_all_refuse_to_learn_from_no_attack() -> None:
    module = adversarial(objective="free")
    module.threat = ThreatModel(norm="l1", eps=1.0)
    with pytest.raises(UserError, match=r"trained_on\.norm=l1: objective=free allows linf and l2"):
        module.on_fit_start()
    module.threat = None
    with pytest.raises(UserError, match=r"defense\.trained_on: missing"):
        module.on_fit_start()


def test_the_moving_average_is_what_is_kept_statistics_of_batch_norm_included() -> None:
    def network() -> nn.Module:
        return nn.Sequential(nn.BatchNorm2d(1), Linear(side=8, classes=3))

    module = AdversarialTraining(fresh=network, classifier=fresh(), ema=0.5)
    weights = []
    for value in (1.0, 2.0, 3.0):  # the first is copied; then decays (1 + n) / (10 + n) for n = 1, 2
        with torch.no_grad():
            module.network[1].layer.weight.fill_(value)
            module.network[0].running_mean.fill_(value)
        module.on_train_batch_end(None, {}, 0)
        weights.append(float(module.hardened[1].layer.weight[0, 0]))
    second = 2 / 11 * 1 + 9 / 11 * 2
    assert weights == pytest.approx([1.0, second, 3 / 12 * second + 9 / 12 * 3])
    assert float(module.hardened[0].running_mean) == pytest.approx(weights[-1])
    module.eval()
    torch.testing.assert_close(module.guard(fresh())(images()), module.hardened(images()))
    assert not torch.equal(module(images()), module.network(images()))  # validation, too
    module._trainer = SimpleNamespace(training=True)  # the attack on a training batch meets the one that learns
    torch.testing.assert_close(module(images()), module.network(images()))


@pytest.mark.parametrize("prefix", ["", "network."])
@pytest.mark.parametrize("name", ["ema", "no_ema", "distillation", "smoothing"])
def test_weights_of_ones_own_are_those_of_the_network_alone(tmp_path: Path, name: str, prefix: str) -> None:
    """What only a training needs, an average or a teacher, is not asked for."""
    module = {
        "ema": lambda: adversarial(ema=0.5),
        "no_ema": lambda: adversarial(ema=0),
        "distillation": lambda: Distillation(fresh=fresh, classifier=fresh()),
        "smoothing": lambda: Smoothing(fresh=fresh, sigma=1e-6),
    }[name]().eval()
    mine, file = Linear(side=8, classes=3, seed=7), tmp_path / "w.pt"
    torch.save({prefix + key: value for key, value in mine.state_dict().items()}, file)
    load_weights(module, file, "defense.checkpoint")
    torch.testing.assert_close(module.guard(fresh()).logits(images()), mine(images()), atol=1e-3, rtol=1e-3)
    torch.save({"layer.weight": mine.layer.weight}, file)
    with pytest.raises(UserError, match=r"of another architecture; 1 of 2 tensors differ, first layer\.bias"):
        load_weights(module, file, "defense.checkpoint")


def test_fast_alone_stops_when_its_accuracy_collapses() -> None:
    keeper = SimpleNamespace(best_model_score=torch.tensor(0.7))
    for objective, now, stops in (("fast", 0.55, False), ("fast", 0.45, True), ("pgd", 0.45, False)):
        module = adversarial(objective=objective, collapse=0.2)
        module._trainer = SimpleNamespace(
            checkpoint_callback=keeper, callback_metrics={"val_accuracy": torch.tensor(now)}, should_stop=False
        )
        module.on_train_epoch_end()
        assert module._trainer.should_stop is stops


def test_warm_start_copies_weights_and_keeps_no_classifier() -> None:
    network = Linear(side=8, classes=3, seed=7)
    bare = Classifier(network=network, num_classes=3)
    module = AdversarialTraining(fresh=fresh, classifier=bare, warm_start=True)
    torch.testing.assert_close(module(images()), bare(images()))
    assert all(each is not bare and each is not network for each in module.modules())
    cold = AdversarialTraining(fresh=fresh, classifier=bare)
    assert not torch.equal(cold(images()), bare(images()))


def test_the_radius_grows_in_the_warmup_and_an_absent_attack_leaves_the_images() -> None:
    module, data = fresh(), batch()
    trainer = SimpleNamespace(global_rank=0, current_epoch=0, max_epochs=4, num_training_batches=10)
    callback = AttackCallback(attack=FGSM(), threat=LINF, draw_radius=False, warmup=0.5)
    for epoch, index, share in ((0, 0, 0.0), (1, 0, 0.5), (1, 5, 0.75), (2, 0, 1.0), (3, 9, 1.0)):
        trainer.current_epoch = epoch
        learnt = {"image": torch.full((4, 1, 8, 8), 0.5), "label": data["label"]}
        callback.on_train_batch_start(trainer, module, learnt, index)
        torch.testing.assert_close((learnt["image"] - learnt["clean"]).abs().amax(), torch.tensor(share * LINF.eps))
    own = AttackCallback(attack=None, threat=LINF, draw_radius=False, validation=FGSM())
    learnt, judged = dict(data), dict(data)
    own.on_train_batch_start(trainer, module, learnt, 0)
    own.on_validation_batch_start(trainer, module, judged, 0)
    assert torch.equal(learnt["image"], data["image"])
    assert not torch.equal(judged["image"], data["image"])


def test_squeezed_training_keeps_the_filter_at_test() -> None:
    module = SqueezedTraining(fresh=fresh, window=3)
    salted = torch.full((1, 1, 8, 8), 0.5)
    salted[0, 0, 3, 3] = 1.0
    plain = torch.full((1, 1, 8, 8), 0.5)
    defended = module.guard(fresh())
    torch.testing.assert_close(defended(salted), module.network(plain))
    torch.testing.assert_close(module(salted), module.network(plain))  # in training as well
    assert torch.equal(defended.purified(salted), plain)


def test_distillation_has_nothing_to_learn_where_both_agree_at_the_temperature() -> None:
    module = Distillation(fresh=fresh, classifier=fresh(), temperature=20.0)
    data = batch()
    module.network.load_state_dict(module.teacher.state_dict())
    module._taught(data).backward()
    assert float(module.network.layer.weight.grad.abs().max()) < 1e-5
    assert module.teacher.layer.weight.grad is None
    logits = module.teacher(data["image"]) / 20
    soft, hard = logits.softmax(1), data["label"]
    torch.testing.assert_close(module._taught(data), -20 * (soft * logits.log_softmax(1)).sum(1).mean())
    torch.testing.assert_close(module._learnt(module.teacher, data["image"], hard), 20 * F.cross_entropy(logits, hard))


def test_distillation_of_the_last_layer_leaves_the_features(artifacts: Path) -> None:
    epochs = ("defense.layers=last", "defense.fit.epochs=8", "defense.fit.lr=3e-2", "defense.temperature=10")
    made = Trained(artifacts, "distillation", *epochs)
    module, bare = made.defended.defense, made.classifier.network
    torch.testing.assert_close(module.network.features(made.images), bare.features(made.images))
    logits = [network(made.images) for network in (module.network, module.teacher, bare)]
    assert min((each.argmax(1) == made.labels).float().mean() for each in logits) > 0.85
    # The student answers as the teacher does, and at temperature 1 both are far surer than the bare classifier.
    assert (logits[0].argmax(1) == logits[1].argmax(1)).float().mean() > 0.95
    assert float((logits[0].std() / logits[2].std()).detach()) > 2


class Normed(nn.Module):
    """Features with batch norm and dropout, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Dropout(0.5))
        self.head = nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


def distilled(**recipe) -> Distillation:
    """Two epochs of a network with batch norm, of which the first trains the teacher."""
    module = Distillation(fresh=Normed, classifier=Normed(), layers="last")
    module.recipe = Recipe(**{**OmegaConf.load(CONF / "fit" / "default.yaml"), **recipe})
    data = DataLoader([{"image": x, "label": torch.tensor(i % 3)} for i, x in enumerate(images(16))], batch_size=8)
    trainer = Trainer(
        accelerator="cpu", max_epochs=2, num_sanity_val_steps=0, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, data, data)
    return module


def test_kept_features_do_not_drift_in_training() -> None:
    module = distilled()
    for network in (module.network, module.teacher):
        assert not network.body[1].running_mean.any()
        assert not any(part.training for part in network.body.modules())  # nor was there dropout


def test_the_teacher_learns_for_half_of_the_training_and_then_teaches_in_eval_mode(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    learnt, real = [], Distillation._learnt

    def watched(self: Distillation, network: nn.Module, images: Tensor, target: Tensor) -> Tensor:
        learnt.append((network is self.teacher, target.ndim, self.teacher.head.training))
        return real(self, network, images, target)

    monkeypatch.setattr(Distillation, "_learnt", watched)
    module = distilled(schedule="onecycle")
    assert learnt == [(True, 1, True)] * 2 + [(False, 2, False)] * 2
    assert [each.scheduler.total_steps for each in module.trainer.lr_scheduler_configs] == [2, 2]  # whole in each half


def test_distillation_refuses_patience() -> None:
    with pytest.raises(UserError, match=r"defense\.fit\.patience=3: .* Use defense\.fit\.patience=null"):
        distilled(patience=3)


def test_distillation_of_a_network_without_head_is_a_clear_error() -> None:
    with pytest.raises(UserError, match=r"defense\.layers=last: Linear has no last layer"):
        Distillation(fresh=fresh, classifier=fresh(), layers="last")


def rbf(**options) -> RBF:
    torch.manual_seed(0)
    return RBF(fresh=fresh, channels=1, size=(8, 8), num_classes=3, code=5, **options)


def test_rbf_by_hand() -> None:
    module, data = rbf(margin=4.0), batch()
    codes = module.network.encode(data["image"].flatten(1))
    squares = torch.stack([(codes - centre).square().sum(1) for centre in module.network.centres], dim=1)
    torch.testing.assert_close(module(data["image"]), -squares)
    torch.testing.assert_close(module.distance(data["image"]), squares.amin(dim=1))
    losses = [
        squares[i, y] + sum(F.softplus(4.0 - squares[i, k]) for k in range(3) if k != y)
        for i, y in enumerate(data["label"].tolist())
    ]
    torch.testing.assert_close(module.loss(data), torch.stack(losses).mean())


def test_rbf_rejects_what_is_far_from_every_class() -> None:
    module = rbf(fpr=0.05)
    defended = module.guard(fresh())
    with torch.no_grad():
        module.network.encode.weight.mul_(3)
        clean = images(200) * 0.1  # near the origin, where the codes are alike
        defended.set_thresholds(defended.scores(clean))
        assert float((defended(clean).argmax(1) == 3).float().mean()) <= 0.05
        assert int(defended(torch.ones(1, 1, 8, 8)).argmax(1)) == 3
    assert not rbf().guard(fresh()).rejects


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


def test_smoothing_counts_every_draw_and_answers_by_majority() -> None:
    linear = TwoSided()
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
