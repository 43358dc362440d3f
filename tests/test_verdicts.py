"""From a search to its verdict: coarse searches, images that fall back, other layouts, batches that become empty."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from src.attacks.base import Attack
from src.attacks.deepfool import DeepFool
from src.attacks.fab import FAB
from src.attacks.fgsm import FGSM
from src.attacks.hop_skip_jump import HopSkipJump
from src.attacks.noise import Noise
from src.attacks.peers import Peer
from src.attacks.pgd import PGD
from src.attacks.query import Query
from src.attacks.square import Square
from src.attacks.worst_case import WorstCase
from src.errors import UserError
from src.threat import Norm, ThreatModel
from tests.conftest import Linear


class Viewed(nn.Module):
    """A network as in many tutorials: it flattens with ``.view``, for which the layout in memory has to be plain."""

    def __init__(self, *, view: bool = True, scale: float = 1.0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.convolution, self.linear = nn.Conv2d(3, 8, 3), nn.Linear(8 * 36, 5)
        self.plain, self.scale = view, scale

    def forward(self, x: Tensor) -> Tensor:
        seen = torch.relu(self.convolution(x))
        return self.scale * self.linear(seen.view(x.size(0), -1) if self.plain else seen.flatten(1))


def of(model: nn.Module, count: int = 32) -> tuple[Tensor, Tensor]:
    images = torch.randint(0, 256, (count, 3, 8, 8), generator=torch.Generator().manual_seed(1)) / 255
    with torch.no_grad():
        return images, model(images).argmax(dim=1)


@pytest.mark.parametrize("attack", [PGD(steps=5), DeepFool(), Square(queries=20), HopSkipJump(iterations=1)])
def test_a_model_that_flattens_with_view_is_attacked_as_any_other(attack: Attack) -> None:
    images, labels = of(Viewed())
    threat = ThreatModel(norm="linf", eps=0.1)
    viewed, flat = (attack(Viewed(view=view), images, labels, threat) for view in (True, False))
    assert viewed.success.any()
    torch.testing.assert_close(viewed.images, flat.images, rtol=0, atol=1e-3)


def test_another_error_of_the_model_is_not_swallowed() -> None:
    class Broken(Viewed):
        def forward(self, x: Tensor) -> Tensor:
            if x.requires_grad:
                raise RuntimeError("out of order")
            return super().forward(x)

    images, labels = of(Viewed(), 2)
    with pytest.raises(RuntimeError, match="out of order"):
        FGSM()(Broken(), images, labels, ThreatModel(norm="linf", eps=0.1))


@pytest.mark.parametrize("search", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("attack", [FGSM(), DeepFool(), HopSkipJump(iterations=1, starts=5)])
def test_no_empty_batch_reaches_the_model(attack: Attack, search: torch.dtype) -> None:
    model = Viewed()  # which cannot be asked of none: .view(0, -1) is ambiguous
    images, labels = of(model, 4)
    attacked = attack(model, images, labels, ThreatModel(norm="linf", eps=1.0), search=search)
    assert attacked.success.all()


def test_the_search_is_in_its_precision_and_the_verdicts_in_float32() -> None:
    asked = []

    class Seen(Viewed):
        def forward(self, x: Tensor) -> Tensor:
            logits = super().forward(x)
            asked.append(logits.dtype)
            return logits

    images, labels = of(Viewed(view=False), 2)
    FGSM()(Seen(view=False), images, labels, ThreatModel(norm="linf", eps=1.0), search=torch.bfloat16)
    assert asked == [torch.float32, torch.bfloat16, torch.float32]


def test_a_random_model_draws_what_the_generator_says() -> None:
    class Random(Viewed):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x + (x - x.detach()) * torch.randn_like(x))  # its slope alone is random

    images, labels = of(Viewed(), 4)
    threat = ThreatModel(norm="l2", eps=0.1)
    one, again, other = (
        FGSM()(Random(), images, labels, threat, generator=torch.Generator().manual_seed(seed)).images
        for seed in (1, 1, 2)
    )
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_a_worst_case_in_bfloat16_is_no_weaker_than_its_member() -> None:
    model = Viewed(scale=30.0)
    images, labels = of(model, 256)
    threat = ThreatModel(norm="linf", eps=0.004)
    pgd = PGD(steps=10, random_start=False)
    together = WorstCase(members={"noise": Noise(), "pgd": pgd}, all_images=False)
    alone, exact, both = (
        attack(model, images, labels, threat, search=search).success
        for attack, search in ((pgd, torch.bfloat16), (pgd, torch.float32), (together, torch.bfloat16))
    )
    assert 0.2 < float(exact.float().mean()) < 0.8
    assert int((alone & ~both).sum()) == 0
    assert int(both.sum()) >= int(exact.sum())


class Moves(Attack):
    """Adds a fixed amount to the first value."""

    norms = frozenset({Norm.LINF})

    def __init__(self, by: float) -> None:
        self.by = by

    def run(self, model: Query, x: Tensor, y: Tensor, threat: ThreatModel, *, generator: torch.Generator) -> Tensor:
        moved = x.clone()
        moved[:, 0, 0, 0] += self.by
        model(moved)
        return moved


class Slope(nn.Module):
    """Class 1 where the first value is over a half, by ten times as much in logits."""

    def forward(self, x: Tensor) -> Tensor:
        lead = 10 * (x[:, 0, 0, 0] - 0.5)
        return torch.stack([-lead, lead], dim=1) / 2


@pytest.mark.parametrize("exhaust", [False, True])
def test_images_for_others_are_the_surest_and_others_the_nearest(exhaust: bool) -> None:
    images, labels = torch.full((2, 1, 2, 2), 0.45), torch.zeros(2, dtype=torch.int64)
    threat = ThreatModel(norm="linf", eps=0.5, exhaust=exhaust)
    by = (0.1, 0.2, 0.4, 0.3)
    attack = WorstCase(members={str(each): Moves(each) for each in by}, all_images=False)
    attacked = attack(Slope(), images, labels, threat)
    assert attacked.success.all()
    # For this very model the first success ends it. For others an image goes on until its lead of 10 x is over 3.
    assert attacked.distance.tolist() == pytest.approx([0.4 if exhaust else 0.1] * 2)
    asked = 3 if exhaust else 1
    assert attacked.forward_passes.tolist() == [2 + 2 * asked] * 2
    every = WorstCase(members={str(each): Moves(each) for each in reversed(by)}, all_images=True)
    found = every(Slope(), images, labels, threat)
    assert found.distance.tolist() == pytest.approx([0.4 if exhaust else 0.1] * 2)


@pytest.mark.parametrize(("rejects", "differentiable"), [(True, True), (False, True), (True, False), (False, False)])
def test_members_meet_the_models_that_they_are_made_for(rejects: bool, differentiable: bool) -> None:
    class Against(Moves):
        against_rejection = True

    class Blind(Moves):
        needs = "labels"

    class Model(Slope):
        def forward(self, x: Tensor) -> Tensor:
            logits = super().forward(x)
            return torch.cat([logits, torch.full((len(x), 1), -10.0)], dim=1) if rejects else logits

    model = Model()
    model.rejects, model.differentiable = rejects, differentiable  # type: ignore[assignment]
    images, labels = torch.full((1, 1, 2, 2), 0.45), torch.zeros(1, dtype=torch.int64)
    attack = WorstCase(members={"against": Against(0.1), "gradient": Moves(0.2), "blind": Blind(0.3)})
    attacked = attack(model, images, labels, ThreatModel(norm="linf", eps=0.5))
    nearest = 0.3 if not differentiable else 0.1 if rejects else 0.2
    assert attacked.distance.tolist() == pytest.approx([nearest])


def test_what_this_model_gets_wrong_is_attacked_where_images_are_for_others() -> None:
    """Another model, or another draw of a random one, may get it right: left alone it would count as held."""

    class Smallest(Moves):
        minimal = True

    images, labels = torch.tensor([0.45, 0.55]).view(2, 1, 1, 1).expand(2, 1, 2, 2), torch.zeros(2, dtype=torch.int64)
    for attack, exhaust, expected in ((Moves, True, 0.1), (Moves, False, 0), (Smallest, True, 0)):
        attacked = attack(0.1)(Slope(), images, labels, ThreatModel(norm="linf", eps=0.5, exhaust=exhaust))
        assert attacked.attempted.tolist() == [True, expected > 0]
        assert attacked.distance.tolist() == pytest.approx([0.1, expected])


def test_an_image_that_nobody_turns_is_as_the_first_member_left_it() -> None:
    images, labels = torch.full((2, 1, 2, 2), 0.4), torch.zeros(2, dtype=torch.int64)
    attack = WorstCase(members={str(by): Moves(by) for by in (0.02, 0.05, 0.01)})
    attacked = attack(Slope(), images, labels, ThreatModel(norm="linf", eps=0.05))
    assert not attacked.success.any()
    assert attacked.distance.tolist() == pytest.approx([0.02] * 2)


def test_without_a_limit_the_nearest_is_kept_though_images_are_for_others() -> None:
    """One search for every eps: the surest one would lie beyond most of them."""
    images, labels = torch.full((2, 1, 2, 2), 0.45), torch.zeros(2, dtype=torch.int64)
    attack = WorstCase(members={str(by): Moves(by) for by in (0.2, 0.1, 0.4)})
    attacked = attack(Slope(), images, labels, ThreatModel(norm="linf", eps=math.inf, exhaust=True))
    assert attacked.distance.tolist() == pytest.approx([0.1] * 2)


def test_the_clean_answer_is_asked_for_once() -> None:
    model = Linear(channels=1, side=4, classes=2)
    images = torch.full((4, 1, 4, 4), 0.5)
    labels = model(images).argmax(dim=1)
    attacked = DeepFool()(model, images, labels, ThreatModel(norm="l2", eps=math.inf))
    assert attacked.success.all()
    assert attacked.forward_passes.tolist() == [4] * 4  # clean, linearised, looked at, judged
    assert attacked.backward_passes.tolist() == [1] * 4


@pytest.mark.parametrize("classes", [None, 2])
def test_stop_at_eps_without_a_limit_is_a_search_as_any_other(classes: int | None) -> None:
    """One search for every eps: the first image found, at whatever distance, must not end it."""
    model = Viewed()
    images, labels = of(model, 8)
    threat = ThreatModel(norm="linf", eps=math.inf)
    plain, stopping = (
        FAB(steps=5, target_classes=classes, stop_at_eps=stop)(model, images, labels, threat) for stop in (False, True)
    )
    assert plain.success.any()
    assert torch.equal(stopping.images, plain.images)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_what_rounding_takes_back_is_pushed_on(norm: str) -> None:
    model = Viewed()
    images, labels = of(model, 64)
    eps = {"linf": 8 / 255, "l2": 0.3}[norm]
    whole, saved = (
        DeepFool()(model, images, labels, ThreatModel(norm=norm, eps=eps, quantize=quantize))
        for quantize in (False, True)
    )
    assert int(whole.success.sum()) > 32
    assert int(saved.success.sum()) >= 0.8 * int(whole.success.sum())
    assert torch.equal((saved.images * 255).round() / 255, saved.images)


@pytest.mark.parametrize("attack", [DeepFool(), FAB(steps=10)])
def test_a_change_that_rounding_takes_back_whole_is_made_large_enough(attack: Attack) -> None:
    model = Linear(channels=3, side=16, classes=2)
    images = torch.randint(0, 256, (400, 3, 16, 16), generator=torch.Generator().manual_seed(1)) / 255
    with torch.no_grad():
        labels = model(images).argmax(dim=1)
    near = attack(model, images, labels, ThreatModel(norm="linf", eps=0.4 / 255)).success
    assert int(near.sum()) > 10
    threat = ThreatModel(norm="linf", eps=2 / 255, quantize=True)
    attacked = attack(model, images[near], labels[near], threat)
    assert attacked.success.all()
    assert torch.equal((attacked.images * 255).round() / 255, attacked.images)


def test_restarts_draw_on_the_cpu_for_any_device() -> None:
    x, found = torch.empty(2, 3, 4, 4, device="meta"), torch.ones(2, device="meta")
    for norm in (Norm.LINF, Norm.L2, Norm.L1):
        start = FAB._random_start(x, found, ThreatModel(norm=norm, eps=0.1), torch.Generator())
        assert start.shape == x.shape


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_rounding_into_the_budget_gives_up_as_little_as_it_can(norm: str) -> None:
    images, _ = of(Viewed(), 16)
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(2))
    threat = ThreatModel(norm=norm, eps={"l1": 3.0, "l2": 0.3}[norm])
    saved = threat.to_8_bit(images, threat.project(images, images + noise))
    assert float(threat.judge(images, saved).min()) > 0.97 * threat.eps


def test_noise_changes_whole_pixels_only() -> None:
    images, labels = of(Viewed(), 4)
    attacked = Noise()(Viewed(), images, labels, ThreatModel(norm="l0", eps=2.5))
    assert attacked.distance.tolist() == [2] * 4
    assert ((attacked.images != images).any(dim=1).flatten(1).sum(dim=1) == 2).all()


def test_a_library_is_not_let_loose_on_a_model_that_rejects() -> None:
    class Library(Peer):
        norms = frozenset({Norm.LINF})
        library = "nowhere"

        def __init__(self) -> None:
            pass

        def attack(self, *_: object) -> tuple[Tensor, bool]:
            raise AssertionError("must not be asked")

    class Rejecting(Viewed):
        rejects = True

    images, labels = of(Viewed(), 4)
    with pytest.raises(UserError, match="attack=nowhere: a library takes an image that the defense rejects"):
        Library()(Rejecting(), images, labels, ThreatModel(norm="linf", eps=0.1))


class Rooted(Viewed):
    """Its gradient at black pixels is NaN: a root's slope is infinite there, times that of a square, nothing."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward((x * x).sqrt())


@pytest.mark.parametrize(
    "attack", [PGD(steps=5, random_start=False), PGD(steps=5, momentum=1.0, random_start=False), DeepFool()]
)
def test_a_gradient_that_is_nan_at_some_pixels_is_followed_at_the_others(attack: Attack) -> None:
    images, labels = of(Viewed(), 16)
    images[:, :, 0] = 0
    labels = Viewed()(images).argmax(dim=1)
    attacked = attack(Rooted(), images, labels, ThreatModel(norm="l2", eps=1.0))
    assert int(attacked.success.sum()) == 16
    assert torch.equal(attacked.images[:, :, 0], images[:, :, 0])
