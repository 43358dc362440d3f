"""Accuracy over eps: what a defense keeps as the attacker is allowed more, with the uncertainty drawn.

Matplotlib's object interface only: pyplot would open a window system and keep global state.
"""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from src import records as store
from src.analysis.points import BARE, Point, bare_lines, bare_name, defended_lines, defense_name, told_apart
from src.checks.flags import why_unreliable
from src.records import Record
from src.tables import format_eps, images_judged

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito (2008): eight colours that stay apart for the colour-blind.
BLACK, ORANGE, SKY, GREEN, YELLOW, BLUE, VERMILLION, PURPLE = (
    "#000000", "#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7",
)  # fmt: skip
# Of several defenses; colours and markers repeat with different periods, so that more than colours still differ.
COLORS, MARKERS = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY, "#666666"), "os^Dv<>P"
ACCESS = {"gray_box": BLUE, "white_box": VERMILLION, "black_box": GREEN, "transfer": PURPLE}
_STYLES = {"gray_box": (0, (4, 1.5)), "white_box": "solid"}
_GREYS, _CROSSES = (BLACK, "#777777", "#AAAAAA"), "x+12"  # of the bare classifier, where it has several lines
_NAMES = {"linf": r"$\ell_\infty$", "l2": r"$\ell_2$", "l1": r"$\ell_1$", "l0": r"$\ell_0$"}
_UNITS = {"linf": "largest change of a pixel, pixels in [0, 1]", "l0": "pixels changed"}
REJECTED = "#555555"  # neither right nor wrong
FONT = 8  # points, at the printed size
PANELS = 12  # of one figure, before it is divided


def unit(norm: str) -> str:
    """What a radius of that norm is counted in."""
    return _UNITS.get(norm, f"{norm} distance, pixels in [0, 1]")


@dataclass(frozen=True)
class Line:
    label: str
    color: str
    style: Any
    marker: str
    points: tuple[Point, ...]


def figures(records: Iterable[Record]) -> dict[str, list[Record]]:
    """Name of a figure → its cells: one for all, or one for each dataset and classifier where one would be too tall."""
    done = [r for r in records if r.status == "done"]
    if len({(r.dataset, r.classifier, r.attack, r.norm, r.targeted) for r in done}) <= PANELS:
        return {"": done}
    groups: dict[str, list[Record]] = {}
    for record in done:
        groups.setdefault(f"{record.dataset}-{record.classifier}", []).append(record)
    return groups


def robustness_curve(records: Iterable[Record], path: Path) -> Path:
    """Draw accuracy over eps, one panel per dataset, classifier, attack and norm; failed cells are left out.

    With one defense colour tells the access, with several the defense (gray_box dashed, white_box solid).
    eps = 0 is the clean accuracy; an infinite eps has its own place at the right, not joined to the line. A cell that
    is unreliable is a hollow marker in a gap of its line.
    """
    from matplotlib.figure import Figure

    done = [r for r in sorted(records, key=store.order) if r.status == "done" and r.robust_accuracy is not None]
    done, shared = told_apart(done)
    panels: dict[tuple[object, ...], list[Record]] = {}
    for record in done:
        key = (record.dataset, record.classifier, record.attack, record.norm, record.targeted)
        panels.setdefault(key, []).append(record)
    defenses = list(dict.fromkeys(defense_name(r) for r in done if r.defense != "none"))
    bare = list(dict.fromkeys(name for r in done if (name := bare_name(r))))

    attacks = len({key[2:] for key in panels})  # a row per dataset where the attacks fit beside each other
    columns = 1 if len(panels) <= 1 else attacks if 2 <= attacks <= 3 else min(3, len(panels))
    lines = math.ceil(max(1, len(panels)) / columns)
    with paper_style():
        size = (5.2, 3.7) if len(panels) <= 1 else (7.0 if columns > 1 else 4.2, 1.0 + 2.2 * lines)
        figure = Figure(figsize=size, dpi=200, layout="constrained")
        axes = figure.subplots(lines, columns, squeeze=False, sharey=True)
        legend: dict[str, Any] = {}
        for axis, cells in zip(axes.flat, panels.values(), strict=False):
            _panel(axis, cells, defenses, bare, legend, alone=len(panels) == 1)
        for axis in axes.flat[len(panels) :]:
            axis.set_axis_off()
        for axis in axes[:, 0]:
            axis.set_ylabel("accuracy (%)")
        if not panels:
            axes.flat[0].text(0.5, 0.5, "no finished cell", ha="center", va="center")
        _legend(figure, legend, paired=min(len(defenses), len({r.access for r in done if r.defense != "none"})) > 1)
        further = [f"With {shared}." if shared else "", _on_unreliable(done)]
        lines_below = [line for each in further for line in textwrap.wrap(each, int(size[0] * 17))]
        text = "\n".join([caption(done), *lines_below])
        figure.supxlabel(text, x=0.01, ha="left", fontsize=FONT, color="#333333")
        return save_figure(figure, path)


