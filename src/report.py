"""Records to tables and figures: ``python -m src.report multirun/2026-01-31/12-00-00``."""

from __future__ import annotations

import argparse
import logging
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from src import records as store
from src.checks.across import across
from src.errors import UserError
from src.records import Record

log = logging.getLogger(__name__)
MAX_GRIDS = 12  # picture grids of one report; a sweep over more settings says which it left out


def write_report(records: Iterable[Record], sidecar_folder: Path | Iterable[Path], out: Path) -> list[Path]:
    """Write results.csv, results.md, robustness_curve.png and, where there are examples, pictures.png.

    Args:
        records: finished and failed cells alike.
        sidecar_folder: folder or folders searched, with all below, for the ``<key>.npz`` of the records.
        out: folder to write into; made if need be.

    Returns:
        The paths written. A sweep over several settings has ``pictures_<setting>.png`` for each of them.
    """
    from src import comparison, frame, tables
    from src.analysis import curves, pictures

    cells = list(records)
    files = pictures.sidecars([sidecar_folder] if isinstance(sidecar_folder, Path) else sidecar_folder)
    further = comparison.to_markdown(cells, files)
    paths = [frame.write_csv(cells, out / "results.csv"), tables.write_markdown(cells, out / "results.md", further)]
    if any(r.status == "done" for r in cells):
        paths.append(curves.robustness_curve(cells, out / "robustness_curve.png"))
    shown = {name: group for name, group in pictures.groups(cells).items() if pictures.choose(group, files)}
    for number, (name, group) in enumerate(shown.items()):
        if number == MAX_GRIDS:
            left = ", ".join("-".join(n) for n in list(shown)[MAX_GRIDS:])
            log.warning("pictures: drew %d settings, left out %d: %s", MAX_GRIDS, len(shown) - MAX_GRIDS, left)
            break
        setting = re.sub(r"[^\w.=-]+", "_", "-".join(name))
        file = "pictures.png" if len(shown) == 1 else f"pictures_{setting}.png"
        if (path := pictures.picture_grid(group, files, out / file)) is not None:
            paths.append(path)
    return paths


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit code: 1 for wrong input, told in one line."""
    parser = argparse.ArgumentParser(prog="python -m src.report", description=__doc__)
    parser.add_argument(
        "paths", nargs="+", type=Path, metavar="PATH", help="output folder of a run or sweep, or a record"
    )
    parser.add_argument("--out", type=Path, help="where to write (default: the first PATH, or the folder it lies in)")
    options = parser.parse_args(arguments)
    try:
        for path in options.paths:
            if not path.exists():
                raise UserError(f"{path}: no such file or folder. Expected the output folder of a run or a sweep")
        cells = across(store.find(options.paths))
        if not cells:
            names = ", ".join(str(path) for path in options.paths)
            raise UserError(f"{names}: no records found. Expected a folder that holds records/*.json at some depth")
        first: Path = options.paths[0]
        beside = first if first.is_dir() and first.name != "records" else first.parent
        folders = [path if path.is_dir() else path.parent for path in options.paths]
        from src.tables import print_table

        print_table(cells)
        for written in write_report(cells, folders, options.out or beside):
            print(written)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
