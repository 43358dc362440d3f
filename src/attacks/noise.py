"""Random noise of the radius: the control that every attack must beat."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import PositiveInt
from torch import Tensor

from src.attacks.base import Attack, fooled
from src.attacks.query import Query
from src.threat import Norm, ThreatModel


class Noise(Attack):
    """Changes of the whole radius that know nothing of the model: where they succeed, no attack is needed.

    Paper: Fawzi, Moosavi-Dezfooli, Frossard 2016, "Robustness of classifiers: from adversarial to random noise",
    https://arxiv.org/abs/1608.08967

    Norms: all. Untargeted and targeted. Looks at the model's label only.

    - linf: each value moves by a number from [-eps, eps], or by a Gaussian of standard deviation eps cut off there.
    - l2, l1: a direction with uniform or Gaussian values (for l2 the latter is uniform on the sphere), eps long.
    - l0: eps pixels, drawn without repeats, get values from [0, 1], or a Gaussian of standard deviation 1 added.

    Then values are clipped to [0, 1].

    Args:
        kind: ``uniform`` or ``gaussian``.
        draws: times that an image is tried; the first success is kept, else the last draw.

    Shapes: images ``(B, C, H, W)`` in [0, 1], labels or targets ``(B,)``.

    Example::

        attacked = Noise(kind="gaussian")(model, images, labels, ThreatModel(norm="l2", eps=0.5))
    """

    norms = frozenset(Norm)
    needs = "labels"

    def __init__(self, *, kind: Literal["uniform", "gaussian"] = "uniform", draws: PositiveInt = 1) -> None:
        self.kind = kind
        self.draws = draws

    @torch.no_grad()
    def run(self, model: Query, x: Tensor, y: Tensor, threat: ThreatModel, *, generator: torch.Generator) -> Tensor:
        result, todo = x.clone(), torch.arange(len(x), device=x.device)
        for draw in range(self.draws):
            result[todo] = made = self._drawn(x[todo], threat, generator)
            if draw + 1 < self.draws:  # the last draw is judged by the caller
                todo = todo[~fooled(model.of(todo)(made), y[todo], threat)]
                if not len(todo):
                    break
        return result

    def _drawn(self, x: Tensor, threat: ThreatModel, generator: torch.Generator) -> Tensor:
        """One noisy version of each image, drawn on the CPU so that every device draws the same."""
        if self.kind == "uniform":
            noise = torch.rand(x.shape, generator=generator).mul_(2).sub_(1).to(x.device)
        else:
            noise = torch.randn(x.shape, generator=generator).to(x.device)
        if threat.norm is Norm.L0:
            batch, _, height, width = x.shape
            order = torch.rand(batch, height * width, generator=generator).argsort(dim=1).to(x.device)
            chosen = (order < int(threat.radius(x))).view(batch, 1, height, width)
            new = (noise + 1) / 2 if self.kind == "uniform" else x + noise
            return torch.where(chosen, new.clamp(0.0, 1.0), x)
        if threat.norm is not Norm.LINF:
            size = torch.linalg.vector_norm(noise.flatten(1), ord=threat.norm.order, dim=1)
            noise = noise / size.clamp_min(1e-12).view(-1, 1, 1, 1)
        return threat.project(x, (x + threat.radius(x) * noise).clamp(0.0, 1.0))
