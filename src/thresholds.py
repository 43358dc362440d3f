"""Thresholds of a detector, frozen on clean validation images: a stage of their own."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from src import fit, records
from src.config import Job
from src.data import loaders
from src.data.augment import to_float
from src.data.base import ImageDataModule
from src.defenses.guarded import DefendedModel
from src.errors import UserError
from src.keys import content_key, networks_of, source_digest
from src.stages import Stages


def frozen(
    defended: DefendedModel, keys: dict[str, str], made: dict[str, str], data: ImageDataModule, stages: Stages, job: Job
) -> str:
    """Freeze the thresholds of what the defense detects, found or made; the key of that stage.

    Args:
        keys: content keys of defense and classifier.
        made: the stages that the job has asked for so far; this one is added.

    Raises:
        UserError: there are no validation images.
    """
    about = {
        **keys,
        "fpr": defended.fpr,
        "fixed": [each.threshold for each in defended.detections],
        "data": data.train_fingerprint,
        "seed": job.seed,
        "batch": job.eval_batch_size,  # a random defense draws batch by batch
        "source": source_digest(frozen, *networks_of(defended), loaders, within="src.defenses"),
    }

    @torch.no_grad()
    def scored(folder: Path) -> None:
        data.configure(batch_size=job.eval_batch_size, augment=False)
        torch.manual_seed(job.seed)
        device = fit.device(job.trainer)
        defended.to(device)
        try:
            batches = (batch["image"].to(device) for batch in data.val_dataloader())
            scores = [defended.scores(to_float(images)).cpu() for images in batches]
        finally:
            defended.cpu()
        if not scores:
            raise UserError(
                "dataset.validation=0: a detector's threshold is set on clean validation images; give it a share"
            )
        records.save_tensors(defended.set_thresholds(torch.cat(scores)), folder / "thresholds.pt")

    key = content_key(**about)
    about["made_from"] = dict(made)  # for people and gc: the defense's key may name no stage
    folder = stages.make(
        "thresholds",
        key,
        what="thresholds of the detector",
        build=scored,
        about=about,
        like=(f"thresholds on {data.spec.name}",),
        images=len(data.val),
    )
    made["thresholds"] = key
    if stages.plan:
        return key
    loaded: dict[str, Tensor] = torch.load(folder / "thresholds.pt", weights_only=True)
    defended.frozen = loaded
    return key
