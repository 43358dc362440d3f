"""What an attack did to single images: clean, adversarial, the change, and what the purifier made of it."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from src import records as store
from src import sidecars
from src.analysis.curves import BLUE, REJECTED, VERMILLION, paper_style, save_figure
from src.records import Record
from src.tables import format_eps
from src.variant import data_apart

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_NEEDED = (
    "clean", "adversarial", "purified", "picture_label", "picture_clean_prediction", "picture_prediction",
    "picture_bare_prediction", "class_names",
)  # fmt: skip
_CONFIDENCES = ("picture_clean_confidence", "picture_confidence", "picture_bare_confidence")
# Inches. Places are set by hand: the automatic layouts leave as much air between the rows as there is image.
_SIDE, _PITCH, _TEXT = 0.72, 0.76, 0.15
_LEFT, _HEAD = 1.2, 0.27
_FONT = 7  # below the 8 points of the curves: a prediction has to fit over an image of 0.7 in


def choose(records: Iterable[Record], files: Mapping[str, Path]) -> list[Record]:
    """The cells to draw: each access at the largest finite eps measured (under white_box, where it was)."""
    usable = [r for r in records if r.status == "done" and r.eps is not None and r.key in files]
    finite = [r for r in usable if r.eps is not None and math.isfinite(r.eps)] or usable
    ranked = [r for r in finite if r.access == "white_box"] or finite
    if not ranked:
        return []
    best = max(ranked, key=lambda r: r.eps or 0.0)
    same = {r.access: r for r in finite if _setting(r) == _setting(best)} | {best.access: best}
    return [same[access] for access in sorted(same)]  # gray_box above white_box


def _setting(record: Record) -> tuple[object, ...]:
    return *record.gap_key, *record.weights


def picture_grid(records: Iterable[Record], folder: Path | Mapping[str, Path], path: Path) -> Path | None:
    """Draw the examples of one setting; ``None`` when no sidecar has any.

    Args:
        records: cells of one dataset, classifier, defense, attack and norm; the eps to show is chosen here.
        folder: where the sidecars lie, or what :func:`src.sidecars.find` found there.
        path: the PNG to write.
    """
    from matplotlib.figure import Figure

    files = folder if isinstance(folder, Mapping) else sidecars.find([folder])
    cells = [(record, _load(files[record.key])) for record in choose(records, files)]
    blocks = [(record, arrays) for record, arrays in cells if arrays is not None]
    if not blocks:
        return None
    count = max(len(arrays["clean"]) for _, arrays in blocks)
    width = _LEFT + count * _PITCH
    text = textwrap.fill(_caption(blocks), int(width * 17))
    foot = 0.1 + _TEXT * (text.count("\n") + 1)
    height = foot + sum(_HEAD + sum(_height(row, arrays) for row in _rows(arrays)) for _, arrays in blocks)
    with paper_style():
        figure = Figure(figsize=(width, height), dpi=200)
        # One sheet measured in inches, not an axis for each picture: three times as fast to draw.
        sheet = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(0, height), autoscale_on=False)
        sheet.axis("off")
        top = height
        for record, arrays in blocks:
            top = _block(sheet, top, record, arrays)
        sheet.text(0.05, foot - 0.04, text, fontsize=_FONT + 1, color="#333333", va="top")
        return save_figure(figure, path)


def _caption(blocks: Sequence[tuple[Record, Mapping[str, Any]]]) -> str:
    first = blocks[0][0]
    shown = max(len(arrays["clean"]) for _, arrays in blocks)
    aim = "targeted" if first.targeted else "untargeted"
    accesses = ", ".join(record.access for record, _ in blocks)
    sure = " and its softmax share" if all(_sure(arrays) for _, arrays in blocks) else ""
    random = any(
        _CONFIDENCES[-1] in arrays and not _sure(arrays) and "purified" in _rows(arrays) for _, arrays in blocks
    )
    beside = " The defense is random: what it purifies is shown in another draw than was judged." if random else ""
    return (
        f"n = {shown} of {first.n:,} images, the first that were right. Threat model: {first.attack} ({aim}), "
        f"{first.norm}, ε = {format_eps(first.eps)}, {accesses}. Over an image: the label predicted{sure}; ✓ right "
        f"(blue), ✗ wrong (orange), rejected by a detector (grey).{beside}"
    )


def _sure(arrays: Mapping[str, Any]) -> bool:
    """Whether all shares are known: old files have none, those of a random defense only the bare classifier's."""
    return all(name in arrays for name in _CONFIDENCES)


def _height(row: str, arrays: Mapping[str, Any]) -> float:
    text = 2 * _TEXT - 0.04 if _sure(arrays) else _TEXT
    return _PITCH + (0.0 if row == "change" else text)


