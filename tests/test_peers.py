"""Adapters of other libraries; those that are not installed are skipped, and say so."""

from __future__ import annotations

import importlib.util
import math
import random
from typing import Any

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from torch import Tensor, nn

from src.attacks.art import ART
from src.attacks.foolbox import Foolbox
from src.attacks.peers import Peer, settle
from src.attacks.torchattacks import TorchAttacks, documented_norms
from src.build import build, check
from src.errors import UserError
from src.threat import BudgetError, Norm, ThreatModel
from src.train import CONF

ADAPTERS: dict[str, type[Peer]] = {"torchattacks": TorchAttacks, "foolbox": Foolbox, "art": ART}
ABSENT = {name for name in ADAPTERS if importlib.util.find_spec(name) is None}


def needs(library: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(
        library in ABSENT, reason=f"{library} is not installed, {len(ABSENT)} of 3 libraries absent: make peers"
    )


def case(library: str, name: str, norm: str, eps: float, **arguments: Any) -> Any:
    return pytest.param(library, name, norm, eps, arguments, marks=needs(library), id=f"{library}-{name}-{norm}")


CASES = [
    case("torchattacks", "PGD", "linf", 0.1, steps=5, alpha=0.05),
    case("torchattacks", "PGDL2", "l2", 1.0),
    case("torchattacks", "DeepFool", "l2", math.inf),
    case("torchattacks", "OnePixel", "l0", 3, popsize=5, steps=2),
    case("torchattacks", "JSMA", "l0", 20),
    case("foolbox", "PGD", "linf", 0.1, steps=5),
    case("foolbox", "PGD", "l1", 5.0),
    case("foolbox", "FMN", "l0", 20, steps=20),
    case("foolbox", "L2DeepFoolAttack", "l2", math.inf),
    case("foolbox", "HopSkipJump", "linf", 0.3, steps=2),
    case("art", "FastGradientMethod", "l2", 2.0),
    case("art", "DeepFool", "l2", math.inf, max_iter=5),
    case("art", "PixelAttack", "l0", 3, max_iter=1),
    case("art", "SquareAttack", "linf", 0.2, max_iter=20),
]


@pytest.fixture
def model() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(4 * 36, 4))


def batch(model: nn.Module, count: int = 6) -> tuple[Tensor, Tensor]:
    images = torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    model.eval()
    labels = model(images).argmax(dim=1)
    model.train()
    return images, labels


def composed(name: str) -> Any:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return OmegaConf.to_container(compose("train", overrides=[f"attack={name}"]).attack)


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_absent_library_is_one_line_before_any_work(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda wanted: None if wanted == name else there(wanted))
    for use in (lambda: ADAPTERS[name](name="PGD"), lambda: check(composed(name), "attack")):
        with pytest.raises(UserError, match=f"attack={name}: the library {name} is not installed") as caught:
            use()
        assert "make peers" in str(caught.value)
        assert f"uv pip install {ADAPTERS[name].install}" in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", [pytest.param(name, marks=needs(name)) for name in ADAPTERS])
def test_the_choice_of_the_config_can_be_built_and_works(name: str, model: nn.Module) -> None:
    images, labels = batch(model)
    attack = build(composed(name), "attack")
    attacked = attack(model, images, labels, ThreatModel(norm="linf", eps=0.1))
    assert attacked.success.any()


@pytest.mark.parametrize(("library", "name", "norm", "eps", "arguments"), CASES)
def test_one_attack_under_our_judge(
    library: str, name: str, norm: str, eps: float, arguments: dict[str, Any], model: nn.Module
) -> None:
    """Box and budget, passes counted, the model and the caller's randomness left as they were, the same again."""
    images, labels = batch(model)
    model[0].weight.requires_grad_(False)
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # type: ignore[union-attr]
    attack = ADAPTERS[library](name=name, arguments=arguments)
    threat = ThreatModel(norm=norm, eps=eps)
    one, two = (attack(model, images, labels, threat, generator=torch.Generator().manual_seed(5)) for _ in range(2))
    assert one.success.any()
    assert torch.equal(one.images, two.images)
    assert int(one.forward_passes.min()) > 2
    assert int(one.forward_passes.max() - one.forward_passes.min()) <= 1
    assert model.training
    assert [p.requires_grad for p in model.parameters()] == [False, True, True, True]
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])
    assert random.getstate() == before[2]


