"""The benchmarks: that they count what they say they count."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import sweep


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
