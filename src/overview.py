"""What lies in the cache: ``python -m src.stages ls``, ``verify`` and ``gc``."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from src import records as store
from src.errors import UserError
from src.keys import file_digest
from src.records import Record

YOUNG = 24  # hours after its last use in which gc takes a stage for one that a job still needs, its record to come


@dataclass
class Stage:
    """One folder of the cache, or what is left of one."""

    path: Path
    kind: str
    key: str
    size: int  # bytes
    what: str = ""
    created: str = ""
    seconds: float = 0.0
    files: dict[str, str] = field(default_factory=dict)  # name → digest
    reads: list[str] = field(default_factory=list)  # keys of the stages it was made from
    users: list[Record] = field(default_factory=list)  # that need it, themselves or through another stage
    leftover: str = ""  # why it is no stage: interrupted, set aside as damaged, without a readable meta.json


def scan(root: Path, cells: Iterable[Record] = ()) -> list[Stage]:
    """Everything under ``root`` but the records, each with those of the ``cells`` that need it."""
    if not root.is_dir():
        raise UserError(f"{root}: no such folder. Expected the artifacts of earlier runs: --artifacts DIR")
    stages = [
        _stage(path) for kind in sorted(root.iterdir()) if kind.is_dir() and kind.name != "records"
        for path in sorted(kind.iterdir()) if path.is_dir()
    ]  # fmt: skip
    whole = {stage.key: stage for stage in stages if not stage.leftover}
    for stage in stages:
        stage.reads = [key for key in stage.reads if key in whole and key != stage.key]
    for cell in {cell.key: cell for cell in cells}.values():  # that of a run is a copy of the cached one
        # Records of earlier versions name the models only.
        for key in _reachable(cell.uses or cell.stages.values(), whole):
            whole[key].users.append(cell)
    return stages


def _stage(path: Path) -> Stage:
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    stage = Stage(path=path, kind=path.parent.name, key=path.name, size=size)
    if ".damaged-" in path.name:
        stage.leftover = "damaged, set aside"
        return stage
    if path.name.startswith("."):
        stage.leftover = "interrupted; running the same command again goes on from it"
    try:
        meta = json.loads((path / "meta.json").read_text())
        stage.what, stage.reads = meta["what"], sorted({*_texts(meta["about"]), *meta.get("beside", ())})
        if not stage.leftover:
            stage.created, stage.seconds, stage.files = meta["created"], float(meta["seconds"]), dict(meta["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        stage.leftover = stage.leftover or f"meta.json cannot be read ({type(error).__name__})"
    return stage


def _texts(value: Any) -> Iterator[str]:
    """All strings inside JSON: among them the keys of other stages."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _texts(part)


def _reachable(keys: Iterable[str], stages: dict[str, Stage]) -> set[str]:
    found: set[str] = set()
    waiting = [key for key in keys if key in stages]
    while waiting:
        key = waiting.pop()
        if key not in found:
            found.add(key)
            waiting += stages[key].reads
    return found


def _spared(stages: Sequence[Stage]) -> set[str]:
    """Keys of what was made, used or worked at lately or is being made, and of the stages that this needs."""
    whole = {stage.key: stage for stage in stages if not stage.leftover}
    # A checkpoint is written over the one before, of which the folder's own time knows nothing.
    used = {s.key: max(path.stat().st_mtime for path in (s.path, *s.path.rglob("*"))) for s in stages}
    since = time.time() - YOUNG * 3600
    young = [stage for stage in stages if used[stage.key] > since or _held(stage)]
    return {stage.key for stage in young} | _reachable([key for stage in young for key in stage.reads], whole)


def _held(stage: Stage) -> bool:
    """Whether a process is making this stage right now."""
    key = stage.key.removeprefix(".").removesuffix(".partial")
    path = stage.path.with_name(f".{key}.lock")
    if not path.exists():
        return False
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return True
    lock.release()
    return False


def damage(stage: Stage) -> list[str]:
    """Files of a stage that are gone or differ from what was written."""
    return [
        name for name, digest in stage.files.items()
        if not (stage.path / name).is_file() or file_digest(stage.path / name) != digest
    ]  # fmt: skip


def human(size: int) -> str:
    """Bytes for people."""
    value, units = float(size), ["B", "KiB", "MiB", "GiB", "TiB"]
    while value >= 1024 and len(units) > 1:
        value, units = value / 1024, units[1:]
    return f"{value:.0f} {units[0]}" if units[0] == "B" else f"{value:.1f} {units[0]}"


def _print(stages: Sequence[Stage]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None)
    for name in ("kind", "key", "what", "made from", "made in", "size", "records"):
        table.add_column(name, justify="right" if name in ("made in", "size", "records") else "left")
    for stage in stages:
        reads = ", ".join(stage.reads) or "-"
        table.add_row(stage.kind, stage.key, stage.leftover or stage.what, reads, f"{stage.seconds:.0f} s",
                      human(stage.size), str(len(stage.users)))  # fmt: skip
    Console(width=None if sys.stdout.isatty() else 200).print(table)


