"""What a defense costs against what it holds: milliseconds per image, memory and robust accuracy in one scatter."""

from __future__ import annotations

import math
import textwrap
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from src import records as store
from src.analysis.curves import COLORS, FONT, MARKERS, caption, paper_style, save_figure
from src.analysis.points import defense_name, told_apart
from src.checks.flags import unreliable
from src.records import Record
from src.tables import format_eps


def figures(records: Iterable[Record]) -> dict[str, list[Record]]:
    """Name of a figure → its cells: those timed at a finite eps, of one dataset, classifier and norm."""
    groups: dict[str, list[Record]] = {}
    for r in sorted(records, key=store.order):
        timed = r.status == "done" and r.defense_ms_per_image and r.robust_accuracy is not None
        if timed and math.isfinite(r.eps or 0):
            groups.setdefault(f"{r.dataset}-{r.classifier}-{r.norm}", []).append(r)
    return groups


def cost_scatter(cells: Sequence[Record], path: Path) -> Path | None:
    """One point a defense, attack and access of a figure's cells, all at one eps; None where none is reliable.

    The eps is that at which most were measured, the largest of several. Filled is white_box, hollow any other access.
    The larger the marker, the more memory the forward pass takes.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    series: dict[tuple[object, ...], set[float]] = {}
    for r in cells:
        series.setdefault(_who(r), set()).add(r.eps or 0.0)
    counts = Counter(eps for found in series.values() for eps in found)
    eps = max(counts, key=lambda radius: (counts[radius], radius))
    timed = [r for r in cells if r.eps == eps]
    shown = [r for r in timed if not unreliable(r.flags)]
    if not shown:
        return None
    shown, shared = told_apart(shown)
    defenses = list(dict.fromkeys(defense_name(r) for r in shown))
    with paper_style():
        figure = Figure(figsize=(5.2, 4.1), dpi=200, layout="constrained")
        axis = figure.subplots()
        sizes = [r.defense_memory_mib for r in shown if r.defense_memory_mib]
        handles: list[Any] = []
        for place, defense in enumerate(defenses):
            color, marker = COLORS[place % len(COLORS)], MARKERS[place % len(MARKERS)]
            for r in (r for r in shown if defense_name(r) == defense):
                face = color if r.access == "white_box" else "none"
                x, y = r.defense_ms_per_image or math.nan, 100 * (r.robust_accuracy or 0.0)
                known = marker if r.defense_memory_mib or not sizes else "x"
                look: dict[str, Any] = {
                    "color": color,
                    "markerfacecolor": face,
                    "markersize": _size(r, sizes),
                    "alpha": 0.85,
                }
                axis.plot([x], [y], known, clip_on=False, **look)  # whole, also at 0 and at 100
                low, high = r.interval("robust_accuracy") or (math.nan, math.nan)
                axis.vlines(x, 100 * low, 100 * high, color=color, linewidth=0.8, alpha=0.85)
            handles.append(Line2D([], [], color=color, marker=marker, linestyle="none", label=defense))
        axis.set_title(f"{shown[0].dataset}, {shown[0].classifier}", loc="left")
        axis.set_xscale("log")
        axis.set_xlabel("forward pass of the defended model (ms per image)")
        axis.set_ylabel("robust accuracy (%)")
        axis.set_ylim(-3, 103)
        axis.grid(color="#e6e6e6", linewidth=0.6)
        columns = max(1, min(4, int(5.2 / (0.5 + 0.06 * max(map(len, defenses))))))  # inches that a label takes, by eye
        figure.legend(handles=handles, loc="outside upper left", ncols=columns, frameon=False)
        if sizes:
            of_size = [
                Line2D([], [], color="#666666", marker="o", markerfacecolor="none", linestyle="none",
                       markersize=_points(mib, sizes), label=f"{mib:.3g}")
                for mib in dict.fromkeys((min(sizes), math.sqrt(min(sizes) * max(sizes)), max(sizes)))
            ]  # fmt: skip
            figure.legend(handles=of_size, title="MiB", loc="outside right upper", frameon=False, labelspacing=1.2)
        about = caption(shown).replace("Bands:", "Bars:").replace(" ε = 0: clean images.", "")
        text = (
            f"{about}\nAll at ε = {format_eps(eps)}. Filled: white_box; hollow: other access. "
            "Times: on the record's machine."
        )
        if sizes:
            text += (
                "\nSize (logarithmic): most tensor memory at once in a forward pass of 64 images, weights\nincluded."
                f"{' Cross: memory not recorded.' if len(sizes) < len(shown) else ''}"
            )
        if shared:
            text += "\n" + textwrap.fill(f"With {shared}.", 88)
        doubtful = [_name(r) for r in timed if unreliable(r.flags)]
        elsewhere = [_name(r) for r in cells if eps not in series[_who(r)]]
        for why, names in (("unreliable", doubtful), (f"not measured at ε = {format_eps(eps)}", elsewhere)):
            if names:
                text += "\n" + textwrap.fill(f"Left out as {why}: {', '.join(dict.fromkeys(names))}.", 88)
        figure.supxlabel(text, x=0.01, ha="left", fontsize=FONT, color="#333333")
        return save_figure(figure, path)


def _who(record: Record) -> tuple[object, ...]:
    """Cells that differ in eps only share it."""
    return record.defense, record.attack, record.access, record.seed, record.targeted, record.variant


def _name(record: Record) -> str:
    return f"{defense_name(record)} {record.attack} {record.access}"


def _size(record: Record, sizes: list[float]) -> float:
    """Diameter of a marker, points."""
    return _points(record.defense_memory_mib, sizes) if record.defense_memory_mib else 5.0


def _points(mib: float, sizes: list[float]) -> float:
    """By the logarithm: a small network and a search through a generator are a thousandfold apart."""
    least, most = min(sizes), max(sizes)
    return 4.0 + 9.0 * math.log(mib / least) / math.log(most / least) if most > least else 6.0
