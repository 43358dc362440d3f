"""Attacks that see scores or labels only: one_pixel and hop_skip_jump."""

from __future__ import annotations

import math
from typing import Literal

import pytest
import torch
from torch import Tensor, nn

from src.attacks.hop_skip_jump import HopSkipJump
from src.attacks.one_pixel import OnePixel, _three_others
from src.attacks.query import Query
from src.threat import Norm, ThreatModel
from tests.conftest import Linear


class Weak(nn.Module):
    """Three classes; the first everywhere but where the pixels of a place are bright enough together."""

    def __init__(self, places: list[tuple[int, int]], above: float) -> None:
        super().__init__()
        self.places, self.above = places, above

    def forward(self, x: Tensor) -> Tensor:
        bright = torch.stack([x[:, :, row, column].mean(dim=1) for row, column in self.places]).mean(dim=0)
        return torch.stack([torch.full_like(bright, self.above), bright, torch.full_like(bright, -1.0)], dim=1)


class Labels(nn.Module):
    """Another model's answers as one-hot logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        logits = self.model(x)
        return nn.functional.one_hot(logits.argmax(dim=1), logits.shape[1]).to(x.dtype)


def dark(count: int = 6) -> tuple[Tensor, Tensor]:
    images = 0.1 * torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return images, torch.zeros(count, dtype=torch.int64)


def middling(model: nn.Module, count: int, side: int, low: float = 0.25) -> tuple[Tensor, Tensor]:
    """Images away from the edges of the box, and the model's own answers for them."""
    images = low + (1 - 2 * low) * torch.rand(count, 1, side, side, generator=torch.Generator().manual_seed(3))
    return images, model(images).argmax(dim=1)


def gap(model: Linear, images: Tensor, dual: float) -> Tensor:
    """Exact distance of each image from the boundary of a two-class linear model."""
    weight = (model.layer.weight[0] - model.layer.weight[1]).detach()
    logits = model(images).detach()
    return (logits[:, 0] - logits[:, 1]).abs() / torch.linalg.vector_norm(weight, ord=dual)


def l0(eps: float, *, targeted: bool = False, quantize: bool = False) -> ThreatModel:
    return ThreatModel(norm=Norm.L0, eps=eps, targeted=targeted, quantize=quantize)


# -- passes counted by hand


def test_passes_that_the_view_does_not_see_can_be_added() -> None:
    query = Query(Linear(), 5, torch.device("cpu"), torch.float32)
    some = query.of(torch.tensor([4, 1]))
    some.add_backward(6)
    some.add_backward(-2)
    assert query.backward_passes.tolist() == [0, 2, 0, 0, 2]
    some.share(5, 1)  # as evenly as whole numbers allow
    assert query.forward_passes.tolist() == [0, 2, 0, 0, 3]
    assert query.backward_passes.tolist() == [0, 2, 0, 0, 3]
    query.of(torch.tensor([], dtype=torch.int64)).share(3, 3)
    assert int(query.forward_passes.sum()) == 5
    with pytest.raises(RuntimeError, match="images asked of a view of 2"):
        some.add_backward(3)


@pytest.mark.parametrize("targeted", [False, True])
def test_the_refusal_is_folded_into_the_goal_of_each_image_in_every_block(targeted: bool) -> None:
    """Class 2 is the refusal. Untargeted it backs the label to leave, targeted whatever is not wanted."""
    answers = torch.tensor([[1.0, 2.0, 3.0], [5.0, 4.0, 3.0]])

    class Rejecting(nn.Module):
        rejects = True

        def forward(self, x: Tensor) -> Tensor:
            return answers[x.flatten(1)[:, 0].long()]

    query = Query(Rejecting(), 3, torch.device("cpu"), torch.float32)
    query.goal, query.targeted = torch.tensor([1, 0, 1]), targeted
    images = torch.tensor([0.0, 0, 0, 0, 1, 1]).view(-1, 1, 1, 1)  # three versions of the second and the third image
    seen = query.of(torch.tensor([1, 2]))(images)
    if targeted:
        expected = [[1.0, 3], [3, 2], [1, 3], [3, 2], [5, 4], [5, 4]]
    else:
        expected = [[3.0, 2], [1, 3], [3, 2], [1, 3], [5, 4], [5, 4]]
    assert seen.tolist() == expected


# -- one_pixel


@pytest.mark.parametrize("around", ["best", "random"])
@pytest.mark.parametrize("targeted", [False, True])
def test_one_pixel_finds_a_planted_weakness_in_one_pixel(targeted: bool, around: Literal["best", "random"]) -> None:
    images, labels = dark()
    model = Weak([(5, 2)], above=0.6)
    target = torch.ones_like(labels) if targeted else None
    attack = OnePixel(population=100, generations=40, around=around)
    attacked = attack(model, images, labels, l0(1, targeted=targeted), target=target)
    assert attacked.success.all()
    assert attacked.prediction.tolist() == [1] * len(images)
    assert attacked.distance.tolist() == [1] * len(images)
    assert ((attacked.images != images).any(dim=1).nonzero()[:, 1:] == torch.tensor([5, 2])).all()


