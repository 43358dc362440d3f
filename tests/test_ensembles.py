"""Attacks made of attacks, and the control that must be weak."""

from __future__ import annotations

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from torch import nn

from src.attacks.apgd import APGD
from src.attacks.autoattack import AutoAttack
from src.attacks.base import Attack
from src.attacks.combine import attacks_of
from src.attacks.fgsm import FGSM
from src.attacks.noise import Noise
from src.attacks.orthogonal_pgd import OrthogonalPGD
from src.attacks.pgd import PGD
from src.attacks.square import Square
from src.attacks.worst_case import WorstCase
from src.build import build
from src.errors import UserError
from src.threat import Norm, ThreatModel
from src.train import CONF
from tests.conftest import Linear
from tests.test_apgd import batch, curved

EPS = {Norm.LINF: 0.03, Norm.L2: 0.3, Norm.L1: 3.0, Norm.L0: 3.0}
PLAIN = {"one": FGSM(), "two": PGD(steps=5, random_start=False), "three": PGD(steps=7, random_start=False, loss="dlr")}


def made(*overrides: str) -> Attack:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("train", overrides=list(overrides))
    return build(OmegaConf.to_container(cfg.attack, resolve=True), "attack")


@pytest.mark.parametrize("norm", [Norm.LINF, Norm.L2])
@pytest.mark.parametrize("all_images", [True, False])
def test_worst_case_is_the_union_of_its_members(norm: Norm, all_images: bool) -> None:
    model = curved()
    images, labels = batch(model, 64)
    threat = ThreatModel(norm=norm, eps=EPS[norm])
    alone = [attack(model, images, labels, threat) for attack in PLAIN.values()]
    together = WorstCase(members=PLAIN, all_images=all_images)(model, images, labels, threat)
    union = torch.stack([a.success for a in alone]).any(dim=0)
    assert 0 < int(union.sum()) < len(images)
    assert torch.equal(together.success, union)
    if all_images:
        distances = torch.stack([torch.where(a.success, a.distance, torch.inf) for a in alone])
        assert torch.equal(together.distance[union], distances.amin(dim=0)[union])
    else:
        first = alone[0].success
        assert torch.equal(together.images[first], alone[0].images[first])
        rest = together.forward_passes[first].float().mean(), together.forward_passes[~first].float().mean()
        assert rest[0] < rest[1]


def test_members_that_lack_the_norm_are_named() -> None:
    attack = made("attack=worst_case", "attack@attack.members.square=one_pixel")
    with pytest.raises(UserError, match=r"members\.pgd cannot do it\. Allowed: members that all have l0$"):
        attack.check(Norm.L0)
    with pytest.raises(UserError, match=r"members\.square cannot do it"):
        attack.check(Norm.LINF)


def test_worst_case_is_mounted_by_config() -> None:
    attack = made("attack=worst_case")
    assert isinstance(attack, WorstCase)
    assert {name: type(member) for name, member in attack.members.items()} == {"pgd": PGD, "square": Square}
    changed = made(
        "attack=worst_case",
        "attack@attack.members.pgd=fgsm",
        "~attack@attack.members.square",
        "+attack@attack.members.noise=noise",
        "attack.members.noise.draws=3",
    )
    assert isinstance(changed, WorstCase)
    assert {name: type(member) for name, member in changed.members.items()} == {"pgd": FGSM, "noise": Noise}
    noise = changed.members["noise"]
    assert isinstance(noise, Noise)
    assert noise.draws == 3


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ({}, "expected attacks by name"),
        ({"a": 3}, "members.a=3: expected an attack"),
        ({"a": {"_target_": "src.attacks.pgd.Nothing"}}, "members.a._target_=src.attacks.pgd.Nothing: cannot be"),
        ({"a": {"_target_": "src.threat.Norm"}}, "not an attack"),
        (
            {"a": {"_target_": "src.attacks.pgd.PGD", "restart": 3}},
            "members.a.restart: unknown key; did you mean restarts",
        ),
        ({"a": {"_target_": "src.attacks.pgd.PGD", "steps": 0}}, "members.a.steps=0"),
    ],
)
def test_wrong_members_are_one_clear_line(members: dict, words: str) -> None:
    with pytest.raises(UserError) as caught:
        attacks_of(members)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_worst_case_can_do_what_all_its_members_can() -> None:
    assert WorstCase(members=PLAIN).norms == {Norm.LINF, Norm.L2}
    assert WorstCase(members={"a": PGD()}).needs == "gradient"
    assert WorstCase(members={"a": Square(), "b": PGD()}).needs == "scores"  # it spares a closed model the others
    assert WorstCase(members={"a": Square(), "b": Noise()}).needs == "labels"
    assert not WorstCase(members={"a": Square(), "b": AutoAttack()}).can_target


