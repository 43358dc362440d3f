"""What an analysis looks at: test images, the models, and what the attack makes of the images."""

from __future__ import annotations

import textwrap
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from src.analysis.curves import BLUE, FONT, REJECTED, VERMILLION, save_figure
from src.errors import UserError
from src.sidecars import withstood
from src.tables import format_eps


@dataclass
class Scene:
    """The subject of one job. Images are float32 in [0, 1], the first ones of the split that is judged.

    Attributes:
        dataset: its name.
        classifier_name: what the classifier is called.
        classifier: the bare classifier.
        defended: the same behind its defense.
        images: ``(N, C, H, W)``.
        labels: ``(N,)``.
        classes: names of the classes.
        radii: eps of the job.
        accesses: how the attacker may look, of the job.
        attack: ``(access, images, labels, eps, steps=None, exhaust=None)`` → what the attack made of
            them (:class:`src.attacks.base.Attacked`); ``steps`` overrides the attack's own, ``exhaust`` lets it go on
            with images that are turned already.
        steps: of the attack; None where it counts none.
        norm: that the attack is bounded in.
        threat: the threat model in words, without eps and access.
        minimal: the attack searches the smallest change.
        trainings: folders of the stages that the defense was trained in.
    """

    dataset: str
    classifier_name: str
    classifier: Any
    defended: Any
    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    radii: tuple[float, ...]
    accesses: tuple[str, ...]
    attack: Callable[..., Any]
    norm: str
    threat: str
    minimal: bool
    trainings: tuple[Path, ...] = ()
    steps: int | None = None
    _made: dict[tuple[str, int, float], Any] = field(default_factory=dict)

    @property
    def eps(self) -> float:
        """The largest finite radius of the job; the largest of all where none is finite."""
        finite = [eps for eps in self.radii if eps != float("inf")]
        return max(finite or self.radii)

    @property
    def strongest(self) -> str:
        """white_box where it was asked for."""
        return "white_box" if "white_box" in self.accesses else self.accesses[0]

    @property
    def network(self) -> tuple[Any, str]:
        """The network that answers, behind whatever changes or flags the images, and what it is called."""
        network = self.defended
        while hasattr(network, "purified") and hasattr(network, "classifier"):
            network = network.classifier
        if network is self.classifier:
            return network, "the bare classifier"
        return network, "the network of the defense, which replaces the bare classifier"

    def take(self, count: int) -> tuple[Tensor, Tensor]:
        return self.images[:count], self.labels[:count]

    def attacked(self, access: str, count: int, eps: float | None = None) -> Any:
        """The first images under the attack; made once for all analyses that ask for them."""
        eps = self.eps if eps is None else eps
        key = (access, count, eps)
        if key not in self._made:
            self._made[key] = self.attack(access, *self.take(count), eps)
        return self._made[key]

    @torch.no_grad()
    def answers(self, model: Any, images: Tensor) -> tuple[Tensor, Tensor]:
        """Class and confidence (softmax) of each image; rejection is the class after the last."""
        shares = torch.cat([model(images[i : i + 256]).float().softmax(dim=1) for i in range(0, len(images), 256)])
        confidence, said = shares.max(dim=1)
        return said.cpu(), confidence.cpu()

    def held(self, before: Tensor, after: Tensor) -> Tensor:
        """Which of the first images count as held, by the rule of the records.

        Args:
            before: classes that the defended model gives the clean images.
            after: those that it gives the attacked ones.
        """
        labels = self.labels[: len(after)].cpu()
        if not getattr(self.defended, "rejects", False):
            return after == labels
        held: Tensor = withstood(before == labels, after == labels, after == len(self.classes))
        return held

    @property
    def rule(self) -> str:
        """For captions of a model that rejects: what :meth:`held` counts."""
        rejects = getattr(self.defended, "rejects", False)
        return " A rejected image counts as held where the clean one was right." if rejects else ""

    def look(self, said: int, label: int) -> tuple[str, str]:
        """What is written at an image, and its colour: rejected is neither right nor wrong."""
        color = BLUE if said == label else VERMILLION if said < len(self.classes) else REJECTED
        return self.name(said), color

    def name(self, index: int) -> str:
        return self.classes[index] if index < len(self.classes) else "rejected"

    def caption(self, count: int, *, radius: str | None = None, access: str | None = None) -> str:
        """What every figure says below itself: how many images, under which threat."""
        shown = format_eps(self.eps) if radius is None else radius
        threat = f"{self.threat}, ε = {shown}, {access or self.strongest}"
        return f"n = {count:,} first images, attacked anew for this picture. Threat model: {threat}."


class Analysis(ABC):
    """One way to look. Authors write :meth:`draw`."""

    @abstractmethod
    def draw(self, scene: Scene, path: Path) -> Path:
        """Draw into ``path`` and return it.

        Raises:
            UserError: the scene has not what this analysis looks at.
        """


def finish(figure: Any, caption: str, path: Path) -> Path:
    """Caption below, written whole."""
    wide = int(figure.get_size_inches()[0] * 16)  # characters of the caption's font in the figure's width
    figure.supxlabel(textwrap.fill(caption, wide), x=0.01, ha="left", fontsize=FONT, color="#333333")
    return save_figure(figure, path)


def draw(nodes: Sequence[tuple[str, Analysis]], scene: Scene, out: Path) -> list[Path]:
    """Each analysis as ``analysis_<name>.png``."""
    paths = []
    for name, analysis in nodes:
        try:
            paths.append(analysis.draw(scene, out / f"analysis_{name}.png"))
        except UserError as error:
            raise UserError(f"analysis={name}: {error}") from None
    return paths