def _legend(figure: Any, legend: dict[str, Any], *, paired: bool) -> None:
    """Above the panels. Columns are filled downwards: paired, the two accesses of a defense stay together."""
    from matplotlib.lines import Line2D

    blank = Line2D([], [], linestyle="none")
    entries = sorted(legend.items(), key=lambda entry: not entry[0].startswith(BARE))
    if paired and (bare := sum(name.startswith(BARE) for name, _ in entries)) % 2:
        entries.insert(bare, ("", blank))
    if not entries:
        return
    longest = max(len(name) for name, _ in entries)
    fit = max(1, int(figure.get_size_inches()[0] / (0.5 + 0.06 * longest)))  # inches that a label takes, by eye
    lines = math.ceil(len(entries) / fit)
    if paired:
        lines = 2 * math.ceil(lines / 2)
    columns = math.ceil(len(entries) / lines)
    if paired:  # else columns of unequal length would part a pair
        entries += [("", blank)] * (columns * lines - len(entries))
    place: dict[str, Any] = {"loc": "outside upper left", "frameon": False, "borderaxespad": 0.1}
    labels, handles = zip(*entries, strict=True)
    figure.legend(handles, labels, ncols=columns, handlelength=2.6, **place)


def caption(done: Sequence[Record]) -> str:
    """What makes the picture a measurement: how many images, what the bands are, which threat."""
    n = _counts(done)
    attacks = ", ".join(sorted({f"{r.attack} {_NAMES.get(r.norm, r.norm)}" for r in done}))
    aims = {r.targeted for r in done}
    aim = "untargeted" if aims <= {False} else "targeted" if aims == {True} else "untargeted and targeted"
    images = f"{n} {images_judged(done)}. Bands: 95 % Wilson intervals. ε = 0: clean images."
    return f"{images}\nAttack: {attacks or 'none'}, {aim}."


def _counts(done: Sequence[Record]) -> str:
    counts = sorted({r.n for r in done})
    return f"{counts[0]:,}" if len(counts) == 1 else f"{counts[0]:,} to {counts[-1]:,}" if counts else "no"


def _on_unreliable(done: Sequence[Record]) -> str:
    why = why_unreliable(flag for r in done for flag in r.flags)
    return f"Hollow, not joined: unreliable ({why})." if why else ""


def save_figure(figure: Any, path: Path) -> Path:
    """Write a PNG or PDF whole or not at all, and the same bytes for the same figure (no date inside)."""
    buffer = io.BytesIO()
    kind = path.suffix.removeprefix(".")
    figure.savefig(buffer, format=kind, metadata={"CreationDate": None} if kind == "pdf" else {"Software": None})
    store.write_whole(path, buffer.getvalue())
    return path


def paper_style() -> Any:
    """Our settings for one figure; the caller's matplotlib settings come back afterwards."""
    import matplotlib

    sizes: dict[Any, Any] = dict.fromkeys(("font.size", "legend.fontsize", "xtick.labelsize", "ytick.labelsize"), FONT)
    sizes |= dict.fromkeys(("axes.titlesize", "axes.labelsize"), FONT + 1)
    look: dict[Any, Any] = {
        "axes.spines.top": False,
        "axes.spines.right": False,
        "font.family": "DejaVu Sans",
    }
    tints: dict[Any, Any] = {"axes.edgecolor": "#666666", "xtick.color": "#444444", "ytick.color": "#444444"}
    return matplotlib.rc_context({**sizes, **look, **tints})


