"""Auto-PGD: exact optima, schedule, losses, and that it is never weaker than PGD."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from src.attacks.apgd import APGD
from src.attacks.base import Attack, Attacked
from src.attacks.gradients import cross_entropy, dlr, dlr_pair, gradient, margin
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


@pytest.mark.parametrize("loss", ["dlr", "dlr_targeted"])
def test_of_images_meant_for_others_the_one_that_leads_most_is_kept(loss: str) -> None:
    """The ratio divides by the spread of the logits: its largest value is not where the wrong class leads most."""

    class Notes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = curved()
            self.seen: list[float] = []

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            logits = self.network(x)
            self.seen.append(float(margin(logits.detach(), labels).max()))
            return logits

    model = Notes()
    images, answers = batch(model.network, 12)
    for image, labels in zip(images.split(1), answers.split(1), strict=True):
        model.seen.clear()
        attacked = APGD(steps=20, loss=loss, target_classes=2)(
            model, image, labels, ThreatModel(norm="linf", eps=0.1, exhaust=True)
        )
        assert attacked.success.all()
        assert model.seen[-1] == pytest.approx(max(model.seen), rel=1e-4)


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


def test_looks_at_the_step_size_where_the_paper_does() -> None:
    threat, attack = ThreatModel(norm="linf", eps=0.1), APGD()
    looks, window = [], attack._window(threat, 100, None)
    while sum(looks) + window <= 100:
        looks.append(window)
        window = attack._window(threat, 100, window)
    assert torch.tensor(looks).cumsum(0).tolist() == [22, 41, 57, 70, 80, 87, 93, 99]


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
