"""Records to tables, figures and one page: ``python -m src.report multirun/2026-01-31/12-00-00``.

``python -m src.report wandb PATH...`` logs finished records to Weights & Biases instead. No model is loaded here.
"""

from __future__ import annotations

import argparse
import logging
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from src import records as store
from src import sidecars
from src.checks.across import across
from src.errors import UserError
from src.records import Record

if TYPE_CHECKING:
    from src.frame import Results

log = logging.getLogger(__name__)
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
    """What a job or a sweep leaves: results.csv, results.md, the curve and, where there are examples, pictures.

    Args:
        records: finished and failed cells alike.
        sidecar_folder: folder or folders searched, with all below, for the ``<key>.npz`` of the records.
        out: folder to write into; made if need be.

    Returns:
        The paths written. A sweep over several settings has ``pictures_<setting>.png`` for each of them.
    """
    from src import comparison, frame, tables

    cells = list(records)
    files = sidecars.find([sidecar_folder] if isinstance(sidecar_folder, Path) else sidecar_folder)
    paths = [
        frame.write_csv(cells, out / "results.csv"),
        tables.write_markdown(cells, out / "results.md", comparison.to_markdown(cells, files)),
    ]
    return [*paths, *_curves(cells, out, (".png",)), *_pictures(cells, files, out)]


def write_all(records: Iterable[Record], folders: Sequence[Path], out: Path) -> list[Path]:
    """Everything the command line makes: tables in five formats with the worst cases, curves, pictures, report.html."""
    from src import comparison, frame, latex, page, tables
    from src.analysis.cost import cost_scatter
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
    ]
    paths += [path for path in (cost_scatter(cells, out / f"cost{kind}") for kind in (".png", ".pdf")) if path]
    pictures = [*_pictures(cells, files, out), *_side_by_side(cells, files, out)]
    return [*paths, *pictures, page.write_page(rows, out / "report.html", pictures)]


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


def _pictures(cells: Sequence[Record], files: dict[str, Path], out: Path) -> list[Path]:
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


def _side_by_side(cells: Sequence[Record], files: dict[str, Path], out: Path) -> list[Path]:
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
    """As part of a file's name."""
    return re.sub(r"[^\w.=-]+", "_", name)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit code: 1 for wrong input, told in one line."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return _relog(words[1:]) if words[:1] == ["wandb"] else _report(words)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _report(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m src.report", description=__doc__)
    _paths(parser)
    parser.add_argument("--out", type=Path, help="where to write (default: the first PATH, or the folder it lies in)")
    parser.add_argument("--rows", type=_keys, metavar="KEYS", help="pivot: keys down the side, such as defense")
    parser.add_argument("--cols", type=_keys, metavar="KEYS", help="pivot: keys along the top, such as attack,access")
    parser.add_argument("--value", default="robust_accuracy", help="pivot: the column shown (default: %(default)s)")
    parser.add_argument(
        "--where", action="append", default=[], metavar="KEY=VALUE", help="pivot: these rows only; repeatable"
    )
    options = parser.parse_args(words)
    if (options.cols or options.where) and not options.rows:
        raise UserError("--cols and --where shape a pivot: give --rows as well, such as --rows defense")
    cells = _found(options.paths)
    first: Path = options.paths[0]
    out = options.out or (first if first.is_dir() and first.name != "records" else first.parent)
    if options.rows:
        written = _pivot(options, cells, out)
    else:
        from src.tables import print_table

        print_table(cells)
        written = write_all(cells, options.paths, out)
    for path in written:
        print(path)
    return 0


def _pivot(options: argparse.Namespace, cells: Sequence[Record], out: Path) -> list[Path]:
    from src import frame, pivot
    from src.tables import reading
    from src.worst import worst_cases

    rows = frame.to_frame([*cells, *worst_cases(cells, sidecars.find(options.paths))])
    table = pivot.pivot(pivot.select(rows, options.where), options.rows, options.cols or [], options.value)
    print(table.to_string())
    conditions = f" where {', '.join(options.where)}" if options.where else ""
    return pivot.write(table, out, caption=f"{options.value}{conditions}. {reading(cells).replace('`', '')}")


def _relog(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m src.report wandb", description="Log finished records to Weights & Biases, as if they ran now."
    )
    _paths(parser)
    parser.add_argument("--project", default="parapet", help="W&B project (default: %(default)s)")
    parser.add_argument("--entity", help="W&B user or team (default: that of the login)")
    parser.add_argument("--group", help="name the runs share (default: the name of the first PATH)")
    parser.add_argument(
        "--mode", choices=("offline", "online"), default="offline", help="online sends at once (default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, help="where the runs are written (default: the first PATH)")
    parser.add_argument(
        "--dashboard", action="store_true", help="with --mode online: the workspace of docs/dashboard.md"
    )
    options = parser.parse_args(words)
    if options.dashboard and options.mode != "online":
        raise UserError("--dashboard: a workspace lives on the server; add --mode online")
    cells = _found(options.paths)
    from src import relog
    from src.tracking import group_of

    first: Path = options.paths[0]
    relog.relog(
        cells,
        sidecars.find(options.paths),
        out=options.out or (first if first.is_dir() else first.parent),
        project=options.project,
        entity=options.entity,
        group=options.group or group_of((first if first.is_dir() else first.parent).resolve()),
        mode=options.mode,
    )
    if options.dashboard:
        from src import dashboard

        print(dashboard.save(options.entity, options.project))
    return 0


def _paths(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "paths", nargs="+", type=Path, metavar="PATH", help="output folder of a run or sweep, or a record"
    )


def _keys(text: str) -> list[str]:
    return [key.strip() for key in text.split(",") if key.strip()]


def _found(paths: Sequence[Path]) -> list[Record]:
    for path in paths:
        if not path.exists():
            raise UserError(f"{path}: no such file or folder. Expected the output folder of a run or a sweep")
    cells = across(store.find(paths))
    if not cells:
        names = ", ".join(str(path) for path in paths)
        raise UserError(f"{names}: no records found. Expected a folder that holds records/*.json at some depth")
    return cells


if __name__ == "__main__":
    sys.exit(main())
