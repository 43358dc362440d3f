"""Networks, attacks, data and detectors that are broken on purpose."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from src.attacks.base import Attack
from src.attacks.gradients import gradient
from src.data.base import DataSpec, Split
from src.data.digits import Digits
from src.defenses.base import Detector, Purifier
from src.threat import Norm, ThreatModel


class Net(nn.Module):
    """A small network whose parts the faults replace."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(64, 128), nn.Linear(128, 10)

    def activation(self, x: Tensor) -> Tensor:
        return x.relu()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.activation(self.first(x.flatten(1) - 0.3)))


class Quantised(Net):
    """Activations on a grid: no gradient gets through."""

    def activation(self, x: Tensor) -> Tensor:
        return (x.relu() * 8).round() / 8 + 0 * x


class StraightThrough(Net):
    """As quantised, behind a gradient that is not its own."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + ((x * 2).round() / 2 - x).detach())


class Detached(Net):
    """A purifier that forgets its gradient but for a trace."""

    def forward(self, x: Tensor) -> Tensor:
        smooth = F.avg_pool2d(x, 3, stride=1, padding=1)
        return super().forward(0.01 * x + (x + 0.2 * (smooth - x) - 0.01 * x).detach())


class Saturated(Net):
    def forward(self, x: Tensor) -> Tensor:
        return 1e3 * super().forward(x)


class Probabilities(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).softmax(dim=1)


class Random(Net):
    """Noise on the way that nobody declares."""

    noise = 0.3

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + self.noise * torch.randn_like(x))


class LessRandom(Random):
    noise = 0.12


class Neighbours(Net):
    """Statistics over the batch."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - x.mean(dim=0) + 0.3)


class Offset(Net):
    """Logits around ten thousand, where bfloat16 tells only steps of 64 apart."""

    def __init__(self) -> None:
        super().__init__()
        self.offset = nn.Linear(10, 10)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(super().forward(x), torch.eye(10), torch.full((10,), 10_000.0))


class NotANumber(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward((x**2).sqrt())  # at 0 the gradient is 0 times infinity


class OneMean(Net):
    """The gradient is the same at all pixels."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.detach() + (x - x.detach()).mean(dim=(1, 2, 3), keepdim=True))


class Reversed(Attack):
    """PGD with the sign of its step reversed."""

    norms = frozenset({Norm.LINF})
    steps = 20

    def run(self, model: Any, x: Tensor, y: Tensor, threat: ThreatModel, *, generator: torch.Generator) -> Tensor:
        now = x
        for _ in range(self.steps):
            _, slope = gradient(model, now, y, threat)
            now = threat.project(x, now - threat.radius(x) / 8 * slope.sign())
        return now


class Guess(Attack):
    """Corners of the ball drawn at random, one a restart."""

    norms = frozenset({Norm.LINF})
    needs = "labels"
    restarts = 2

    def run(self, model: Any, x: Tensor, y: Tensor, threat: ThreatModel, *, generator: torch.Generator) -> Tensor:
        best = x
        with torch.no_grad():
            for _ in range(self.restarts):
                sign = (torch.rand(x.shape, generator=generator) - 0.5).sign()
                made = threat.project(x, x + threat.eps * sign)
                turned = (model(made).argmax(dim=1) != y).view(-1, 1, 1, 1)
                best = torch.where(turned, made, best)
        return best


class Shrinking(Attack):
    """One step, shorter where the radius is larger."""

    norms = frozenset({Norm.LINF})

    def run(self, model: Any, x: Tensor, y: Tensor, threat: ThreatModel, *, generator: torch.Generator) -> Tensor:
        _, slope = gradient(model, x, y, threat)
        return threat.project(x, x + 0.01 / threat.eps * slope.sign())


class Leaky(Digits):
    """A tenth of the test images are trained on."""

    def load(self) -> tuple[DataSpec, Split, Split]:
        spec, train, test = super().load()
        some = test.take(slice(0, len(test) // 10))
        labels = torch.cat([train.labels, some.labels])
        return spec, Split(images=torch.cat([train.images, some.images]), labels=labels), test  # type: ignore[list-item]


class Brightness(Detector):
    def score(self, images: Tensor, classify: Callable[[Tensor], Tensor]) -> Tensor:
        return images.mean(dim=(1, 2, 3))


class Grey(Brightness):
    """Of few values, so that no threshold rejects a tenth of the images."""

    def score(self, images: Tensor, classify: Callable[[Tensor], Tensor]) -> Tensor:
        return (super().score(images, classify) * 10).round()


class Unvalidated(Purifier):
    """Learns, and does not say how well."""

    def __init__(self, **options: Any) -> None:
        super().__init__()

    def purify(self, images: Tensor) -> Tensor:
        return images

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        raise AssertionError("never comes to it")
