"""The interactive curves and scatters of ``report.html``, as Vega-Lite specifications without data.

The page gives each its rows (``page.js``) and gives them again when the table's filters change.
"""

from __future__ import annotations

from typing import Any

from src.analysis.curves import COLORS

SHAPES = ["circle", "square", "triangle-up", "diamond", "cross", "triangle-down", "triangle-right", "triangle-left"]
DASHES = {"gray_box": [5, 3], "white_box": [1, 0], "black_box": [2, 2], "transfer": [8, 3, 2, 3]}
_PERCENT = {"scale": {"domain": [0, 100]}, "axis": {"tickCount": 6}}

_Spec = dict[str, Any]


def specs(accesses: list[str]) -> dict[str, _Spec]:
    """Name of the element on the page → its chart.

    Args:
        accesses: those that occur.
    """
    accesses = [name for name in DASHES if name in accesses] or list(DASHES)
    return {
        "curves": _curves(accesses),
        "gray_white": _scatter(
            _field("gray", "gray_box robust accuracy (%)", **_PERCENT),
            _field("white", "white_box robust accuracy (%)", **_PERCENT),
            [("gray_box", "gray_text"), ("white_box", "white_text"), ("gap (pp)", "gap")],
            diagonal=True,
        ),
        "clean_robust": _scatter(
            _field("clean", "clean accuracy, defended (%)", **_PERCENT),
            _field("robust", "robust accuracy (%)", **_PERCENT),
            [("clean", "clean_text"), ("robust", "robust_text")],
            by_access=True,
        ),
        "cost": _scatter(
            _field("cost", "defended forward pass (ms per image, log)", scale={"type": "log"}),
            _field("robust", "robust accuracy (%)", **_PERCENT),
            [
                ("ms per image", "cost"),
                ("attack, ms per image", "attack_ms"),
                ("memory, MiB", "memory"),
                ("robust", "robust_text"),
            ],
            by_access=True,
            sized=True,
        ),
    }


def _field(name: str, title: str, **rest: Any) -> _Spec:
    axis = {"title": title, **rest.pop("axis", {})}
    return {"field": name, "type": "quantitative", "axis": axis, **rest}


def _tooltip(*fields: tuple[str, str]) -> list[_Spec]:
    return [{"field": field, "title": title} for title, field in fields]


# The same for colour and shape, so that they are one legend; as many beside each other as there is room for.
_LEGEND: _Spec = {
    "title": "defense (click to single out)", "orient": "top", "columns": {"expr": "max(1, floor(width / 130))"},
    "symbolLimit": 60, "symbolOpacity": 1,
}  # fmt: skip
_COLOR: _Spec = {"field": "defense", "type": "nominal", "scale": {"range": COLORS}, "legend": _LEGEND}
_SHAPE: _Spec = {"field": "defense", "type": "nominal", "scale": {"range": SHAPES}, "legend": _LEGEND}
# A page that is scrolled past must not zoom.
_ZOOM: _Spec = {
    "name": "zoom", "select": {"type": "interval", "zoom": "wheel![event.shiftKey]"}, "bind": "scales",
}  # fmt: skip
_SINGLE: _Spec = {"name": "single", "select": {"type": "point", "fields": ["defense"]}, "bind": "legend"}
_FADE: _Spec = {"condition": {"param": "single", "value": 1}, "value": 0.06}


def _curves(accesses: list[str]) -> _Spec:
    x = _field("x", "eps")
    # An infinite eps has a place of its own at the right.
    x["axis"] |= {
        "labelExpr": "edge > 0 && datum.value > edge ? '∞' : format(datum.value, '.3~g')",
        "values": {"expr": "ticks"}, "labelOverlap": "greedy", "title": {"expr": "x_title"},
    }  # fmt: skip
    x["scale"] = {"nice": False}
    dash: _Spec = {
        "field": "access", "type": "nominal",
        "scale": {"domain": accesses, "range": [DASHES[name] for name in accesses]},
        "legend": {"title": "access", "orient": "bottom"},
    }  # fmt: skip
    shared = {"x": x, "color": _COLOR, "detail": {"field": "path"}}
    tooltip = _tooltip(("series", "series"), ("eps", "eps"), ("accuracy", "text"), ("images", "n"), ("flags", "flags"))
    return {
        "width": "container",
        "height": 380,
        "data": {"name": "cells"},
        "params": [{"name": "edge", "value": 0}, {"name": "x_title", "value": "eps"}, {"name": "ticks", "value": []}],
        "layer": [
            {
                "mark": {"type": "area", "opacity": 0.12},
                "encoding": {**shared, "y": _field("low", "", scale={"domain": [0, 100]}), "y2": {"field": "high"},
                             "opacity": {"condition": {"param": "single", "value": 0.13}, "value": 0.01}},
            },
            {
                "mark": {"type": "line", "strokeWidth": 2},
                "encoding": {**shared, "y": _field("accuracy", "accuracy (%)", **_PERCENT), "strokeDash": dash,
                             "opacity": _FADE},
            },
            {
                "params": [_SINGLE, _ZOOM],
                "mark": {"type": "point", "filled": True, "size": 70},
                "encoding": {**shared, "y": _field("accuracy", "accuracy (%)", **_PERCENT),
                             "shape": {**_SHAPE, "legend": None},
                             "opacity": _FADE,
                             "tooltip": tooltip},
            },
            {
                "transform": [{"filter": "datum.hollow !== null"}],
                "mark": {"type": "point", "filled": False, "fill": "white", "size": 70, "strokeWidth": 1.6},
                "encoding": {**shared, "y": _field("hollow", "", **_PERCENT), "shape": {**_SHAPE, "legend": None},
                             "opacity": _FADE, "tooltip": tooltip},
            },
        ],
    }  # fmt: skip


def _scatter(
    x: _Spec,
    y: _Spec,
    fields: list[tuple[str, str]],
    *,
    diagonal: bool = False,
    by_access: bool = False,
    sized: bool = False,
) -> _Spec:
    named = [("defense", "defense"), ("setting", "setting"), ("eps", "eps"), ("access", "access"), ("flags", "flags")]
    shape = {"field": "access", "type": "nominal", "legend": {"title": "access", "orient": "bottom"}}
    points: _Spec = {
        "params": [_SINGLE, _ZOOM],
        "mark": {"type": "point", "size": 55, "strokeWidth": 1.5},
        "encoding": {
            "x": x, "y": y, "color": _COLOR, "opacity": {"condition": {"param": "single", "value": 0.8}, "value": 0.04},
            "shape": shape if by_access else _SHAPE,
            "tooltip": _tooltip(*(pair for pair in named if by_access or pair[0] != "access"), *fields),
        },
    }  # fmt: skip
    if sized:  # the page gives each point its area; not every record knows its memory
        points["encoding"]["size"] = {"field": "area", "type": "quantitative", "scale": None}
    line: _Spec = {
        "data": {"values": [{"a": 0}, {"a": 100}]},
        "mark": {"type": "line", "color": "#999999", "strokeDash": [3, 3], "strokeWidth": 1},
        "encoding": {"x": {"field": "a", "type": "quantitative"}, "y": {"field": "a", "type": "quantitative"}},
    }
    layers = [line, points] if diagonal else [points]
    return {"width": "container", "height": 320, "data": {"name": "cells"}, "layer": layers}
