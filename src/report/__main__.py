"""The command: ``python -m src.report multirun/2026-01-31/12-00-00``, a report from records alone.

``python -m src.report wandb PATH...`` logs finished records to Weights & Biases instead. No model is loaded here.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from src import records as store
from src import retry, sidecars
from src.checks.across import across
from src.errors import UserError
from src.records import Record
from src.report import draw_sweep, write_all


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
    parser.add_argument("--value", metavar="COLUMN", help="pivot: the column shown (default: robust_accuracy)")
    parser.add_argument(
        "--where", action="append", default=[], metavar="KEY=VALUE", help="pivot: these rows only; repeatable"
    )
    options = parser.parse_args(words)
    if (options.cols or options.where or options.value) and not options.rows:
        raise UserError("--cols, --value and --where shape a pivot: give --rows as well, such as --rows defense")
    options.value = options.value or "robust_accuracy"
    cells = _found(options.paths)
    out = options.out or _folder(options.paths[0])
    if options.rows:
        written = _pivot(options, cells, out)
    else:
        from src.terminal import print_table

        print_table(cells)
        written = write_all(cells, options.paths, out)
    for path in written:
        print(path)
    return 0


def _pivot(options: argparse.Namespace, cells: Sequence[Record], out: Path) -> list[Path]:
    from src import frame
    from src.report import pivot
    from src.tables import reading
    from src.worst import worst_cases

    everything = [*cells, *worst_cases(cells, sidecars.find(options.paths))]
    chosen = pivot.select(frame.to_frame(everything), options.where)
    table = pivot.pivot(chosen, options.rows, options.cols or [], options.value)
    told = [record for record in everything if record.key in set(chosen["key"])]
    print(table.to_string())
    conditions = f" where {', '.join(options.where)}" if options.where else ""
    return pivot.write(table, out, caption=f"{options.value}{conditions}. {reading(told).replace('`', '')}")


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
    parser.add_argument(
        "--out", type=Path, help="where to write the runs (default: the first PATH, or the folder it lies in)"
    )
    parser.add_argument(
        "--dashboard", action="store_true", help="with --mode online: the workspace of docs/dashboard.md"
    )
    options = parser.parse_args(words)
    if options.dashboard and options.mode != "online":
        raise UserError("--dashboard: a workspace lives on the server; add --mode online")
    cells = _found(options.paths)
    from src.tracking import group_of, relog

    folders = [_folder(path) for path in options.paths]
    files = sidecars.find(options.paths)
    with tempfile.TemporaryDirectory() as scratch:
        relog.relog(
            cells,
            files,
            retry.marked(folders),
            folders=folders,
            pictures=draw_sweep(cells, files, Path(scratch)),
            out=options.out or folders[0],
            project=options.project,
            entity=options.entity,
            group=options.group or group_of(folders[0].resolve()),
            mode=options.mode,
        )
    if options.dashboard:
        from src.tracking import dashboard

        print(dashboard.save(options.entity, options.project))
    return 0


def _paths(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "paths", nargs="+", type=Path, metavar="PATH", help="output folder of a run or sweep, or a record"
    )


def _folder(path: Path) -> Path:
    """Where the output about it belongs: in a folder ``records`` it would lie among them."""
    folder = path if path.is_dir() else path.parent
    return folder.parent if folder.name == "records" else folder


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
