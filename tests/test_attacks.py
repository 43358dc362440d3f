"""Every attack of conf/attack, found by itself: invariants and closed forms."""

from __future__ import annotations

import copy
import functools
import math
import warnings

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from torch import nn

from src.attacks.base import Attack
from src.attacks.fgsm import FGSM
from src.attacks.pgd import PGD
from src.build import build
from src.errors import UserError
from src.threat import Norm, ThreatModel
from src.train import CONF
from tests.conftest import Linear, choices

ATTACKS = choices("attack")

# Published defaults are for figures; the contract is tested with a tenth of their work.
LIGHTER = {
    "square": ["attack.queries=200"],
    "worst_case": ["attack.members.square.queries=100", "attack.members.pgd.steps=10"],
    "autoattack": ["attack.steps=8", "attack.queries=40"],
    "autoattack_plus": ["attack.steps=4", "attack.queries=20"],
    "autoattack_rand": ["attack.steps=8", "attack.eot_iter=2"],
    "adaptive": ["attack.members.square.queries=100", "attack.members.targeted.steps=20"],
    "one_pixel": ["attack.population=150", "attack.generations=50", "attack.batch_size=1024"],
    "hop_skip_jump": ["attack.iterations=3", "attack.samples=20", "attack.max_samples=100", "attack.starts=20"],
    "cw": ["attack.steps=30"],
    "jsma": ["attack.max_pixels=40"],
    "fab": ["attack.steps=20"],
    "fmn": ["attack.steps=40"],
}
WEAK = {"noise"}  # the control: it is meant to turn next to nothing
PEERS = {"torchattacks", "foolbox", "art"}  # other libraries: tested in test_peers.py where they are installed


@functools.cache
def make(name: str) -> Attack:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("train", overrides=[f"attack={name}", *LIGHTER.get(name, [])])
    return build(OmegaConf.to_container(cfg.attack), "attack")


CASES = [(name, norm) for name in ATTACKS if name not in PEERS for norm in sorted(make(name).norms)]
STRONG = [(name, norm) for name, norm in CASES if name not in WEAK]
EPS = {Norm.LINF: 0.05, Norm.L2: 0.5, Norm.L1: 4.0, Norm.L0: 3.0}


