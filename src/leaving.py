"""Ctrl-C, and SIGTERM as Slurm and spot machines send it: leave with all that is whole kept."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

INTERRUPTED = "interrupted; run the same command again to go on from here"
TERMINATED = "terminated (SIGTERM); run the same command again to go on from the last whole epoch"

_USUAL = {signal.SIGTERM: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler}
_told: KeyboardInterrupt | None = None  # by the signal that came last


class Terminated(KeyboardInterrupt):
    """SIGTERM came. Whoever cleans up after Ctrl-C cleans up after it."""


def farewell(error: KeyboardInterrupt) -> tuple[str, int]:
    """The line and the exit code to leave with: 128 and the number of the signal, as shells count."""
    return (TERMINATED, 143) if isinstance(error, Terminated) else (INTERRUPTED, 130)


def or_leave(error: Exception) -> None:
    """Leave all the same where ``error`` is what a library has made of the signal's exception."""
    if _told is not None:
        raise _told from error


@contextmanager
def on_signals() -> Iterator[None]:
    """Raise :class:`Terminated` where SIGTERM finds us, KeyboardInterrupt on Ctrl-C.

    The handler of someone else, such as submitit's, stays.
    """
    global _told
    main = threading.current_thread() is threading.main_thread()
    ours = {number: usual for number, usual in _USUAL.items() if main and signal.getsignal(number) == usual}

    def leave(number: int, _: Any) -> None:
        global _told
        if number == signal.SIGTERM:
            signal.signal(number, signal.SIG_IGN)  # a second one must not end the cleaning up
        _told = Terminated() if number == signal.SIGTERM else KeyboardInterrupt()
        raise _told

    for number in ours:
        signal.signal(number, leave)
    try:
        yield
    except Exception as error:
        or_leave(error)
        raise
    finally:
        for number, usual in ours.items():
            signal.signal(number, usual)
            _told = None
