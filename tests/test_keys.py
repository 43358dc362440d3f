"""What names a trained stage, and what is made from it: nothing is trained here, the plan of a job is enough."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from src import pipeline
from src.audit import composed
from src.measure import Bench
from src.stages import Stages
from src.subject import Names
from src.tracking import NoTracker

QUIET = ("logger=none", "callbacks=none", "trainer.enable_progress_bar=false")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def planned(*overrides: str) -> Bench:
    """The models of a job, untrained, with the keys they would have."""
    job, chosen = composed([*QUIET, *overrides])
    names = Names(**{kind: chosen[kind] for kind in ("dataset", "classifier", "defense", "attack")})
    return pipeline.prepare(job, names, Stages(Path("artifacts"), plan=True), NoTracker())[0]


def trainings(*overrides: str) -> dict[str, str]:
    """The trained stages of a job, kind → key."""
    asked: dict[str, dict[str, Any]] = planned(*overrides).stages.asked
    return {stage["kind"]: key for key, stage in asked.items() if stage["kind"] in ("classifier", "defense")}


def large() -> tuple[str, ...]:
    """Images that every classifier takes."""
    images, labels = np.zeros((20, 28, 28), dtype=np.uint8), np.arange(20) % 2
    np.savez("large.npz", x_train=images, y_train=labels, x_test=images, y_test=labels)
    return "dataset=npz", "dataset.root=large.npz", "threat.eps=0.1"


@pytest.mark.parametrize(
    ("group", "choice", "changed"),
    [
        ("classifier", "cnn6", "mirror=false"),
        ("defense", "smoothing", "certify_draws=2000"),
        ("defense", "vae", "sample=true"),
    ],
)
def test_weights_of_ones_own_are_known_by_all_that_is_chosen_beside_them(group: str, choice: str, changed: str) -> None:
    arguments = (f"{group}={choice}", *(("defense=none", *large()) if group == "classifier" else ()))
    bench = planned(*arguments)
    models = {"classifier": bench.subject.classifier, "defense": bench.subject.defended.defense}
    torch.save(models[group].state_dict(), "w.pt")
    own = (*arguments, f"{group}.checkpoint=w.pt")
    one, two, again = planned(*own), planned(*own, f"{group}.{changed}"), planned(*own, f"{group}.fit=null")
    assert one.keys[group] != two.keys[group]
    assert one.keys[group] == again.keys[group]  # how they would be trained does not matter: they are not
    assert group not in {stage["kind"] for stage in one.stages.asked.values()}
    Path("w.pt").rename("moved.pt")
    assert planned(*arguments, f"{group}.checkpoint=moved.pt").keys[group] == one.keys[group]


class Scaled(nn.Module):
    """Its weights and its source do not tell one from another."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.layer = nn.Linear(64, 10)
        for weight in self.parameters():
            nn.init.zeros_(weight)

    def forward(self, images: Tensor) -> Tensor:
        return self.layer(self.scale * images.flatten(1))


small, great = Scaled(1.0), Scaled(100.0)


def test_a_module_of_ones_own_is_known_by_its_name_as_well() -> None:
    names = ("tests.test_keys:small", "tests.test_keys:great")
    keys = {planned("classifier=own", f"classifier.model={name}", "defense=none").keys["classifier"] for name in names}
    assert len(keys) == 2


@pytest.mark.parametrize("defense", ["adversarial_training", "distillation"])
def test_a_module_of_ones_own_is_where_hardening_starts_and_stays_as_it_is(defense: str) -> None:
    mine = importlib.import_module("tests.test_keys").small
    arguments = ("classifier=own", "classifier.model=tests.test_keys:small", f"defense={defense}")
    bench = planned(*arguments)
    hardened = bench.subject.defended.defense
    networks = [mine, bench.subject.classifier.network, hardened.network]
    networks += [hardened.teacher] if defense == "distillation" else []
    assert len({network.layer.weight.data_ptr() for network in networks}) == len(networks)
    assert all(torch.equal(network.layer.weight, mine.layer.weight) for network in networks)
    trained, again = trainings(*arguments), trainings(*arguments)
    with torch.no_grad():
        mine.layer.bias += 1
    try:
        assert trained == again != trainings(*arguments)
    finally:
        torch.nn.init.zeros_(mine.layer.bias)


@pytest.mark.parametrize(
    ("overrides", "same"),
    [
        (("trainer=ddp_cpu",), True),
        (("trainer=debug", "trainer.enable_progress_bar=true"), True),
        (("callbacks=default",), True),
        (("+trainer.limit_train_batches=2",), False),
        (("+trainer.gradient_clip_val=0.5",), False),
        (("+callbacks.swa._target_=pytorch_lightning.callbacks.StochasticWeightAveraging",), False),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_what_the_trainer_and_callbacks_change_names_a_training(overrides: tuple[str, ...], same: bool) -> None:
    plain, other = trainings(), trainings(*overrides)
    assert {kind: plain[kind] == other[kind] for kind in plain} == {"classifier": same, "defense": same}