def batch(count: int = 12, classes: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(count, 3, 8, 8, generator=generator)
    return images, torch.randint(classes, (count,), generator=generator)


def labels_of(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """The model's own answers in eval mode, so that every image is attacked."""
    training = model.training
    model.eval()
    answer = model(images).argmax(dim=1)
    model.train(training)
    return answer


def balanced(model: nn.Module) -> nn.Module:
    """Its last bias set so that the images share the classes: of the network as it is, all are of one, far away."""
    training = model.training
    model.eval()
    with torch.no_grad():
        model[-1].bias -= model(batch(48)[0]).mean(dim=0)
    return model.train(training)


@pytest.mark.parametrize(("name", "norm"), CASES)
@pytest.mark.parametrize("targeted", [False, True])
def test_invariants(name: str, norm: Norm, targeted: bool, small_network: nn.Module) -> None:
    """Shape, box, budget; the caller's random state, modes and flags stay; misclassified images stay."""
    if targeted and not make(name).can_target:
        with pytest.raises(UserError, match="has no targeted mode"):
            make(name).check(norm, targeted=True)
        return
    images, _ = batch()
    labels = labels_of(balanced(small_network), images)
    labels[::3] = (labels[::3] + 1) % 5  # wrong from the start
    kept = images.clone()
    small_network.train()
    small_network[1].eval()
    small_network[0].weight.requires_grad_(False)
    statistics = small_network[1].running_mean.clone()
    before = torch.get_rng_state()
    threat = ThreatModel(norm=norm, eps=EPS[norm], targeted=targeted)
    attacked = make(name)(small_network, images, labels, threat, generator=torch.Generator().manual_seed(3))

    assert attacked.images.shape == images.shape
    assert attacked.images.dtype == torch.float32
    assert not attacked.images.requires_grad
    assert float(attacked.images.min()) >= 0
    assert float(attacked.images.max()) <= 1
    assert float(attacked.distance.max()) <= EPS[norm] + 1e-5
    assert torch.equal(images, kept)
    assert torch.equal(attacked.images[::3], images[::3])
    assert attacked.attempted.tolist() == [i % 3 != 0 for i in range(len(images))]
    assert not attacked.success[~attacked.attempted].any()
    assert torch.equal(torch.get_rng_state(), before)
    assert small_network.training
    assert not small_network[1].training
    assert small_network[3].training
    assert torch.equal(small_network[1].running_mean, statistics)
    assert not small_network[0].weight.requires_grad
    assert small_network[6].weight.requires_grad
    assert all(parameter.grad is None for parameter in small_network.parameters())
    assert int(attacked.forward_passes.min()) >= 1
    assert bool((attacked.forward_passes[attacked.attempted] > 1).all())


@pytest.mark.parametrize(("name", "norm"), STRONG)
def test_verdict_is_what_the_model_says_of_the_images(name: str, norm: Norm, small_network: nn.Module) -> None:
    images, _ = batch(24)
    labels = labels_of(small_network, images)
    attacked = make(name)(small_network, images, labels, ThreatModel(norm=norm, eps=EPS[norm] * 10))
    again = labels_of(small_network, attacked.images)
    assert torch.equal(attacked.prediction, again)
    assert torch.equal(attacked.success, again != labels)
    assert attacked.success.any()


@pytest.mark.parametrize(("name", "norm"), CASES)
def test_same_generator_same_images(name: str, norm: Norm, small_network: nn.Module) -> None:
    images, _ = batch()
    labels = labels_of(balanced(small_network), images)
    threat = ThreatModel(norm=norm, eps=EPS[norm])
    one, two = (
        make(name)(small_network, images, labels, threat, generator=torch.Generator().manual_seed(7)) for _ in "ab"
    )
    assert not torch.equal(one.images, images)
    assert torch.equal(one.images, two.images)


@pytest.mark.parametrize(("name", "norm"), CASES)
def test_eps_zero_is_the_clean_image(name: str, norm: Norm, small_network: nn.Module) -> None:
    images, _ = batch()
    attacked = make(name)(small_network, images, labels_of(small_network, images), ThreatModel(norm=norm, eps=0))
    assert torch.equal(attacked.images, images)
    assert not attacked.success.any()


@pytest.mark.parametrize(("name", "norm"), STRONG)
def test_eps_infinite_stays_in_the_box_and_turns_nearly_all(name: str, norm: Norm, small_network: nn.Module) -> None:
    images, _ = batch(24)
    labels = labels_of(small_network, images)
    attacked = make(name)(small_network, images, labels, ThreatModel(norm=norm, eps=math.inf))
    assert float(attacked.images.min()) >= 0
    assert float(attacked.images.max()) <= 1
    assert attacked.success.float().mean() > 0.5


@pytest.mark.parametrize(("name", "norm"), CASES)
@pytest.mark.parametrize("count", [0, 1])
def test_small_batches(name: str, norm: Norm, count: int, small_network: nn.Module) -> None:
    images, _ = batch()
    labels = labels_of(small_network, images)
    attacked = make(name)(small_network, images[:count], labels[:count], ThreatModel(norm=norm, eps=EPS[norm]))
    assert attacked.images.shape == images[:count].shape


@pytest.mark.parametrize(("name", "norm"), CASES)
def test_works_under_inference_mode_and_autocast(name: str, norm: Norm, small_network: nn.Module) -> None:
    images, _ = batch(24)
    labels = labels_of(small_network, images)
    threat = ThreatModel(norm=norm, eps=EPS[norm] * 4)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        attacked = make(name)(small_network, images.clone(), labels, threat)
    assert attacked.images.dtype == torch.float32
    # the verdict is float32's, although the search ran in bf16
    assert torch.equal(attacked.prediction, labels_of(small_network, attacked.images))


@pytest.mark.parametrize("attack", [FGSM(), PGD(relative_step=20), PGD(steps=20, random_start=False, restarts=2)])
@pytest.mark.parametrize(("norm", "dual"), [(Norm.LINF, 1), (Norm.L2, 2)])
def test_linear_loss_is_driven_to_its_exact_optimum(attack: Attack, norm: Norm, dual: int) -> None:
    """On two classes the margin is linear: the best change in the ball lowers it by eps times the dual norm."""
    model = Linear(side=4)
    weight = (model.layer.weight[0] - model.layer.weight[1]).detach()
    images = torch.full((1, 1, 4, 4), 0.5)
    labels = labels_of(model, images)
    eps = 0.02
    # exhaust: PGD would otherwise stop as soon as the label turns
    attacked = attack(model, images, labels, ThreatModel(norm=norm, eps=eps, exhaust=True))

    @torch.no_grad()
    def margin(x: torch.Tensor) -> float:
        logits = model(x)[0]
        return float(logits[labels[0]] - logits[1 - labels[0]])

    drop = margin(images) - margin(attacked.images)
    assert drop == pytest.approx(eps * float(torch.linalg.vector_norm(weight, ord=dual)), rel=1e-3)


def test_targeted_fgsm_moves_toward_the_target() -> None:
    model = Linear(classes=4, seed=2)
    images = torch.full((1, 1, 4, 4), 0.5)
    labels = labels_of(model, images)
    target = (labels + 1) % 4
    attacked = FGSM()(model, images, labels, ThreatModel(norm="linf", eps=0.05, targeted=True), target=target)
    before, after = (model(x).log_softmax(dim=1)[0, target[0]] for x in (images, attacked.images))
    assert after > before


def test_pgd_stops_working_on_images_that_are_turned(small_network: nn.Module) -> None:
    images, _ = batch(24)
    labels = labels_of(small_network, images)
    threat = ThreatModel(norm=Norm.LINF, eps=1.0)
    short = PGD(steps=40, step=0.05)(small_network, images, labels, threat)
    full = PGD(steps=40, step=0.05)(small_network, images, labels, ThreatModel(norm=Norm.LINF, eps=1.0, exhaust=True))
    assert full.backward_passes.tolist() == [40] * 24
    assert int(short.backward_passes.sum()) < 24 * 40
    assert bool((short.forward_passes == short.backward_passes + 2).logical_or(~short.success).all())
    assert int(full.success.sum()) >= int(short.success.sum())


BY_GRADIENT = [case for case in dict(CASES).items() if make(case[0]).needs == "gradient"]


@pytest.mark.parametrize(("name", "norm"), BY_GRADIENT)
def test_a_callable_without_gradient_is_one_line_though_its_parameters_have_theirs(
    name: str, norm: Norm, small_network: nn.Module
) -> None:
    """The attack cannot take the gradients off parameters that it does not see; the input still has none."""
    small_network.eval()

    def detached(x: torch.Tensor) -> torch.Tensor:
        return small_network((x.detach() * 16).round() / 16)

    images, _ = batch(4)
    with pytest.raises(UserError, match=r"lets no gradient through.*attack=square"):
        make(name)(detached, images, detached(images).argmax(dim=1), ThreatModel(norm=norm, eps=EPS[norm]))


@pytest.mark.parametrize(("name", "norm"), [case for case in CASES if not make(case[0]).minimal])
def test_search_in_bf16_is_judged_in_float32(name: str, norm: Norm, small_network: nn.Module) -> None:
    """What counts is float32's answer, and images that only bf16 takes for turned are searched again."""
    images, _ = batch(24)
    labels = labels_of(balanced(small_network), images)
    threat = ThreatModel(norm=norm, eps=EPS[norm])
    attack = make(name)
    exact = attack(small_network, images, labels, threat, generator=torch.Generator().manual_seed(0))
    coarse = attack(
        small_network, images, labels, threat, generator=torch.Generator().manual_seed(0), search=torch.bfloat16
    )
    assert torch.equal(coarse.prediction, labels_of(small_network, coarse.images))
    assert torch.equal(coarse.success, coarse.prediction != labels)
    assert int(exact.success.sum()) > 10 or name in WEAK
    assert int(coarse.success.sum()) >= int(exact.success.sum()) - 3


ONE_NORM = list(dict(CASES).items())  # a norm each: the classes and the batches are the same code in all of them


@pytest.mark.parametrize(("name", "norm"), ONE_NORM)
@pytest.mark.parametrize("classes", [1, 2, 3])
def test_any_class_count(name: str, norm: Norm, classes: int) -> None:
    """A single class cannot be left, and says so as an image that holds; the fewest others are no special case."""
    model = Linear(classes=classes)
    images = torch.full((4, 1, 4, 4), 0.5)
    labels = labels_of(model, images)
    attacked = make(name)(model, images, labels, ThreatModel(norm=norm, eps=EPS[norm]))
    assert torch.equal(attacked.prediction, labels_of(model, attacked.images))
    assert classes > 1 or not attacked.success.any()


DETERMINISTIC = {"fgsm", "mi_fgsm", "orthogonal_pgd", "deepfool", "fab", "fmn", "cw", "jsma"}  # they draw nothing


@pytest.mark.parametrize(("name", "norm"), [case for case in ONE_NORM if case[0] in DETERMINISTIC])
def test_another_batch_size_gives_the_same_verdicts(name: str, norm: Norm, small_network: nn.Module) -> None:
    images, _ = batch(6)
    labels = labels_of(balanced(small_network), images)
    assert len(labels.unique()) > 2
    threat = ThreatModel(norm=norm, eps=EPS[norm])
    attack = copy.copy(make(name))
    vars(attack).update(steps=min(vars(attack).get("steps", 5), 5))
    whole = attack(small_network, images, labels, threat)
    parts = [attack(small_network, *part, threat) for part in zip(images.split(5), labels.split(5), strict=True)]
    assert whole.success.any()
    assert torch.equal(torch.cat([part.success for part in parts]), whole.success)
    torch.testing.assert_close(torch.cat([part.distance for part in parts]), whole.distance, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["log-probabilities", "probabilities"])
def test_a_model_of_probabilities_is_warned_of_once(
    kind: str, small_network: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("src.attacks.query._warned", set())
    small_network.eval()
    images, _ = batch(2)
    labels, threat = labels_of(small_network, images), ThreatModel(norm="linf", eps=0.05)

    def model(x: torch.Tensor) -> torch.Tensor:
        logits = small_network(x)
        return logits.log_softmax(dim=1) if kind == "log-probabilities" else logits.softmax(dim=1)

    with pytest.warns(UserWarning, match=f"seems to return {kind}"):
        FGSM()(model, images, labels, threat)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        FGSM()(model, images, labels, threat)
