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

from benchmarks import attacks, faults, models, sweep


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


def test_the_page_of_speeds_says_what_ours_was_given() -> None:
    page, rows = attacks.OUT.read_text(), models.earlier(attacks.OUT)
    assert attacks.ABOUT in page
    assert "bfloat16" in attacks.ABOUT
    for race in attacks.RACES:
        assert rows[attacks.title(race)][4] == f"attack={race.choice}"


def test_rows_measured_with_weights_stay_where_there_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "attacks.md"
    page.write_text(attacks.OUT.read_text().replace("PGD-40, network holds | robust", "something else | robust"))
    before = models.earlier(page)
    words = ["attacks", "--only", "square", "pgd", "--on", attacks.ROBUST, "--out", str(page)]
    monkeypatch.setattr(sys, "argv", words)
    monkeypatch.setattr(attacks.torch, "set_num_threads", lambda count: None)
    attacks.main()
    after = models.earlier(page)
    pgd, square = [attacks.title(race) for race in attacks.RACES if race.on == attacks.ROBUST][:2]
    assert after[square] == before[square]
    assert pgd not in before
    assert after[pgd][5] == "no weights: --robust-weights"
    assert len(after[pgd]) == len(after[square])
