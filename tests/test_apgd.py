"""Auto-PGD: exact optima, schedule, losses, and that it is never weaker than PGD."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from src.attacks.apgd import APGD
from src.attacks.base import Attack, Attacked
from src.attacks.gradients import cross_entropy, dlr, dlr_pair, gradient
from src.attacks.pgd import PGD
from src.attacks.query import Query
from src.threat import Norm, ThreatModel
from tests.conftest import Linear

NORMS = [(Norm.LINF, 0.05), (Norm.L2, 0.5), (Norm.L1, 6.0)]


def curved(classes: int = 4) -> nn.Module:
    """A small network with bends, in eval mode."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.SiLU(), nn.Conv2d(8, 8, 3, stride=2), nn.SiLU(), nn.Flatten(), nn.Linear(32, classes)
        )
        for layer in network:
            if isinstance(layer, nn.Conv2d | nn.Linear):
                layer.weight.data *= 3
    return network.eval()


def batch(model: nn.Module, count: int = 24) -> tuple[torch.Tensor, torch.Tensor]:
    images = torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return images, model(images).argmax(dim=1)


def loss_of(model: nn.Module, attacked: Attacked, labels: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return cross_entropy(model(attacked.images), labels)


@pytest.mark.parametrize("attack", [APGD(), APGD(loss="dlr"), APGD(loss="dlr_targeted"), APGD(enlarge=True)])
@pytest.mark.parametrize(("norm", "eps"), [(Norm.LINF, 0.02), (Norm.L2, 0.1), (Norm.L1, 0.3), (Norm.L1, 1.2)])
def test_linear_loss_is_driven_to_its_exact_optimum(attack: Attack, norm: Norm, eps: float) -> None:
    """On two classes all losses are the margin or grow with it: its best change in ball and box is known."""
    model = Linear(side=4)
    weight = (model.layer.weight[0] - model.layer.weight[1]).detach().abs().sort(descending=True).values
    images = torch.full((1, 1, 4, 4), 0.5)
    if norm is Norm.LINF:
        best = eps * weight.sum()
    elif norm is Norm.L2:
        best = eps * weight.norm()
    else:  # the heaviest pixels go to the end of the box, one after another
        best = (weight * (eps - 0.5 * torch.arange(16)).clamp(0, 0.5)).sum()
    with torch.no_grad():
        labels = model(images).argmax(dim=1)
    # exhaust: it would otherwise stop as soon as the label turns
    attacked = attack(model, images, labels, ThreatModel(norm=norm, eps=eps, exhaust=True))
    with torch.no_grad():
        before, after = ((z := model(x)[0])[labels[0]] - z[1 - labels[0]] for x in (images, attacked.images))
    assert float(before - after) == pytest.approx(float(best), rel=1e-3)


@pytest.mark.parametrize("eps", [0.3])
def test_pgd_finds_the_optimum_of_the_l1_ball(eps: float) -> None:
    model = Linear(side=4)
    weight = (model.layer.weight[0] - model.layer.weight[1]).detach().abs()
    images = torch.full((1, 1, 4, 4), 0.5)
    with torch.no_grad():
        labels = model(images).argmax(dim=1)
    attacked = PGD(relative_step=20)(model, images, labels, ThreatModel(norm=Norm.L1, eps=eps, exhaust=True))
    with torch.no_grad():
        before, after = ((z := model(x)[0])[labels[0]] - z[1 - labels[0]] for x in (images, attacked.images))
    assert float(before - after) == pytest.approx(eps * float(weight.max()), rel=1e-3)


@pytest.mark.parametrize(("norm", "eps"), NORMS)
def test_loss_is_not_below_that_of_pgd_with_as_many_steps(norm: Norm, eps: float) -> None:
    model = curved()
    images, labels = batch(model)
    threat = ThreatModel(norm=norm, eps=eps, exhaust=True)
    ours = loss_of(model, APGD(steps=60, restarts=3)(model, images, labels, threat), labels)
    pgd = loss_of(model, PGD(steps=60, restarts=3)(model, images, labels, threat), labels)
    assert float(ours.mean()) >= float(pgd.mean())
    assert bool((ours >= pgd * 0.95).all())


@pytest.mark.parametrize("loss", ["ce", "dlr", "dlr_targeted"])
@pytest.mark.parametrize(("norm", "eps"), NORMS)
def test_restarts_never_lose_an_image(norm: Norm, eps: float, loss: str) -> None:
    model = curved()
    images, labels = batch(model)
    threat = ThreatModel(norm=norm, eps=eps / 2)
    one, many = (APGD(steps=8, restarts=k, loss=loss)(model, images, labels, threat) for k in (1, 4))
    if loss != "dlr_targeted":  # there the second class draws other numbers after more restarts
        assert bool((many.success | ~one.success).all())
    assert int(many.success.sum()) >= int(one.success.sum())


def test_looks_at_the_step_size_where_the_paper_does() -> None:
    threat, attack = ThreatModel(norm="linf", eps=0.1), APGD()
    looks, window = [], attack._window(threat, 100, None)
    while sum(looks) + window <= 100:
        looks.append(window)
        window = attack._window(threat, 100, window)
    assert torch.tensor(looks).cumsum(0).tolist() == [22, 41, 57, 70, 80, 87, 93, 99]


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


def test_turned_images_leave_the_batch() -> None:
    model = curved()
    images, labels = batch(model)
    threat = ThreatModel(norm=Norm.LINF, eps=0.5)
    short = APGD()(model, images, labels, threat)
    full = APGD()(model, images, labels, ThreatModel(norm=Norm.LINF, eps=0.5, exhaust=True))
    assert short.success.all()
    assert full.success.all()
    assert full.backward_passes.tolist() == [100] * len(images)
    assert int(short.backward_passes.max()) < 20
    assert float(loss_of(model, full, labels).mean()) >= float(loss_of(model, short, labels).mean())


@pytest.mark.parametrize("loss", ["ce", "dlr", "dlr_targeted"])
@pytest.mark.parametrize("classes", [2, 3, 4])
@pytest.mark.parametrize("targeted", [False, True])
def test_any_number_of_classes(loss: str, classes: int, targeted: bool) -> None:
    model = curved(classes)
    images, labels = batch(model)
    target = (labels + 1) % classes if targeted else None
    threat = ThreatModel(norm=Norm.LINF, eps=0.3, targeted=targeted)
    attacked = APGD(steps=30, loss=loss)(model, images, labels, threat, target=target)
    assert attacked.success.float().mean() > 0.9
    if target is not None:
        assert torch.equal(attacked.prediction[attacked.success], target[attacked.success])


def test_targeted_ratio_is_the_papers() -> None:
    logits = torch.tensor([[4.0, 1.0, 3.0, -2.0, 0.0]])
    value = dlr_pair(logits, torch.tensor([0]), other=torch.tensor([2]))
    assert float(value) == pytest.approx((3 - 4) / (4 - (1 + 0) / 2))


def test_targeted_ratio_tries_the_likeliest_classes_first() -> None:
    model = Linear(classes=6, seed=3)
    images = torch.rand(5, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        order = model(images).argsort(dim=1, descending=True)
    query = Query(model, 5, images.device, torch.float32)
    threat = ThreatModel(norm="linf", eps=0.1)
    others = APGD(loss="dlr_targeted", target_classes=3)._others(query, images, order[:, 0], threat)
    assert torch.equal(torch.stack([o for o in others if o is not None]), order[:, 1:4].T)
    assert len(APGD(loss="dlr_targeted")._others(query, images, order[:, 0], threat)) == 5  # never more than there are


class Shaky(nn.Module):
    """Answers at random around a linear model."""

    def __init__(self) -> None:
        super().__init__()
        self.core = Linear(side=4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.core(x + 0.1 * torch.randn_like(x))


def test_gradients_of_a_random_model_are_averaged() -> None:
    model = Shaky()
    images = torch.full((1, 1, 4, 4), 0.5)
    with torch.no_grad():
        labels = model.core(images).argmax(dim=1)
    threat = ThreatModel(norm="linf", eps=1e-3, exhaust=True)
    attacked = APGD(steps=10, eot_iter=7)(model, images, labels, threat)
    assert attacked.backward_passes.tolist() == [70]
    assert attacked.forward_passes.tolist() == [77 + 2]


def test_the_plain_ratio_is_flat_where_the_target_is_third() -> None:
    """There it is the largest logit minus the third over the same: 1, without a slope. The targeted one has a slope."""
    model = Linear(classes=5, seed=3)
    images = torch.rand(16, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    query = Query(model, 16, images.device, torch.float32)
    threat = ThreatModel(norm="linf", eps=0.5, targeted=True)
    with torch.no_grad():
        order = model(images).argsort(dim=1, descending=True)
    third = order[:, 2]
    _, flat = gradient(query, images, third, threat, dlr)
    assert float(flat.abs().max()) < 1e-5
    _, steep = gradient(query, images, third, threat, partial(dlr_pair, other=order[:, 0]))
    assert float(steep.abs().amax(dim=(1, 2, 3)).min()) > 1e-2
    for attack in (APGD(steps=20, loss="dlr"), PGD(steps=20, loss="dlr", random_start=False)):
        attacked = attack(model, images, order[:, 0], threat, target=third)
        assert attacked.success.float().mean() > 0.7
