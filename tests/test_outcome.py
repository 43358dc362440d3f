"""From verdicts to a record: ten images counted by hand."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from src import records, sidecars
from src.attacked import _within
from src.audit import composed
from src.config import Job
from src.outcome import Table, to_record, to_sidecar
from src.records import Record, wilson
from src.threat import Access, Norm, ThreatModel
from tests.conftest import Linear
from tests.test_detection import Brightness, frozen
from tests.test_pipeline import QUIET

# Ten images of class 0; class 3 is rejection. What becomes of each is said beside it.
BARE = [0, 0, 0, 0, 0, 1, 1, 0, 0, 0]  # 5 and 6 are not attacked
CLEAN = [0, 0, 0, 3, 0, 1, 0, 0, 1, 0]  # 3 is rejected before any attack, 8 lost by the defense
MADE = [1, 1, 1, 1, 0, 1, 1, 1, 0, 1]  # of 4 and 8 the attack fails on the bare classifier
SEEN = [3, 1, 0, 3, 3, 1, 1, 2, 1, 1]  # 0, 2 and 4 hold: rejected, right again, rejected
BEHIND = [1, 1, 0, 1, 0, 1, 1, 2, 1, 1]
SUSPICION = [1.5, 0.9, 0.2, 1.3, 1.1, 0.6, 0.3, 0.7, 0.1, 0.8]
BEFORE = [0.1, 0.2, 0.4, 1.2, 0.5, 0.6, 0.35, 0.25, 0.15, 0.45]


def tables() -> dict[str, Table]:
    label, nothing = torch.zeros(10, dtype=torch.int64), torch.zeros(10)
    tried = torch.tensor(BARE) == 0
    clean = {
        "index": torch.arange(10), "label": label, "bare": torch.tensor(BARE), "defended": torch.tensor(CLEAN),
        "rejected": torch.tensor(CLEAN) == 3, "suspicion": torch.tensor(BEFORE), "seconds": nothing,
    }  # fmt: skip
    made = {
        "label": label, "prediction": torch.tensor(MADE), "reached": torch.tensor(MADE), "attempted": tried,
        "success": tried & (torch.tensor(MADE) == 1) & (torch.arange(10) != 9),  # 9 became another class than asked for
        "distance": torch.tensor([0.1, 0.2, 0.3, 0.3, 0.2, 0.0, 0.0, 0.3, 0.3, 0.3]), "attack_seconds": nothing,
        "forward_passes": torch.where(tried, 8, 1), "backward_passes": torch.where(tried, 4, 0),
    }  # fmt: skip
    images = torch.rand(10, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    seen = {
        "label": label, "prediction": torch.tensor(SEEN), "behind": torch.tensor(BEHIND),
        "rejected": torch.tensor(SEEN) == 3, "suspicion": torch.tensor(SUSPICION), "clean": images, "image": images,
    }  # fmt: skip
    return {"clean": clean, "made": made, "seen": seen}


@cache
def job() -> Job:
    return composed([*QUIET])[0]


def counted(told: dict[str, Table], access: Access = Access.GRAY_BOX, *, targeted: bool = False) -> Record:
    threat = ThreatModel(norm=Norm.LINF, eps=0.3, targeted=targeted)
    names = {name: name for name in ("key", "dataset", "classifier", "defense", "attack")}
    return to_record(job(), **told, threat=threat, access=access, checks={}, **names)


def test_every_figure_of_a_record_by_hand(tmp_path: Path) -> None:
    told = tables()
    record = counted(told)
    found = {
        "n": 10, "correct_bare": 8, "correct_defended": 7, "correct_attacked": 3, "correct_attacked_bare": 2,
        "clean_accuracy": 0.8, "clean_accuracy_defended": 0.7, "robust_accuracy": 0.3, "robust_accuracy_bare": 0.2,
        "attack_success_rate": 3 / 6,  # 1, 7, 9 of the six that were right with and without the defense
        "clean_rejected": 0.1, "accepted_wrong": 0.6,
        "detection_n": 5, "detection_tpr": 1 / 5,  # 0 of 0, 1, 6, 7, 9
        "detection_auc": (10 + 9 + 4 + 9 + 9) / 50,
        "distance_median": 0.3, "distance_max": 0.3, "forward_passes": 8, "backward_passes": 4,
    }  # fmt: skip
    assert {name: getattr(record, name) for name in found} == pytest.approx(found)
    low, high = wilson(3, 10)
    assert (record.robust_accuracy_low, record.robust_accuracy_high) == (low, high)
    assert record.checks["few_images"] == pytest.approx(high - low, abs=1e-6)
    assert counted(told, targeted=True).attack_success_rate == pytest.approx(1 / 6)  # image 1 is what was asked for
    assert counted(told, Access.TRANSFER).correct_attacked_bare is None
    some = told["made"] | {"found": torch.arange(10) < 2}
    assert counted(told | {"made": some}).distance_max == pytest.approx(0.2)  # of a search, where it found something

    # The verdicts beside a record are those that it counts.
    classifier = Linear(classes=3)
    defended = frozen(Brightness().guard(classifier), told["seen"]["image"])
    path = tmp_path / "key.npz"
    records.save_sidecar(path, to_sidecar(job(), ("a", "b", "c"), classifier, defended, **told))
    verdicts = sidecars.verdicts(record, path)
    assert verdicts is not None
    assert verdicts.right.nonzero()[0].tolist() == [0, 1, 2, 4, 6, 7, 9]
    assert verdicts.held.nonzero()[0].tolist() == [0, 2, 4]
    kept = sidecars.read(path, ("picture_label",))
    assert kept is not None
    assert len(kept["picture_label"]) == 6  # right with and without the defense


def test_a_target_is_reached_where_the_draw_that_counts_says_it_too() -> None:
    """Of a random model ``prediction`` is what the draw that counts says, ``reached`` what the mean of draws says."""
    told = tables()
    told["made"]["prediction"] = told["seen"]["prediction"]
    assert counted(told, Access.WHITE_BOX, targeted=True).attack_success_rate == pytest.approx(1 / 6)


def test_without_a_detector_what_is_right_has_held() -> None:
    """Also an image that the model got wrong before: it is counted as it is seen."""
    told = tables()
    plain = {name: told["seen"][name] for name in ("label", "prediction", "clean", "image")}
    record = counted(told | {"seen": plain})
    assert (record.correct_attacked, record.clean_rejected, record.detection_auc) == (1, None, None)


def test_of_a_search_only_what_lies_within_eps_is_shown() -> None:
    def column(*values: Any) -> Tensor:
        return torch.tensor(values)

    clean, image = torch.zeros(3, 1, 2, 2), torch.ones(3, 1, 2, 2)
    table = {
        "label": column(0, 0, 0), "prediction": column(1, 1, 2), "behind": column(1, 1, 1), "clean": clean,
        "rejected": column(False, False, True), "success": column(True, True, True), "image": image,
        "distance": column(0.2, 0.4, 0.4),
    }  # fmt: skip
    near = _within(table, ThreatModel(norm=Norm.LINF, eps=0.2))
    assert near["prediction"].tolist() == near["behind"].tolist() == [1, 0, 0]
    assert near["rejected"].tolist() == [False] * 3
    assert near["success"].tolist() == [True, False, False]
    assert near["found"].tolist() == [True] * 3
    assert near["image"].amax(dim=(1, 2, 3)).tolist() == [1, 0, 0]
    assert torch.equal(near["distance"], table["distance"])
