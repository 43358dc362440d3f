"""Square attack: queries counted, no gradients, patches, budget."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from src.attacks.gradients import cross_entropy, margin
from src.attacks.query import Query
from src.attacks.square import Square, _patch
from src.threat import Norm, ThreatModel
from tests.conftest import Linear


class Blind(nn.Module):
    """Scores without gradients; counts how often it is asked."""

    def __init__(self, channels: int = 3, side: int = 8, classes: int = 5) -> None:
        super().__init__()
        self.core = Linear(channels, side, classes)
        self.shown = 0

    @torch.no_grad()
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert not torch.is_grad_enabled()
        self.shown += len(x)
        return self.core(x).detach()


def batch(model: nn.Module, count: int = 16, channels: int = 3, side: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    images = torch.rand(count, channels, side, side, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return images, model(images).argmax(dim=1)


@pytest.mark.parametrize(("norm", "eps"), [(Norm.LINF, 0.002), (Norm.L2, 0.01), (Norm.L1, 0.03)])
@pytest.mark.parametrize("queries", [1, 2, 37])
def test_asks_no_more_than_it_may(norm: Norm, eps: float, queries: int) -> None:
    model = Blind()
    images, labels = batch(model)
    model.shown = 0
    attacked = Square(queries=queries)(model, images, labels, ThreatModel(norm=norm, eps=eps))
    assert not attacked.success.all()
    assert int(attacked.forward_passes.max()) <= queries + 2  # the verdicts before and after are not the attack's
    assert int(attacked.forward_passes.sum()) == model.shown
    assert int(attacked.backward_passes.sum()) == 0
    if norm is not Norm.LINF:
        assert int(attacked.forward_passes.max()) == queries + 2


@pytest.mark.parametrize(("norm", "eps"), [(Norm.LINF, 0.1), (Norm.L2, 2.0), (Norm.L1, 12.0)])
@pytest.mark.parametrize("targeted", [False, True])
def test_turns_images_by_scores_alone(norm: Norm, eps: float, targeted: bool) -> None:
    model = Blind()
    images, labels = batch(model)
    threat = ThreatModel(norm=norm, eps=eps, targeted=targeted)
    attacked = Square(queries=400)(model, images, labels, threat, target=(labels + 1) % 5 if targeted else None)
    assert attacked.success.float().mean() > 0.8
    assert float(attacked.forward_passes.float().mean()) < 400  # turned images leave


def test_linf_changes_are_of_eps_in_stripes_and_squares() -> None:
    model = Blind()
    images, labels = batch(model)
    eps = 0.01
    first = Square(queries=1)(model, images, labels, ThreatModel(norm="linf", eps=eps, exhaust=True)).images
    later = Square(queries=50)(model, images, labels, ThreatModel(norm="linf", eps=eps, exhaust=True)).images
    up, down = (images + eps).clamp(0, 1), (images - eps).clamp(0, 1)
    for made in (first, later):
        assert bool(((made == up) | (made == down)).all())
    inner = ((images > eps) & (images < 1 - eps)).all(dim=2, keepdim=True)
    signs = (first - images).sign() * inner
    assert torch.equal(signs, signs[:, :, :1].expand_as(signs))  # one sign a column
    assert not torch.equal(first, later)


def test_every_image_has_squares_of_its_own() -> None:
    model = Blind()
    images, labels = batch(model, 1)
    images, labels = images.repeat(4, 1, 1, 1), labels.repeat(4)
    attack = Square(queries=2, p_init=0.1)
    query_images = attack(model, images, labels, ThreatModel(norm="linf", eps=0.01, exhaust=True)).images
    assert len({tuple(image.flatten().tolist()) for image in query_images}) == 4


@pytest.mark.parametrize("norm", [Norm.LINF, Norm.L2, Norm.L1])
def test_more_queries_never_lose_an_image(norm: Norm) -> None:
    eps = {Norm.LINF: 0.01, Norm.L2: 0.15, Norm.L1: 1.5}[norm]
    model = Blind()
    images, labels = batch(model, 48)
    few, many = (
        Square(queries=k, rescale_schedule=False)(model, images, labels, ThreatModel(norm=norm, eps=eps))
        for k in (20, 200)
    )
    assert bool((many.success | ~few.success).all())
    assert int(many.success.sum()) > int(few.success.sum())


def test_restarts_never_lose_an_image() -> None:
    model = Blind()
    images, labels = batch(model, 24)
    one, many = (
        Square(queries=10, restarts=k)(model, images, labels, ThreatModel(norm="linf", eps=0.01)) for k in (1, 3)
    )
    assert bool((many.success | ~one.success).all())
    assert int(many.success.sum()) > int(one.success.sum())
    assert torch.equal(many.forward_passes[one.success], one.forward_passes[one.success])


def test_squares_lie_anywhere_and_have_a_sign_for_each_channel() -> None:
    x, draws = torch.full((200, 3, 5, 6), 0.5), torch.Generator().manual_seed(0)
    change = Square()._patched(x, x, 2, ThreatModel(norm="linf", eps=0.1), draws) - x
    changed = (change != 0).any(dim=1)
    assert changed.flatten(1).sum(dim=1).tolist() == [4] * 200
    assert bool(changed.any(dim=0).all())  # to the last row and column
    signs = change.sign().sum(dim=(2, 3)) / 4
    assert len({tuple(each) for each in signs.tolist()}) == 8


@pytest.mark.parametrize("norm", [Norm.L2, Norm.L1])
@pytest.mark.parametrize("share", [0.5, 1.0])
def test_a_move_spends_the_whole_budget_on_two_windows(norm: Norm, share: float) -> None:
    """What was spent there, and what was not spent at all; in l2 the rest stays as it is."""
    draws = torch.Generator().manual_seed(0)
    x, threat = torch.full((50, 3, 9, 9), 0.5), ThreatModel(norm=norm, eps=0.5)
    delta = torch.randn(x.shape, generator=draws)
    delta = share * 0.5 * delta / threat.distance(x, x + delta).view(-1, 1, 1, 1)
    moved = Square()._moved(x, x + delta, 3, threat, draws)
    torch.testing.assert_close(threat.distance(x, moved), torch.full((50,), 0.5))
    if norm is Norm.L2:
        changed = ((moved - x - delta).abs() > 1e-5).any(dim=1).flatten(1).sum(dim=1)
        assert int(changed.max()) <= 2 * 9


def test_patches_stand_or_lie() -> None:
    x, threat = torch.zeros(1, 1, 9, 9), ThreatModel(norm="l2", eps=1)
    upright = _patch(5, Norm.L2)
    drawn = Square._patches((40,), 5, x, threat, torch.Generator().manual_seed(0))
    stands, lies = ((drawn == each).flatten(1).all(dim=1) for each in (upright, upright.T))
    assert bool((stands ^ lies).all())
    assert 10 < int(stands.sum()) < 30


def test_it_raises_the_loss_it_is_told_and_lowers_the_targets() -> None:
    model = Blind()
    images, labels = batch(model)
    logits, query = model(images), Query(model, len(images), images.device, torch.float32)
    plain, wanted = (ThreatModel(norm="linf", eps=0.1, targeted=targeted) for targeted in (False, True))
    for attack, threat, loss in (
        (Square(loss="ce"), plain, cross_entropy(logits, labels)),
        (Square(loss="margin"), plain, margin(logits, labels)),
        (Square(loss="margin"), wanted, -cross_entropy(logits, labels)),
    ):
        torch.testing.assert_close(attack._asked(query, images, labels, threat)[0], loss)


def test_proposals_that_change_nothing_are_not_shown() -> None:
    """On black images half of the proposals of a single grey channel change nothing."""
    model = Blind(channels=1)
    images = torch.zeros(16, 1, 8, 8)
    labels = model(images).argmax(dim=1)
    attacked = Square(queries=200)(model, images, labels, ThreatModel(norm="linf", eps=1e-5))
    assert not attacked.success.any()
    assert 50 < float(attacked.forward_passes.float().mean()) < 160


def test_l2_fills_the_budget_where_the_box_leaves_room() -> None:
    model = Blind()
    images, labels = batch(model)
    images = images * 0.2 + 0.4
    labels = model(images).argmax(dim=1)
    attacked = Square(queries=30)(model, images, labels, ThreatModel(norm="l2", eps=0.02))
    assert float(attacked.distance.min()) == pytest.approx(0.02, rel=1e-4)


def test_large_flat_images_stay_in_the_ball() -> None:
    """The judge refuses what leaves it: rounding all one way, over so many pixels, would."""
    images = torch.linspace(0.26, 0.49, 8).view(-1, 1, 1, 1).repeat(1, 3, 224, 224)
    model = nn.Sequential(nn.AvgPool2d(224), nn.Flatten())
    attacked = Square(queries=40)(model, images, model(images).argmax(dim=1), ThreatModel(norm="l2", eps=1.0))
    assert bool((attacked.distance <= 1 + 1e-6).all())


@pytest.mark.parametrize(("rescale", "queries"), [(False, 5000), (True, 10_000)])
def test_squares_shrink_as_the_paper_says(rescale: bool, queries: int) -> None:
    attack = Square(queries=queries, rescale_schedule=rescale)
    x, threat = torch.zeros(1, 1, 28, 28), ThreatModel(norm="linf", eps=0.1)
    sides = [attack._side(query, x, threat) for query in (0, 10, 11, 51, 201, 501, 1001, 2001, 4001)]
    assert sides == [25, 25, 18, 13, 9, 6, 4, 3, 2]
    fast = Square(queries=1000, rescale_schedule=True)
    assert fast._side(2, x, threat) == 18  # the paper's 20th of 10,000
    assert attack._side(4001, x, ThreatModel(norm="l2", eps=1)) == 3


@pytest.mark.parametrize("side", [1, 2, 3, 5, 8])
@pytest.mark.parametrize(("norm", "order"), [(Norm.L2, 2), (Norm.L1, 1)])
def test_patches_have_size_one_and_a_hill_above_a_hollow(side: int, norm: Norm, order: int) -> None:
    patch = _patch(side, norm)
    assert patch.shape == (side, side)
    assert float(torch.linalg.vector_norm(patch, ord=order)) == pytest.approx(1.0)
    assert bool((patch[: side // 2] > 0).all())
    assert bool((patch[side // 2 :] < 0).all())


@pytest.mark.parametrize(("norm", "eps"), [(Norm.LINF, 0.05), (Norm.L2, 0.5), (Norm.L1, 3.0)])
@pytest.mark.parametrize(("height", "width"), [(3, 3), (4, 9), (12, 5), (1, 1)])
def test_images_of_any_shape(norm: Norm, eps: float, height: int, width: int) -> None:
    images = torch.rand(6, 2, height, width, generator=torch.Generator().manual_seed(0))
    weight = torch.randn(2 * height * width, 3, generator=torch.Generator().manual_seed(1))

    def model(x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1) @ weight

    attacked = Square(queries=25)(model, images, model(images).argmax(dim=1), ThreatModel(norm=norm, eps=eps))
    assert attacked.images.shape == images.shape


def test_to_the_last_query_a_hit_gives_way_to_a_hit_of_larger_loss_alone() -> None:
    hit, surer = [1.0, 1.1, -10.0], [1.0, 1.5, -10.0]
    vague = [0.0, -0.01, -0.01]  # of a larger cross-entropy than both, and yet right
    script, seen = [[9.0, 0.0, 0.0], vague, hit, vague, surer, hit], []

    def model(images: torch.Tensor) -> torch.Tensor:
        seen.append(images.clone())
        return torch.tensor([script[len(seen) - 1] if len(seen) <= len(script) else surer])

    images, labels = torch.full((1, 3, 16, 16), 0.5), torch.zeros(1, dtype=torch.int64)
    threat = ThreatModel(norm="linf", eps=0.1, exhaust=True)
    attacked = Square(queries=5, loss="ce")(model, images, labels, threat)
    assert len(seen) == len(script) + 1
    assert torch.equal(attacked.images, seen[4])
