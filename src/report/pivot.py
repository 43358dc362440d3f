"""A table by any keys: ``python -m src.report PATH --rows defense --cols attack,access --where eps=0.3``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from src import records as store
from src.errors import UserError
from src.frame import ATTACKED
from src.report.latex import latex
from src.tables import format_eps, percent, with_interval

if TYPE_CHECKING:
    import pandas as pd

KEYS = ("dataset", "classifier", "defense", "attack", "norm", "eps", "access", "seed", "targeted", "variant")


def select(table: pd.DataFrame, where: Sequence[str]) -> pd.DataFrame:
    """The rows for which all of ``KEY=VALUE`` hold; eps is compared as a number, ``8/255`` too.

    Raises:
        UserError: an unknown key, or nothing left.
    """
    from fractions import Fraction

    for condition in where:
        key, _, value = condition.partition("=")
        _known([key], "--where")
        if key == "eps":
            try:
                wanted = float("inf") if value == "inf" else float(Fraction(value))
            except (ValueError, ZeroDivisionError):
                raise UserError(f"--where {condition}: expected a number such as 0.3, 8/255 or inf") from None
            keep = (table["eps"] == wanted) | ((table["eps"] - wanted).abs() < 1e-6)
        else:
            keep = table[key].astype(str) == value
        if not keep.any():
            here = [format_eps(v) if key == "eps" else str(v) for v in sorted(table[key].dropna().unique())]
            raise UserError(f"--where {condition}: no such row. {key} has {', '.join(here) or 'no value'}")
        table = table[keep]
    return table


def pivot(
    table: pd.DataFrame, rows: Sequence[str], cols: Sequence[str], value: str = "robust_accuracy"
) -> pd.DataFrame:
    """One figure a place, as text: accuracies in percent with their interval, ``-`` where nothing was measured,
    ``unreliable`` where a decisive check was raised.

    Raises:
        UserError: an unknown key or column, or two cells in one place (they are never averaged).
    """
    _known([*rows, *cols], "--rows, --cols")
    if again := [key for key in KEYS if [*rows, *cols].count(key) > 1]:
        raise UserError(f"--rows, --cols: {again[0]} is named twice")
    if value not in table.columns or table[value].dtype.kind not in "fi":
        numbers = [name for name in table.columns if table[name].dtype.kind in "fi"]
        raise UserError(f"--value {value}: not a column of numbers. Expected one of {', '.join(numbers)}")
    if value in (*rows, *cols):
        raise UserError(f"--value {value}: is in --rows or --cols already. Expected another column")
    done = table[table["status"] == "done"].copy()
    if done.empty:
        raise UserError("--rows, --cols: no finished cell to show")
    places = [*rows, *cols]
    if done.duplicated(places).any():
        first = done[done.duplicated(places, keep=False)].groupby(places, sort=False, dropna=False).get_group
        twice = done[done.duplicated(places, keep=False)]
        group = first(tuple(twice.iloc[0][places])) if len(places) > 1 else first((twice.iloc[0][places[0]],))
        apart = [key for key in KEYS if key not in places and group[key].nunique() > 1] or ["key"]
        raise UserError(
            f"--rows {','.join(rows)} --cols {','.join(cols)}: several cells in one place, which differ in "
            f"{', '.join(apart)}; figures are never averaged. Add it to --rows or --cols, or pick with --where"
        )
    if (bounds := [f"{value}_low", f"{value}_high"])[0] in table.columns:
        texts = done[[value, *bounds]].apply(lambda row: with_interval(*row), axis=1)
    elif value.endswith(("_low", "_high", "_rate")):
        texts = done[value].map(percent)
    else:
        texts = done[value].map(lambda number: "-" if number != number else f"{number:.4g}")
    done[value] = texts.mask(done["unreliable"], "unreliable") if value in ATTACKED else texts
    whole = done.set_index(places)[value].unstack(list(cols)) if cols else done.set_index(places)[[value]]
    whole = whole.sort_index(axis=0).sort_index(axis=1)
    for axis in ("index", "columns"):
        labels = getattr(whole, axis)
        if "eps" in labels.names:
            whole = whole.rename(format_eps, axis=axis, level="eps" if labels.nlevels > 1 else None)
    return whole.fillna("-")


def write(table: pd.DataFrame, out: Path, *, caption: str) -> list[Path]:
    """``pivot.csv``, ``pivot.md`` and ``pivot.tex``."""
    from tabulate import tabulate

    flat = table.reset_index()
    heads = [" ".join(str(part) for part in (n if isinstance(n, tuple) else (n,)) if str(part)) for n in flat.columns]
    body = [[str(cell) for cell in row] for row in flat.to_numpy().tolist()]
    names = len(table.index.names)
    align = ["left"] * names + ["right"] * (len(heads) - names)
    markdown = tabulate(body, heads, tablefmt="pipe", colalign=align, disable_numparse=True)
    texts = {
        "pivot.csv": table.to_csv(),
        "pivot.md": f"{markdown}\n\n{caption}\n",
        "pivot.tex": latex(table, caption=caption, label="tab:pivot", index=True),
    }
    for name, text in texts.items():
        store.write_whole(out / name, text.encode())
    return [out / name for name in texts]


def _known(keys: Sequence[str], option: str) -> None:
    for key in keys:
        if key not in KEYS:
            raise UserError(f"{option}: unknown key {key!r}. Expected some of {', '.join(KEYS)}")
