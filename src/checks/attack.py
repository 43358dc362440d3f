"""Checks of an attack: what it must be able to do, and what must not beat it.

Each takes a :class:`~src.checks.look.Look` and returns a figure, or None where it does not apply.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from src.attacks.base import Attack
from src.attacks.combine import Ensemble
from src.attacks.fgsm import FGSM
from src.attacks.gradients import cross_entropy
from src.attacks.noise import Noise
from src.checks.look import Look
from src.keys import seed_of
from src.threat import Norm
from src.uncertainty import exact, excess

NOISE_DRAWS = 10
HELD = 5  # images that must still hold for the loss to be judged by them


def noise_stronger(look: Look) -> float | None:
    """By which share of the images ten draws of noise turn more than the attack; 0 where chance explains it."""
    if isinstance(look.attack, Noise) or look.threat.targeted or not look.threat.eps:
        return None
    return excess(look.run(Noise(draws=NOISE_DRAWS), look.threat), look.turned)


def one_step_stronger(look: Look) -> float | None:
    """By which share of the images FGSM turns more than an attack in many steps; 0 where chance explains it."""
    comparable = look.threat.norm in FGSM.norms and look.threat.eps and not look.threat.targeted
    if not (comparable and look.by_gradient) or getattr(look.attack, "steps", 2) == 1:
        return None
    return excess(look.run(FGSM(), look.threat), look.turned)


def unbounded_holds(look: Look) -> float | None:
    """Share of the images got right that hold at eps=1 in linf, where any image may become any other."""
    if isinstance(look.attack, Noise) or look.threat.targeted or look.threat.norm is not Norm.LINF:
        return None
    if not bool(look.right.any()):
        return None
    turned = look.run(look.attack, replace(look.threat, eps=1.0))
    return float((~turned[look.right.cpu()]).double().mean())


def steps_short(look: Look) -> float | None:
    """By which share of the images the attack turns more in twice the steps (or queries)."""
    return _doubled(look, "steps", "queries")


def restarts_short(look: Look) -> float | None:
    """By which share of the images the attack turns more with twice the restarts."""
    return _doubled(look, "restarts")


def _doubled(look: Look, *names: str) -> float | None:
    stronger = _with(look.attack, lambda value: 2 * value, *names)
    if stronger is None or not look.threat.eps or getattr(look.attack, "steps", 2) == 1:
        return None
    return excess(look.run(stronger, look.threat), look.turned)


def _with(attack: Attack, change: Callable[[int], int], *names: str) -> Attack | None:
    """The attack, or the members it was given, with other values of these; None where none of them has any."""
    other, changed = copy.copy(attack), False
    for name in names:
        value = getattr(attack, name, None)
        if isinstance(value, int) and not isinstance(value, bool):
            setattr(other, name, change(value))
            changed = True
    if isinstance(other, Ensemble) and other.given:
        made = {name: _with(each, change, *names) for name, each in other.members.items()}
        changed |= any(each is not None for each in made.values())
        other.members = {name: each or other.members[name] for name, each in made.items()}
    return other if changed else None


def loss_rising(look: Look) -> float | None:
    """Of all that the loss rose on images that still hold, the share that came in the last tenth of the steps."""
    single = getattr(look.attack, "steps", 1) == 1 or look.attack.minimal or look.attack.parts(look.threat.norm)
    if single or not look.by_gradient or look.threat.targeted or not look.threat.eps:
        return None
    path, held = loss_path(look)
    if len(path) < 3 or int(held.sum()) < HELD:
        return None
    loss = path[:, held].double().mean(dim=1)
    rise = float(loss[-1] - loss[0])
    before = loss[min(len(loss) - 2, int(0.9 * len(loss)))]
    return max(0.0, float(loss[-1] - before) / rise) if rise > 0 else 0.0


def loss_path(look: Look) -> tuple[Tensor, Tensor]:
    """Cross-entropy at each pass of one start of the attack, ``(passes, B)``, and which images hold in the end.

    Of the images got right; the first row is the clean images'. No image leaves when it is turned. No rows where the
    model answers at random and gets others right the second time.
    """
    images, labels = look.images[look.right], look.labels[look.right]
    watched = Watched(look.target, labels)
    attack = _with(look.attack, lambda _: 1, "restarts") or look.attack
    generator = torch.Generator().manual_seed(seed_of(look.seed, 1))
    threat = replace(look.threat, exhaust=True)
    made = attack(watched, images, labels, threat, generator=generator, search=look.search)
    kept = watched.losses[:-1]  # the last pass is the verdict, of the same images
    return torch.stack(kept) if kept else torch.empty(0, len(images)), ~made.success.cpu()


def members_left_out(attack: Attack, *, rejects: bool = False) -> float | None:
    """How many attacks of an ensemble cannot be used on a model that gives no gradient.

    Those against rejection count where the model ``rejects``; elsewhere nobody misses them.
    """
    if not isinstance(attack, Ensemble) or not attack.given:
        return None
    members = attack.members.values()
    return float(sum(each.needs == "gradient" and (rejects or not each.against_rejection) for each in members))


def label_leaking(wrong: Tensor, right: Tensor) -> float | None:
    """Of the attacked images that are ``wrong`` when clean the share that is ``right`` now; 0 where chance explains it.

    An attack moves away from the label, so few should be. Of a model that learnt from images attacked once and for all
    many are: it reads the label off the change.
    Paper: Kurakin, Goodfellow, Bengio 2017, "Adversarial Machine Learning at Scale", https://arxiv.org/abs/1611.01236
    """
    count, now = int(wrong.sum()), int((wrong & right).sum())
    if not count:
        return None
    return now / count if exact(now, count - now) < 0.05 else 0.0


class Watched(nn.Module):
    """A model that keeps the loss of each pass of all its images."""

    def __init__(self, model: nn.Module, labels: Tensor) -> None:
        super().__init__()
        self.model, self.labels = model, labels
        self.losses: list[Tensor] = []
        for name in ("rejects", "differentiable", "log_probabilities"):
            if hasattr(model, name):
                setattr(self, name, getattr(model, name))

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.model(images)
        if len(images) == len(self.labels):
            self.losses.append(cross_entropy(logits.detach().float(), self.labels).cpu())
        return logits
