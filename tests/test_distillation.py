"""Distillation: two networks, one after the other, at a temperature."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from pytorch_lightning import Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from src.defenses.harden.distillation import Distillation
from src.errors import UserError
from src.recipe import Recipe
from src.train import CONF
from tests.hardening import Trained, batch, fresh, images


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
