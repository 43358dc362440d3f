"""What a defense costs against what it holds: milliseconds per image, memory and robust accuracy in one scatter."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from src import records as store
from src.analysis.curves import BLUE, FONT, GREEN, ORANGE, PURPLE, SKY, VERMILLION, caption, paper_style, save_figure
from src.checks.flags import unreliable
from src.records import Record

_COLORS = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY, "#666666")
_MARKERS = "os^Dv<>P"


def cost_scatter(records: Iterable[Record], path: Path) -> Path | None:
    """One point a defense, attack and access, at the largest finite eps of each; None where nothing was timed.

    Filled is white_box, hollow any other access. The larger the marker, the more memory the forward pass takes.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    timed = strongest(records)
    shown = [r for r in timed if not unreliable(r.flags)]
    if not shown:
        return None
    defenses = list(dict.fromkeys(r.defense for r in shown))
    with paper_style():
        figure = Figure(figsize=(5.2, 4.1), dpi=200, layout="constrained")
        axis = figure.subplots()
        sizes = [r.defense_memory_mib for r in shown if r.defense_memory_mib]
        handles: list[Any] = []
        for place, defense in enumerate(defenses):
            color, marker = _COLORS[place % len(_COLORS)], _MARKERS[place % len(_MARKERS)]
            for r in (r for r in shown if r.defense == defense):
                face = color if r.access == "white_box" else "none"
                x, y = r.defense_ms_per_image or math.nan, 100 * (r.robust_accuracy or 0.0)
                known = marker if r.defense_memory_mib or not sizes else "x"
                axis.plot([x], [y], known, color=color, markerfacecolor=face, markersize=_size(r, sizes), alpha=0.85)
            handles.append(Line2D([], [], color=color, marker=marker, linestyle="none", label=defense))
        axis.set_xscale("log")
        axis.set_xlabel("forward pass of the defended model (ms per image)")
        axis.set_ylabel("robust accuracy (%)")
        axis.set_ylim(-3, 103)
        axis.grid(color="#e6e6e6", linewidth=0.6)
        figure.legend(handles=handles, loc="outside upper left", ncols=4, frameon=False)
        if sizes:
            of_size = [
                Line2D([], [], color="#666666", marker="o", markerfacecolor="none", linestyle="none",
                       markersize=_points(mib, sizes), label=f"{mib:.3g}")
                for mib in dict.fromkeys((min(sizes), math.sqrt(min(sizes) * max(sizes)), max(sizes)))
            ]  # fmt: skip
            figure.legend(handles=of_size, title="MiB", loc="outside right upper", frameon=False, labelspacing=1.2)
        about = caption(shown).replace(" Bands: 95 % Wilson intervals. ε = 0: clean images.", "")
        text = (
            f"{about}\nFilled: white_box; hollow: other access. Each at its largest finite ε, on the record's machine."
        )
        if sizes:
            text += (
                "\nSize (logarithmic): most tensor memory at once in a forward pass of 64 images, weights\nincluded."
                f"{' Cross: memory not recorded.' if len(sizes) < len(shown) else ''}"
            )
        if doubtful := [f"{r.defense} {r.attack} {r.access}" for r in timed if unreliable(r.flags)]:
            text += "\n" + textwrap.fill(f"Left out as unreliable: {', '.join(doubtful)}.", 88)
        figure.supxlabel(text, x=0.01, ha="left", fontsize=FONT, color="#333333")
        return save_figure(figure, path)


def _size(record: Record, sizes: list[float]) -> float:
    """Diameter of a marker, points."""
    return _points(record.defense_memory_mib, sizes) if record.defense_memory_mib else 5.0


def _points(mib: float, sizes: list[float]) -> float:
    """By the logarithm: a small network and a search through a generator are a thousandfold apart."""
    least, most = min(sizes), max(sizes)
    return 4.0 + 9.0 * math.log(mib / least) / math.log(most / least) if most > least else 6.0


def strongest(records: Iterable[Record]) -> list[Record]:
    """Of cells that differ in eps only, the one at the largest finite eps; untimed and failed ones are left out."""
    best: dict[tuple[object, ...], Record] = {}
    for r in sorted(records, key=store.order):
        if (
            r.status == "done"
            and r.defense_ms_per_image
            and r.robust_accuracy is not None
            and math.isfinite(r.eps or 0)
        ):
            key = (r.dataset, r.classifier, r.defense, r.attack, r.norm, r.access, r.seed, r.targeted, r.variant)
            best[key] = r
    return list(best.values())
