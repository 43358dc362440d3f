"""Records survive the disk, and nothing half written is ever read."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest

from src import records as store
from src.errors import UserError
from src.records import Record


def cell(**changes: Any) -> Record:
    values: dict[str, Any] = {
        "key": "k", "dataset": "digits", "classifier": "lenet", "defense": "vae", "attack": "pgd", "norm": "linf",
        "eps": 0.1, "access": "gray_box", "seed": 0, "n": 10, "created": "2026-01-01T00:00:00+00:00",
    }  # fmt: skip
    return Record(**(values | changes))


@pytest.mark.parametrize("eps", [0.0, 8 / 255, math.inf, None])
def test_round_trip(tmp_path: Path, eps: float | None) -> None:
    record = cell(eps=eps, flags=["a", "b"], config={"threat": {"eps": [0.1]}}, clean_accuracy=0.5)
    assert store.load(store.save(record, tmp_path)) == record


def test_newer_schema_is_refused(tmp_path: Path) -> None:
    path = store.save(cell(schema_version=store.SCHEMA_VERSION + 1), tmp_path)
    with pytest.raises(UserError, match="newer"):
        store.load(path)


def test_a_figure_changed_by_hand_is_found_out(tmp_path: Path) -> None:
    path = store.save(cell(n=10, correct_attacked=3), tmp_path)
    path.write_text(path.read_text().replace('"correct_attacked": 3', '"correct_attacked": 9'))
    with pytest.raises(UserError, match="changed since it was written"):
        store.load(path)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"schema_version": "1"}', '{"schema_version": 1}'])
def test_what_is_no_record_is_said_in_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(UserError) as caught:
        store.load(tmp_path / "x.json")
    assert "x.json" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unknown_field_is_refused(tmp_path: Path) -> None:
    path = store.save(cell(), tmp_path)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"colour": "red", "digest": ""}))
    with pytest.raises(UserError, match="colour"):
        store.load(path)


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    path = tmp_path / "file"
    store.write_whole(path, b"old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, step, full)
    with pytest.raises(OSError, match="No space"):
        store.write_whole(path, b"new")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert path.read_bytes() == b"old"


def test_find_takes_each_key_once_and_the_newest(tmp_path: Path) -> None:
    store.save(cell(reason="old"), tmp_path / "0" / "records")
    store.save(cell(reason="new", created="2026-01-02T00:00:00+00:00"), tmp_path / "1" / "records")
    store.save(cell(key="other", eps=0.01), tmp_path / "1" / "records")
    assert [(r.key, r.reason) for r in store.find([tmp_path])] == [("other", ""), ("k", "new")]
    assert len(store.find([tmp_path / "1" / "records"])) == 2, "a records folder itself can be named"
    assert len(store.find([tmp_path / "0" / "records" / "k.json"])) == 1


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    [
        (8, 10, 0.4901625, 0.9433178),  # by the closed form of Wilson (1927) with z = 1.959964
        (0, 10, 0.0, 0.2775328),
        (10, 10, 0.7224672, 1.0),
        (81, 263, 0.2552885, 0.3662096),
        (0, 0, 0.0, 1.0),
    ],
)
def test_wilson(right: int, n: int, low: float, high: float) -> None:
    assert store.wilson(right, n) == pytest.approx((low, high), abs=1e-6)