def _load(path: Path) -> dict[str, Any] | None:
    arrays = sidecars.read(path, _NEEDED, _CONFIDENCES)
    return arrays if arrays is not None and len(arrays["clean"]) else None


def _rows(arrays: Mapping[str, Any]) -> list[str]:
    """A defense that does not change the input has nothing to show as purified."""
    import numpy as np

    rows = ["clean", "adversarial", "change"]
    return rows if np.array_equal(arrays["purified"], arrays["adversarial"]) else [*rows, "purified"]


def _block(sheet: Any, top: float, record: Record, arrays: Mapping[str, Any]) -> float:
    """One access from ``top`` (inches from the foot of the page) downwards; returns where it ends."""
    defense = "" if record.defense == "none" else f", defense {record.defense}"
    setting = f"{record.dataset}, {record.classifier}{defense}, {record.attack} {record.norm}"
    title = f"{record.access}: {setting} ε = {format_eps(record.eps)}"
    sheet.text(0.05, top - 0.2, title, fontsize=_FONT + 2)
    top -= _HEAD
    names = [str(name) for name in arrays["class_names"]]
    for row in _rows(arrays):
        images, said_by, label = _content(row, arrays, "classifier" if record.defense == "none" else "defended model")
        top -= _height(row, arrays)
        sheet.text(_LEFT - 0.08, top + _SIDE / 2, label, fontsize=_FONT + 1, ha="right", va="center")
        for column, image in enumerate(images):
            left = _LEFT + column * _PITCH
            _draw(sheet, image, left, top)
            if said_by is not None:
                truth = int(arrays["picture_label"][column])
                said = int(arrays[f"picture_{said_by}prediction"][column])
                name = _name(names, said)
                mark, color = (" ✓", BLUE) if said == truth else (" ✗", VERMILLION)
                if name == "rejected":  # neither right nor wrong
                    mark, color = "", REJECTED
                middle, above = left + _SIDE / 2, top + _SIDE + 0.03
                share = (
                    f"\n{100 * float(arrays[f'picture_{said_by}confidence'][column]):.0f} %" if _sure(arrays) else ""
                )
                look: dict[str, Any] = {"fontsize": _FONT, "color": color, "ha": "center", "linespacing": 1.0}
                sheet.text(middle, above, f"{name}{mark}{share}", va="bottom" if share else "baseline", **look)
    return top


def _content(row: str, arrays: Mapping[str, Any], model: str) -> tuple[Any, str | None, str]:
    """Images of a row, whose predictions to put over them, and what the row is called."""
    if row == "clean":
        return arrays["clean"], "clean_", f"clean\n({model})"
    if row == "purified":
        return arrays["purified"], "", f"purified\n({model})"
    if row == "change":
        change = arrays["adversarial"] - arrays["clean"]
        scale = 0.4 / max(float(abs(change).max()), 1e-6)
        return 0.5 + scale * change, None, f"perturbation\n(\N{MULTIPLICATION SIGN}{scale:.3g}, gray = 0)"
    # Over the adversarial image of a purifier stands what the bare classifier says, since the defended
    # model's word belongs to the purified one. Any other defense answers for the adversarial image itself.
    if "purified" in _rows(arrays):
        return arrays["adversarial"], "bare_", "adversarial\n(bare classifier)"
    return arrays["adversarial"], "", f"adversarial\n({model})"


def _draw(sheet: Any, image: NDArray[np.float32], left: float, foot: float) -> None:
    """``(C, H, W)`` in [0, 1]; anything but one or three channels is shown as their mean."""
    from matplotlib.patches import Rectangle

    frame = {"extent": (left, left + _SIDE, foot, foot + _SIDE), "aspect": "auto", "interpolation": "nearest"}
    if image.shape[0] == 3:
        sheet.imshow(image.transpose(1, 2, 0).clip(0, 1), **frame)
    else:
        sheet.imshow(image.mean(axis=0).clip(0, 1), cmap="gray", vmin=0, vmax=1, **frame)
    sheet.add_patch(Rectangle((left, foot), _SIDE, _SIDE, fill=False, color="#bbbbbb", linewidth=0.4))


def _name(names: Sequence[str], index: int) -> str:
    name = names[index] if 0 <= index < len(names) else str(index)
    return name if len(name) <= 10 else f"{name[:9]}…"


def groups(records: Iterable[Record]) -> dict[tuple[str, ...], list[Record]]:
    """Cells that share a picture: everything but eps, access and seed."""
    result: dict[tuple[str, ...], list[Record]] = {}
    cells = sorted(records, key=store.order)
    for r, data in zip(cells, data_apart(cells), strict=True):
        targeted = ("targeted",) if r.targeted else ()
        key = (r.dataset, r.classifier, r.defense, r.attack, *targeted, r.norm, *filter(None, [r.variant, data]))
        result.setdefault(key, []).append(r)
    return result