@pytest.mark.parametrize(
    ("library", "name", "norm", "eps", "arguments"),
    [
        case("torchattacks", "PGD", "linf", 0.4, alpha=0.1),
        case("foolbox", "PGD", "linf", 0.4),
        case("art", "ProjectedGradientDescent", "linf", 0.4),
        case("art", "SaliencyMapMethod", "l0", 40),
    ],
)
def test_targeted(library: str, name: str, norm: str, eps: float, arguments: dict[str, Any], model: nn.Module) -> None:
    images, labels = batch(model)
    threat = ThreatModel(norm=norm, eps=eps, targeted=True)
    target = (labels + 1) % 4
    attacked = ADAPTERS[library](name=name, arguments=arguments)(model, images, labels, threat, target=target)
    assert int((attacked.prediction == target).sum()) >= 2


@needs("art")
def test_the_autoattack_of_art_has_what_it_imports(model: nn.Module) -> None:
    pytest.importorskip("multiprocess", reason="multiprocess is not installed, of which ART says nothing: make peers")
    images, labels = batch(model)
    attacked = ART(name="AutoAttack")(model, images, labels, ThreatModel(norm="l2", eps=4.0))
    assert attacked.success.all()


@needs("torchattacks")
@pytest.mark.parametrize("name", ["PIFGSM", "PIFGSMPP"])
def test_a_radius_of_another_name_is_the_threats(name: str, model: nn.Module) -> None:
    """Their ``max_epsilon`` is 16/255 where nobody sets it: all they make would lie beyond eps and be undone."""
    grey, labels = batch(model)
    model.eval()
    images = grey.expand(-1, 3, -1, -1)  # they take nothing but colour
    threat = ThreatModel(norm="linf", eps=0.04)
    attacked = TorchAttacks(name=name)(lambda x: model(x.mean(dim=1, keepdim=True)), images, labels, threat)
    assert attacked.distance.tolist() == pytest.approx([0.04] * len(images), abs=1e-5)


@pytest.mark.parametrize(
    ("library", "name", "norm", "targeted", "arguments", "words"),
    [
        ("torchattacks", "PDG", "linf", False, {}, "no such attack. Close to it: PGD"),
        ("torchattacks", "PGD", "l2", False, {}, "torchattacks's PGD cannot do it. Allowed: linf"),
        ("torchattacks", "DeepFool", "l2", True, {}, "has no targeted mode"),
        ("torchattacks", "PGD", "linf", False, {"eps": 1}, "comes from the threat"),
        ("torchattacks", "PGD", "linf", False, {"stepz": 1}, "Allowed: alpha, random_start, steps"),
        ("foolbox", "DeepFool", "l0", False, {}, "Allowed: l2, linf"),
        ("foolbox", "L2PGD", "linf", False, {}, "Allowed: l2"),
        ("foolbox", "PDGAttack", "linf", False, {}, "no such attack"),
        ("art", "DeepFool", "l0", False, {}, "Allowed: l2"),
        ("art", "ProjectedGradient", "l2", False, {}, "Close to it: ProjectedGradientDescent"),
        ("art", "DeepFool", "l2", True, {}, "has no targeted mode"),
        ("art", "AutoAttack", "l2", True, {}, "has no targeted mode"),
    ],
)
def test_what_a_library_cannot_do_is_one_line(
    library: str, name: str, norm: str, targeted: bool, arguments: dict[str, Any], words: str, model: nn.Module
) -> None:
    if library in ABSENT:
        pytest.skip(f"{library} is not installed: make peers")
    images, labels = batch(model)
    attack = ADAPTERS[library](name=name, arguments=arguments)
    with pytest.raises(UserError) as caught:
        attack(model, images, labels, ThreatModel(norm=norm, eps=1, targeted=targeted))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    if not arguments:  # a command asks this before it trains anything
        with pytest.raises(UserError) as early:
            attack.check(Norm(norm), targeted=targeted)
        assert str(early.value) == str(caught.value)


def test_float_noise_is_settled_and_more_than_that_is_left_to_the_judge() -> None:
    x = torch.full((2, 1, 4, 4), 0.5)
    threat = ThreatModel(norm="linf", eps=0.1)
    near = settle(x + 0.1 + 2e-5, x, threat, bounded=True)
    threat.judge(x, near)
    with pytest.raises(BudgetError, match="budget"):
        threat.judge(x, settle(x + 0.11, x, threat, bounded=True))
    with pytest.raises(BudgetError, match="box"):
        threat.judge(x, settle(x + 0.6, x, threat, bounded=True))
    assert torch.equal(settle(x + 0.11, x, threat, bounded=False), x)
    pixel = x + 1e-8
    pixel[:, :, 0, 0] = 1
    counted = settle(pixel + 1e-7, x, ThreatModel(norm="l0", eps=1), bounded=True)
    assert ThreatModel(norm="l0", eps=1).judge(x, counted).tolist() == [1, 1]


def test_norms_are_read_from_the_documentation() -> None:
    class Documented:
        """Distance Measure : Linf, L2"""

    assert documented_norms(Documented) == {Norm.LINF, Norm.L2}
    assert documented_norms(object) == set(Norm)
