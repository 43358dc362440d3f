"""A record that the cache has: what is looked at again before it counts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from src import measure, records, sidecars
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


def test_a_cell_that_was_called_otherwise_is_not_measured_again(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = (*SMALL, "defense=jpeg", "threat.eps=0.2", "threat.access=[gray_box,white_box]")
    before = records.find(ok(command(*arguments)).runs())
    said = (*arguments, "defense.quality=75")  # which it is anyway

    def never(*arguments: Any) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(measure.Bench, "_measured", never)
    assert "2 cells: 2 found, 0 to measure" in ok(command(*said, "+plan=true")).out
    after = records.find(ok(command(*said)).runs()[-1:])
    named = sorted([*before[0].variant.split(","), "defense.quality=75"])
    assert {record.variant for record in after} == {",".join(named)}
    for one, other in zip(before, after, strict=True):
        assert other.key != one.key
        same = {"key": one.key, "variant": one.variant, "config": one.config}
        assert other.model_copy(update=same) == one
    assert sidecars.verdicts(after[0], Path("artifacts/records", f"{after[0].key}.npz")) is not None
