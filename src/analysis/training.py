"""The curves of a training, as Lightning's CSV logger left them beside the weights."""

from __future__ import annotations

import csv
from pathlib import Path

_BESIDE = ("epoch", "step")


def read(path: Path) -> list[dict[str, float]]:
    """A stage's training, as Lightning's CSV logger left it; empty where the stage is not at hand."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [{name: float(text) for name, text in row.items() if text} for row in csv.DictReader(file)]


def series(rows: list[dict[str, float]]) -> dict[str, list[tuple[float, float]]]:
    """Name of a figure → (epoch from 1, value); figures of the training before those of the validation."""
    found: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        for name, value in row.items():
            if name not in _BESIDE and "epoch" in row:
                found.setdefault(name, []).append((row["epoch"] + 1, value))
    return {name: found[name] for name in sorted(found, key=lambda name: (name.startswith("val"), name))}
