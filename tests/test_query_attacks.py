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


@pytest.mark.parametrize("around", ["best", "random"])
@pytest.mark.parametrize("crossover", [1.0, 0.9, 0.0])
def test_one_pixel_children_are_those_of_differential_evolution(
    around: Literal["best", "random"], crossover: float
) -> None:
    """A candidate and a share of a difference, of two others; reflected at the edges, clipped to [0, 1]."""
    attack = OnePixel(population=50, around=around, weight=(0.5, 1.0), crossover=crossover)
    size, draws = torch.Size([6, 9]), torch.Generator().manual_seed(0)
    people = torch.rand(50, 3, 2, 5, generator=draws) * torch.tensor([6.0, 9, 1, 1, 1])
    fitness = torch.rand(50, 3, generator=draws)
    children = attack._children(people, fitness, size, torch.Generator().manual_seed(1))

    draws = torch.Generator().manual_seed(1)
    a, b, c = _three_others(50, draws)
    weight = 0.5 + 0.5 * float(torch.rand((), generator=draws))
    best = torch.stack([people[fitness[:, image].argmax(), image] for image in range(3)])
    whole = (people[a] if around == "random" else best) + weight * (people[b] - people[c])
    row, column = ((whole[..., i].abs() - edge).abs() for i, edge in enumerate(size))  # never beyond twice the edge
    whole = torch.cat([torch.stack([6 - row, 9 - column], dim=3), whole[..., 2:].clamp(0, 1)], dim=3)
    taken, kept = ((children - other).abs() < 1e-5 for other in (whole, people))
    assert bool((taken | kept).all())
    share = float((~kept).flatten(2).float().mean())
    assert share == pytest.approx(max(crossover, 0.1), abs=0.06)
    assert int((~kept).flatten(2).sum(dim=2).min()) >= (1 if around == "random" else 0)


def test_one_pixel_never_gets_worse_with_more_generations() -> None:
    model = Weak([(row, column) for row in range(8) for column in range(8)], above=9)
    images, labels = dark(4)
    before = torch.full((4,), -math.inf)
    for generations in range(1, 6):
        attacked = OnePixel(population=10, generations=generations, around="random")(model, images, labels, l0(3))
        bright = model(attacked.images)[:, 1]
        assert bool((bright >= before).all())
        before = bright


def test_one_pixel_goes_on_where_its_images_are_meant_for_another_model() -> None:
    images, labels = dark()
    threat = ThreatModel(norm=Norm.L0, eps=8, exhaust=True)
    attacked = OnePixel(population=20, generations=10)(Weak([(5, 2)], above=0.15), images, labels, threat)
    assert attacked.success.all()
    assert attacked.forward_passes.tolist() == [2 + 20 * 11] * len(images)


@pytest.mark.parametrize("count", [4, 5, 17])
def test_three_others_are_three_and_other(count: int) -> None:
    draws = torch.Generator().manual_seed(0)
    for _ in range(50):
        table = torch.cat([torch.arange(count)[None], _three_others(count, draws)])
        assert int(table.min()) >= 0
        assert int(table.max()) < count
        assert all(len(set(column)) == 4 for column in table.T.tolist())
