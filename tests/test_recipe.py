"""The schedule of a training, also of one of very few steps, and whose precision it takes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR

from src import fit, resuming
from src.classifiers.module import Classifier
from src.data.digits import Digits
from src.recipe import Recipe
from src.report.command import CONF
from tests.conftest import Linear


def recipe(warmup: float) -> Recipe:
    return Recipe(
        epochs=1, batch_size=4, optimizer="sgd", lr=0.5, momentum=0.9, weight_decay=0.0, schedule="onecycle",
        warmup=warmup, augment=False, patience=None, precision="32-true", channels_last=False,
    )  # fmt: skip


def rates(made: dict, steps: int) -> list[float]:
    optimizer, found = made["optimizer"], []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if "lr_scheduler" in made:
            made["lr_scheduler"]["scheduler"].step()
    return found


@pytest.mark.parametrize("warmup", [0.1, 0.2, 0.25, 1 / 3, 0.5])
@pytest.mark.parametrize("steps", range(1, 11))
def test_onecycle_of_few_steps_learns(warmup: float, steps: int) -> None:
    found = rates(recipe(warmup).optimizers(nn.Linear(2, 2), steps=steps), steps)
    assert max(found) >= 0.04
    assert max(found) <= 0.5
    if steps > 1:
        assert found[-1] == pytest.approx(0.5 / 10 / 1000)
    if warmup * steps == 1:
        assert found[0] == pytest.approx(0.5)


@pytest.mark.parametrize(("warmup", "steps"), [(0.2, 4), (0.2, 6), (0.2, 100), (0.3, 250)])
def test_onecycle_is_that_of_torch(warmup: float, steps: int) -> None:
    optimizer = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.5)
    schedule = OneCycleLR(
        optimizer, 0.5, total_steps=steps, pct_start=warmup, anneal_strategy="linear", div_factor=10,
        final_div_factor=1000, cycle_momentum=False,
    )  # fmt: skip
    wanted = rates({"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule}}, steps)
    assert rates(recipe(warmup).optimizers(nn.Linear(2, 2), steps=steps), steps) == wanted


@pytest.mark.parametrize(
    "defense", ["adversarial_training_fast", "distillation", "rbf", "smoothing", "squeezed_training"]
)
def test_a_network_of_the_classifiers_kind_is_trained_in_its_precision(defense: str) -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        for classifier in ("cnn6", "own"):
            overrides = (
                ["classifier=own", "classifier.model=a:b"] if classifier == "own" else [f"classifier={classifier}"]
            )
            fit = compose("train", overrides=[*overrides, f"defense={defense}"]).defense.fit
            like_it = classifier == "cnn6"
            assert (fit.augment, fit.channels_last) == (like_it, like_it)
            assert fit.precision == ("bf16-mixed" if like_it else "32-true")
            assert fit.optimizer == "adam"


@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_decay_rates_of_moments_are_torchs_unless_given(name: str) -> None:
    asked = recipe(0.2).model_copy(update={"optimizer": name})
    for given, wanted in (({}, (0.9, 0.999)), ({"betas": (0.5, 0.9)}, (0.5, 0.9))):
        groups = asked.optimizers(nn.Linear(2, 2), steps=4, **given)["optimizer"].param_groups
        assert {group["betas"] for group in groups} == {wanted}
    sgd = recipe(0.2).optimizers(nn.Linear(2, 2), steps=4, betas=(0.5, 0.9))["optimizer"]
    assert all("betas" not in group for group in sgd.param_groups), "it has no moments to decay"


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_weights_decay_and_neither_biases_nor_batch_norm_nor_what_is_frozen(optimizer: str) -> None:
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Linear(2, 2).requires_grad_(False))
    given = recipe(0.2).model_copy(update={"optimizer": optimizer, "weight_decay": 0.1, "schedule": "none"})
    made = given.optimizers(network)["optimizer"]
    decays = {id(weight): group["weight_decay"] for group in made.param_groups for weight in group["params"]}
    assert [decays.get(id(weight)) for weight in network.parameters()] == [0.1, 0, 0, 0, None, None]


def test_cosine_falls_from_the_rate_to_none_over_the_steps() -> None:
    made = recipe(0.2).model_copy(update={"schedule": "cosine"}).optimizers(nn.Linear(2, 2), steps=8)
    assert rates(made, 8) == pytest.approx([0.25 * (1 + math.cos(math.pi * step / 8)) for step in range(8)])


def test_the_weights_of_the_best_epoch_are_kept_and_those_of_the_last_to_go_on_from(tmp_path: Path) -> None:
    last = []

    class Told(Classifier):
        """Its weights are the number of the epoch, and the second is the best."""

        def on_train_epoch_start(self) -> None:
            if self.current_epoch:
                last.append(torch.load(tmp_path / "last.ckpt", weights_only=True)["epoch"])

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            with torch.no_grad():
                self.network.layer.weight.fill_(self.current_epoch)
            self.log("val_accuracy", (0.5, 0.9, 0.7, 0.8, 0.6)[self.current_epoch])

    module = Told(network=Linear(side=8, classes=10), num_classes=10)
    given = recipe(0.2).model_copy(update={"epochs": 5, "batch_size": 16, "patience": 2})
    config = {"_target_": "pytorch_lightning.Trainer", "accelerator": "cpu", "enable_progress_bar": False}
    fit.fit(module, Digits(limit_train=40), given, config=config, folder=tmp_path, seed=0)
    assert module.trainer.current_epoch == 4  # two epochs that were no better
    assert last == [0, 1, 2]
    assert (module.network.layer.weight == 1).all()
    assert (torch.load(tmp_path / "weights.pt", weights_only=True)["network.layer.weight"] == 1).all()


def test_the_best_epoch_is_known_in_a_folder_that_was_moved(tmp_path: Path) -> None:
    states = []
    for name in ("before", "after"):
        best = resuming.Checkpoints(tmp_path / name, "best", monitor="val_loss")
        path = str(tmp_path / name / "best.ckpt")
        best.best_model_score, best.best_model_path, best.best_k_models = torch.tensor(0.5), path, {path: 0.5}
        best.kth_best_model_path, best.kth_value = path, torch.tensor(0.5)
        states.append(best.state_dict())
    fresh = resuming.Checkpoints(tmp_path / "after", "best", monitor="val_loss")
    fresh.load_state_dict(states[0])
    assert {**fresh.state_dict(), "current_score": None} == {**states[1], "current_score": None}


def test_a_damaged_checkpoint_costs_epochs_and_not_the_training(tmp_path: Path) -> None:
    best, last = tmp_path / "best.ckpt", tmp_path / "last.ckpt"
    assert resuming.last_of(tmp_path) is None
    torch.save({"epoch": 3}, best)
    last.write_bytes(best.read_bytes()[:100])
    assert resuming.last_of(tmp_path) == best
    for damage in (lambda: best.write_bytes(b""), lambda: best.unlink(missing_ok=True)):
        torch.save({"epoch": 3}, last)
        damage()
        assert resuming.last_of(tmp_path) is None, "the best epoch may lie behind the last"
        assert not list(tmp_path.iterdir())
        torch.save({"epoch": 3}, best)


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_each_optimizer_has_the_schedule_that_was_asked_for(steps: int) -> None:
    """GANs step theirs by place: one that is left out moves the others up."""
    assert "lr_scheduler" in recipe(0.2).optimizers(nn.Linear(2, 2), steps=steps)
