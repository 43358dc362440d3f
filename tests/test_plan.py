"""``+plan=true``: what would be done, before it is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from src.plan import Plan, report
from src.records import Record
from tests.conftest import Outcome
from tests.test_pipeline import SMALL, ok

Command = Callable[..., Outcome]
CELLS = ("threat.eps=[0.1,0.2]", "threat.access=[gray_box,white_box]")


def test_a_plan_makes_nothing_and_is_kept_to(command: Command, tmp_path: Path) -> None:
    before = ok(command(*SMALL, *CELLS, "+plan=true")).out
    assert "4 cells: 0 found, 4 to measure" in before
    assert "4 stages: 0 found, 4 to make" in before  # classifier, defense, examples of two eps
    assert not list((tmp_path / "artifacts").rglob("*.pt"))
    ok(command(*SMALL, *CELLS))
    after = ok(command(*SMALL, *CELLS, "+plan=true")).out
    assert "4 cells: 4 found, 0 to measure" in after
    assert "2 stages: 2 found, 0 to make" in after  # the examples are not asked for again
    more = ok(command(*SMALL, CELLS[1], "threat.eps=[0.1,0.3]", "+plan=true")).out
    assert "4 cells: 2 found, 2 to measure" in more
    assert "1 to make" in more
    assert "by what such cells and stages took so far" in more


def test_a_sweep_counts_what_its_jobs_share_once(command: Command) -> None:
    swept = ok(command("-m", *SMALL, *CELLS, "defense=none,vae,feature_squeezing", "+plan=true")).out
    assert "12 cells: 0 found, 12 to measure" in swept
    # a classifier, a VAE, the examples of two eps
    assert "4 stages: 0 found, 4 to make" in swept


def test_time_is_that_of_the_most_alike() -> None:
    def cell(**changes: object) -> dict[str, object]:
        known = {"dataset": "d", "attack": "pgd", "defense": "vae", "access": "white_box", "present": False}
        return known | changes

    def took(seconds: float, **changes: object) -> Record:
        shape = {name: value for name, value in cell(**changes).items() if name != "present"}
        more = {"key": "k", "classifier": "c", "norm": "linf", "eps": 0.1, "seed": 0, "wall_seconds": seconds}
        return Record(**shape, **more)  # type: ignore[arg-type]

    records = [took(100.0), took(200.0), took(5.0, access="gray_box"), took(1000.0, attack="square")]
    plan = Plan(cells={"a": cell(), "b": cell(access="gray_box"), "c": cell(defense="other"), "d": cell(present=True)})
    # 150 (median of the same), 5, 100 (median of pgd on d); the one that is there costs nothing
    assert "about 4 min" in report(plan, records, [])
    plan = Plan(stages={"s": {"kind": "classifier", "what": "classifier x on d", "present": False}})
    assert "about 40 s" in report(plan, [], [{"kind": "classifier", "what": "classifier y on d", "seconds": 40}])
    assert "1 of which nothing is known yet" in report(plan, [], [])