def test_one_pixel_needs_as_many_pixels_as_the_weakness_has() -> None:
    images, labels = dark(3)
    model = Weak([(5, 2), (0, 7)], above=0.6)
    attack = OnePixel(population=200, generations=60)
    assert not attack(model, images, labels, l0(1)).success.any()
    both = attack(model, images, labels, l0(2))
    assert both.success.all()
    assert both.distance.tolist() == [2] * 3


@pytest.mark.parametrize("eps", [0.9, 1, 3, 1000, math.inf])
def test_one_pixel_never_changes_more_pixels_than_asked(eps: float) -> None:
    images, labels = dark()
    attacked = OnePixel(population=8, generations=5, pixels=4)(Weak([(5, 2)], above=9), images, labels, l0(eps))
    assert not attacked.success.any()
    assert float(attacked.distance.max()) <= min(int(eps) if math.isfinite(eps) else 4, 64)
    assert float(attacked.distance.min()) >= min(1, int(min(eps, 1)))


def test_one_pixel_works_without_gradients_and_asks_for_none() -> None:
    images, labels = dark()

    @torch.no_grad()
    def model(x: Tensor) -> Tensor:
        assert not x.requires_grad
        return Weak([(5, 2)], above=0.6)(x)

    attacked = OnePixel(population=100, generations=40)(model, images, labels, l0(1))
    assert attacked.success.all()
    assert not attacked.backward_passes.any()


def test_one_pixel_stops_with_the_first_hit() -> None:
    images, labels = dark()
    easy = OnePixel(population=50, generations=30)(Weak([(5, 2)], above=0.15), images, labels, l0(8))
    hard = OnePixel(population=50, generations=30)(Weak([(5, 2)], above=9), images, labels, l0(8))
    assert easy.success.all()
    assert int(easy.forward_passes.max()) < 2 + 50 * 31
    assert hard.forward_passes.tolist() == [2 + 50 * 31] * len(images)


@pytest.mark.parametrize(
    "attack", [OnePixel(population=30, generations=10, batch_size=64), HopSkipJump(iterations=3, batch_size=4096)]
)
def test_an_image_comes_out_the_same_whatever_else_is_in_the_batch(attack: OnePixel | HopSkipJump) -> None:
    """With the same generator; exact here, where neither the model's rounding nor the split of the samples differs."""
    norm = min(attack.norms)
    model = Weak([(row, row) for row in range(8)], above=0.4)
    images, labels = dark(7)
    threat = ThreatModel(norm=norm, eps=3 if norm is Norm.L0 else math.inf)
    whole = attack(model, images, labels, threat, generator=torch.Generator().manual_seed(1))
    for rows in (torch.tensor([4]), torch.tensor([6, 1])):
        part = attack(model, images[rows], labels[rows], threat, generator=torch.Generator().manual_seed(1))
        assert torch.equal(part.images, whole.images[rows])


@pytest.mark.parametrize("attack", [OnePixel(population=40, generations=4, batch_size=16),
                                    HopSkipJump(iterations=3, batch_size=16)])  # fmt: skip
def test_the_model_never_gets_more_than_batch_size_images(attack: OnePixel | HopSkipJump) -> None:
    images, labels = dark(16)
    most = 0

    def model(x: Tensor) -> Tensor:
        nonlocal most
        most = max(most, len(x))
        return Weak([(5, 2)], above=0.6)(x)

    norm = min(attack.norms)
    attack(model, images, labels, ThreatModel(norm=norm, eps=1 if norm is Norm.L0 else math.inf))
    assert most == 16


def test_one_pixel_hits_survive_8_bit_pixels() -> None:
    images, labels = dark()
    images = (images * 255).round() / 255
    attacked = OnePixel(population=100, generations=40)(
        Weak([(5, 2)], above=0.97), images, labels, l0(1, quantize=True)
    )
    assert attacked.success.all()
    assert torch.equal((attacked.images * 255).round() / 255, attacked.images)


@pytest.mark.parametrize("crossover", [0.0, 0.5])
def test_one_pixel_with_crossover(crossover: float) -> None:
    images, labels = dark()
    attack = OnePixel(population=100, generations=60, crossover=crossover)
    assert attack(Weak([(5, 2)], above=0.5), images, labels, l0(1)).success.all()


@pytest.mark.parametrize("count", [4, 5, 17])
def test_three_others_are_three_and_other(count: int) -> None:
    draws = torch.Generator().manual_seed(0)
    for _ in range(50):
        table = torch.cat([torch.arange(count)[None], _three_others(count, draws)])
        assert int(table.min()) >= 0
        assert int(table.max()) < count
        assert all(len(set(column)) == 4 for column in table.T.tolist())


# -- hop_skip_jump


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
