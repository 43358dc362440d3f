"""From a job's bench to the scene that analyses look at: ``python -m src.train analysis=[confusion,over_eps]``."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from src.analysis.scene import Scene, draw
from src.build import build
from src.data.augment import to_float
from src.errors import UserError
from src.keys import seed_of
from src.measure import Bench
from src.threat import ThreatModel


def look(bench: Bench, radii: tuple[float, ...], out: Path) -> list[Path]:
    """Draw every analysis of the job into ``out``.

    Raises:
        UserError: an analysis that the job's defense or attack gives nothing to look at.
    """
    nodes = [(name, build(node, f"analysis.{name}")) for name, node in bench.job.analysis.items()]
    return draw(nodes, scene(bench, radii), out) if nodes else []


def scene(bench: Bench, radii: tuple[float, ...]) -> Scene:
    """Models in eval mode, and the attack on any of their images."""
    job, subject, attack = bench.job, bench.subject, bench.attack
    classifier, defended = subject.classifier.eval(), subject.defended.eval()
    targets: dict[str, Any] = {
        "gray_box": classifier,
        "white_box": defended.adaptive(job.eot_draws),
        "black_box": defended.closed(),
        "transfer": subject.surrogate,
    }

    def attacked(
        access: str, images: Tensor, labels: Tensor, eps: float, steps: int | None = None, exhaust: bool | None = None
    ) -> Any:
        # What another model is shown, or another draw of this one, has to go beyond the boundary.
        beyond = access in ("gray_box", "transfer") or defended.stochastic
        threat = ThreatModel(
            norm=job.norm, eps=eps, targeted=job.threat.targeted, quantize=job.threat.quantize,
            exhaust=beyond if exhaust is None else exhaust,
        )  # fmt: skip
        chosen = attack
        if steps is not None:
            chosen = with_steps(attack, steps, threat.radius(images))
        generator = torch.Generator(images.device).manual_seed(seed_of(job.seed, 0))
        torch.manual_seed(job.seed)
        return chosen(targets[access], images, labels, threat, generator=generator, search=bench.images.search)

    images, labels = _images(bench)
    if job.norm not in attack.norms:
        raise UserError(f"analysis: attack={bench.names.attack} has no {job.norm}")
    return Scene(
        dataset=bench.names.dataset,
        classifier_name=bench.names.classifier,
        classifier=classifier,
        defended=defended,
        images=images,
        labels=labels,
        classes=bench.data.spec.classes,
        radii=radii,
        accesses=tuple(str(access) for access in job.access),
        attack=attacked,
        norm=job.norm,
        threat=f"{bench.names.attack} ({'targeted' if job.threat.targeted else 'untargeted'}), {job.norm}",
        minimal=attack.minimal,
        trainings=tuple(folder for folder in bench.stages.folders if folder.parent.name == "defense"),
        steps=getattr(attack, "steps", None),
    )


def with_steps(attack: Any, steps: int, radius: float) -> Any:
    """The attack in another number of steps, each as long as before: where none is given, they share out the radius."""
    other = copy.copy(attack)
    other.steps = steps
    if getattr(attack, "step", 0) is None:
        other.step = getattr(attack, "relative_step", 1.0) * radius / attack.steps
    return other


def _images(bench: Bench, at_most: int = 2000) -> tuple[Tensor, Tensor]:
    """The first images of the split that is judged."""
    images, labels, left = [], [], at_most
    for batch in bench.data.test_dataloader():
        images.append(to_float(batch["image"][:left]))
        labels.append(batch["label"][:left])
        left -= len(labels[-1])
        if left <= 0:
            break
    device = bench.subject.classifier.device
    return torch.cat(images).to(device), torch.cat(labels).to(device)
