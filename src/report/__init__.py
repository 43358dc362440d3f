"""Records to tables, figures and one page; the command is in ``__main__``. No model is loaded here."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from src import sidecars
from src.keys import content_key
from src.records import Record

if TYPE_CHECKING:
    from src.frame import Results

log = logging.getLogger(__name__)
LONGEST = 120  # characters of a setting in a file's name
MAX_GRIDS = 12  # picture grids of one report; a sweep over more settings says which it left out


def load(paths: Iterable[Path | str] | Path | str, *, worst: bool = True) -> Results:
    """The records under folders or files as a pandas frame; ``.to_xarray()`` gives the labelled cube.

    Args:
        paths: output folders of runs or sweeps, or single records.
        worst: with a row ``worst_of_all`` for each threat model that several attacks tried.
    """
    from src import frame

    return frame.load(paths, worst=worst)


def write_report(records: Iterable[Record], sidecar_folder: Path | Iterable[Path], out: Path) -> list[Path]:
    """What a job or a sweep leaves: results.csv, results.md, the curve, the cost of several defenses, and pictures.

    Args:
        records: finished and failed cells alike.
        sidecar_folder: folder or folders searched, with all below, for the ``<key>.npz`` of the records.
        out: folder to write into; made if need be.

    Returns:
        The paths written. A sweep over several settings has ``pictures_<setting>.png`` for each of them.
    """
    from src import frame, tables
    from src.report import comparison

    cells = list(records)
    files = sidecars.find([sidecar_folder] if isinstance(sidecar_folder, Path) else sidecar_folder)
    paths = [
        frame.write_csv(cells, out / "results.csv"),
        tables.write_markdown(cells, out / "results.md", comparison.to_markdown(cells, files)),
    ]
    costs = _costs(cells, out, (".png",)) if len({r.defense for r in cells}) > 1 else []
    return [*paths, *_curves(cells, out, (".png",)), *costs, *_pictures(cells, files, out)]


def write_all(records: Iterable[Record], folders: Sequence[Path], out: Path) -> list[Path]:
    """Everything the command line makes: tables in five formats with the worst cases, curves, pictures, report.html."""
    from src import frame, tables
    from src.report import comparison, latex, page
    from src.worst import worst_cases

    cells = list(records)
    files = sidecars.find(folders)
    rows = [*cells, *worst_cases(cells, files)]
    paths = [
        frame.write_csv(rows, out / "results.csv"),
        frame.write_parquet(rows, out / "results.parquet"),
        tables.write_markdown(rows, out / "results.md", comparison.to_markdown(cells, files)),
        latex.write_latex(rows, out / "results.tex"),
        *_curves(cells, out, (".png", ".pdf")),
        *_costs(cells, out, (".png", ".pdf")),
    ]
    pictures = [*_pictures(cells, files, out), *_side_by_side(cells, files, out)]
    return [*paths, *pictures, page.write_page(rows, out / "report.html", pictures)]


def draw_sweep(records: Iterable[Record], files: Mapping[str, Path], out: Path) -> list[Path]:
    """The PNGs that take a whole sweep: curves, cost, and the changes of several attacks side by side."""
    cells = list(records)
    return [*_curves(cells, out, (".png",)), *_costs(cells, out, (".png",)), *_side_by_side(cells, files, out)]


def _curves(cells: Sequence[Record], out: Path, kinds: Sequence[str]) -> list[Path]:
    from src.analysis import curves

    if not any(r.status == "done" for r in cells):
        return []
    groups = curves.figures(cells)
    return [
        curves.robustness_curve(group, out / f"robustness_curve{f'_{name}' if len(groups) > 1 else ''}{kind}")
        for name, group in groups.items()
        for kind in kinds
    ]


def _costs(cells: Sequence[Record], out: Path, kinds: Sequence[str]) -> list[Path]:
    from src.analysis import cost

    groups = cost.figures(cells)
    drawn = [
        cost.cost_scatter(group, out / f"cost{f'_{name}' if len(groups) > 1 else ''}{kind}")
        for name, group in groups.items()
        for kind in kinds
    ]
    return [path for path in drawn if path is not None]


def _pictures(cells: Sequence[Record], files: Mapping[str, Path], out: Path) -> list[Path]:
    from src.analysis import pictures

    paths = []
    shown = {name: group for name, group in pictures.groups(cells).items() if pictures.choose(group, files)}
    for number, (name, group) in enumerate(shown.items()):
        if number == MAX_GRIDS:
            left = ", ".join("-".join(n) for n in list(shown)[MAX_GRIDS:])
            log.warning("pictures: drew %d settings, left out %d: %s", MAX_GRIDS, len(shown) - MAX_GRIDS, left)
            break
        file = "pictures.png" if len(shown) == 1 else f"pictures_{_file('-'.join(name))}.png"
        if (path := pictures.picture_grid(group, files, out / file)) is not None:
            paths.append(path)
    return paths


def _side_by_side(cells: Sequence[Record], files: Mapping[str, Path], out: Path) -> list[Path]:
    from src.analysis import side_by_side

    groups = side_by_side.groups(cells)
    if len(groups) > MAX_GRIDS:
        left = ", ".join(list(groups)[MAX_GRIDS:])
        log.warning("attacks side by side: drew %d settings, left out %s", MAX_GRIDS, left)
    drawn = [
        side_by_side.side_by_side(group, files, out / f"attacks_{_file(name)}.png")
        for name, group in list(groups.items())[:MAX_GRIDS]
    ]
    return [path for path in drawn if path is not None]


def _file(name: str) -> str:
    """As part of a file's name, which may have 255 bytes: the end of a long one is a digest."""
    plain = re.sub(r"[^\w.=-]+", "_", name)
    return plain if len(plain) <= LONGEST else f"{plain[:LONGEST]}_{content_key(name=name)}"
