"""What a defense proves of its answers, whatever attacks them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from src import fit, records
from src.config import Job
from src.data.augment import to_float
from src.data.base import ImageDataModule
from src.keys import content_key, source_digest
from src.stages import Stages
from src.subject import Subject

RADII = [0.25 * step for step in range(13)]  # l2, of the certified curve


def certified(
    subject: Subject, keys: dict[str, str], data: ImageDataModule, stages: Stages, job: Job
) -> tuple[str, dict[str, Any]]:
    """The key of the certificate's stage, and the fields of a record that come from it; in a plan there are none.

    Args:
        subject: its defended model has ``certify``.
        keys: content keys of data, classifier and defense.
    """
    defended = subject.defended
    certify = defended.certify
    assert certify is not None
    count = min(defended.certify_images, len(data.test))
    parts = {**keys, "count": count, "seed": job.seed, "batch": job.eval_batch_size}
    parts["source"] = source_digest(certified, type(defended))

    @torch.no_grad()
    def make(folder: Path) -> None:
        torch.manual_seed(job.seed)
        radii, left, device = [], count, fit.device(job.trainer)
        defended.to(device)
        try:
            for batch in data.test_dataloader():
                images, labels = batch["image"][:left].to(device), batch["label"][:left].to(device)
                radii.append(certify(to_float(images), labels).cpu())
                left -= len(images)
                if not left:
                    break
        finally:
            defended.cpu()
        records.save_tensors(torch.cat(radii), folder / "radius.pt")

    key = content_key(**parts)
    folder = stages.make(
        "certificate",
        key,
        what="certificate",
        build=make,
        about=parts | {"made_from": subject.made},
        like=(f"certificate on {data.spec.name}",),
        images=count,
    )
    if stages.plan:
        return key, {}
    radius = torch.load(folder / "radius.pt", weights_only=True)
    curve = {f"{r:g}": float((radius >= r).double().mean()) for r in RADII}
    return key, {"certified_n": count, "certified": curve}
