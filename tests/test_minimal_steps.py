"""The moves of attacks that search the smallest change, one by one: each against its closed form."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from src.attacks.cw import CW, _Search
from src.attacks.deepfool import DeepFool
from src.attacks.fab import FAB
from src.attacks.fmn import FMN
from src.attacks.gradients import steepest
from src.attacks.jsma import JSMA
from src.attacks.minimal import shorten
from src.attacks.query import Query
from src.threat import Norm, ThreatModel
from tests.conftest import Linear

INF = math.inf


class Pixels(nn.Module):
    """Class 0 has the logit 1, class k as much as ``first[k - 1]`` and ``steep[k - 1]`` times what pixel k - 1 gains.

    The classes' boundaries are as far away as the gaps over the slopes. Keeps what it was asked.
    """

    def __init__(self, first: list[float], steep: list[float]) -> None:
        super().__init__()
        self.first, self.steep, self.visited = torch.tensor(first), torch.tensor(steep), list[Tensor]()

    def forward(self, x: Tensor) -> Tensor:
        self.visited.append(x.detach().flatten(1))
        others = self.first + self.steep * (x.flatten(1)[:, : len(self.first)] - 0.5)
        return torch.cat([torch.ones(len(x), 1), others], dim=1)


def middle(count: int = 1, side: int = 2, channels: int = 1) -> tuple[Tensor, Tensor]:
    """Images in the middle of the box, of class 0."""
    return torch.full((count, channels, side, side), 0.5), torch.zeros(count, dtype=torch.int64)


@pytest.mark.parametrize(
    ("candidates", "contenders", "turned", "distance"),
    [(2, None, 1, 0.4), (3, None, 2, 0.2), (4, None, 3, 0.03), (4, 1, 2, 0.2), (4, 2, 3, 0.03)],
)
def test_deepfool_goes_to_the_nearest_of_the_classes_it_considers(
    candidates: int, contenders: int | None, turned: int, distance: float
) -> None:
    """Candidates are the largest logits, the own class counted; the first step looks at one more than `contenders`."""
    model = Pixels([0.9, 0.8, 0.7], [0.25, 1.0, 10.0])
    attack = DeepFool(overshoot=0.01, candidates=candidates, contenders=contenders)
    attacked = attack(model, *middle(), ThreatModel(norm="l2", eps=INF))
    assert attacked.prediction.tolist() == [turned]
    assert attacked.distance.tolist() == pytest.approx([1.01 * distance], rel=1e-3)


def test_deepfool_remembers_how_steep_classes_were() -> None:
    """The first step, to class 2, is cut short by the box; by gaps alone the second would go for the flat class 1."""
    model = Pixels([0.9, 0.8, 0.1], [0.01, 1.0, 1.0])
    images, labels = middle()
    images[:, 0, 0, 1] = 0.92
    with torch.no_grad():
        model.first[1] -= 0.42  # as far from turning as before
    attack = DeepFool(contenders=1, steps=2)
    attack(model, images, labels, ThreatModel(norm="l2", eps=INF))
    first, second = (model.visited[i][0] - images.flatten() for i in (2, 4))
    assert first.nonzero().flatten().tolist() == [1]
    assert second.nonzero().flatten().tolist() == [1]


def test_a_step_of_fab_is_between_both_projections_gone_beyond_by_eta() -> None:
    generator = torch.Generator().manual_seed(0)
    clean, current = (0.5 + 0.05 * torch.randn(8, 1, 4, 4, generator=generator) for _ in "ab")
    slope, gap = torch.randn(clean.shape, generator=generator), torch.randn(8, generator=generator) * 0.1
    found = FAB(eta=1.3, alpha_max=0.4)._closer(clean, current, gap, slope, Norm.L2)

    def to_plane(x: Tensor) -> Tensor:
        value = gap + ((x - current) * slope).flatten(1).sum(dim=1)
        return -(value / slope.flatten(1).square().sum(dim=1)).view(-1, 1, 1, 1) * slope

    near, far = to_plane(current), to_plane(clean)
    here, there = near.flatten(1).norm(dim=1), far.flatten(1).norm(dim=1)
    alpha = (here / (here + there)).clamp_max(0.4)
    assert 0 < int((alpha < 0.4).sum()) < 8
    alpha = alpha.view(-1, 1, 1, 1)
    expected = (1 - alpha) * (current + 1.3 * near) + alpha * (clean + 1.3 * far)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_fab_goes_back_to_its_share_of_the_change_after_success_only() -> None:
    model = Pixels([0.8], [1.0])
    images, labels = middle(2)
    FAB(steps=2, eta=1.5, alpha_max=0.0, beta=0.7)(model, images, labels, ThreatModel(norm="l2", eps=INF))
    start, reached, back = (model.visited[i][0, 0] for i in (1, 2, 3))
    assert float(start) == 0.5
    assert float(reached) == pytest.approx(0.5 + 1.5 * 0.2)
    assert float(back) == pytest.approx(0.5 + 0.7 * 1.5 * 0.2)


def test_fab_tries_the_likeliest_classes_and_from_the_target_the_leading_one() -> None:
    model = Pixels([0.9, 0.8, 0.7], [1.0, 1.0, 1.0])
    images, labels = middle()
    for count, distance in ((1, 0.1), (2, 0.1)):
        attack, model.visited = FAB(steps=1, target_classes=count), []
        attacked = attack(model, images, labels, ThreatModel(norm="l2", eps=INF))
        assert attacked.prediction.tolist() == [1]
        assert attacked.distance.tolist() == pytest.approx([1.05 * distance], rel=1e-3)
        moved = [int((x - 0.5).abs().argmax()) for x in model.visited[2:-1:2]]
        assert moved == list(range(count))
    target = torch.tensor([3])
    aimed = FAB(steps=1)(model, images, labels, ThreatModel(norm="linf", eps=INF, targeted=True), target=target)
    assert aimed.prediction.tolist() == [3]  # away from class 0, the leading one, on the pixel of class 3 alone
    assert (aimed.images != images).flatten().nonzero().flatten().tolist() == [2]


@pytest.mark.parametrize("norm", [Norm.LINF, Norm.L2, Norm.L1])
def test_fab_starts_again_half_as_far_as_eps_or_as_what_was_found(norm: Norm) -> None:
    images, _ = middle(3, side=8)
    found = torch.tensor([0.1, 0.3, INF])
    for eps, radius in ((0.2, 0.2), (INF, {Norm.LINF: 0.3, Norm.L2: 1.0, Norm.L1: 5.0}[norm])):
        threat = ThreatModel(norm=norm, eps=eps)
        start = FAB._random_start(images, found, threat, torch.Generator().manual_seed(0))
        torch.testing.assert_close(threat.distance(images, start), found.clamp_max(radius) / 2)


class Wavy(nn.Module):
    """Two classes; the lead of the second along the only value of an image has slopes of either sign."""

    def __init__(self) -> None:
        super().__init__()
        self.visited = list[Tensor]()

    def lead(self, value: Tensor) -> Tensor:
        return (20 * value).sin() + 4 * (value - 0.5)

    def forward(self, x: Tensor) -> Tensor:
        self.visited.append(x.detach().flatten())
        value = x.flatten(1)[:, 0]
        return torch.stack([torch.zeros_like(value), self.lead(value)], dim=1)


@pytest.mark.parametrize("norm", [Norm.L1, Norm.L2, Norm.LINF])
def test_every_point_of_fmn_is_that_of_the_published_algorithm(norm: Norm) -> None:
    """Images of one value, where all norms are one: the ball shrinks and grows, both lengths fall along a cosine."""
    model, clean, steps = Wavy(), torch.linspace(0.02, 0.98, 49), 12
    with torch.no_grad():
        labels = (model.lead(clean) > 0).long()
    model.visited.clear()
    attack = FMN(steps=steps, step=0.2, last_step=0.01, gamma=0.2, last_gamma=0.02)
    attacked = attack(model, clean.view(-1, 1, 1, 1), labels, ThreatModel(norm=norm, eps=INF))
    path = torch.stack(model.visited[1:-1], dim=1)  # the others are verdicts

    now, radius, best, points = clean, torch.full_like(clean, INF), torch.full_like(clean, INF), [clean]
    side = torch.where(labels == 1, -1.0, 1.0)  # of what has to rise
    for index in range(steps):
        fall = (1 + math.cos(math.pi * index / steps)) / 2
        step, gamma = 0.01 + 0.19 * fall, 0.02 + 0.18 * fall
        x = now.clone().requires_grad_()
        (slope,) = torch.autograd.grad((side * model.lead(x)).sum(), x)
        distance, hit = (now - clean).abs(), (model.lead(now) > 0) != (labels == 1)
        best = torch.where(hit, torch.minimum(best, distance), best)
        shrunk = torch.minimum(radius * (1 - gamma), best)
        known = torch.where(best.isfinite(), radius, distance + model.lead(now).abs() / slope.abs()) * (1 + gamma)
        radius = torch.where(hit, shrunk, known).minimum(torch.maximum(clean, 1 - clean))
        now = (clean + (now - clean + step * slope.sign()).clamp(-radius, radius)).clamp(0, 1)
        points.append(now)
    torch.testing.assert_close(path, torch.stack(points, dim=1), rtol=0, atol=1e-4)
    hit = (model.lead(now) > 0) != (labels == 1)
    best = torch.where(hit, torch.minimum(best, (now - clean).abs()), best)
    assert 0 < int(attacked.success.sum()) < 49
    torch.testing.assert_close(attacked.distance, torch.where(best.isfinite(), best, 0.0), rtol=0, atol=1e-4)


def test_the_steepest_step_has_length_one_however_small_the_slope() -> None:
    """Squares of a confident network's slopes underflow; where there is no slope there is no step."""
    slope = torch.randn(3, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    tiny = slope * torch.tensor([1.0, 1e-30, 0.0]).view(-1, 1, 1, 1)
    step = steepest(tiny, Norm.L2)
    direction = slope / slope.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    torch.testing.assert_close(step[:2], direction[:2])
    assert not step[2].any()


def test_cw_takes_the_steps_of_adam_in_tanh_space() -> None:
    """With the c and the rate that are right for a linear model: torch's own Adam on the paper's loss comes along."""
    model, generator, confidence = Linear(side=4), torch.Generator().manual_seed(2), 0.3
    images = 0.5 + 0.1 * torch.randn(6, 1, 4, 4, generator=generator)
    weight = (model.layer.weight[1] - model.layer.weight[0]).detach()
    with torch.no_grad():
        model.layer.bias[0] = model.layer.bias[1] + weight.sum() / 2
        labels = model(images).argmax(dim=1)
    visited = list[Tensor]()
    model.register_forward_pre_hook(lambda _, inputs: visited.append(inputs[0].detach()))
    attack = CW(steps=12, binary_search_steps=1, abort_early=False, shorten=0, confidence=confidence)
    attack(model, images, labels, ThreatModel(norm="l2", eps=INF))
    path = visited[2:14]  # after the verdict and the look that sets c and rate

    sign = torch.where(labels == 0, 1.0, -1.0)

    weight, offset = sign[:, None] * weight, sign * (model.layer.bias[1] - model.layer.bias[0]).detach()

    def ahead(x: Tensor) -> Tensor:
        return (x.flatten(1) * weight).sum(dim=1) + offset

    size = weight.norm(dim=1)
    distance = (confidence - ahead(images)) / size
    c = 1.5 * 2 * distance / size
    rate = distance / (2 * images * (1 - images)).flatten(1).norm(dim=1)
    shifts = [torch.zeros(1, 4, 4, requires_grad=True) for _ in images]
    adam = torch.optim.Adam([{"params": [s], "lr": float(r)} for s, r in zip(shifts, rate, strict=True)], eps=1e-12)
    for seen in path:
        made = (torch.tanh(torch.atanh(2 * images - 1) + torch.stack(shifts)) + 1) / 2
        torch.testing.assert_close(seen, made.detach(), rtol=0, atol=1e-4)
        loss = (made - images).square().flatten(1).sum(dim=1) + c * (confidence - ahead(made)).clamp_min(0)
        adam.zero_grad()
        loss.sum().backward()
        adam.step()


def test_cw_searches_c_for_each_image_by_itself() -> None:
    """Worked, failed, failed below one that worked, still under way, stalled after success, through with its last."""
    c, low, high = torch.tensor([2.0, 2.0, 4.0, 2.0, 3.0, 2.0]), torch.zeros(6), torch.full((6,), INF)
    low[0], high[2] = 1.0, 8.0
    image = torch.ones(6, 1, 1, 1)
    search = _Search(
        rows=torch.arange(6), shift=image.clone(), mean=image.clone(), square=image.clone(), c=c, low=low, high=high,
        age=torch.tensor([10.0, 10, 10, 5, 5, 10]), trial=torch.tensor([0.0, 0, 0, 0, 1, 2]), lr=torch.ones(6),
        worked=torch.tensor([True, False, False, True, True, True]), last=torch.full((6,), 1.0),
    )  # fmt: skip
    CW(steps=10, binary_search_steps=3)._next_c(search, torch.tensor([0.5, 0.5, 0.5, 0.5, 0.995, 0.5]))
    assert search.rows.tolist() == [0, 1, 2, 3, 4]
    assert search.c.tolist() == [1.5, 20, 6, 2, 1.5]
    assert search.low.tolist() == [1, 2, 4, 0, 0]
    assert search.high.tolist() == [2, INF, 8, INF, 3]
    assert search.lr.tolist() == [0.5, 1, 1, 1, 0.5]
    assert search.trial.tolist() == [1, 1, 1, 0, 2]
    assert search.age.tolist() == [0, 0, 0, 5, 0]
    assert search.last.tolist() == [INF, INF, INF, 0.5, INF]
    assert search.mean.flatten().tolist() == search.square.flatten().tolist() == [0, 0, 0, 1, 0]
    assert search.shift.flatten().tolist() == [1] * 5  # the next c begins where this one ended


def test_what_was_found_is_shortened_to_the_boundary() -> None:
    """By bisection, and by a fifth at most; what was not found stays."""
    model = Pixels([0.8], [1.0])
    images, _ = middle(4)
    share = torch.tensor([0.97, 0.83, 0.5, INF])  # of the change, where the boundary is
    found = images.clone()
    found[:, 0, 0, 0] += 0.2 / share
    query = Query(model, 4, images.device, torch.float32)
    made = shorten(query, images, found, lambda logits, rows: logits[:, 1] > logits[:, 0], passes=5)
    kept = ((made - images)[:, 0, 0, 0] / (0.2 / share))[:3]
    least = share[:3].clamp_min(0.8)
    assert bool((kept > least).all())
    assert bool((kept <= least + 0.2 / 2**5 + 1e-5).all())
    assert torch.equal(made[3], images[3])
    assert query.forward_passes.tolist() == [5, 5, 5, 0]


@pytest.mark.parametrize("others", ["sum", "softmax"])
def test_jsma_takes_the_other_classes_without_the_target(others: str) -> None:
    """The first value raises the target by 4 and lowers the other by 1, the second by a half and by 2."""
    model = Linear(side=2)
    with torch.no_grad():
        model.layer.weight.copy_(torch.tensor([[-1.0, -2.0, 0.0, 0.0], [4.0, 0.5, 0.0, 0.0]]))
        model.layer.bias.copy_(torch.tensor([0.5, 0.0]))
    attack = JSMA(saliency="single", others=others)  # type: ignore[arg-type]
    images, labels = torch.zeros(1, 1, 2, 2), torch.zeros(1, dtype=torch.int64)
    attacked = attack(model, images, labels, ThreatModel(norm="l0", eps=INF))
    assert attacked.images.flatten().tolist() == [1, 0, 0, 0]


def test_jsma_spends_its_whole_budget_in_pixels_on_the_way_to_the_runner_up() -> None:
    """Both channels of one pixel are one; class 1, the runner-up, takes them, and class 2 would take two others."""
    model = Linear(channels=2, side=2, classes=3)
    with torch.no_grad():
        model.layer.weight.zero_()
        model.layer.weight[1, [0, 4]] = 1.0  # channel by channel
        model.layer.weight[2, [1, 6]] = 4.0
        model.layer.weight[0, [0, 1, 4, 6]] = -0.1
        model.layer.bias.copy_(torch.tensor([1.5, 0.0, -6.0]))
    images, labels = torch.zeros(1, 2, 2, 2), torch.zeros(1, dtype=torch.int64)
    attacked = JSMA()(model, images, labels, ThreatModel(norm="l0", eps=1))
    assert attacked.prediction.tolist() == [1]
    assert attacked.distance.tolist() == [1]
    assert attacked.images.flatten().nonzero().flatten().tolist() == [0, 4]
