"""The table of a run or a sweep in the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from src.records import Record
from src.tables import IDENTITY, Row, shared, side_by_side, text_columns

if TYPE_CHECKING:  # rich takes a while to import; `--help` must not wait for it
    from rich.console import Console
    from rich.table import Table

_LEFT = {name for name, _ in IDENTITY} | {"notes"}


def print_table(records: Iterable[Record], console: Console | None = None) -> None:
    """The table in the terminal. Whatever is the same in all rows goes above it; no cell is ever cut.

    In a narrow terminal intervals move to a second line, notes under the table. Into a pipe or a file every
    row stays on one line, however long.
    """
    from rich.console import Console
    from rich.measure import Measurement
    from rich.text import Text

    console = console or Console()
    rows = side_by_side(records)
    if not rows:
        console.print("No cells: nothing was measured.")
        return
    same, cells = shared(text_columns(rows))
    unbounded = console.options.update(width=100_000, max_width=100_000)
    table = _rich_table(rows, cells)
    needed = Measurement.get(console, unbounded, table).maximum
    notes: list[str] = []
    width = console.width
    if needed > width and console.is_terminal:
        _, cells = shared(text_columns(rows, "\n"))
        notes = list(dict.fromkeys(filter(None, cells.get("notes", []))))
        cells |= {"notes": [str(notes.index(n) + 1) if n else "" for n in cells["notes"]]} if notes else {}
        table = _rich_table(rows, cells)
        # Names may fold down to 8 characters, numbers not at all: below that the terminal has to wrap the lines.
        needed = sum(2 + min(8 if name in _LEFT else 1_000, _widest(name, v)) for name, v in cells.items())
    title = ", ".join(f"{name} {value}" for name, value in same.items() if value)
    console.print(Text(title, style="bold"), soft_wrap=True)
    try:
        console.width = max(needed, width)
        console.print(table)
    finally:
        console.width = width
    for number, note in enumerate(notes, start=1):
        console.print(Text(f"note {number}: {note}"), soft_wrap=True)
    console.print(Text("Accuracies in % with their 95 % intervals; gap = gray_box - white_box."), soft_wrap=True)


def _header(name: str) -> str:
    return name.replace("clean defended", "clean def.").replace(" ", "\n")


def _widest(name: str, values: Iterable[str]) -> int:
    return max(len(line) for text in (_header(name), *values) for line in text.split("\n"))


def _rich_table(rows: Sequence[Row], cells: dict[str, list[str]]) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for name in cells:
        left = name in _LEFT
        table.add_column(Text(_header(name)), justify="left" if left else "right", overflow="fold", no_wrap=not left)
    for i, row in enumerate(rows):
        style = "red" if any(r.status == "failed" for r in row.cells.values()) else ""
        table.add_row(*(Text(values[i], style=style) for values in cells.values()))
    return table
