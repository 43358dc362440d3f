"""The changes that several attacks make to the same images, one below another."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from src import records as store
from src import sidecars
from src.analysis.curves import BLUE, FONT, REJECTED, VERMILLION, paper_style, save_figure
from src.records import Record
from src.tables import format_eps
from src.variant import variant_of

_NEEDED = ("clean", "adversarial", "picture_label", "picture_prediction", "class_names")
_SHOWN = 8
AIMS = (("untargeted", False), ("targeted", True))


def groups(records: Iterable[Record]) -> dict[str, list[Record]]:
    """Name → one cell for each of several attacks on the same defended model with one norm and access.

    Of a minimal-norm attack the cell without a bound, where there is one, is the smallest change; of others the
    largest eps stands.
    """
    found: dict[tuple[str, ...], dict[str, Record]] = {}
    for r in sorted(records, key=store.order):
        if r.status == "done" and r.eps is not None:
            names = (r.dataset, r.classifier, r.defense, r.norm, r.access, str(r.seed), variant_of(r))
            found.setdefault((*names, *r.made_of), {})[_attack(r)] = r
    result: dict[str, list[Record]] = {}
    for key, cells in found.items():
        if len(cells) > 1:
            name, copy = "-".join(filter(None, key[:7])), 1
            while (unique := name if copy == 1 else f"{name}-{copy}") in result:
                copy += 1  # of other weights under the same name
            result[unique] = list(cells.values())
    return result


def _attack(record: Record) -> str:
    change = variant_of(record, attack=True)
    return record.attack + (" targeted" if record.targeted else "") + (f" ({change})" if change else "")


def side_by_side(cells: Sequence[Record], files: Mapping[str, Path], path: Path) -> Path | None:
    """Draw the change of each attack, all on one scale; None where fewer than two have the same images beside them."""
    import numpy as np
    from matplotlib.figure import Figure

    rows: list[tuple[Record, dict[str, Any]]] = []
    for record in cells:
        arrays = sidecars.read(files.get(record.key), _NEEDED)
        if arrays is None or not len(arrays["clean"]):
            continue
        if rows and not np.array_equal(rows[0][1]["clean"], arrays["clean"]):
            continue
        rows.append((record, arrays))
    if len(rows) < 2:
        return None
    clean = rows[0][1]["clean"][:_SHOWN]
    changes = [arrays["adversarial"][:_SHOWN] - clean for _, arrays in rows]
    scale = 0.5 / max(float(max(abs(change).max() for change in changes)), 1e-6)
    with paper_style():
        width = 1.6 + 0.68 * len(clean)
        figure = Figure(figsize=(width, 0.9 + 0.86 * (len(rows) + 1)), dpi=200, layout="constrained")
        axes = figure.subplots(len(rows) + 1, len(clean), squeeze=False)
        _row(axes[0], "clean", clean)
        for line, (record, arrays), change in zip(axes[1:], rows, changes, strict=True):
            _row(
                line,
                "\n".join([*textwrap.wrap(_attack(record), 22), f"ε = {format_eps(record.eps)}"]),
                0.5 + scale * change,
            )
            names = arrays["class_names"]
            for axis, size, said, truth in zip(
                line, distance(change, record.norm), arrays["picture_prediction"], arrays["picture_label"], strict=False
            ):
                color, word = (BLUE, "") if said == truth else (VERMILLION, "")
                if said == len(names) - 1 and str(names[-1]) == "rejected":
                    color, word = REJECTED, "\nrejected"
                axis.set_title(f"{size:.3g}{word}", fontsize=FONT, color=color, pad=2)
        first = rows[0][0]
        aims = " and ".join(aim for aim, is_so in AIMS if any(record.targeted == is_so for record, _ in rows))
        change = f" ({variant_of(first)})" if variant_of(first) else ""
        text = (
            f"n = {len(clean)} images of {first.dataset}, {first.classifier}, defense {first.defense}{change}. "
            f"Threat model: {aims}, {first.norm}, {first.access}. Change x{scale:.3g}, grey = 0; above it its size: "
            "orange where the defended model is wrong, blue where it is right, grey where it rejects."
        )
        figure.supxlabel(textwrap.fill(text, int(14 * width)), x=0.01, ha="left", fontsize=FONT, color="#333333")
        return save_figure(figure, path)


def distance(change: Any, norm: str) -> list[float]:
    """Size of each change ``(B, C, H, W)`` in its norm; l0 counts pixels."""
    import numpy as np

    flat = abs(change.reshape(len(change), -1)).astype("float64")
    if norm == "l0":
        return [float(count) for count in (abs(change).max(axis=1) > 0).sum(axis=(1, 2))]
    if norm == "linf":
        return [float(size) for size in flat.max(axis=1)]
    sizes = flat.sum(axis=1) if norm == "l1" else np.sqrt((flat**2).sum(axis=1))
    return [float(size) for size in sizes]


def _row(axes: Any, label: str, images: Any) -> None:
    axes[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=FONT)
    for axis, image in zip(axes, images, strict=True):
        pixels = image.clip(0, 1)
        if len(pixels) == 3:
            axis.imshow(pixels.transpose(1, 2, 0), interpolation="nearest")
        else:
            axis.imshow(pixels.mean(axis=0), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set(visible=True, color="#bbbbbb", linewidth=0.4)
