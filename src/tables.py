"""Records as tables to read, a row per eps: ``results.md``, and the columns that the terminal and LaTeX show too.

The accesses stand side by side because that is the honest reading: ``gray_box`` alone says what a
defense does to an attacker who does not know it, the gap to ``white_box`` how much of that was real.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from src import records as store
from src.checks.flags import unreliable, why_unreliable
from src.records import Record
from src.variant import places


@dataclass
class Row:
    """The cells that differ in access only. ``cells`` maps access to its record, failed ones included.

    ``apart``: file names of data and weights, where they alone tell the row from others.
    """

    first: Record
    cells: dict[str, Record] = field(default_factory=dict)
    apart: tuple[str, ...] = ()

    @property
    def variant(self) -> str:
        return ",".join(filter(None, (self.first.variant, *self.apart)))

    def sound(self, access: str) -> Record | None:
        """A cell whose figure means what it says."""
        record = self.cells.get(access)
        return record if record is not None and record.status == "done" and not unreliable(record.flags) else None

    @property
    def any_done(self) -> Record | None:
        return next((r for r in self.cells.values() if r.status == "done"), None)

    @property
    def bare(self) -> tuple[float, float, float] | None:
        """Accuracy and interval of the bare classifier; only gray_box images are aimed at it."""
        record = self.sound("gray_box")
        if record is None or record.correct_attacked_bare is None or record.n == 0:
            return None
        return record.correct_attacked_bare / record.n, *store.wilson(record.correct_attacked_bare, record.n)

    @property
    def gap(self) -> float | None:
        """``gray_box`` minus ``white_box``, a fraction."""
        gray, white = self.sound("gray_box"), self.sound("white_box")
        if gray is None or white is None or gray.robust_accuracy is None or white.robust_accuracy is None:
            return None
        return gray.robust_accuracy - white.robust_accuracy

    @property
    def notes(self) -> str:
        """Flags of the sanity checks, for what failed why, and what a worst case was taken over."""
        notes = list(dict.fromkeys(flag for record in self.cells.values() for flag in record.flags))
        notes += dict.fromkeys(r.reason for r in self.cells.values() if r.status == "done" and r.reason)
        reasons: dict[str, list[str]] = {}
        for access, record in self.cells.items():
            if record.status == "failed":
                reasons.setdefault(" ".join(record.reason.split()) or "no reason recorded", []).append(access)
        notes += [f"failed ({', '.join(filter(None, names)) or 'job'}): {why}" for why, names in reasons.items()]
        return "; ".join(notes)


def side_by_side(records: Iterable[Record]) -> list[Row]:
    """Pair records that differ in access only, in the order of the table.

    Cells of one access never overwrite each other: what came from other weights, or twice, is its own row. What failed
    may not know what it would have been made from: it stands in the first row of its setting that lacks the access.
    """
    rows: dict[tuple[object, ...], Row] = {}
    lost: list[Record] = []
    for record in sorted(records, key=store.order):
        if record.status == "failed" and not record.stages:
            lost.append(record)
            continue
        copy = 0
        while record.access in (row := rows.setdefault((*record.gap_key, record.weights, copy), Row(record))).cells:
            copy += 1
        row.cells[record.access] = record
    alike: dict[tuple[object, ...], list[Row]] = {}
    for row in rows.values():
        alike.setdefault(row.first.gap_key, []).append(row)
    for record in lost:
        settings = alike.setdefault(record.gap_key, [])
        lacking = [row for row in settings if record.access not in row.cells]
        if not lacking:
            lacking = [Row(record)]
            settings += lacking
        lacking[0].cells[record.access] = record
    for settings in alike.values():
        twins = [row for row in settings if any(record.config for record in row.cells.values())]
        said = [{k: v for r in row.cells.values() for k, v in places(r).items()} for row in twins]
        differ = sorted(name for name in set().union(*said) if len({each.get(name) for each in said}) > 1)
        for row, each in zip(twins, said, strict=True):
            row.apart = tuple(f"{name}={each[name]}" for name in differ if name in each)
    return sorted((row for settings in alike.values() for row in settings), key=lambda row: store.order(row.first))


def format_eps(eps: float | None) -> str:
    """A radius as people write it: ``0.3``, ``8/255``, ``inf``."""
    if eps is None:
        return "-"
    if math.isinf(eps) or abs(eps - round(eps, 3)) < 1e-9:
        return f"{eps:g}"
    steps = eps * 255
    return f"{round(steps)}/255" if abs(steps - round(steps)) < 1e-4 else f"{eps:.4g}"


def percent(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{100 * value:.1f}"


def with_interval(value: float | None, low: float | None, high: float | None, separator: str = " ") -> str:
    bounds = [percent(low), percent(high)]
    return percent(value) if "-" in bounds else f"{percent(value)}{separator}[{', '.join(bounds)}]"


def _share(record: Record | None, name: str, separator: str) -> str:
    if record is None:
        return "-"
    low, high = record.interval(name) or (None, None)
    return with_interval(getattr(record, name), low, high, separator)


def _clean(row: Row, name: str, separator: str) -> str:
    return _share(row.any_done, name, separator)


def _attacked(row: Row, access: str, name: str, separator: str) -> str:
    record = row.cells.get(access)
    if record is None or record.status == "failed":
        return "-" if record is None else "failed"
    return "unreliable" if unreliable(record.flags) else _share(record, name, separator)


def _count(row: Row) -> str:
    return "/".join(dict.fromkeys(str(r.n) for r in row.cells.values() if r.status == "done")) or "-"


Column = tuple[str, Callable[[Row], str]]
IDENTITY: tuple[Column, ...] = (
    ("dataset", lambda row: row.first.dataset),
    ("classifier", lambda row: row.first.classifier),
    ("defense", lambda row: row.first.defense),
    ("attack", lambda row: row.first.attack + (" (targeted)" if row.first.targeted else "")),
    ("norm", lambda row: row.first.norm),
    ("seed", lambda row: str(row.first.seed)),
    ("variant", lambda row: row.variant),
)


def _measures(rows: Sequence[Row], separator: str = " ") -> list[Column]:
    known = ["gray_box", "white_box"]
    known += sorted({a for row in rows for a, r in row.cells.items() if r.status == "done"} - set(known))
    columns: list[Column] = [
        ("eps", lambda row: format_eps(row.first.eps)),
        ("n", _count),
        ("clean bare", partial(_clean, name="clean_accuracy", separator=separator)),
        ("clean defended", partial(_clean, name="clean_accuracy_defended", separator=separator)),
        ("robust bare", lambda row: with_interval(*row.bare, separator) if row.bare else "-"),
    ]
    attacked = partial(_attacked, separator=separator)
    columns += [(f"robust {a}", partial(attacked, access=a, name="robust_accuracy")) for a in known]
    columns.append(("gap (pp)", lambda row: percent(row.gap)))
    found = [r for row in rows for r in row.cells.values()]
    if any(r.clean_rejected is not None for r in found):
        columns.append(("clean rejected", partial(_clean, name="clean_rejected", separator=separator)))
        columns += [(f"detected {a}", partial(attacked, access=a, name="detection_tpr")) for a in known]
    if any(r.certified for r in found):
        columns.append(("certified n", _certified_n))
        columns += [(f"certified l2 {r}", partial(_certified, radius=r, separator=separator)) for r in ("0.5", "1")]
    return columns


def _certified_n(row: Row) -> str:
    record = row.any_done
    return str(record.certified_n) if record is not None and record.certified else "-"


def _certified(row: Row, radius: str, separator: str) -> str:
    record = row.any_done
    share = (record.certified or {}).get(radius) if record is not None else None
    if record is None or share is None or not record.certified_n:
        return "-"
    return with_interval(share, *store.wilson(round(share * record.certified_n), record.certified_n), separator)


_ON_REJECTION = (
    "A defense that detects has held an attacked image it rejects, but not one whose clean version it rejects "
    "(`clean rejected`); `detected` is the share rejected of the attacked images that the classifier gets wrong. "
)


def _on_unreliable(done: Sequence[Record]) -> str:
    """Without the notes at hand, as in LaTeX, this is all that a reader learns."""
    why = why_unreliable(flag for r in done for flag in r.flags)
    if not why:
        return ""
    return (
        "`unreliable` stands in place of a figure where a decisive sanity check was raised, so that the attack, the "
        f"gradients or the data do not allow one ({why}; see docs/checks.md). "
    )


def images_judged(records: Iterable[Record]) -> str:
    """Test images, unless a job was to choose by validation images; a worst case has no config of its own."""
    splits = {str(r.config.get("split", "test")) for r in records if r.config}
    return f"{' and '.join(sorted(splits)) or 'test'} images"


def reading(records: Sequence[Record]) -> str:
    """How to read the table, with the facts that make it a measurement: n, interval, threat model, date."""
    done = [r for r in records if r.status == "done"]
    failed = len(records) - len(done)
    counts = ", ".join(sorted({str(r.n) for r in done}, key=int)) or "no"
    threats = ", ".join(sorted({f"{r.attack} ({'targeted' if r.targeted else 'untargeted'}, {r.norm})" for r in done}))
    date = max((r.created for r in records), default="")[:10]
    return (
        f"Accuracies are percentages of {counts} {images_judged(records)}, each counted once; brackets hold the 95 % "
        "Wilson interval. Eps is the radius of the perturbation, in its norm, for pixels in [0, 1]. "
        f"Threat model: {threats or 'none measured'}. `bare` is the classifier without the defense; "
        "`gray_box` attacks that bare classifier and shows the images to the defended model; `white_box` "
        "attacks the defended model through its defense and is the figure to quote. The gap, gray_box minus "
        "white_box in percentage points, is the robustness that is gone once the attacker knows the defense. "
        f"{_ON_REJECTION if any(r.clean_rejected is not None for r in done) else ''}"
        f"{_on_unreliable(done)}"
        f"{f'{failed} cell(s) failed, see notes. ' if failed else ''}Measured {date or 'on an unknown date'}."
    )


def write_markdown(records: Iterable[Record], path: Path, further: str = "") -> Path:
    """Write ``results.md``: the side-by-side table with all its columns, how to read it, and further sections."""
    from tabulate import tabulate

    cells = sorted(records, key=store.order)
    rows = side_by_side(cells)
    identity = [c for c in IDENTITY if c[0] != "variant" or any(row.variant for row in rows)]
    notes: Column = ("notes", lambda row: row.notes)
    columns = [*identity, *_measures(rows), notes]
    body = [[value(row).replace("|", "\\|") for _, value in columns] for row in rows]
    align = ["left"] * len(identity) + ["right"] * (len(columns) - len(identity) - 1) + ["left"]
    table = tabulate(body, [name for name, _ in columns], tablefmt="pipe", colalign=align, disable_numparse=True)
    text = f"# Results\n\n{table}\n\n{reading(cells)}\n"
    store.write_whole(path, (f"{text}\n{further}" if further else text).encode())
    return path


def text_columns(rows: Sequence[Row], separator: str = " ") -> dict[str, list[str]]:
    """The table as text, column by column; ``separator`` stands between a figure and its interval."""
    columns: list[Column] = [*IDENTITY, *_measures(rows, separator), ("notes", lambda row: row.notes)]
    return {name: [value(row) for row in rows] for name, value in columns}


def shared(cells: dict[str, list[str]]) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Split columns into those that say the same in every row and those worth showing."""
    same: dict[str, str] = {}
    for name in [name for name, _ in IDENTITY] + ["n", "clean bare"]:
        values = set(cells[name]) - {"-"}  # a failed row has none, which is no news
        if len(values) == 1:
            same[name] = values.pop()
    return same, {n: v for n, v in cells.items() if n not in same and (n != "notes" or any(v))}
