"""The flags that a check can raise. Nothing heavy is imported here: tables ask which flags are decisive."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Flag:
    """One flag.

    Attributes:
        says: what is wrong when it is raised, for a reader of the table.
        limit: the flag is raised where the figure is larger.
        decisive: the cell's figure does not mean what it says; tables show *unreliable* in its place.
        full: taken with ``checks=full`` only: it attacks once more, or asks the model on as many images.
    """

    says: str
    limit: float = 0.0
    decisive: bool = True
    full: bool = False


FLAGS: dict[str, Flag] = {
    # of cells side by side
    "accuracy_rises_with_eps": Flag(says="a larger eps is less harmful: the attack fails, not the defense holds"),
    "weaker_access_stronger": Flag(says="an attacker who knows less does more harm: the white_box attack fails"),
    "one_step_stronger": Flag(says="one step does more harm than many: the gradients mislead"),
    "noise_stronger": Flag(says="random noise does more harm than the attack"),
    # of the attack
    "unbounded_holds": Flag(says="the model holds where every pixel may take any value: the attack fails", limit=0.2),
    "steps_short": Flag(says="twice the steps do more harm", limit=0.03, decisive=False, full=True),
    "restarts_short": Flag(says="twice the restarts do more harm", limit=0.03, decisive=False, full=True),
    "loss_rising": Flag(says="the loss still rises when the attack stops", limit=0.1, decisive=False, full=True),
    "members_left_out": Flag(says="attacks of the ensemble that need gradients could not be used", decisive=False),
    "label_leaking": Flag(
        says="most images that are wrong when clean are right when attacked: the change gives the label away",
        limit=0.5,
        decisive=False,
    ),
    # of the model
    "gradient_missing": Flag(says="the gradient is zero, NaN or the same at all pixels", limit=0.1),
    "gradient_untrue": Flag(
        says="the gradient declared exact is not what finite differences say", limit=0.25, decisive=False
    ),
    "logits_saturated": Flag(says="the gradient of the cross-entropy is below what floats resolve", limit=0.1),
    "softmax_as_logits": Flag(says="the model returns probabilities where logits are expected", limit=0.5),
    "random_without_eot": Flag(says="the model answers at random and the attack does not average", limit=0.05),
    "redraws_disagree": Flag(says="verdicts change from draw to draw of the defense", limit=0.1, decisive=False),
    "batch_changes_verdict": Flag(says="an image's verdict depends on the images beside it", limit=0.02),
    "bf16_changes_verdict": Flag(says="verdicts change in bfloat16", limit=0.05, decisive=False, full=True),
    # of the data
    "few_images": Flag(says="the interval is wide: too few images", limit=0.12, decisive=False),
    "threshold_not_clean": Flag(says="the detector's threshold is not that of the clean validation images"),
    "threshold_by_hand": Flag(
        says="the detector's threshold, set by hand, rejects another share of clean images than is declared",
        decisive=False,
    ),
    "test_in_training": Flag(says="test images are among the training images", limit=0.01),
}

DECISIVE = frozenset(name for name, flag in FLAGS.items() if flag.decisive)


def raised(figures: dict[str, float]) -> list[str]:
    """The flags that figures of checks raise, in the order of the register."""
    return [name for name, flag in FLAGS.items() if name in figures and not figures[name] <= flag.limit]


def unreliable(flags: Iterable[str]) -> bool:
    """Whether a cell with these flags has failed a decisive check."""
    return not DECISIVE.isdisjoint(flags)


def why_unreliable(flags: Iterable[str]) -> str:
    """The decisive ones among flags, each with what it says, for a caption; empty where there is none."""
    found = DECISIVE.intersection(flags)
    return "; ".join(f"{name}: {flag.says}" for name, flag in FLAGS.items() if name in found)
