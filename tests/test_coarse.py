"""What a search in bfloat16 leaves to float32: images that it took for turned, and points that FAB keeps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from src.attacks.base import Attack
from src.attacks.fab import FAB
from src.attacks.pgd import PGD
from src.attacks.query import Query
from src.attacks.square import Square
from src.attacks.worst_case import WorstCase
from src.threat import Norm, ThreatModel


class Answers(nn.Module):
    """Class 0 leads by ``exact`` in float32 and by ``coarse`` in bfloat16, of logits around one, where it is black."""

    def __init__(self, exact: float, coarse: float) -> None:
        super().__init__()
        self.exact, self.coarse = exact, coarse
        self.asked: list[torch.dtype] = []

    def forward(self, x: Tensor) -> Tensor:
        coarse = torch.is_autocast_enabled("cpu")
        self.asked.append(torch.bfloat16 if coarse else torch.float32)
        rises = x.flatten(1).mean(dim=1)
        return torch.stack([torch.ones(len(x)), 1 - (self.coarse if coarse else self.exact) + rises], dim=1)


class Stays(Attack):
    """Looks at the image and gives it back."""

    norms = frozenset({Norm.LINF})

    def run(self, model: Query, x: Tensor, y: Tensor, threat: ThreatModel, *, generator: torch.Generator) -> Tensor:
        model(x)
        return x


@pytest.mark.parametrize(
    ("exact", "coarse", "again"),
    [
        (0.02, -0.02, True),  # taken for turned
        (0.02, 0.0, True),  # a tie: which class comes first in bfloat16 is chance
        (0.02, 0.003, True),  # within the last digit
        (0.003, 0.02, True),
        (0.006, 0.006, False),
        (0.02, 0.02, False),
    ],
)
def test_what_the_search_took_for_turned_is_searched_again(exact: float, coarse: float, again: bool) -> None:
    model, black = Answers(exact, coarse), torch.zeros(1, 1, 2, 2)
    threat = ThreatModel(norm="linf", eps=0.1)
    attacked = Stays()(model, black, torch.zeros(1, dtype=torch.int64), threat, search=torch.bfloat16)
    first = [torch.float32, torch.bfloat16, torch.float32, torch.bfloat16]
    assert model.asked == first + [torch.float32] * 2 * again
    assert not attacked.success.any()


@pytest.mark.parametrize("stop_at_eps", [False, True])
@pytest.mark.parametrize("eps", [0.01, 0.5])
def test_fab_asks_float32_for_what_it_may_keep(stop_at_eps: bool, eps: float) -> None:
    """Beyond eps, where it is to stop at eps, it may keep nothing: two verdicts are all that float32 is asked for."""
    model, black = Answers(0.1, 0.1), torch.zeros(1, 1, 2, 2)
    threat = ThreatModel(norm="linf", eps=eps)
    attack = FAB(steps=10, stop_at_eps=stop_at_eps)
    attacked = attack(model, black, torch.zeros(1, dtype=torch.int64), threat, search=torch.bfloat16)
    assert attacked.success.all() == (eps == 0.5)
    spent = model.asked.count(torch.float32) - 2
    if stop_at_eps:
        assert spent == (1 if eps == 0.5 else 0)
    else:
        assert 1 <= spent < 10  # what is farther than the nearest so far is not worth it
    if attacked.success.all():
        assert float(attacked.distance) == pytest.approx(0.1, rel=0.1)


@pytest.mark.parametrize("together", [False, True])
def test_square_searches_in_float32_alone_and_beside_others(together: bool) -> None:
    """What a small square gains is less than bfloat16 can tell."""
    model, black, label = Answers(0.5, 0.5), torch.zeros(1, 1, 4, 4), torch.zeros(1, dtype=torch.int64)
    square, threat = Square(queries=20), ThreatModel(norm="linf", eps=0.1)
    members = {"pgd": PGD(steps=5), "square": square}
    attack: Attack = WorstCase(members=members) if together else square
    attack(model, black, label, threat, search=torch.bfloat16)
    searched = model.asked[1:]
    assert searched.count(torch.bfloat16) == (7 if together else 0)  # five steps, the end, and the end once more
    assert searched.count(torch.float32) >= 10
    del model.asked[:]
    square.perturb(model, black, label, threat, generator=torch.Generator().manual_seed(0), search=torch.bfloat16)
    assert set(model.asked) == {torch.float32}
