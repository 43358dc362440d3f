"""Fit-or-load: the only place that knows the cache.

A stage is a folder ``<root>/<kind>/<key>/`` whose name is a hash of what it depends on. It is made in a hidden folder
beside it under a lock and renamed when whole; ``meta.json`` holds a digest of each file, so that damage is noticed.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from src.errors import UserError
from src.keys import file_digest
from src.records import write_whole

log = logging.getLogger(__name__)


class Stages:
    """The stages under one folder."""

    def __init__(self, root: Path, *, plan: bool = False) -> None:
        self.root = root.absolute()
        self.plan = plan  # make nothing, only note what is asked for
        self.asked: dict[str, dict[str, Any]] = {}
        self.folders: list[Path] = []  # of all the stages asked for
        self.used: list[str] = []  # keys of the stages that were found or made
        self.seconds = 0.0  # that finding, making and waiting for them took
        try:
            self.root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"paths.artifacts={root}: cannot be created ({error.strerror}); name a folder you can write to"
            ) from None
        if not os.access(self.root, os.W_OK | os.X_OK):
            raise UserError(f"paths.artifacts={root}: not writable; name a folder you can write to")

    def make(
        self,
        kind: str,
        key: str,
        *,
        what: str,
        build: Callable[[Path], None],
        about: dict[str, Any],
        like: tuple[str, ...] = (),
        images: int = 0,
    ) -> Path:
        """The folder of a stage, found or made.

        Args:
            kind: classifier, defense, examples, …
            key: content key.
            what: words for the log, "classifier cnn3 on digits".
            build: writes the stage's files into the folder it is given. What an earlier, interrupted ``build`` left
                there is still in it.
            about: written to ``meta.json``: what the key was made of, for people and tools.
            like: words for what decides how long ``build`` takes, the weightiest last, by which a plan finds others
                like it; none: no plan goes by it.
            images: how many it goes through, one by one; a plan scales the time by it.
        """
        final = self.root / kind / key
        self.used.append(key)
        self.folders.append(final)
        if self.plan:
            self.asked[key] = {
                "kind": kind, "what": what, "like": like, "images": images, "present": final.exists()
            }  # fmt: skip
            return final
        entered = time.perf_counter()
        final.parent.mkdir(parents=True, exist_ok=True)
        with alone(final.parent / f".{key}.lock", what):
            if self._intact(final):
                log.info("%s: found (%s)", what, key)
            else:
                facts = {"kind": kind, "key": key, "what": what, "like": like, "images": images, "about": about}
                self._build(final, build, facts)
        for folder in self.folders:  # all that the job works with: gc goes by the last use
            with suppress(OSError):  # somebody else's
                os.utime(folder)
        self.seconds += time.perf_counter() - entered
        return final

    def _build(self, final: Path, build: Callable[[Path], None], facts: dict[str, Any]) -> None:
        partial = final.parent / f".{final.name}.partial"
        partial.mkdir(exist_ok=True)
        clear(partial, "meta.json", ".*.part")  # of a try that ended here: no files of the stage
        log.info("%s: making it (%s)%s", facts["what"], final.name, ", resuming" if any(partial.iterdir()) else "")
        beside = [folder.name for folder in self.folders]  # gc leaves alone what the job has and will want again
        write_whole(partial / "meta.json", _json(facts | {"beside": beside}))
        started = time.perf_counter()
        build(partial)
        files = [path for path in sorted(partial.iterdir()) if path.name != "meta.json"]
        made = {
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": round(time.perf_counter() - started, 2),
            "files": {path.name: file_digest(path) for path in files},
        }
        write_whole(partial / "meta.json", _json(facts | made))
        partial.rename(final)

    def _intact(self, folder: Path) -> bool:
        """Whether the stage is there and whole; a damaged one is set aside, never deleted."""
        if not folder.exists():
            return False
        try:
            files = json.loads((folder / "meta.json").read_text())["files"]
            broken = [name for name, digest in files.items() if file_digest(folder / name) != digest]
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            broken = [f"meta.json ({type(error).__name__})"]
        if not broken:
            return True
        aside = folder.with_name(f"{folder.name}.damaged-{time.time_ns()}")
        folder.rename(aside)
        log.warning("%s: damaged (%s); set aside as %s and made again", folder, ", ".join(broken), aside.name)
        return False


def _json(facts: dict[str, Any]) -> bytes:
    return json.dumps(facts, indent=1, default=str).encode()


@contextmanager
def alone(path: Path, what: str) -> Iterator[None]:
    """Hold the lock file ``path``; whoever comes later waits. The system frees the lock of a holder that died.

    The file is removed at the end, while it is held: those who wait for it notice and take a new one.
    """
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        log.info("%s: another process is making it; waiting", what)
        lock.acquire()
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        lock.release()


def clear(folder: Path, *patterns: str) -> None:
    """Remove working files of a build before its folder becomes a stage."""
    for pattern in patterns:
        for path in folder.glob(pattern):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


if __name__ == "__main__":
    import sys

    from src.overview import main

    sys.exit(main())