def _print_users(stages: Sequence[Stage], keys: Sequence[str]) -> None:
    if unknown := sorted(set(keys) - {stage.key for stage in stages}):
        raise UserError(f"ls {' '.join(unknown)}: no such stage. Expected keys that ls shows")
    for stage in stages:
        if stage.key in keys:
            _print([stage])
            for cell in sorted(stage.users, key=store.order):
                variant = f" {cell.variant}" if cell.variant else ""
                print(f"  {cell.key}: {cell.dataset} {cell.classifier} {cell.defense} {cell.attack} {cell.norm} "
                      f"eps {cell.eps:.4g} {cell.access} seed {cell.seed}{variant}")  # fmt: skip


def read_records(root: Path, more: Sequence[Path] = ()) -> tuple[list[Record], list[str]]:
    """Records of the cache and of other folders, and one line for each file that is none."""
    cells, broken = [], []
    for folder in [root / "records", *more]:
        for path in sorted(folder.rglob("*.json")):
            if path.parent.name != "records":
                continue
            try:
                cells.append(store.load(path))
            except UserError as error:
                broken.append(str(error))
    return cells, broken


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit code: 1 for wrong input or, from verify, damage."""
    parser = argparse.ArgumentParser(prog="python -m src.stages", description="What lies in the cache of stages.")
    parser.add_argument("command", choices=["ls", "verify", "gc"], help="list; compare files with their digests; free")
    parser.add_argument(
        "keys", nargs="*", metavar="KEY", help="ls: these stages alone, with the records that need them"
    )
    parser.add_argument("--artifacts", type=Path, default=Path("artifacts"), help="the cache (default: artifacts)")
    parser.add_argument("--records", type=Path, nargs="*", default=[], metavar="DIR",
                        help="further folders whose records keep stages alive, such as multirun/")  # fmt: skip
    parser.add_argument("--yes", action="store_true", help="gc: free what it shows")
    options = parser.parse_args(arguments)
    try:
        if options.keys and options.command != "ls":
            raise UserError(f"{options.command} {options.keys[0]}: only ls takes keys; {options.command} takes none")
        if lacking := [folder for folder in options.records if not folder.is_dir()]:
            raise UserError(f"--records {lacking[0]}: no such folder. Expected one with records, such as multirun")
        cells, broken = read_records(options.artifacts, options.records)
        stages = scan(options.artifacts, cells)
        if options.command == "verify":
            return _verify(stages, broken + _without_verdicts(options.artifacts / "records", cells))
        if options.command == "gc":
            return _gc(stages, broken, yes=options.yes)
        if options.keys:
            _print_users(stages, options.keys)
        else:
            _print(stages)
            print(f"{len(stages)} stages, {human(sum(stage.size for stage in stages))}; {len(cells)} records")
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _gc(stages: Sequence[Stage], broken: Sequence[str], *, yes: bool) -> int:
    """Show, or free, what no record needs and no job is at work with."""
    if broken:
        print("\n".join(broken))
        raise UserError(
            "gc: what the records above need is not known. Delete them, or run the commands that made them "
            "again, then gc"
        )
    spared = _spared(stages)
    unused = [stage for stage in stages if not stage.users]
    free = [stage for stage in unused if stage.key not in spared]
    _print(free)
    total = human(sum(stage.size for stage in free))
    if kept := len(unused) - len(free):
        print(f"{kept} that no record needs are spared: made in the last {YOUNG} hours, used then, or needed for what "
              "is being made")  # fmt: skip
    if not free:
        print("nothing to free: every other stage is needed by a record" if kept else
              "nothing to free: every stage is needed by a record")  # fmt: skip
    elif not yes:
        print(f"{len(free)} that no record needs, {total}. Free them with the same command and --yes")
    else:
        for stage in free:
            shutil.rmtree(stage.path)
        print(f"freed {total}")
    return 0


def _without_verdicts(folder: Path, cells: Iterable[Record]) -> list[str]:
    """One line for each cached record whose verdicts of the images, in the file beside it, are gone or damaged."""
    found = []
    for key in sorted({cell.key for cell in cells if cell.status == "done"}):
        if (folder / f"{key}.json").exists():  # other folders of records may lack what only figures need
            try:
                store.check_sidecar(folder / f"{key}.npz")
            except UserError as error:
                found.append(str(error))
    return found


def _verify(stages: Sequence[Stage], broken: Sequence[str]) -> int:
    faults = list(broken)
    for stage in stages:
        if stage.leftover:
            print(f"{stage.path}: {stage.leftover}")
        elif names := damage(stage):
            faults.append(f"{stage.path}: damaged: {', '.join(names)}")
    for fault in faults:
        print(fault)
    whole = sum(1 for stage in stages if not stage.leftover)
    print(f"{whole} stages and their records: {len(faults) or 'no'} damaged")
    if faults:
        print("Run the command that made them again: what is damaged is set aside and made anew.")
    return 1 if faults else 0
