"""Tables for a paper: ``results.tex``, with the rules of the booktabs package."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from src import records as store
from src.records import Record
from src.tables import reading, shared, side_by_side, text_columns

if TYPE_CHECKING:
    import pandas as pd

ONE_PAGE = 45  # rows; a longer table breaks over pages
_SPECIAL = {c: f"\\{c}" for c in "&%$#_{}"} | {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
}  # fmt: skip


def write_latex(records: Iterable[Record], path: Path) -> Path:
    """Write ``results.tex``: a row per eps, the accesses side by side; what all rows share is in the caption."""
    import pandas as pd

    cells = sorted(records, key=store.order)
    rows = side_by_side(cells)
    same, shown = shared(text_columns(rows))
    shown.pop("notes", None)
    words = ", ".join(f"{name} {value}" for name, value in same.items() if value)
    caption = f"{f'{words}. ' if words else ''}{reading(cells)}"
    text = latex(pd.DataFrame(shown if rows else {"no cells": []}), caption=caption, label="tab:results")
    store.write_whole(path, text.encode())
    return path


def latex(table: pd.DataFrame, *, caption: str, label: str, index: bool = False) -> str:
    """A booktabs table of text; words to the left, figures to the right, their intervals small.

    Args:
        index: whether the index is part of the table, as in a pivot.
    """
    texts = table.map(_cell)
    for axis in (texts.index, texts.columns):
        axis.names = [None if name is None else escape(str(name)) for name in axis.names]
    texts.columns = texts.columns.map(lambda name: tuple(map(_head, name)) if isinstance(name, tuple) else _head(name))
    if index:
        texts.index = texts.index.map(lambda name: tuple(map(_head, name)) if isinstance(name, tuple) else _head(name))
    style = texts.style if index else texts.style.hide(axis="index")
    levels = texts.index.nlevels if index else 0
    words = ["l" if _is_words(table.iloc[:, i]) else "r" for i in range(table.shape[1])]
    long = len(table) > ONE_PAGE
    text = style.to_latex(
        hrules=True,
        column_format="l" * levels + "".join(words),
        caption=escape(caption.replace("`", "")),
        label=label,
        environment="longtable" if long else "table",
        position="" if long else "t",
        multicol_align="c",
        multirow_align="t",
    )
    # On the pages after the first the caption need not be said again.
    text = re.sub(r"\\caption\[\]\{.*\} \\\\", r"\\caption[]{(continued)} \\\\", text)
    return "% \\usepackage{booktabs,multirow" + (",longtable" if long else "") + "}\n" + text


def escape(text: str) -> str:
    """Plain text as LaTeX prints it."""
    return "".join(_SPECIAL.get(c, c) for c in text)


def _head(name: object) -> str:
    return escape(str(name))


def _cell(value: object) -> str:
    text = escape(str(value))
    return re.sub(r"^(-?[\d.]+) (\[.*\])$", r"\1 {\\scriptsize \2}", text)


def _is_words(column: pd.Series[str]) -> bool:
    return not any(re.match(r"-?\d", str(value)) for value in column)
