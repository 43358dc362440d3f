"""SIGTERM, as Slurm and spot machines send it: leave as after Ctrl-C, with all that is whole kept."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

INTERRUPTED = "interrupted; run the same command again to go on from here"
TERMINATED = "terminated (SIGTERM); run the same command again to go on from the last whole epoch"


class Terminated(KeyboardInterrupt):
    """SIGTERM came. Whoever cleans up after Ctrl-C cleans up after it."""


def farewell(error: KeyboardInterrupt) -> tuple[str, int]:
    """The line and the exit code to leave with: 128 and the number of the signal, as shells count."""
    return (TERMINATED, 143) if isinstance(error, Terminated) else (INTERRUPTED, 130)


@contextmanager
def on_sigterm() -> Iterator[None]:
    """Raise :class:`Terminated` where SIGTERM finds us; the handler of someone else, such as submitit's, stays."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return

    def leave(*_: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one must not end the cleaning up
        raise Terminated

    signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
