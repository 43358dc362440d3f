"""Attacks that search the smallest change: closed forms, exact projections, and what holds on a network."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from src.attacks.base import Attack, Attacked
from src.attacks.cw import CW
from src.attacks.deepfool import DeepFool
from src.attacks.fab import FAB, to_plane
from src.attacks.fmn import FMN
from src.attacks.jsma import JSMA
from src.errors import UserError
from src.threat import Norm, ThreatModel
from tests.conftest import Linear

INF = math.inf


@pytest.mark.parametrize(
    "attack", [DeepFool(), FMN(steps=5), FAB(steps=3), CW(steps=5)], ids=lambda a: type(a).__name__
)
def test_images_to_learn_from_keep_the_radius(attack: Attack) -> None:
    """A search for the smallest change knows no radius, and many of its images lie beyond."""
    model = Linear(classes=3)
    images = torch.rand(20, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    labels = model(images).argmax(dim=1)
    threat = ThreatModel(norm=Norm.L2, eps=0.05)
    made = attack.perturb(model, images, labels, threat, generator=torch.Generator().manual_seed(0))
    distance = threat.judge(images, made)
    assert float(distance.max()) == pytest.approx(0.05, abs=1e-5)


DUAL = {Norm.L1: INF, Norm.L2: 2, Norm.LINF: 1}
CLASSES = 4


class Logits(nn.Module):
    """A network of smooth layers, with a margin between classes that images of it cross one after the other."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(5)
            self.body = nn.Sequential(
                nn.Conv2d(3, 8, 3, padding=1), nn.SiLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(8 * 9, CLASSES)
            )
            with torch.no_grad():
                for parameter in self.parameters():
                    parameter.mul_(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x - 0.5)


@pytest.fixture(scope="module")
def network() -> nn.Module:
    return Logits().eval()


def images_of(model: nn.Module, count: int = 24) -> tuple[torch.Tensor, torch.Tensor]:
    images = torch.rand(count, 3, 6, 6, generator=torch.Generator().manual_seed(1)) * 0.8 + 0.1
    with torch.no_grad():
        return images, model(images).argmax(dim=1)


