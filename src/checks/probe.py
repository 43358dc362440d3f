"""Takes the checks of a cell that need the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from src.checks import attack, model
from src.checks.flags import FLAGS
from src.checks.look import Look

Check = Callable[[Look], float | None]

# Of the model under attack, whatever eps; and of each cell.
ONCE: Sequence[Check] = (
    model.gradient_untrue, model.softmax_as_logits, model.random_without_eot,
    model.batch_changes_verdict, model.bf16_changes_verdict, attack.unbounded_holds,
)  # fmt: skip
EACH: Sequence[Check] = (
    attack.noise_stronger, attack.one_step_stronger,
    model.gradient_missing, model.logits_saturated, model.redraws_disagree,
    attack.steps_short, attack.restarts_short, attack.loss_rising,
)  # fmt: skip


def take(look: Look, checks: Sequence[Check], *, full: bool) -> dict[str, float]:
    """Figures by name of the checks that apply. The caller's random state stays as it is.

    Args:
        full: those as well that cost as much as an attack.
    """
    figures: dict[str, float] = {}
    devices = [look.images.device] if look.images.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        for check in checks:
            if full or not FLAGS[check.__name__].full:
                look.seeded()
                if (figure := check(look)) is not None:
                    figures[check.__name__] = round(figure, 6)
    return figures
