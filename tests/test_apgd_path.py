"""Auto-PGD point by point: along the published algorithm, through enlarged balls, and which point is kept."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from src.attacks.apgd import APGD
from src.threat import ThreatModel


class Hills(nn.Module):
    """Two classes; the lead of the second is hilly along the only value of an image. Keeps what it was asked."""

    def __init__(self, height: float) -> None:
        super().__init__()
        self.height, self.visited = height, list[torch.Tensor]()

    def lead(self, value: torch.Tensor) -> torch.Tensor:
        return (25 * value).sin() + 0.7 * (90 * value).sin() + 2 * value + self.height

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.visited.append(x.detach().flatten())
        value = x.flatten(1)[:, 0]
        return torch.stack([torch.zeros_like(value), self.lead(value)], dim=1)


@pytest.mark.parametrize("rho", [0.75, 0.5])
def test_every_point_is_that_of_the_published_algorithm(rho: float) -> None:
    """Images of one value in a hilly landscape: algorithm 1 of the paper, with what its code says of the looks."""
    model, clean, eps = Hills(-4.0), torch.linspace(0.3, 0.7, 40), 0.3  # so low that no image is turned
    labels, threat = torch.zeros(40, dtype=torch.int64), ThreatModel(norm="linf", eps=eps)
    attacked = APGD(rho=rho)(model, clean.view(-1, 1, 1, 1), labels, threat)
    path = torch.stack(model.visited[1:-1], dim=1)  # the others are verdicts

    def slope(x: torch.Tensor) -> torch.Tensor:
        x = x.clone().requires_grad_()
        (found,) = torch.autograd.grad(model.lead(x).sum(), x)
        return found

    now = before = peak = path[:, 0]
    low, high, step, halved = clean - eps, clean + eps, torch.full((40,), 2 * eps), clean > 0
    points, losses, then, seen = [now], [model.lead(now)], model.lead(now), 0
    for index in range(1, 101):
        there = (now + step * slope(now).sign()).clamp(low, high)
        moved = there if index == 1 else (now + 0.75 * (there - now) + 0.25 * (now - before)).clamp(low, high)
        before, now = now, moved
        points.append(now)
        losses.append(model.lead(now))
        peak = torch.where(losses[-1] > model.lead(peak), now, peak)
        if index in (22, 41, 57, 70, 80, 87, 93, 99):
            rises = sum(losses[i] > losses[i - 1] for i in range(seen + 1, index + 1))
            halved = (rises <= rho * (index - seen)) | (~halved & (model.lead(peak) <= then))
            step, now = torch.where(halved, step / 2, step), torch.where(halved, peak, now)
            then, seen = model.lead(peak), index
    torch.testing.assert_close(path, torch.stack(points, dim=1), rtol=0, atol=1e-4)
    torch.testing.assert_close(attacked.images.flatten(), peak, rtol=0, atol=1e-4)


class Waves(nn.Module):
    """Two classes; the lead of the second, never over 0, has waves along each value. Keeps what it was asked."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(4)
        self.height, self.length = torch.rand(2, 36, generator=generator) + 0.2
        self.length, self.visited = 8 * self.length, list[torch.Tensor]()

    def lead(self, x: torch.Tensor) -> torch.Tensor:
        return (self.height * (self.length * x.flatten(1)).sin()).sum(dim=1) - 60

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.visited.append(x.detach().clone(memory_format=torch.contiguous_format))
        lead = self.lead(x)
        return torch.stack([torch.ones_like(lead), 1 + lead], dim=1)


def test_every_point_in_l1_is_that_of_the_published_algorithm() -> None:
    """Steps along the largest values, more and fewer of them as the best point is dense or sparse; long ones again
    where it became sparser."""
    model, eps, size = Waves(), 3.0, 36
    clean = torch.rand(6, 1, 6, 6, generator=torch.Generator().manual_seed(1))
    labels, threat = torch.zeros(6, dtype=torch.int64), ThreatModel(norm="l1", eps=eps)
    APGD(steps=50, loss="dlr")(model, clean, labels, threat)  # of two classes: the margin, which never underflows
    path = model.visited[1:-1]  # the others are verdicts

    def slope(x: torch.Tensor) -> torch.Tensor:
        x = x.clone().requires_grad_()
        (found,) = torch.autograd.grad(model.lead(x).sum(), x)
        return found.flatten(1)

    now = peak = path[0]
    step, share, before, backs = torch.full((6,), eps), torch.full((6,), 0.2), torch.full((6,), float(size)), 0
    for index, point in enumerate(path):
        torch.testing.assert_close(point, now, rtol=0, atol=1e-4)
        now = point  # to the last bit: whether a value is the clean one counts
        peak = torch.where((model.lead(now) > model.lead(peak)).view(-1, 1, 1, 1), now, peak)
        if index and index % 2 == 0:  # 4 % of the steps
            changed = (peak != clean).flatten(1).sum(dim=1).float()
            back = changed / before < 0.95
            step = torch.where(back, eps, (step / 1.5).clamp_min(eps / 10))
            now = torch.where(back.view(-1, 1, 1, 1), peak, now)
            share, before, backs = changed / size / 1.5, changed, backs + int(back.sum())
        move = torch.zeros(6, size)
        for row, along in enumerate(slope(now)):
            chosen = along.abs().topk(max(1, int((share[row] * size).round()))).indices
            move[row, chosen] = step[row] * along[chosen].sign() / len(chosen)
        now = threat.project(clean, now + move.view_as(now))
    assert len(path) == 51
    assert 0 < backs < 6 * 24


def test_an_enlarged_search_goes_through_larger_balls() -> None:
    model, eps = Waves(), 1.0
    clean = torch.rand(6, 1, 6, 6, generator=torch.Generator().manual_seed(1))
    threat = ThreatModel(norm="l1", eps=eps)
    APGD(steps=20, loss="dlr", enlarge=True)(model, clean, torch.zeros(6, dtype=torch.int64), threat)
    reached = [float(threat.distance(clean, x).max()) for x in model.visited[1:-1]]
    # 30 % of the steps in each of the larger balls, the rest in the ball itself; each search looks at its end as well.
    for part, radius in ((reached[:7], 3), (reached[7:14], 2), (reached[14:], 1)):
        assert max(part) == pytest.approx(radius * eps, rel=1e-4)
    assert len(reached) == 7 + 7 + 9


@pytest.mark.parametrize(("height", "restarts"), [(-4.0, 3), (-2.0, 1)])
def test_the_point_of_the_largest_loss_is_kept(height: float, restarts: int) -> None:
    """Of all starts where none is turned; of the turned ones where images are meant for another model."""
    model, clean = Hills(height), torch.linspace(0.2, 0.8, 40)
    labels = torch.zeros(40, dtype=torch.int64)
    threat = ThreatModel(norm="linf", eps=0.1, exhaust=True)
    attacked = APGD(steps=20, restarts=restarts)(model, clean.view(-1, 1, 1, 1), labels, threat)
    right = attacked.attempted
    assert attacked.success.any() == (height == -2.0)
    best = torch.stack(model.visited[1:-1], dim=1)
    best = best.gather(1, model.lead(best).argmax(dim=1, keepdim=True)).flatten()
    torch.testing.assert_close(attacked.images.flatten()[right], best)