def near_the_plane(count: int = 8) -> tuple[Linear, torch.Tensor, torch.Tensor, torch.Tensor]:
    """A linear model of two classes, images near its boundary in the middle of the box, margins and normal."""
    model = Linear(side=4)
    weight = (model.layer.weight[0] - model.layer.weight[1]).detach()
    with torch.no_grad():
        model.layer.bias[0] = model.layer.bias[1] - weight.sum() / 2
    images = 0.5 + 0.04 * torch.randn(count, 1, 4, 4, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        logits = model(images)
    return model, images, logits[:, 0] - logits[:, 1], weight


@pytest.mark.parametrize(
    ("attack", "norm", "tolerance"),
    [
        *((DeepFool(overshoot=0.001), norm, 0.005) for norm in (Norm.L2, Norm.LINF)),
        *((FAB(steps=40, target_classes=k), norm, 0.01) for norm in (Norm.L2, Norm.LINF, Norm.L1) for k in (None, 9)),
        *((FMN(steps=150), norm, 0.01) for norm in (Norm.L2, Norm.LINF, Norm.L1)),
        (CW(), Norm.L2, 0.01),
    ],
)
def test_distance_to_a_hyperplane_is_exact(attack: Attack, norm: Norm, tolerance: float) -> None:
    model, images, margin, weight = near_the_plane()
    attacked = attack(model, images, (margin < 0).long(), ThreatModel(norm=norm, eps=INF))
    truth = margin.abs() / torch.linalg.vector_norm(weight, ord=DUAL[norm])
    assert attacked.success.all()
    ratio = attacked.distance / truth
    assert float(ratio.min()) >= 1 - 1e-4
    assert float(ratio.max()) <= 1 + tolerance


@pytest.mark.parametrize("norm", [Norm.L2, Norm.LINF])
@pytest.mark.parametrize("overshoot", [0.0, 0.02, 0.3])
def test_deepfool_goes_beyond_the_boundary_by_its_overshoot(overshoot: float, norm: Norm) -> None:
    model, images, margin, weight = near_the_plane()
    attacked = DeepFool(overshoot=overshoot)(model, images, (margin < 0).long(), ThreatModel(norm=norm, eps=INF))
    truth = margin.abs() / torch.linalg.vector_norm(weight, ord=DUAL[norm])
    assert attacked.success.all()
    torch.testing.assert_close(attacked.distance / truth, torch.full_like(truth, 1 + overshoot), rtol=2e-3, atol=0)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("nearer", [0.03, 1.0])
def test_cw_finds_the_distance_whatever_the_scale_of_logits_and_distance(scale: float, nearer: float) -> None:
    """Its rate and its first c follow from the gradient: no setting depends on the classifier."""
    model, images, margin, weight = near_the_plane()
    truth = margin.abs() / weight.norm()
    with torch.no_grad():  # each image moved along the normal to `nearer` times its distance, logits scaled
        images = images - ((1 - nearer) * margin / weight.norm() ** 2).view(-1, 1, 1, 1) * weight.view(1, 1, 4, 4)
        for parameter in model.parameters():
            parameter.mul_(scale)
    attacked = CW()(model, images, (margin < 0).long(), ThreatModel(norm="l2", eps=INF))
    assert attacked.success.all()
    ratio = attacked.distance / (nearer * truth)
    assert float(ratio.min()) >= 0.999
    assert float(ratio.max()) <= 1.01


def test_cw_leads_by_its_confidence_and_goes_no_further() -> None:
    confidence = 1.0
    model, images, margin, weight = near_the_plane(4)
    labels = (margin < 0).long()
    attacked = CW(steps=50, confidence=confidence)(model, images, labels, ThreatModel(norm="l2", eps=INF))
    assert attacked.success.all()
    with torch.no_grad():
        logits = model(attacked.images)
    lead = (logits[:, 1] - logits[:, 0]) * margin.sign()
    assert float(lead.min()) >= confidence
    ratio = attacked.distance / ((margin.abs() + confidence) / weight.norm())
    assert float(ratio.min()) >= 1 - 1e-4
    assert float(ratio.max()) <= 1.02


def test_fmn_l0_finds_the_fewest_pixels() -> None:
    """Largest gains first, each pixel moved to the end of the box: that greedy count is optimal for a linear model."""
    model, images, margin, weight = near_the_plane(12)
    images = (images + 0.2 * margin.sign().view(-1, 1, 1, 1) * weight.sign().view(1, 1, 4, 4)).clamp(0, 1)
    with torch.no_grad():
        logits = model(images)
    margin = logits[:, 0] - logits[:, 1]
    toward = -margin.sign()[:, None] * weight
    room = torch.where(toward > 0, 1 - images.flatten(1), images.flatten(1))
    gains = (toward.abs() * room).sort(dim=1, descending=True).values.cumsum(dim=1)
    truth = (gains <= margin.abs()[:, None]).sum(dim=1) + 1
    attacked = FMN(steps=200)(model, images, (margin < 0).long(), ThreatModel(norm="l0", eps=INF))
    assert attacked.success.all()
    assert bool((attacked.distance >= truth).all())
    assert float((attacked.distance - truth).mean()) < 0.3


@pytest.mark.parametrize("norm", list(DUAL))
def test_projection_onto_a_plane_inside_the_box(norm: Norm) -> None:
    """On the plane or at the end of the box, inside the box, and nothing random is nearer."""
    generator = torch.Generator().manual_seed(0)
    start = torch.rand(200, 1, 3, 4, generator=generator)
    start[:50] = start[:50].round()  # corners, where half of the values cannot move
    slope = torch.randn(start.shape, generator=generator)
    slope[:, :, 0, 0] = 0
    rise = torch.randn(200, generator=generator) * 3
    change = to_plane(start, slope, rise, norm)
    room = torch.where(slope * rise.view(-1, 1, 1, 1) > 0, 1 - start, start)
    most = (slope.abs() * room).flatten(1).sum(dim=1)
    gained = (slope * change).flatten(1).sum(dim=1)
    torch.testing.assert_close(gained, rise.sign() * torch.minimum(rise.abs(), most), rtol=1e-4, atol=1e-4)
    assert float((start + change - 0.5).abs().max()) <= 0.5 + 1e-6

    threat = ThreatModel(norm=norm, eps=INF)
    size = threat.distance(start, start + change)
    for _ in range(50):
        other = torch.rand(start.shape, generator=generator) * room * (slope * rise.view(-1, 1, 1, 1)).sign()
        reach = (slope * other).flatten(1).sum(dim=1)
        other = other * (gained / reach).clamp(0, 1).view(-1, 1, 1, 1).nan_to_num()
        equal = ((slope * other).flatten(1).sum(dim=1) - gained).abs() < 1e-4
        assert bool((~equal | (threat.distance(start, start + other) >= size - 1e-3)).all())


Make = Callable[[], Attack]
SUITE: list[tuple[Make, Norm]] = [
    *((DeepFool, norm) for norm in (Norm.L2, Norm.LINF)),
    *((lambda: FAB(steps=20), norm) for norm in (Norm.L1, Norm.L2, Norm.LINF)),
    *((lambda: FAB(steps=10, target_classes=3, restarts=2), norm) for norm in (Norm.L1, Norm.L2, Norm.LINF)),
    *((lambda: FMN(steps=40), norm) for norm in Norm),
    (lambda: CW(steps=60, binary_search_steps=5), Norm.L2),
    (lambda: JSMA(max_pixels=20), Norm.L0),
    (lambda: JSMA(max_pixels=20, saliency="single"), Norm.L0),
]


def attack_all(attack: Attack, norm: Norm, network: nn.Module, eps: float = INF, **kwargs: bool) -> Attacked:
    images, labels = images_of(network)
    return attack(network, images, labels, ThreatModel(norm=norm, eps=eps, **kwargs))


@pytest.mark.parametrize(("make", "norm"), SUITE)
def test_successes_are_successes_with_finite_distances(make: Make, norm: Norm, network: nn.Module) -> None:
    images, labels = images_of(network)
    attacked = attack_all(make(), norm, network)
    with torch.no_grad():
        assert torch.equal(network(attacked.images).argmax(dim=1), attacked.prediction)
    assert torch.equal(attacked.success, attacked.prediction != labels)
    assert attacked.success.float().mean() > 0.7
    assert attacked.distance.isfinite().all()
    assert bool((attacked.distance > 0).eq(attacked.success).all())  # what did not work is the clean image
    assert torch.equal(attacked.images[~attacked.success], images[~attacked.success])


ONE_START = [case for case in SUITE if getattr(case[0](), "restarts", 1) == 1]  # random starts depend on eps


@pytest.mark.parametrize(("make", "norm"), ONE_START)
def test_one_run_answers_every_eps(make: Make, norm: Norm, network: nn.Module) -> None:
    attack = make()
    whole = attack_all(attack, norm, network)
    for share in (0.3, 0.6, 0.9):
        eps = float(whole.distance[whole.success].quantile(share)) + (0.5 if norm is Norm.L0 else 1e-4)
        single = attack_all(attack, norm, network, eps=eps)
        assert torch.equal(single.success, whole.success & (whole.distance <= eps))


@pytest.mark.parametrize(("make", "norm"), [case for case in SUITE if case[0] is not DeepFool])
def test_targeted_hits_its_target(make: Make, norm: Norm, network: nn.Module) -> None:
    images, labels = images_of(network)
    target = (labels + 1) % CLASSES
    attacked = make()(network, images, labels, ThreatModel(norm=norm, eps=INF, targeted=True), target=target)
    assert attacked.success.float().mean() > 0.6
    assert torch.equal(attacked.prediction[attacked.success], target[attacked.success])
    # The nearest wrong class is no farther than one given: true of what they find but where a search goes astray.
    anywhere = make()(network, images, labels, ThreatModel(norm=norm, eps=INF))
    both = attacked.success & anywhere.success
    ratio = attacked.distance[both] / anywhere.distance[both]
    assert float(ratio.median()) > 1.05
    assert float((ratio > 0.99).float().mean()) > 0.85


def test_fab_never_gets_worse_with_more_steps(network: nn.Module) -> None:
    before = torch.full((24,), INF)
    for steps in (2, 4, 8):
        attacked = attack_all(FAB(steps=steps), Norm.L2, network)
        distance = attacked.distance.masked_fill(~attacked.success, INF)
        assert bool((distance <= before + 1e-6).all())
        before = distance


def test_cw_gets_nearer_with_more_values_of_c(network: nn.Module) -> None:
    """In the median: each value of c begins where the last one ended, so that single images may go either way."""
    few, many = (attack_all(CW(steps=40, binary_search_steps=count), Norm.L2, network) for count in (1, 8))
    assert int(many.success.sum()) >= int(few.success.sum())
    medians = [float(a.distance.masked_fill(~a.success, INF).median()) for a in (few, many)]
    assert medians[1] <= medians[0] * 1.001


def test_stop_at_eps_keeps_the_verdict_and_saves_passes(network: nn.Module) -> None:
    full = attack_all(FAB(steps=20, target_classes=3), Norm.LINF, network)
    eps = float(full.distance[full.success].quantile(0.7)) + 1e-4
    quick = attack_all(FAB(steps=20, target_classes=3, stop_at_eps=True), Norm.LINF, network, eps=eps)
    assert torch.equal(quick.success, full.success & (full.distance <= eps))
    assert int(quick.backward_passes.sum()) < int(full.backward_passes.sum()) / 2


def test_every_class_counts_as_a_backward_pass_and_batch_size_changes_nothing(network: nn.Module) -> None:
    whole, parts, one = (attack_all(FAB(steps=5, batch_size=size), Norm.L2, network) for size in (1024, 7, 1))
    assert whole.backward_passes.tolist() == [5 * (CLASSES - 1)] * 24
    for other in (parts, one):
        torch.testing.assert_close(other.distance, whole.distance, rtol=1e-4, atol=1e-5)
        assert torch.equal(other.backward_passes, whole.backward_passes)


class Handwritten(torch.autograd.Function):
    """A backward pass that cannot be batched: it looks at values."""

    @staticmethod
    def forward(context: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(context: Any, slope: torch.Tensor) -> torch.Tensor:
        return slope * (1.0 if slope.abs().sum().item() > -1 else 0.0)


def test_layers_that_cannot_be_batched_take_the_long_way(network: nn.Module) -> None:
    class Wrapped(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return network(Handwritten.apply(x))

    images, labels = images_of(network)
    threat = ThreatModel(norm="l2", eps=INF)
    plain, wrapped = (DeepFool()(model, images, labels, threat) for model in (network, Wrapped()))
    torch.testing.assert_close(wrapped.distance, plain.distance)
    assert torch.equal(wrapped.backward_passes, plain.backward_passes)


@pytest.mark.parametrize(("make", "norm"), SUITE)
def test_a_bfloat16_search_ends_on_the_right_side_in_float32(make: Make, norm: Norm, network: nn.Module) -> None:
    images, labels = images_of(network)
    threat = ThreatModel(norm=norm, eps=INF)
    exact = make()(network, images, labels, threat)
    coarse = make()(network, images, labels, threat, search=torch.bfloat16)
    assert int(coarse.success.sum()) >= int(exact.success.sum()) - 2
    both = coarse.success & exact.success
    assert float(coarse.distance[both].median()) <= float(exact.distance[both].median()) * 1.15 + (
        1 if norm is Norm.L0 else 0
    )


def test_a_model_without_gradient_is_named(network: nn.Module) -> None:
    images, labels = images_of(network)

    def blind(x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return network(x)

    for attack, norm in ((DeepFool(), "l2"), (FAB(), "l2"), (CW(), "l2"), (FMN(), "l2"), (JSMA(), "l0")):
        with pytest.raises(UserError, match="attack=square"):
            attack(blind, images, labels, ThreatModel(norm=norm, eps=1))
