"""Records made by hand, and what of them is printed and drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from src import records as store
from src.records import Record


def cell(eps: float | None = 0.1, access: str = "gray_box", right: int = 60, n: int = 100, **changes: Any) -> Record:
    low, high = store.wilson(right, n)
    values: dict[str, Any] = {
        "dataset": "digits", "classifier": "lenet", "defense": "vae", "attack": "pgd", "norm": "linf", "eps": eps,
        "access": access, "seed": 0, "n": n, "correct_bare": 97, "correct_defended": 95, "correct_attacked": right,
        "correct_attacked_bare": 20 if access == "gray_box" else None, "clean_accuracy": 0.97,
        "clean_accuracy_defended": 0.95, "robust_accuracy": right / max(n, 1), "robust_accuracy_low": low,
        "robust_accuracy_high": high, "created": "2026-01-31T00:00:00+00:00",
    } | changes  # fmt: skip
    names = ("dataset", "defense", "attack", "eps", "access", "seed", "variant")
    return Record(**{"key": "-".join(str(values.get(name, "")) for name in names)} | values)


def failed(**changes: Any) -> Record:
    empty = dict.fromkeys(("robust_accuracy", "correct_attacked", "clean_accuracy", "clean_accuracy_defended"))
    return cell(**{"status": "failed", "reason": "it broke", "n": 0} | empty | changes)


def pair(eps: float = 0.1, **changes: Any) -> list[Record]:
    return [cell(eps, "gray_box", 60, **changes), cell(eps, "white_box", 35, **changes)]


def sidecar(record: Record, folder: Path, *, purifies: bool = True, channels: int = 1, rejected: bool = False) -> None:
    rng = np.random.default_rng(0)
    clean = rng.random((4, channels, 8, 8), dtype=np.float32)
    adversarial = (clean + 0.1 * rng.choice([-1, 1], clean.shape)).clip(0, 1).astype("float32")
    labels = np.arange(4)
    store.save_sidecar(
        folder / f"{record.key}.npz",
        {
            "clean": clean, "adversarial": adversarial, "purified": clean if purifies else adversarial,
            "picture_label": labels, "picture_clean_prediction": labels,
            "picture_prediction": np.full(4, 5) if rejected else labels, "picture_bare_prediction": labels + 1,
            "class_names": np.array([*"abcde", *(["rejected"] if rejected else [])]),
        },
    )  # fmt: skip


def is_drawn(path: Path) -> bool:
    from matplotlib.image import imread

    image = imread(path)
    return min(image.shape[:2]) > 300 and float(image[..., :3].std()) > 0.02
