"""From verdicts to a record: what was counted, and the few pictures kept beside it."""

from __future__ import annotations

import platform
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc

from src.checks.attack import label_leaking
from src.checks.flags import raised
from src.config import Job
from src.defenses.guarded import DefendedModel
from src.records import Record, wilson
from src.sidecars import withstood
from src.threat import Access, ThreatModel

PICTURES = 8  # examples kept beside a record

Table = dict[str, Tensor]  # one row an image of the test split, in its order


def to_record(
    job: Job,
    *,
    clean: Table,
    made: Table,
    seen: Table,
    threat: ThreatModel,
    access: Access,
    checks: dict[str, float],
    **known: Any,
) -> Record:
    """Count.

    Args:
        clean: ``label``, and the classes that the ``bare`` and the ``defended`` model give the clean images.
        made: verdicts and costs of the attack, on the model it was aimed at.
        seen: what the defended model makes of the attacked images; the same table when that was its target.
        checks: figures of the sanity checks; two that take every image are added here.
        known: further fields of the record: names, keys, time.
    """
    label = clean["label"]
    right, held = clean["defended"] == label, has_held(clean, seen)
    detection = _detection(clean, seen, right) if "behind" in seen else {}
    turned = right & made["attempted"] & ~held
    if threat.targeted:  # reached on the attacked model, and by the defended one's answer as well
        turned &= made["success"] & (seen["prediction"] == made["reached"])
    low, high = wilson(int(held.sum()), len(label))
    checks = checks | {"few_images": round(high - low, 6)}
    leaking = label_leaking(~right & made["attempted"], seen["prediction"] == label)
    if leaking is not None and not threat.targeted:
        checks["label_leaking"] = round(leaking, 6)
    worked = made.get("found", made["attempted"])
    on_bare = (made["prediction"] == label) if access is Access.GRAY_BOX else None
    return Record(
        **known,
        **detection,
        norm=threat.norm,
        eps=threat.eps,
        access=access,
        seed=job.seed,
        targeted=threat.targeted,
        n=len(label),
        correct_bare=int((clean["bare"] == label).sum()),
        correct_defended=int(right.sum()),
        correct_attacked=int(held.sum()),
        correct_attacked_bare=None if on_bare is None else int(on_bare.sum()),
        clean_accuracy=float((clean["bare"] == label).double().mean()),
        clean_accuracy_defended=float(right.double().mean()),
        robust_accuracy=float(held.double().mean()),
        robust_accuracy_low=low,
        robust_accuracy_high=high,
        robust_accuracy_bare=None if on_bare is None else float(on_bare.double().mean()),
        attack_success_rate=_share(turned, right & made["attempted"]),
        distance_median=_over(made["distance"], worked, "median"),
        distance_max=_over(made["distance"], worked, "amax"),
        forward_passes=_over(made["forward_passes"], made["attempted"], "mean"),
        backward_passes=_over(made["backward_passes"], made["attempted"], "mean"),
        attack_ms_per_image=_over(made["attack_seconds"] * 1e3, made["attempted"], "mean"),
        defense_ms_per_image=float(clean["seconds"].mean() * 1e3),
        checks=checks,
        flags=raised(checks),
        config=job.model_dump(mode="json"),
        versions={name: version(name) for name in ("torch", "pytorch-lightning", "hydra-core", "numpy")},
        host=platform.node(),
        device=str(job.trainer.get("accelerator", "auto")),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def has_held(clean: Table, seen: Table) -> Tensor:
    """``(n,)`` whether the defended model withstood the attack on each image."""
    same = seen["prediction"] == seen["label"]
    if "behind" not in seen:
        return same
    held: Tensor = withstood(clean["defended"] == clean["label"], same, seen["rejected"])
    return held


@torch.no_grad()
def to_sidecar(
    job: Job,
    classes: tuple[str, ...],
    classifier: torch.nn.Module,
    defended: DefendedModel,
    *,
    clean: Table,
    made: Table,
    seen: Table,
) -> dict[str, Any]:
    """Verdicts of every image, and a few pictures, so that figures need no model."""
    # Right before the attack with and without the defense: gray_box and white_box then show the same images.
    right = (clean["bare"] == clean["label"]) & (clean["defended"] == clean["label"])
    chosen = right[: len(seen["clean"])].nonzero().flatten()[:PICTURES]
    before, after = seen["clean"][chosen], seen["image"][chosen]
    torch.manual_seed(job.seed)
    models = {"clean_": (defended, before), "": (defended, after), "bare_": (classifier, after)}
    said = {
        "clean_": clean["defended"][chosen],
        "": seen["prediction"][chosen],
        "bare_": classifier(after).argmax(dim=1),
    }
    pictures = {
        "clean": before,
        "adversarial": after,
        "purified_clean": defended.purified(before),
        "purified": defended.purified(after),
        "picture_label": clean["label"][chosen],
        **{f"picture_{of}prediction": classes_said for of, classes_said in said.items()},
        # Another draw's share would be none of the answer that was counted.
        **{
            f"picture_{of}confidence": _shares(*models[of], classes_said)
            for of, classes_said in said.items()
            if of == "bare_" or not defended.stochastic
        },
    }
    verdicts = {
        "index": clean["index"],
        "label": clean["label"],
        "clean_prediction": clean["defended"],
        "prediction": seen["prediction"],
        **{name: made[name] for name in ("attempted", "distance", "forward_passes", "backward_passes")},
    }
    names = np.array([*classes, "rejected"] if defended.rejects else classes, dtype=np.str_)
    return {"class_names": names} | {name: value.numpy() for name, value in (pictures | verdicts).items()}


def _shares(model: torch.nn.Module, images: Tensor, classes: Tensor) -> Tensor:
    """Softmax share of each image's class."""
    if not len(images):  # not every defense takes an empty batch
        return images.new_zeros(0)
    shares: Tensor = model(images).float().softmax(dim=1)
    return shares.gather(1, classes[:, None]).squeeze(1)


def _detection(clean: Table, seen: Table, right: Tensor) -> dict[str, float]:
    """How well attacked images are told from clean ones: over those that the classifier behind would get wrong.

    ROC AUC is against all clean test images.
    """
    wrong = right & (seen["behind"] != seen["label"])
    accepted_wrong = ~seen["rejected"] & (seen["behind"] != seen["label"])
    found: dict[str, float] = {
        "clean_rejected": float(clean["rejected"].double().mean()),
        "accepted_wrong": float(accepted_wrong.double().mean()),
    }
    if bool(wrong.any()):
        scores = torch.cat([clean["suspicion"], seen["suspicion"][wrong]])
        attacked = torch.cat([torch.zeros(len(right)), torch.ones(int(wrong.sum()))]).long()
        # The order is all that AUC knows of, and torchmetrics wants scores in [0, 1].
        ranks = torch.unique(scores, return_inverse=True)[1].double()
        found["detection_auc"] = float(binary_auroc(ranks / len(scores), attacked))
        found["detection_tpr"] = float(seen["rejected"][wrong].double().mean())
        found["detection_n"] = int(wrong.sum())
    return found


def _share(part: Tensor, whole: Tensor) -> float | None:
    return float(part.sum() / whole.sum()) if bool(whole.any()) else None


def _over(values: Tensor, mask: Tensor, how: str) -> float | None:
    """A figure over the images the attack worked on; None when there are none."""
    return float(getattr(values[mask].double(), how)()) if bool(mask.any()) else None
