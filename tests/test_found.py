"""A record that the cache has: what is looked at again before it counts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest

from src import measure, records
from src.checks.flags import FLAGS
from src.errors import UserError
from tests.conftest import Outcome
from tests.test_keys import planned
from tests.test_pipeline import SMALL, ok

Command = Callable[..., Outcome]


def test_flags_are_raised_by_the_limits_of_today(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = (*SMALL, "defense=none", "attack=fgsm", "threat.eps=0.2", "threat.access=white_box")
    arguments = tuple(item for item in arguments if not item.startswith("attack.steps"))
    (before,) = records.find(ok(command(*arguments)).runs())
    assert before.flags == ["few_images"]
    monkeypatch.setitem(FLAGS, "few_images", dataclasses.replace(FLAGS["few_images"], limit=1.0))
    (after,) = records.find(ok(command(*arguments)).runs()[-1:])
    assert after == before.model_copy(update={"flags": []})


def test_a_damaged_record_that_another_job_has_set_aside_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    bench, path = planned("defense=none", "attack=fgsm"), tmp_path / "x.json"

    def taken(path: Path) -> None:
        path.unlink()
        raise UserError(f"{path}: damaged")

    monkeypatch.setattr(measure.records, "load", taken)
    path.write_text("{}")
    assert bench._found(path) is None
    assert list(tmp_path.glob("x.json*")) == []
