"""Checks of the data: is the test split unseen, is a detector's threshold that of clean validation images?"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor

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
def thresholds(defended: DefendedModel, data: ImageDataModule, seed: int) -> dict[str, float]:
    """Of a detector: how far the share of clean validation images that it rejects is off what it should be.

    ``threshold_not_clean``: off what thresholds set anew reject, which is less than the declared rate where scores are
    tied. ``threshold_by_hand``, where one is: off the declared rate. Both are 0 where chance explains it.

    ``seed``: of the draws by which the thresholds were set. A random defense is asked with the same ones: with others
    thresholds and scores both vary, which the test of one share knows nothing of.
    """
    if not defended.rejects:
        return {}
    batches = data.val_dataloader()
    with torch.random.fork_rng(devices=[defended.device] if defended.device.type == "cuda" else []):
        torch.manual_seed(seed)
        scores = torch.cat([defended.scores(to_float(batch["image"]).to(defended.device)) for batch in batches])
    frozen, rejected = defended.frozen, defended._together([scores]) > 1
    try:
        defended.set_thresholds(scores)
        anew = defended._together([scores]) > 1
    finally:
        defended.frozen = frozen
    found = {"threshold_not_clean": _off(rejected, float(anew.double().mean()))}
    if any(each.threshold is not None for each in defended.detections):
        found["threshold_by_hand"] = _off(rejected, defended.fpr)
    return found


def _off(rejected: Tensor, expected: float) -> float:
    from scipy.stats import binomtest

    share, expected = float(rejected.double().mean()), max(expected, 1 / len(rejected))  # rounding may turn one image
    return abs(share - expected) if binomtest(int(rejected.sum()), len(rejected), expected).pvalue < 0.01 else 0.0
