"""The benchmarks: that they count what they say they count."""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import faults, sweep


def artifacts_of(arguments: tuple[str, ...]) -> str:
    return next((a for a in reversed(arguments) if a.startswith("paths.artifacts=")), "the default")


def test_the_plan_of_a_benchmark_finds_nothing_that_its_sweep_has_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled: set[str] = set()

    def run(folder: Path, *arguments: str) -> sweep.Cost:
        """In the place of the command: finds cells where others have left some."""
        if "+plan=true" in arguments:
            found = 120 if artifacts_of(arguments) in filled else 0
            (folder / "words.log").write_text(f"10000 cells: {found} found, {10_000 - found} to measure")
        elif "src.train" in arguments:
            filled.add(artifacts_of(arguments))
        return sweep.Cost(1, 1, 1)

    monkeypatch.setattr(sweep, "run", run)
    sweep.sweep(tmp_path, "digits", sweep.QUIET, 2, 0)
    assert len(filled) == 3
    sweep.plan(tmp_path)


def fails(folder: Path, *more: str) -> None:
    """A run that no kill is needed for."""
    sys.exit(3)


def gives_another_code(folder: Path, *more: str) -> None:
    """A run that leaves with 1 when it is interrupted, as one does that nobody has written a farewell for."""
    for number in faults.KILLS[1:]:
        signal.signal(number, lambda *_: os._exit(1))
    time.sleep(30)


@pytest.mark.parametrize(("run", "why"), [(fails, "nothing killed: exit code 3"), (gives_another_code, "exit code 1")])
def test_a_run_that_ends_as_none_should_is_recorded_and_not_started_again(
    run: Callable[..., None], why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(faults, "run", run)
    monkeypatch.setattr(faults, "KILLS", faults.KILLS[1:])  # to SIGKILL no run has an answer
    tally = faults.Tally()
    faults.killed(tmp_path, {}, 1.0, 1000, tally, random.Random(0))
    (line,) = tally.wrong
    assert why in line


def test_runs_that_end_by_the_kill_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tally = faults.Tally()

    def run(folder: Path, *more: str) -> None:
        """Ends by itself once it has been killed often enough."""
        folder.mkdir(exist_ok=True)
        if sum(tally.kills.values()) < 3:
            time.sleep(30)

    monkeypatch.setattr(faults, "run", run)
    faults.killed(tmp_path, {}, 0.3, 3, tally, random.Random(0))
    assert tally.wrong == []
    assert sum(tally.kills.values()) == 3


def test_a_race_prints_what_was_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(folder: Path, *more: str) -> None:
        folder.mkdir()
        (folder / "words.log").write_text("classifier: making it (k1)\nfgsm eps 0.1: robust accuracy 0.5\n")

    monkeypatch.setattr(faults, "run", run)
    tally = faults.Tally()
    faults.raced(tmp_path, {"a": {}}, tally, racers=2)
    assert (tally.twice, tally.doubled) == (1, 1)
    assert "made 1 stages, 2 times in all, and measured 2 times the 1 cells" in capsys.readouterr().out
