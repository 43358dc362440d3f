"""What names a trained stage, and what is made from it: nothing is trained here, the plan of a job is enough."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor, nn

from src import pipeline
from src.audit import composed
from src.build import locate
from src.measure import Bench
from src.stages import Stages
from src.subject import Names
from src.threat import Access
from src.tracking import NoTracker
from src.train import CONF
from src.trained import Workshop
from tests.conftest import two_cores

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


def test_a_cell_is_named_by_all_that_its_figures_depend_on() -> None:
    one = planned("defense=smoothing", "attack=pgd", "threat=linf")
    job, data, own = one.job, copy.copy(one.data), {"own": {"_target_": "x.Callback"}}
    data.fingerprint = "other images"

    def key(
        eps: float = 0.1, access: Access = Access.WHITE_BOX, *, data: Any = one.data, keys: Any = None, **changes: Any
    ) -> str:
        subject = dataclasses.replace(one.subject, keys=one.subject.keys | (keys or {}))
        names = dataclasses.replace(one.names, **changes.pop("names", {}))
        return Bench(job.model_copy(update=changes), names, data, one.stages, subject).planned(eps, access)["key"]

    def threat(**changes: Any) -> Any:
        return job.threat.model_copy(update=changes)

    keys = [
        key(), key(0.2), key(access=Access.GRAY_BOX), key(data=data), key(keys={"classifier": "x"}),
        key(keys={"defense": "x"}), key(names={"variant": "x"}), key(seed=1), key(eval_batch_size=7), key(eot_draws=3),
        key(search_precision="bf16-mixed"), key(checks="full"), key(callbacks=own),
        key(attack=job.attack | {"steps": 3}),
        key(threat=threat(norm="l2")), key(threat=threat(targeted=True)), key(threat=threat(quantize=True)),
    ]  # fmt: skip
    assert len(set(keys)) == len(keys)
    assert key() == keys[0]


def test_images_of_a_search_are_named_by_the_whole_model_that_it_met() -> None:
    """The key of a defense that nothing is trained for does not say which classifier stands behind it."""
    one = planned("defense=smoothing", "attack=deepfool", "threat=l2")

    def images(access: Access = Access.WHITE_BOX, eps: float = 1.0, **changes: Any) -> str:
        keys = {name: changes.pop(name) for name in ("classifier", "defense") if name in changes}
        subject = dataclasses.replace(one.subject, keys=one.subject.keys | keys)
        bench = Bench(one.job.model_copy(update=changes), one.names, one.data, one.stages, subject)
        stage = bench.images.stage(bench._threat(eps), access)
        assert stage is not None
        return stage.name

    named = [
        images(), images(classifier="x"), images(defense="x"), images(eot_draws=3), images(Access.BLACK_BOX),
        images(Access.GRAY_BOX), images(Access.GRAY_BOX, classifier="x"), images(Access.GRAY_BOX, seed=1),
        images(Access.GRAY_BOX, callbacks={"own": {"_target_": "x.Callback"}}),
    ]  # fmt: skip
    assert len(set(named)) == len(named)
    assert images(eps=2.0) == named[0]
    assert images(Access.GRAY_BOX, defense="x", eot_draws=3) == named[5], "which serves every defense"


def test_a_training_is_named_by_all_that_it_depends_on() -> None:
    one = planned("defense=autoencoder")
    job, other = one.job, copy.copy(one.data)
    other.train_fingerprint = "other images"
    classifier, defense = job.classifier, job.defense
    learnt = defense["trained_on"]
    changes = {"eps": 0.05}, {"norm": "l2"}, {"radius": "full"}, {"attack": learnt["attack"] | {"steps": 2}}

    def key(data: Any = one.data, *, of: str = "classifier", **update: Any) -> str:
        shop = Workshop(job.model_copy(update=update), data, one.stages, NoTracker())
        return shop.classifier("x")[1] if of == "classifier" else shop.defense("x", one.subject.classifier, of)[1]

    keys = [
        key(), key(other), key(seed=1), key(limit=job.limit.model_copy(update={"epochs": 1})),
        key(classifier=classifier | {"label_smoothing": 0.2}), key(classifier=classifier | {"widths": [8, 8, 8]}),
        key(classifier=classifier | {"fit": classifier["fit"] | {"lr": 1.0}}), key(of="a"), key(of="b"),
        key(other, of="a"), key(of="a", seed=1), key(of="a", defense=defense | {"noise": 0.5}),
        *(key(of="a", defense=defense | {"trained_on": learnt | change}) for change in changes),
    ]  # fmt: skip
    assert len(set(keys)) == len(keys)
    assert (key(), key(of="a")) == (keys[0], keys[7])
    anew = planned("defense=adversarial_training").job.defense  # with a network of the classifier's kind
    narrow = classifier | {"widths": [8, 8, 8]}
    assert key(of="a", defense=anew) != key(of="a", defense=anew, classifier=narrow)
    assert key(of="a", classifier=narrow) == keys[7]

    brought = []
    for value in (0.0, 1.0):  # in weights of one's own, in a file of the same name
        nn.init.constant_(next(one.subject.classifier.parameters()), value)
        torch.save(one.subject.classifier.state_dict(), "w.pt")
        brought.append(key(classifier=classifier | {"checkpoint": "w.pt"}))
    assert brought[0] != brought[1]


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


def test_a_module_of_ones_own_is_known_by_the_code_of_all_its_layers(tmp_path: Path, monkeypatch: Any) -> None:
    layer = "from torch import nn\nclass {name}(nn.Module):\n    def forward(self, x):\n        return {what}\n"
    make = (
        "from torch import nn\nfrom {layers} import {layer}\ndef make():\n    return nn.Sequential({layer}(), {rest})\n"
    )
    rest = "nn.Flatten(), nn.Linear(64, 10)"
    monkeypatch.syspath_prepend(tmp_path)

    def key(what: str = "x", rest: str = rest) -> str:
        (tmp_path / "own_layers.py").write_text(layer.format(name="Layer", what=what))
        (tmp_path / "own_model.py").write_text(make.format(layers="own_layers", layer="Layer", rest=rest))
        importlib.invalidate_caches()
        for name in ("own_layers", "own_model"):
            sys.modules.pop(name, None)
        torch.manual_seed(0)
        bench = planned("classifier=own", "classifier.model=own_model:make", "defense=none")
        return bench.keys["classifier"]

    keys = [key(), key("-x"), key(rest=f"{rest}, nn.Identity()"), key()]
    assert len(set(keys)) == 3
    assert keys[3] == keys[0]


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
    ("defense", "same"),
    [
        ("adversarial_training", True), ("adversarial_training defense.warm_start=true", False), ("distillation", True),
        ("adversarial_training_fgsm", False), ("distillation defense.layers=last", False), ("autoencoder", False),
    ],
)  # fmt: skip
def test_a_training_that_learns_nothing_of_the_bare_classifier_is_found_beside_another(
    defense: str, same: bool
) -> None:
    chosen = f"defense={defense}".split()
    plain, other = (trainings(*chosen, f"classifier.label_smoothing={share}") for share in (0.0, 0.3))
    assert plain["classifier"] != other["classifier"]
    assert (plain["defense"] == other["defense"]) == same


@pytest.mark.parametrize(
    ("defense", "kinds"),
    [
        ("autoencoder", {"defense"}), ("smoothing", {"defense", "certificate"}), ("vae_kl", {"defense", "thresholds"}),
        ("squeezing_detector", {"thresholds"}), ("jpeg", set()),
    ],
)  # fmt: skip
def test_what_is_drawn_batch_by_batch_depends_on_their_size(defense: str, kinds: set[str]) -> None:
    asked: list[dict[str, str]] = []
    for size in (256, 7):
        bench = planned(f"defense={defense}", f"eval_batch_size={size}", "attack=noise", "threat.access=white_box")
        bench.planned(0.1, Access.WHITE_BOX)
        asked.append({stage["kind"]: key for key, stage in bench.stages.asked.items() if stage["kind"] != "examples"})
    assert {kind for kind in asked[0] if asked[0][kind] != asked[1][kind]} == kinds


@pytest.mark.parametrize(
    ("overrides", "same"),
    [
        pytest.param(("trainer=ddp_cpu",), True, marks=two_cores),
        (("trainer=debug", "trainer.enable_progress_bar=true"), True),
        (("callbacks=default",), True),
        (("+trainer.limit_train_batches=2",), False),
        (("+trainer.gradient_clip_val=0.5",), False),
        (
            (
                "+callbacks.swa._target_=pytorch_lightning.callbacks.StochasticWeightAveraging",
                "+callbacks.swa.swa_lrs=0.01",
            ),
            False,
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_what_the_trainer_and_callbacks_change_names_a_training(overrides: tuple[str, ...], same: bool) -> None:
    plain, other = trainings(), trainings(*overrides)
    assert {kind: plain[kind] == other[kind] for kind in plain} == {"classifier": same, "defense": same}


# Of each defense with arguments that its training does not read: other values of them, and another argument.
LATER = {
    "smoothing": ("votes=3 alpha=0.01 select_draws=10 certify_draws=20 certify_images=5", "sigma=0.3"),
    "rbf": ("fpr=0.1", "margin=5"),
    "vae": ("sample=true", "beta=0.5"),
    "vae_kl": ("fpr=0.1 threshold=0.3", "beta=0.5"),
    "magnet": ("detectors=[l1] temperatures=[20] reform=false fpr=0.1", "noise=0.2"),
    "diffusion": ("eta=1.0 gradient=bpda steps=5", "t_star=0.1"),
    "defense_gan": ("restarts=2 steps=5 backward=unrolled", "rate=5.0"),
}


def test_every_defense_that_declares_arguments_of_the_test_is_held_to_it_here() -> None:
    declared = {}
    for path in (CONF / "defense").glob("*.yaml"):
        node = yaml.safe_load(path.read_text())
        if "_target_" in node and (names := locate(node, "defense").at_test):
            declared[path.stem] = names
            assert names <= node.keys(), "what is not in the YAML cannot be told from the rest"
    assert declared == {name: {item.partition("=")[0] for item in later.split()} for name, (later, _) in LATER.items()}


@pytest.mark.parametrize("defense", LATER)
def test_arguments_that_training_does_not_read_find_the_training_and_nothing_else(defense: str) -> None:
    later, other = LATER[defense]
    arguments = (f"defense={defense}", "attack=cw", "threat=l2", "threat.eps=1", "threat.access=white_box")
    one = planned(*arguments)
    two = planned(*arguments, *(f"defense.{item}" for item in later.split()))
    three = planned(*arguments, f"defense.{other}")
    made = []
    for bench in (one, two, three):
        cell = bench.planned(1.0, Access.WHITE_BOX)["key"]
        kinds = {stage["kind"]: key for key, stage in bench.stages.asked.items()}
        made.append({"cell": cell, "defense": kinds["defense"], "key": bench.keys["defense"], **kinds})
    assert made[0]["defense"] == made[1]["defense"] != made[2]["defense"]
    assert len({each["key"] for each in made}) == 3  # of which the certificate's key is made as well
    assert len({each["cell"] for each in made}) == 3
    assert len({each["examples"] for each in made}) == 3
    assert len({each.get("thresholds", number) for number, each in enumerate(made)}) == 3


@pytest.mark.parametrize("defense", LATER)
def test_training_does_not_read_what_its_key_leaves_out(defense: str) -> None:
    arguments = [*QUIET, f"defense={defense}", "limit.epochs=2", "limit.train_images=48", "limit.test_images=10"]
    torch.save(planned(*arguments).subject.classifier.state_dict(), "w.pt")
    arguments += ["classifier.checkpoint=w.pt", "dataset.validation=0.2", "defense.fit.batch_size=16"]
    found = []
    for place, later in (("one", ()), ("two", LATER[defense][0].split())):
        job, chosen = composed([*arguments, *(f"defense.{item}" for item in later)])
        names = Names(**{kind: chosen[kind] for kind in ("dataset", "classifier", "defense", "attack")})
        pipeline.prepare(job, names, Stages(Path(place)), NoTracker())
        (folder,) = Path(place).glob("defense/[!.]*")
        weights = torch.load(folder / "weights.pt", weights_only=True)
        found.append((weights, (folder / "metrics.csv").read_text()))
    (one, curves), (two, again) = found
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert curves == again
