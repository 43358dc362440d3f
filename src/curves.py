"""The curves of a training over all its tries: Lightning's CSV logger begins a new file at each."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from src.records import write_whole

NAME = "metrics.csv"


def gather(folder: Path) -> None:
    """Add what the last try wrote, ``folder/curves/metrics.csv``, to ``folder/metrics.csv``.

    Of the tries before it the rows of earlier steps stay; what followed its checkpoint it has done again.
    """
    written = folder / "curves" / NAME
    rows = _read(written)
    if not rows:
        return
    first = min(float(row["step"]) for row in rows)
    rows = [row for row in _read(folder / NAME) if float(row["step"]) < first] + rows
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, sorted({name for row in rows for name in row}))
    writer.writeheader()
    writer.writerows(rows)
    write_whole(folder / NAME, text.getvalue().encode())
    written.unlink()


def _read(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    text = path.read_bytes().decode()
    whole = text[: text.rfind("\n") + 1]  # the last line of a try that was killed may be cut
    return list(csv.DictReader(io.StringIO(whole, newline="")))