def test_a_member_without_the_norm_says_so() -> None:
    model = curved()
    images, labels = batch(model, 4)
    with pytest.raises(UserError, match=r"threat\.norm=l1: members\.one cannot do it. Allowed: l2, linf, members"):
        WorstCase(members=PLAIN)(model, images, labels, ThreatModel(norm="l1", eps=1))
    with pytest.raises(UserError, match="WorstCase has no targeted mode"):
        WorstCase(members={"a": AutoAttack()})(model, images, labels, ThreatModel(norm="l2", eps=1, targeted=True))


def test_members_against_rejection_are_asked_for_the_norm_by_models_that_reject() -> None:
    attack = made("attack=adaptive", "attack.members.square.queries=3")
    attack.check(Norm.L1)
    model = curved()
    images, labels = batch(model, 4)
    threat = ThreatModel(norm="l1", eps=1)
    attack(model, images, labels, threat)

    class Rejects(torch.nn.Module):
        rejects = True

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cat([model(x), model(x)[:, :1] * 0 - 99], dim=1)

    with pytest.raises(UserError, match=r"threat\.norm=l1: OrthogonalPGD cannot do it"):
        attack(Rejects(), images, labels, threat)


def test_an_ensemble_is_never_empty() -> None:
    model = curved()
    images, labels = batch(model, 8)
    threat = ThreatModel(norm="linf", eps=0.5)
    alone, member = WorstCase(members={"only": OrthogonalPGD()}), OrthogonalPGD()
    assert torch.equal(alone(model, images, labels, threat).images, member(model, images, labels, threat).images)
    closed = curved()
    closed.differentiable = False  # type: ignore[assignment]
    with pytest.raises(UserError, match=r"lets no gradient through, and each of members\.a, members\.b needs one"):
        WorstCase(members={"a": PGD(), "b": FGSM()})(closed, images, labels, threat)


def test_every_attack_says_what_it_is_made_of() -> None:
    inner = WorstCase(members={"fgsm": FGSM()})
    outer = WorstCase(members={"a": inner, "b": PGD()})
    assert WorstCase(members={"a": inner}).parts(Norm.L2) == {"a": inner}
    assert outer.kinds(Norm.L2) == [WorstCase, WorstCase, FGSM, PGD]
    assert {type(part) for part in AutoAttack(version="rand").parts(Norm.L2).values()} == {APGD}
    assert PGD().parts(Norm.LINF) == {}


def test_autoattack_has_the_published_members() -> None:
    pytest.importorskip("src.attacks.fab")
    standard, l1, plus, rand = (
        AutoAttack(version=version).parts(norm)
        for version, norm in (("standard", "linf"), ("standard", Norm.L1), ("plus", "l2"), ("rand", "l2"))
    )
    assert list(standard) == list(l1) == ["apgd-ce", "apgd-t", "fab-t", "square"]
    assert list(plus) == ["apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t"]
    assert list(rand) == ["apgd-ce", "apgd-dlr"]

    def facts(attack: Attack) -> tuple[object, ...]:
        assert isinstance(attack, APGD)
        classes = attack.target_classes if attack.loss == "dlr_targeted" else None
        return attack.loss, attack.steps, attack.restarts, classes, attack.eot_iter, attack.enlarge

    assert facts(standard["apgd-ce"]) == ("ce", 100, 1, None, 1, False)
    assert facts(standard["apgd-t"]) == ("dlr_targeted", 100, 1, 9, 1, False)
    assert facts(l1["apgd-ce"]) == ("ce", 100, 5, None, 1, True)
    assert facts(l1["apgd-t"]) == ("dlr_targeted", 100, 1, 5, 1, True)
    assert facts(plus["apgd-ce"]) == ("ce", 100, 5, None, 1, False)
    assert facts(plus["apgd-dlr"]) == ("dlr", 100, 5, None, 1, False)
    assert facts(plus["apgd-t"]) == ("dlr_targeted", 100, 1, 9, 1, False)
    assert facts(rand["apgd-ce"]) == ("ce", 100, 1, None, 20, False)
    assert facts(rand["apgd-dlr"]) == ("dlr", 100, 1, None, 20, False)

    fab, of_fab = pytest.importorskip("src.attacks.fab").FAB, {"steps": 100, "stop_at_eps": True}
    for each in (standard["fab-t"], l1["fab-t"], plus["fab-t"]):
        assert vars(each) == vars(fab(**of_fab, target_classes=9))
    assert vars(plus["fab"]) == vars(fab(**of_fab, restarts=5))
    square = standard["square"]
    assert isinstance(square, Square)
    assert (square.queries, square.p_init, square.rescale_schedule, square.restarts) == (5000, 0.8, False, 1)


