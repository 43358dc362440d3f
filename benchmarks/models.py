"""What the attack benchmarks share: trained classifiers with test images, contestants, and what one of them scores.

Contestants are attacks under our contract and judge: ours from ``conf/attack``, those of torchattacks, foolbox and ART
through the adapters that users have, those of adv-lib and of the reference AutoAttack through the two below.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import inspect
import io
import logging
import math
import statistics
import time
import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from torch import Tensor, nn

from src.attacks.art import ART
from src.attacks.base import Attack
from src.attacks.foolbox import Foolbox
from src.attacks.peers import Peer, Seen
from src.attacks.torchattacks import TorchAttacks
from src.build import build
from src.config import parse
from src.errors import UserError
from src.stages import Stages
from src.threat import BudgetError, Norm, ThreatModel
from src.tracking import NoTracker
from src.train import CONF
from src.trained import Workshop

ORDER = {Norm.L0: 0.0, Norm.L1: 1.0, Norm.L2: 2.0, Norm.LINF: math.inf}


class AdvLib(Peer):
    """A function of ``adv_lib.attacks``."""

    library = "adv_lib"
    install = "adv-lib"

    def attack(self, library: Any, model: Seen, x: Tensor, y: Tensor, threat: ThreatModel) -> tuple[Tensor, bool]:
        function = getattr(importlib.import_module("adv_lib.attacks"), self.name)
        known = inspect.signature(function).parameters
        radius = threat.radius(x)
        given = {"norm": ORDER[threat.norm], "eps": radius}
        if self.name == "pgd_linf":  # the one attack whose radius has a Greek name
            given["\u03b5"] = radius
        given = {name: value for name, value in given.items() if name in known}
        return function(model, x, y, **given, **self.arguments), radius in given.values()


class Reference(Peer):
    """A member of the reference AutoAttack (``apgd-ce``, ``apgd-t``, ``fab``, ``square``, …) or ``standard``."""

    library = "pyautoattack"
    install = "pyautoattack"

    def attack(self, library: Any, model: Seen, x: Tensor, y: Tensor, threat: ThreatModel) -> tuple[Tensor, bool]:
        norm = "Linf" if threat.norm is Norm.LINF else threat.norm.upper()
        whole = self.name in {"standard", "plus", "rand"}
        attack = library.AutoAttack(
            model,
            norm=norm,
            eps=threat.eps if math.isfinite(threat.eps) else 1e10,
            seed=int(torch.randint(2**31, ())),
            device=x.device,
            version=self.name if whole else "custom",
            attacks=None if whole else [self.name],
        )
        for member in ("apgd", "apgd_targeted", "fab", "square"):
            getattr(attack, member).n_restarts = self.arguments.get("restarts", 1)
            getattr(attack, member).n_iter = self.arguments.get("steps", 100)
        if whole:
            attack._set_version(self.name)
        return attack.run_standard_evaluation(x, y, batch_size=len(x))[0], math.isfinite(threat.eps)


LIBRARIES: dict[str, type[Peer]] = {
    "torchattacks": TorchAttacks,
    "foolbox": Foolbox,
    "art": ART,
    "adv_lib": AdvLib,
    "reference": Reference,
}


@dataclass(frozen=True)
class Peering:
    """An attack of another library: which, by what name, with which arguments."""

    library: str
    name: str
    arguments: dict[str, Any] = field(default_factory=dict)


def peer(library: str, name: str, **arguments: Any) -> Peering:
    return Peering(library, name, arguments)


def installed(library: str) -> bool:
    return importlib.util.find_spec(LIBRARIES[library].library) is not None


@dataclass(frozen=True)
class Subject:
    """A trained classifier and the test images it gets right, of the first ``tested``."""

    name: str
    model: nn.Module
    images: Tensor
    labels: Tensor
    tested: int

    def first(self, tested: int) -> Subject:
        """With the first ``tested`` test images only; the share of right ones is taken to be the same."""
        right = max(1, round(len(self.images) * min(tested, self.tested) / self.tested))
        return Subject(self.name, self.model, self.images[:right], self.labels[:right], min(tested, self.tested))


def subject(overrides: list[str], count: int, *, root: str, artifacts: str, weights: str | None = None) -> Subject:
    """Trained, or found in ``artifacts``, exactly as ``python -m src.train`` would."""
    settings = [*overrides, "defense=none", "attack=fgsm", "logger=none", f"paths.artifacts={artifacts}"]
    if not any(override.startswith("dataset.root") for override in overrides):
        settings.append(f"paths.data={root}")
    if weights:
        settings.append(f"classifier.checkpoint={weights}")
    with initialize_config_dir(str(CONF), version_base="1.3"):
        job = parse(compose("train", overrides=settings))
    data = build(job.dataset, "dataset")
    data.prepare()
    name = next(override.partition("=")[2] for override in overrides if override.startswith("classifier="))
    module, _ = Workshop(job, data, Stages(Path(job.paths.artifacts)), NoTracker()).classifier(name)
    model = module.network.eval()
    images, labels = data.test.images[:count].float() / 255, data.test.labels[:count]
    with torch.no_grad():
        right = torch.cat([model(part).argmax(dim=1) for part in images.split(256)]) == labels
    return Subject(f"{name} on {data.spec.name}", model, images[right], labels[right], len(images))


def ours(choice: str) -> Attack:
    """Our attack from ``conf/attack`` with overrides: ``"pgd attack.steps=20"``.

    Raises:
        UserError: there is no such attack yet, or it has other arguments.
    """
    name, *rest = choice.split()
    if not (CONF / "attack" / f"{name}.yaml").is_file():
        raise UserError("not there yet")
    with initialize_config_dir(str(CONF), version_base="1.3"):
        node = compose("train", overrides=[f"attack={name}", *rest]).attack
    return build(OmegaConf.to_container(node, resolve=True), "attack")


def theirs(peering: Peering) -> Attack:
    return LIBRARIES[peering.library](name=peering.name, arguments=peering.arguments)


@dataclass(frozen=True)
class Score:
    """What an attack did to the images of a subject."""

    accuracy: float  # robust accuracy at eps, over all images tested
    median: float  # distance over the images attacked; inf where more than half hold
    seconds: float
    images: int
    forwards: int

    @property
    def rate(self) -> float:
        """Images per second."""
        return self.images / self.seconds

    @property
    def candidate_rate(self) -> float:
        """Versions of an image shown to the model per second."""
        return self.forwards / self.seconds


def score(
    attack: Attack,
    on: Subject,
    norm: str,
    eps: float,
    *,
    minimal: bool,
    batch: int = 250,
    search: torch.dtype = torch.float32,
    seed: int = 0,
) -> Score | str:
    """Attack all images, ``batch`` at a time; a text says why there is no score.

    A minimal attack is run without a limit; its robust accuracy at eps is the share of distances over eps.
    """
    threat = ThreatModel(norm=norm, eps=math.inf if minimal else eps)
    within = eps + ThreatModel(norm=norm, eps=eps).slack
    distances, turned, forwards = [], [], 0
    generator = torch.Generator().manual_seed(seed)
    started = time.perf_counter()
    try:
        for images, labels in zip(on.images.split(batch), on.labels.split(batch), strict=True):
            with _silent():
                attacked = attack(on.model, images, labels, threat, generator=generator, search=search)
            turned.append(attacked.success & (attacked.distance <= within))
            distances.append(attacked.distance.masked_fill(~attacked.success, math.inf))
            forwards += int(attacked.forward_passes.sum())
    except BudgetError as error:
        return f"leaves the budget: {error}"
    except UserError as error:
        return str(error)
    seconds = time.perf_counter() - started
    fallen = int(torch.cat(turned).sum())
    return Score(
        accuracy=(len(on.images) - fallen) / on.tested,
        median=float(torch.cat(distances).median()),
        seconds=seconds,
        images=len(on.images),
        forwards=forwards,
    )


def mean(scores: list[Score | str]) -> Score | str:
    """Of several seeds; a text where one of them has no score."""
    found = [each for each in scores if isinstance(each, Score)]
    if len(found) < len(scores):
        return next(each for each in scores if isinstance(each, str))
    accuracy, median, seconds = (
        statistics.fmean(getattr(each, name) for each in found) for name in ("accuracy", "median", "seconds")
    )
    return replace(found[0], accuracy=accuracy, median=median, seconds=seconds)


@contextlib.contextmanager
def _silent() -> Any:
    """Without the libraries' progress bars and warnings."""
    logging.getLogger("art").setLevel(logging.ERROR)
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        yield


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """A table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "/") for cell in line) + " |" for line in lines) + "\n"


def earlier(path: Path) -> dict[tuple[str, ...], list[str]]:
    """Lines of a table written before, by what they are of: a run of some attacks leaves the others as they were."""
    lines = path.read_text().splitlines() if path.exists() else []
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    return {tuple(line[:3]): line for line in cells}
