"""HopSkipJump: its walk by closed forms on linear models, and what it may know."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from src.attacks.hop_skip_jump import HopSkipJump, _Walk
from src.attacks.query import Query
from src.threat import Norm, ThreatModel
from tests.conftest import Linear
from tests.test_query_attacks import Labels, Weak, dark, gap, middling


@pytest.mark.parametrize(("norm", "dual", "worst"), [(Norm.L2, 2, 1.1), (Norm.LINF, 1, 1.2)])
def test_hop_skip_jump_comes_near_the_exact_distance_of_a_linear_model(norm: Norm, dual: float, worst: float) -> None:
    model = Linear(side=8, seed=1)
    images, labels = middling(model, 16, side=8)
    exact = gap(model, images, dual)
    ratios = []
    for iterations in (1, 5, 20):
        attacked = HopSkipJump(iterations=iterations)(model, images, labels, ThreatModel(norm=norm, eps=math.inf))
        assert attacked.success.all()
        ratios.append(attacked.distance / exact)
        assert float(ratios[-1].min()) > 0.999
    assert float(ratios[0].median()) > float(ratios[1].median()) > float(ratios[2].median())
    assert float(ratios[2].max()) < worst


@pytest.mark.parametrize("norm", [Norm.L2, Norm.LINF])
def test_hop_skip_jump_needs_the_labels_only(norm: Norm) -> None:
    model = Linear(classes=3, side=6, seed=1)
    images, labels = middling(model, 8, side=6)
    threat = ThreatModel(norm=norm, eps=math.inf)
    scores, onehot = (HopSkipJump(iterations=4)(m, images, labels, threat) for m in (model, Labels(model)))
    assert scores.success.all()
    assert torch.equal(scores.images, onehot.images)
    assert not onehot.backward_passes.any()


def test_hop_skip_jump_drops_what_lies_beyond_eps() -> None:
    model = Linear(side=8, seed=1)
    images, labels = middling(model, 16, side=8)
    found = HopSkipJump(iterations=5)(model, images, labels, ThreatModel(norm=Norm.L2, eps=math.inf)).distance
    eps = float(found.median())
    attacked = HopSkipJump(iterations=5)(model, images, labels, ThreatModel(norm=Norm.L2, eps=eps))
    assert attacked.success.tolist() == (found <= eps).tolist()
    assert torch.equal(attacked.images[~attacked.success], images[~attacked.success])


@pytest.mark.parametrize("norm", [Norm.L2, Norm.LINF])
def test_targeted_hop_skip_jump_starts_from_an_image_of_the_target(norm: Norm) -> None:
    model = Linear(classes=4, side=6, seed=2)
    with torch.no_grad():  # no class is preferred
        model.layer.bias.copy_(-0.5 * model.layer.weight.sum(dim=1))
    images, labels = middling(model, 24, side=6, low=0.0)
    target = labels.roll(1)
    keep = target != labels
    images, labels, target = images[keep], labels[keep], target[keep]
    threat = ThreatModel(norm=norm, eps=math.inf, targeted=True)
    short, longer = (HopSkipJump(iterations=k, starts=1)(model, images, labels, threat, target=target) for k in (1, 15))
    there = torch.isin(target, labels)  # an image of the target is in the batch
    assert int(there.sum()) > 10
    assert longer.success[there].all()
    assert torch.equal(longer.prediction[there], target[there])
    assert float(longer.distance[there].median()) < float(short.distance[there].median())


def test_hop_skip_jump_estimates_the_normal_as_the_paper_does() -> None:
    """The sum of (phi - mean phi) u, of directions with labels; the mean direction or its opposite where all agree."""
    model, threat = Linear(side=3, seed=1), ThreatModel(norm=Norm.L2, eps=math.inf)
    weight = (model.layer.weight[1] - model.layer.weight[0]).detach()
    with torch.no_grad():
        model.layer.bias.copy_(torch.tensor([0.5, -0.5]) * weight.sum() / 2)  # the boundary goes through grey
    unit = (weight / weight.norm()).view(1, 3, 3)
    off = torch.tensor([0.0, 0.01, 0.2, -0.2])  # from the boundary: on it, beyond, and so far that all agree
    images = 0.5 + off.view(-1, 1, 1, 1) * unit
    walk = _Walk(Query(model, 4, images.device, torch.float32), images, torch.zeros(4, dtype=torch.int64), threat, 64)
    reach, count = torch.full((4,), 0.3), 50
    normal = walk.normal(images, reach, count, torch.Generator().manual_seed(0))

    directions = walk._directions(count, torch.Generator().manual_seed(0))
    shown = images[None] + reach[0] / 9 * directions[:, None]
    with torch.no_grad():
        phi = model(shown.flatten(0, 1)).argmax(dim=1).view(count, 4) * 2.0 - 1
    spread = phi - phi.mean(dim=0)
    expected = torch.einsum("sr,schw->rchw", spread, directions)
    expected[2:] = torch.stack([directions.sum(dim=0), -directions.sum(dim=0)])
    expected = expected / expected.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    assert [len(set(column)) for column in phi.T.tolist()] == [2, 2, 1, 1]
    assert 0.1 < abs(float(phi[:, 1].mean())) < 0.9
    torch.testing.assert_close(normal, expected, rtol=0, atol=1e-4)


def test_hop_skip_jump_steps_and_samples_by_the_root_of_the_iteration(monkeypatch: pytest.MonkeyPatch) -> None:
    steps, counts, step, normal = [], [], _Walk.step, _Walk.normal

    def stepped(walk: _Walk, images: Tensor, direction: Tensor, length: Tensor) -> Tensor:
        steps.append(float((length / walk.threat.distance(walk.x, images)).mean()))
        return step(walk, images, direction, length)

    def estimated(walk: _Walk, images: Tensor, reach: Tensor, count: int, draws: torch.Generator) -> Tensor:
        counts.append(count)
        return normal(walk, images, reach, count, draws)

    monkeypatch.setattr(_Walk, "step", stepped)
    monkeypatch.setattr(_Walk, "normal", estimated)
    model = Linear(side=4, seed=1)
    images, labels = middling(model, 4, side=4)
    attack = HopSkipJump(iterations=5, samples=10, max_samples=19)
    attack(model, images, labels, ThreatModel(norm=Norm.L2, eps=math.inf))
    assert counts == [10, 14, 17, 19, 19]
    assert steps == pytest.approx([1 / math.sqrt(t) for t in range(1, 6)], rel=1e-5)


def test_hop_skip_jump_returns_the_nearest_point_of_its_walk() -> None:
    model = Linear(side=8, seed=1)
    images, labels = middling(model, 8, side=8)
    threat, before = ThreatModel(norm=Norm.LINF, eps=math.inf), torch.full((8,), math.inf)
    for iterations in range(1, 4):  # each walk is the one before and a step; of few samples, most lead away
        attacked = HopSkipJump(iterations=iterations, samples=3)(model, images, labels, threat)
        assert bool((attacked.distance <= before).all())
        before = attacked.distance


def test_hop_skip_jump_halves_a_step_until_it_keeps_the_goal() -> None:
    def model(x: Tensor) -> Tensor:  # the goal is class 1: over 0.5
        return torch.stack([torch.full((len(x),), 0.5), x.flatten(1)[:, 0]], dim=1)

    images = torch.tensor([0.6, 0.9, 0.52]).view(-1, 1, 1, 1)
    query = Query(model, 3, images.device, torch.float32)
    walk = _Walk(query, images, torch.zeros(3, dtype=torch.int64), ThreatModel(norm=Norm.L2, eps=math.inf), 64)
    stepped = walk.step(images, -torch.ones_like(images), torch.full((3,), 0.32))
    assert stepped.flatten().tolist() == pytest.approx([0.52, 0.58, 0.51])
    assert query.forward_passes.tolist() == [3, 1, 6]


def three_classes(count: int) -> tuple[Linear, Tensor, Tensor]:
    """A linear model, and images of which each class has its share."""
    model = Linear(classes=3, side=4, seed=1)
    images, _ = middling(model, count, side=4, low=0.0)
    with torch.no_grad():
        model.layer.bias -= model(images).mean(dim=0)
    labels = model(images).argmax(dim=1)
    assert (labels.bincount(minlength=3) > count / 8).all()
    return model, images, labels


@pytest.mark.parametrize(("norm", "order"), [(Norm.L2, 2), (Norm.LINF, math.inf)])
def test_a_targeted_walk_starts_from_the_nearest_image_of_the_target(norm: Norm, order: float) -> None:
    model, images, labels = three_classes(20)
    target = (labels + 1) % 3
    query = Query(model, 20, images.device, torch.float32)
    threat = ThreatModel(norm=norm, eps=math.inf, targeted=True)
    with torch.no_grad():
        start, found = HopSkipJump()._starts(query, images, target, threat, torch.Generator())
    away = (images[:, None] - images[None]).flatten(2).norm(p=order, dim=2)
    away = away.masked_fill(target[:, None] != labels, math.inf)
    assert found.all()
    assert torch.equal(start, images[away.argmin(dim=1)])


@pytest.mark.parametrize("targeted", [False, True])
def test_a_walk_starts_from_no_image_that_the_model_rejects(targeted: bool) -> None:
    model, images, labels = three_classes(40)
    bright = images.mean(dim=(1, 2, 3)).median()

    class Rejects(nn.Module):
        rejects = True

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            logits = model(x)
            over = x.mean(dim=(1, 2, 3)) - bright  # every other image
            return torch.cat([logits, (logits.amax(dim=1) + 10 * over)[:, None]], dim=1)

    goal = (labels + 1) % 3 if targeted else labels
    query = Query(Rejects(), 40, images.device, torch.float32)
    query.goal, query.targeted = goal, targeted
    threat = ThreatModel(norm=Norm.L2, eps=math.inf, targeted=targeted)
    start, found = images.clone(), torch.zeros(40, dtype=torch.bool)
    with torch.no_grad():
        HopSkipJump()._from_batch(query, images, goal, threat, start, found)
        said = Rejects()(start).argmax(dim=1)
    assert found.all()
    assert torch.equal(said == goal, torch.full((40,), targeted))
    assert (said < 3).all()


def test_images_without_a_start_stay_clean() -> None:
    images, labels = dark()
    attacked = HopSkipJump(iterations=2, starts=3)(
        Weak([(5, 2)], above=9), images, labels, ThreatModel(norm=Norm.L2, eps=math.inf)
    )
    assert not attacked.success.any()
    assert torch.equal(attacked.images, images)


def test_hop_skip_jump_searches_in_float32(small_network: nn.Module) -> None:
    small_network.eval()
    images = torch.rand(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    labels = small_network(images).argmax(dim=1)
    threat = ThreatModel(norm=Norm.L2, eps=math.inf)
    one, two = (
        HopSkipJump(iterations=3)(small_network, images, labels, threat, search=dtype)
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert torch.equal(one.images, two.images)
