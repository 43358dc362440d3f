"""Checks of the data: is the test split unseen, is a detector's threshold that of clean validation images?"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch

from src.data.augment import to_float
from src.data.base import ImageDataModule
from src.data.split import ImageSource, Split
from src.defenses.guarded import DefendedModel

CHUNK = 512


def test_in_training(data: ImageDataModule, *, full: bool) -> float | None:
    """Share of the test images that are, pixel for pixel, among those trained on or chosen by.

    With ``split=validation`` those judged are those chosen by, and the figure is of those trained on.

    Args:
        full: read sets that lie on disk as well, which takes as long as decoding them.
    """
    known = (data.train,) if data.on_validation else (data.train, data.val)
    if not full and any(isinstance(split.images, ImageSource) for split in (*known, data.test)):
        return None
    seen = {digest for split in known for digest in _digests(split)}
    found = [digest in seen for digest in _digests(data.test)]
    return sum(found) / len(found)


def _digests(split: Split) -> Iterator[bytes]:
    for start in range(0, len(split), CHUNK):
        batch = split.batch(range(start, min(start + CHUNK, len(split))))["image"]
        for row in batch.flatten(1).numpy():
            yield hashlib.blake2b(row.tobytes(), digest_size=16).digest()


@torch.no_grad()
def threshold_not_clean(defended: DefendedModel, data: ImageDataModule) -> float | None:
    """How far the share of clean validation images rejected is off the declared rate; 0 where chance explains it."""
    from scipy.stats import binomtest

    if not defended.rejects:
        return None
    suspicion = [defended.suspicion(to_float(batch["image"])) for batch in data.val_dataloader()]
    rejected = torch.cat(suspicion) > 1
    share = float(rejected.double().mean())
    chance = binomtest(int(rejected.sum()), len(rejected), defended.fpr).pvalue
    return abs(share - defended.fpr) if chance < 0.01 else 0.0
