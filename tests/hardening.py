"""What the tests of defenses that change the classifier share: a network, a batch, one trained on digits."""

from __future__ import annotations

from pathlib import Path

import torch
from hydra import compose, initialize_config_dir
from torch import Tensor, nn

from src.attacks.pgd import PGD
from src.build import build
from src.config import parse
from src.data.augment import to_float
from src.data.base import ImageDataModule
from src.stages import Stages
from src.threat import ThreatModel
from src.tracking import NoTracker
from src.train import CONF
from src.trained import Workshop
from tests.conftest import Linear, choices

LINF = ThreatModel(norm="linf", eps=0.15, exhaust=True)


class Trained:
    """A defense trained on the digits, the test images, and the classifier it is compared with."""

    def __init__(self, artifacts: Path, name: str, *overrides: str) -> None:
        quick = ("callbacks=none", "logger=none", "trainer.enable_progress_bar=false", f"paths.artifacts={artifacts}")
        with initialize_config_dir(str(CONF), version_base="1.3"):
            job = parse(compose("train", overrides=[f"defense={name}", *quick, "classifier.fit.epochs=8", *overrides]))
        data: ImageDataModule = build(job.dataset, "dataset")
        data.prepare()
        data.eval_batch_size = 256
        workshop = Workshop(job, data, Stages(artifacts), NoTracker())
        self.classifier, key = workshop.classifier("cnn3")
        self.defended, _ = workshop.defense(name, self.classifier, key)
        batch = data.test.batch(list(range(len(data.test))))
        self.images, self.labels = to_float(batch["image"]), batch["label"]
        self.validated = len(data.val)

    def accuracy(self, model: nn.Module, images: Tensor | None = None) -> float:
        torch.manual_seed(0)
        with torch.no_grad():
            right = model(self.images if images is None else images).argmax(dim=1) == self.labels
        return float(right.float().mean())

    def under_attack(self, model: nn.Module) -> float:
        return self.accuracy(model, PGD(steps=10)(model, self.images, self.labels, LINF).images)


HARDEN = [
    name
    for name in choices("defense")
    if ".harden." in (text := (CONF / "defense" / f"{name}.yaml").read_text()) or "- adversarial_training\n" in text
]


def images(count: int = 4, side: int = 8) -> Tensor:
    return torch.rand(count, 1, side, side, generator=torch.Generator().manual_seed(1))


def fresh() -> nn.Module:
    return Linear(side=8, classes=3)


def batch(count: int = 4) -> dict[str, Tensor]:
    clean = images(count)
    attacked = (clean + 0.1 * images(count).flip(0)).clamp(0, 1)
    return {"image": attacked, "clean": clean, "label": torch.arange(count) % 3}
