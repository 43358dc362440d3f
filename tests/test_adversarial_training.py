"""The objectives of adversarial training by hand, and what it refuses."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from src.attacks.fgsm import FGSM
from src.callbacks.attack_callback import AttackCallback
from src.classifiers.module import Classifier
from src.defenses.harden.adversarial_training import AdversarialTraining, mart, moved, trades
from src.defenses.harden.distillation import Distillation
from src.defenses.harden.smoothing import Smoothing
from src.errors import UserError
from src.threat import ThreatModel
from src.weights import load_weights
from tests.conftest import Linear
from tests.hardening import LINF, Trained, batch, fresh, images


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
    once = moved(torch.zeros_like(slope), slope, threat.norm, 0.3)
    torch.testing.assert_close(threat.distance(torch.zeros_like(slope), once), torch.full((4,), 0.3))
    again = moved(once, slope.flip(0), threat.norm, 0.3)
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


def test_a_training_that_stopped_on_collapse_has_stopped_when_it_is_resumed(monkeypatch: pytest.MonkeyPatch) -> None:
    for collapsed in (True, False):
        checkpoint: dict = {}
        module, again = adversarial(objective="fast"), adversarial(objective="fast")
        module.collapsed = collapsed
        module.on_save_checkpoint(checkpoint)
        again.on_load_checkpoint(checkpoint)
        trainer = SimpleNamespace(should_stop=False)
        monkeypatch.setattr(AdversarialTraining, "trainer", trainer)
        again.on_train_start()
        assert trainer.should_stop is collapsed


def test_free_without_a_limit_moves_by_the_width_of_the_box(monkeypatch: pytest.MonkeyPatch) -> None:
    module = free(1, monkeypatch)
    module.threat = ThreatModel(norm="linf", eps=math.inf, exhaust=True)
    module.training_step({"image": images(), "label": batch()["label"]}, 0)
    assert module.perturbation.abs().max() == 1
