"""Several starts of an image side by side: as many as the batch has room for, each pass counted, all ended by one."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import nn

from src.attacks.apgd import APGD
from src.attacks.base import Attack
from src.attacks.pgd import PGD
from src.attacks.query import Query
from src.threat import Norm, ThreatModel
from tests.test_apgd_path import Hills


class Bowls(nn.Module):
    """Class 0 leads by ``walls[k - 1]`` over class k where the single pixel is black; class k gains with the pixel."""

    def __init__(self, *walls: float) -> None:
        super().__init__()
        self.walls = torch.tensor(walls)
        self.sizes: list[int] = []
        self.backward_sizes: list[int] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.sizes.append(len(x))
        if x.requires_grad:
            x.register_hook(lambda slope: self.backward_sizes.append(len(slope)))
        pixel = x.flatten(1)
        return torch.cat([0 * pixel, pixel - self.walls], dim=1)


def black(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros(count, 1, 1, 1), torch.zeros(count, dtype=torch.int64)


@pytest.mark.parametrize(
    ("choice", "starts"), [({"restarts": 5}, 5), ({"loss": "dlr_targeted"}, 4), ({"enlarge": True, "restarts": 3}, 3)]
)
@pytest.mark.parametrize("batch", [1, 2, 3, 8])
def test_starts_of_the_few_that_are_attacked_fill_the_batch(choice: dict[str, object], starts: int, batch: int) -> None:
    """One image of the batch is right: its starts share passes of at most the batch's size, and each is counted."""
    model = Bowls(0.5, 0.6, 0.7, 0.8)
    images, labels = black(batch)
    labels[1:] = 1
    threat = ThreatModel(norm="l1" if "enlarge" in choice else "linf", eps=0.1)
    attacked = APGD(steps=10, **choice)(model, images, labels, threat)  # type: ignore[arg-type]
    assert attacked.attempted.sum() == 1
    assert not attacked.success.any()
    assert max(model.sizes) == batch
    searched = [size for size in model.sizes[1:-1]]  # the first and the last are verdicts
    assert set(searched[:-1]) <= {min(batch, starts), starts % batch}
    assert sum(searched) == attacked.forward_passes[0] - 2
    assert sum(model.backward_sizes) == attacked.backward_passes[0]
    assert len(searched) == -(-starts // batch) * (sum(searched) // starts)


def test_an_image_leaves_with_all_its_starts() -> None:
    """The second of three classes is reached at the first steps: the starts toward the others end there."""
    model = Bowls(0.5, 0.05, 0.9)
    images, labels = black(3)
    labels[1:] = 1  # wrong before: the one image has the batch to itself
    attacked = APGD(loss="dlr_targeted", steps=50)(model, images, labels, ThreatModel(norm="linf", eps=0.1))
    assert attacked.success.tolist() == [True, False, False]
    assert attacked.prediction[0] == 2
    assert int(attacked.backward_passes[0]) <= 9


class Told(APGD):
    """Starts that end as they are told: loss, and whether turned; the image's value is the start's number."""

    def __init__(self, *ends: tuple[float, bool]) -> None:
        super().__init__(restarts=len(ends))
        self.ends, self.made = list(ends), 0

    def _start(self, model: Query, x: torch.Tensor, *_: object) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        told = self.ends[self.made : self.made + len(x)]
        numbers = torch.arange(self.made + 1, self.made + len(x) + 1) / 10
        self.made += len(x)
        loss, done = zip(*told, strict=True)
        return numbers.view(-1, 1, 1, 1), torch.tensor(loss), torch.tensor(done)


@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize(
    ("ends", "kept"),
    [
        ([(1.0, False), (3.0, False), (2.0, False)], 2),
        ([(3.0, False), (1.0, True), (4.0, False)], 2),  # turned counts before any loss
        ([(1.0, True), (3.0, False), (4.0, False)], 1),
    ],
)
def test_the_best_start_is_kept(ends: list[tuple[float, bool]], kept: int, batch: int) -> None:
    images, labels = black(batch)
    labels[1:] = 1
    attacked = Told(*ends)(Bowls(2.0), images, labels, ThreatModel(norm="linf", eps=1.0))
    assert attacked.images[0].item() == pytest.approx(kept / 10)


def test_of_starts_that_turn_an_image_at_once_the_highest_is_kept() -> None:
    images, labels = black(3)
    labels[1:] = 1
    attack, threat = Told((1.0, True), (3.0, True), (2.0, True)), ThreatModel(norm="linf", eps=1.0)
    attacked = attack(Bowls(2.0), images, labels, threat)
    assert attacked.images[0].item() == pytest.approx(0.2)


def test_passes_of_versions_are_counted_for_their_image() -> None:
    query = Query(nn.Flatten(), 4, torch.device("cpu"), torch.float32)
    view = query.of(torch.tensor([3, 1, 3])).of(torch.tensor([0, 2, 2, 1]))
    assert view.rows.tolist() == [3, 3, 3, 1]
    view(torch.zeros(8, 1, 1, 1, requires_grad=True)).sum().backward()
    assert query.forward_passes.tolist() == [0, 2, 0, 6]
    assert query.backward_passes.tolist() == [0, 2, 0, 6]
    assert view.batch == 4


@pytest.mark.parametrize("norm", [Norm.LINF, Norm.L2, Norm.L1])
@pytest.mark.parametrize(
    "attack",
    [partial(PGD, steps=5, step=0.005), *(partial(APGD, steps=8, loss=loss) for loss in ("ce", "dlr", "dlr_targeted"))],
    ids=("pgd", "ce", "dlr", "dlr_targeted"),
)
def test_restarts_turn_more_and_never_lose_an_image(attack: Callable[..., Attack], norm: Norm) -> None:
    model, images = Hills(-2.0), torch.linspace(0.2, 0.8, 40).view(-1, 1, 1, 1)
    labels, threat = torch.zeros(40, dtype=torch.int64), ThreatModel(norm=norm, eps=0.1)
    one, many = (attack(restarts=count)(model, images, labels, threat) for count in (1, 4))
    assert bool((many.success | ~one.success).all())
    assert 0 < int(one.success.sum()) < int(many.success.sum())
