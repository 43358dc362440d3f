"""The one-pixel attack: differential evolution over a few pixels."""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from src.attacks.base import Attack
from src.attacks.gradients import margin
from src.attacks.query import Query
from src.threat import Norm, ThreatModel

Weight = Annotated[float, Field(gt=0, le=2)]


class OnePixel(Attack):
    """Replaces k pixels by others, found by differential evolution on the scores of the model.

    Paper: Su, Vargas, Sakurai 2019, "One Pixel Attack for Fooling Deep Neural Networks",
    https://arxiv.org/abs/1710.08864

    Norm: l0; k is the threat's eps. Untargeted and targeted. Needs the scores only, no gradient.

    A candidate is k pixels: row, column and one value per channel of each. A child is ``a + weight * (b - c)`` of the
    best candidate and two others and takes its parent's place when it is better, that is less of the label or more of
    the target. The search for an image ends with the first candidate that reaches the goal.

    Args:
        population: candidates per image.
        generations: generations after the first.
        around: what the difference is added to: the ``best`` candidate so far, or another one at ``random``.
        weight: the paper's F: share of the difference of two candidates that is added. Drawn anew between these two
            numbers for each generation.
        crossover: share of a child's values that come from that sum, the others from its parent; 1 is the paper's.
        pixels: most pixels changed when eps is infinite.
        batch_size: candidate images the model gets at once. It bounds the memory, whatever the number of images: so
            many images evolve together as have a place in it with their whole population.

    Shapes: images ``(B, C, H, W)`` in [0, 1], labels or targets ``(B,)``.

    Where ours departs from the paper: it has ``around="random"`` and ``weight=(0.5, 0.5)``; the defaults are those of
    the implementations in use (scipy's), which turn more images (5 pixels, lenet on MNIST validation images: 6 of 24
    against 1). Candidates are compared by the lead of the class in logits, not by its
    probability, which rounds to 1 and can fall while the class stays the answer; a row or column beyond the edge is
    reflected at it, a value outside [0, 1] is clipped. All images of a batch share their random draws: with the same
    generator an image comes out the same whatever else is in the batch (but for the rounding of models that depends
    on the batch size).

    Example::

        attacked = OnePixel(population=100)(model, images, labels, ThreatModel(norm="l0", eps=5))
    """

    norms = frozenset({Norm.L0})
    needs = "scores"

    def __init__(
        self,
        *,
        population: Annotated[int, Field(ge=4)] = 400,
        generations: PositiveInt = 100,
        around: Literal["best", "random"] = "best",
        weight: tuple[Weight, Weight] = (0.5, 1.0),
        crossover: Annotated[float, Field(ge=0, le=1)] = 1.0,
        pixels: PositiveInt = 100,
        batch_size: PositiveInt = 256,
    ) -> None:
        self.population = population
        self.generations = generations
        self.around = around
        self.weight = weight
        self.crossover = crossover
        self.pixels = pixels
        self.batch_size = batch_size

    @torch.no_grad()
    def run(self, model: Query, x: Tensor, y: Tensor, threat: ThreatModel, *, generator: torch.Generator) -> Tensor:
        pixels = self._count(x, threat)
        result = x.clone()
        if not pixels:
            return result
        seed = int(torch.randint(2**62, (), generator=generator))
        together = max(1, self.batch_size // self.population)
        for rows in torch.split(torch.arange(len(x), device=x.device), together):
            draws = torch.Generator().manual_seed(seed)
            result[rows] = self._evolve(model.of(rows), x[rows], y[rows], threat, pixels, draws)
        return result

    def _count(self, x: Tensor, threat: ThreatModel) -> int:
        """How many pixels may change."""
        return min(int(threat.eps) if math.isfinite(threat.eps) else self.pixels, x.shape[2] * x.shape[3])

    def _evolve(
        self, model: Query, x: Tensor, y: Tensor, threat: ThreatModel, pixels: int, draws: torch.Generator
    ) -> Tensor:
        """The best image found for each of ``x``."""
        result = x.clone()
        todo = torch.arange(len(x), device=x.device)
        left = model
        candidates = people = self._first(x, pixels, draws)  # (population, images, pixels, 2 + C)
        fitness = torch.full(people.shape[:2], -torch.inf, device=x.device)
        for generation in range(self.generations + 1):
            if threat.quantize:
                candidates = torch.cat([candidates[..., :2], (candidates[..., 2:] * 255).round() / 255], dim=3)
            rated = self._rate(left, x[todo], y[todo], candidates, threat)
            better = rated > fitness
            people = torch.where(better[:, :, None, None], candidates, people)
            fitness = torch.where(better, rated, fitness)
            done = (fitness > 0).any(dim=0)
            if not threat.exhaust and bool(done.any()):
                result[todo[done]] = _fittest(x[todo[done]], people[:, done], fitness[:, done])
                todo, people, fitness = todo[~done], people[:, ~done], fitness[:, ~done]
                if not len(todo):
                    return result
                left = model.of(todo)
            if generation < self.generations:
                candidates = self._children(people, fitness, x.shape[2:], draws)
        result[todo] = _fittest(x[todo], people, fitness)
        return result

    def _first(self, x: Tensor, pixels: int, draws: torch.Generator) -> Tensor:
        """The first population: places uniform, values normal around grey, as the paper has them."""
        count, channels, height, width = x.shape
        size = torch.tensor([height, width])
        places = torch.rand(self.population, 1, pixels, 2, generator=draws) * size
        values = (torch.randn(self.population, 1, pixels, channels, generator=draws) * 0.5 + 0.5).clamp(0, 1)
        return torch.cat([places, values], dim=3).to(x.device).expand(-1, count, -1, -1)

    def _children(self, people: Tensor, fitness: Tensor, size: torch.Size, draws: torch.Generator) -> Tensor:
        """One child per candidate, inside the image."""
        a, b, c = _three_others(len(people), draws).to(people.device)
        low, high = self.weight
        weight = low + (high - low) * float(torch.rand((), generator=draws))
        middle = people[a] if self.around == "random" else _best(people, fitness)
        children = middle + weight * (people[b] - people[c])
        if self.crossover < 1:
            shape = people[:, :1].shape
            taken = torch.rand(shape, generator=draws) < self.crossover
            one = torch.randint(taken[0].numel(), (len(people), 1), generator=draws)
            taken = taken.flatten(1).scatter(1, one, True).view(shape)
            children = torch.where(taken.to(people.device), children, people)
        edge = torch.tensor(size, dtype=people.dtype, device=people.device)
        places = children[..., :2].remainder(2 * edge)
        places = torch.minimum(places, 2 * edge - places)
        return torch.cat([places, children[..., 2:].clamp(0, 1)], dim=3)

    def _rate(self, model: Query, x: Tensor, y: Tensor, people: Tensor, threat: ThreatModel) -> Tensor:
        """Fitness ``(population, images)``: positive where the goal is reached."""
        fitness = []
        for part in torch.split(people, max(1, self.batch_size // len(x))):
            lead = margin(model(_paint(x, part)), y.repeat(len(part)))
            fitness.append((-lead if threat.targeted else lead).view(len(part), -1))
        return torch.cat(fitness)


def _three_others(count: int, draws: torch.Generator) -> Tensor:
    """For each of ``count`` candidates three others, all different: ``(3, count)``."""
    # Steps around the circle of candidates: distinct steps from 1 to count - 1 lead to distinct others.
    first = torch.randint(1, count, (count,), generator=draws)
    second = torch.randint(1, count - 1, (count,), generator=draws)
    second = second + (second >= first)
    third = torch.randint(1, count - 2, (count,), generator=draws)
    low, high = torch.minimum(first, second), torch.maximum(first, second)
    third = third + (third >= low)
    third = third + (third >= high)
    return (torch.arange(count) + torch.stack([first, second, third])) % count


def _fittest(x: Tensor, people: Tensor, fitness: Tensor) -> Tensor:
    """Each of ``x`` as its fittest candidate shows it."""
    return _paint(x, _best(people, fitness)[None])


def _best(people: Tensor, fitness: Tensor) -> Tensor:
    """The fittest candidate of each image: ``(images, pixels, 2 + C)``."""
    return people[fitness.argmax(dim=0), torch.arange(people.shape[1], device=people.device)]


def _paint(x: Tensor, people: Tensor) -> Tensor:
    """The candidates as images, ``(candidates * images, C, H, W)``: one block of all images after another."""
    _, channels, height, width = x.shape
    # Channels last in memory, which convolutions are faster in (twice on lenet).
    images = x.permute(0, 2, 3, 1).flatten(1, 2).repeat(len(people), 1, 1)
    people = people.flatten(0, 1)
    row = people[..., 0].long().clamp_(0, height - 1)
    column = people[..., 1].long().clamp_(0, width - 1)
    place = row * width + column
    for pixel in range(people.shape[1]):  # in order: where two meet, the later one counts
        index = place[:, pixel, None, None].expand(-1, -1, channels)
        images.scatter_(1, index, people[:, pixel, None, 2:])
    return images.view(-1, height, width, channels).permute(0, 3, 1, 2)