def _panel(
    axis: Axes, cells: Sequence[Record], defenses: list[str], bare: list[str], legend: dict[str, Any], *, alone: bool
) -> None:
    first = cells[0]
    radii = sorted({r.eps for r in cells if r.eps is not None and 0 < r.eps < math.inf})
    edge = radii[-1] if radii else 1.0
    infinite = edge * 1.2 if any(r.eps == math.inf for r in cells) else None
    for line in _lines(cells, defenses, bare):
        finite = [p if p.sound else Point(p.eps, math.nan, math.nan, math.nan) for p in line.points if p.eps < math.inf]
        look: dict[str, Any] = {"color": line.color, "marker": line.marker, "markersize": 3.6}
        (drawn,) = axis.plot(
            [p.eps for p in finite],
            [100 * p.accuracy for p in finite],
            linestyle=line.style,
            linewidth=1.5,
            **look,
        )
        axis.fill_between(
            [p.eps for p in finite], [100 * p.low for p in finite], [100 * p.high for p in finite],
            color=line.color, alpha=0.16, linewidth=0,
        )  # fmt: skip
        for p in line.points:
            if not p.sound:
                place = infinite if infinite is not None and math.isinf(p.eps) else p.eps
                marker = "o" if line.label.startswith(BARE) else line.marker
                axis.plot(place, 100 * p.accuracy, marker, color=line.color, markersize=4.5, markerfacecolor="white")
            elif infinite is not None and math.isinf(p.eps):
                bars = [[100 * (p.accuracy - p.low)], [100 * (p.high - p.accuracy)]]
                axis.errorbar([infinite], [100 * p.accuracy], yerr=bars, linestyle="none", elinewidth=1, **look)
        legend.setdefault(line.label, drawn)
    _ticks(axis, radii, infinite, alone=alone)
    axis.set_ylim(-3, 103)
    axis.set_yticks(range(0, 101, 20))
    axis.grid(axis="y", color="#e6e6e6", linewidth=0.6)
    axis.set_axisbelow(True)
    name = _NAMES.get(first.norm, first.norm)
    axis.set_xlabel(f"ε ({name}: {unit(first.norm)})" if alone else f"ε ({name})")
    defense = f", defense {defenses[0]}" if alone and len(defenses) == 1 else ""
    targeted = " targeted" if first.targeted else ""
    separator = ", " if alone else f", n = {_counts(cells)}\n"
    axis.set_title(f"{first.dataset}, {first.classifier}{separator}{first.attack}{targeted}{defense}", loc="left")


def _ticks(axis: Axes, radii: Sequence[float], infinite: float | None, *, alone: bool) -> None:
    """Ticks at the radii that were measured, thinned until their labels keep apart."""
    edge = radii[-1] if radii else 1.0
    room = (0.085 if alone else 0.24) * edge  # what one label needs, by eye, at the printed size
    shown = [0.0]
    for eps in reversed(radii):  # from the right: the largest radius always has its label
        if all(abs(eps - other) >= room for other in shown):
            shown.append(eps)
    places, labels = sorted(shown), [format_eps(e) for e in sorted(shown)]
    if infinite is not None:
        axis.axvline((edge + infinite) / 2, color="#999999", linewidth=0.8, linestyle=(0, (1, 2)))
        places, labels = [*places, infinite], [*labels, "∞"]
    axis.set_xticks(places, labels)
    axis.set_xticks(list(radii), minor=True)
    axis.set_xlim(-0.03 * edge, (infinite or edge) + 0.05 * edge)


def _lines(cells: Sequence[Record], defenses: list[str], bare: list[str]) -> list[Line]:
    """The bare classifier first, then each defense under each access."""
    result = []
    for name, points in bare_lines(cells):
        place = bare.index(name)
        color, marker = _GREYS[place % len(_GREYS)], _CROSSES[place % len(_CROSSES)]
        result.append(Line(name, color, (0, (1, 1.2)), marker, points))
    for first, points in defended_lines(cells):
        defense, access = defense_name(first), first.access
        place = defenses.index(defense)
        if len(defenses) == 1:
            color, marker, label = (VERMILLION, "s", access) if access == "white_box" else (BLUE, "o", access)
        else:
            color, marker = COLORS[place % len(COLORS)], MARKERS[place % len(MARKERS)]
            label = f"{defense}, {access}"
        result.append(Line(label, color, _STYLES.get(access, "dashdot"), marker, points))
    return result