@pytest.mark.parametrize("version", ["standard", "plus", "rand"])
@pytest.mark.parametrize("norm", [Norm.LINF, Norm.L2, Norm.L1])
def test_autoattack_is_not_weaker_than_any_member(version: str, norm: Norm) -> None:
    if version != "rand":
        pytest.importorskip("src.attacks.fab")
    model = curved()
    images, labels = batch(model, 24)
    threat = ThreatModel(norm=norm, eps=EPS[norm] / 2)
    attack = AutoAttack(version=version, steps=8, queries=40, eot_iter=2)
    whole = attack(model, images, labels, threat)
    assert 0 < int(whole.success.sum()) < len(images)
    for name, member in attack.parts(norm).items():
        alone = member(model, images, labels, threat)
        # In `rand` a member alone draws other starts than as a later member: one image may go either way.
        assert int(whole.success.sum()) >= int(alone.success.sum()) - (version == "rand"), name


class Jittery(nn.Module):
    """A linear classifier whose gradient is drawn anew each time, right only on average; what it answers is exact."""

    def __init__(self, noise: float) -> None:
        super().__init__()
        self.core, self.noise = Linear(side=8), noise

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        nothing = (x - x.detach()).flatten(1)
        return self.core(x) + torch.stack([(nothing * self.noise * torch.randn_like(nothing)).sum(1)] * 2, 1).mul(
            torch.tensor([1.0, -1.0])
        )


@pytest.mark.parametrize("norm", [Norm.LINF, Norm.L2])
def test_autoattack_rand_averages_the_gradients_of_a_random_model(norm: Norm) -> None:
    """Images whose exact distance is within eps: with many draws all are turned, with one few."""
    model = Jittery(noise=4.0)
    weight = (model.core.layer.weight[0] - model.core.layer.weight[1]).detach()
    images = torch.rand(24, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 0.2 + 0.4
    with torch.no_grad():
        logits = model(images)
        labels, gap = logits.argmax(dim=1), (logits[:, 0] - logits[:, 1]).abs()
    distance = gap / torch.linalg.vector_norm(weight, ord=1 if norm is Norm.LINF else 2)
    eps = float(distance.median())
    sharp, blunt = (
        AutoAttack(version="rand", steps=8, eot_iter=draws)(model, images, labels, ThreatModel(norm=norm, eps=eps))
        for draws in (30, 1)
    )
    assert not sharp.success[distance > eps].any()
    assert sharp.success[distance < 0.85 * eps].all()
    assert int(blunt.success.sum()) < int(sharp.success.sum())


@pytest.mark.parametrize("kind", ["uniform", "gaussian"])
@pytest.mark.parametrize("norm", list(Norm))
def test_noise_is_weak_and_keeps_to_the_budget(kind: str, norm: Norm) -> None:
    model = curved()
    images, labels = batch(model, 64)
    images = images * 0.6 + 0.2  # room for changes: the box takes little of them
    with torch.no_grad():
        labels = model(images).argmax(dim=1)
    threat = ThreatModel(norm=norm, eps=EPS[norm])
    attacked = Noise(kind=kind)(model, images, labels, threat)
    assert float(attacked.distance.max()) <= EPS[norm] + threat.slack
    assert float(attacked.distance.min()) > 0.9 * EPS[norm]
    if norm is Norm.L0:
        assert attacked.distance.tolist() == [3.0] * len(images)
    else:
        strong = APGD(steps=20)(model, images, labels, threat)
        assert int(attacked.success.sum()) < int(strong.success.sum()) / 2


@pytest.mark.parametrize("kind", ["uniform", "gaussian"])
def test_noise_in_l0_draws_new_values_or_adds_to_them(kind: str) -> None:
    """The pixels hold 0.9: new values from [0, 1] lie mostly below it, a Gaussian of deviation 1 on either side."""
    images = torch.full((50, 3, 8, 8), 0.9)
    threat = ThreatModel(norm="l0", eps=64)
    drawn = Noise(kind=kind)._drawn(images, threat, torch.Generator().manual_seed(0))
    inside = drawn[(drawn > 0) & (drawn < 1)]
    if kind == "uniform":
        assert len(inside) == drawn.numel()
        assert float((drawn < 0.25).float().mean()) == pytest.approx(0.25, abs=0.02)
    else:  # cut off at the ends of the box, 0.9 below and 0.1 above
        assert float((drawn == 0).float().mean()) == pytest.approx(0.184, abs=0.02)
        assert float((drawn == 1).float().mean()) == pytest.approx(0.460, abs=0.02)


def test_more_draws_of_noise_never_lose_an_image() -> None:
    model: nn.Module = curved()
    images, labels = batch(model, 64)
    threat = ThreatModel(norm="linf", eps=0.2)
    one, many = (Noise(draws=k)(model, images, labels, threat) for k in (1, 20))
    assert bool((many.success | ~one.success).all())
    assert int(many.success.sum()) > int(one.success.sum())
    assert bool((many.forward_passes <= 21).all())
