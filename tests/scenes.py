"""What a closer look is given: a model that detects and purifies, images, and attacks that cost nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from src.analysis.scene import Scene
from tests.conftest import Linear


@dataclass
class Made:
    images: Tensor
    attempted: Tensor
    success: Tensor
    distance: Tensor


class Detecting(Linear):
    """Rejects bright images; purifies by halving."""

    rejects = True

    least = 0.0

    def suspicion(self, images: Tensor) -> Tensor:
        return 2 * images.flatten(1).mean(dim=1) - self.least

    def logits(self, images: Tensor) -> Tensor:
        return super().forward(images)

    def forward(self, images: Tensor) -> Tensor:
        logits = self.logits(images)
        refusal = logits.amax(dim=1) + self.suspicion(images) - 1
        return torch.cat([logits, refusal[:, None]], dim=1)

    def purified(self, images: Tensor) -> Tensor:
        return images / 2

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        images = batch["image"]
        return {
            "prediction": self(images).argmax(dim=1), "behind": self.logits(images).argmax(dim=1),
            "rejected": self.suspicion(images) > 1, "suspicion": self.suspicion(images),
        }  # fmt: skip


def scene(**changes: Any) -> Scene:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(40, 1, 8, 8, generator=generator)
    bare, model = Linear(side=8, classes=3), Detecting(side=8, classes=3)
    labels = model.logits(images).argmax(dim=1)

    def attack(access: str, x: Tensor, y: Tensor, eps: float, **_: Any) -> Made:
        made = (x + min(eps, 0.5) * torch.randn(x.shape, generator=generator).sign()).clamp(0, 1)
        return Made(
            made, torch.ones(len(x)).bool(), model(made).argmax(1) != y, torch.rand(len(x), generator=generator)
        )

    values: dict[str, Any] = {
        "dataset": "digits", "classifier_name": "linear",
        "classifier": bare, "defended": model, "images": images, "labels": labels, "classes": ("a", "b", "c"),
        "radii": (0.1, 0.3, float("inf")), "accesses": ("gray_box", "white_box"), "attack": attack,
        "norm": "linf", "threat": "noise (untargeted), linf", "minimal": True, "steps": 3,
    }  # fmt: skip
    return Scene(**(values | changes))


def whitened() -> Callable[..., Made]:
    """An attack that is seen through: every image becomes white, which :class:`Detecting` rejects."""

    def attack(access: str, x: Tensor, y: Tensor, eps: float, **_: Any) -> Made:
        return Made(torch.ones_like(x), torch.ones(len(x)).bool(), torch.zeros(len(x)).bool(), torch.ones(len(x)))

    return attack


class Remembered(nn.Module):
    """A defense that can only repeat what it is given."""

    def __init__(self, images: Tensor, asked: Tensor | None) -> None:
        super().__init__()
        self.images, self.asked = images, asked

    def samples_to_show(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
        return self.images[:count], None if self.asked is None else self.asked[:count]
