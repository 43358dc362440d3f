"""What a run on Weights & Biases holds of finished cells: the same whether they have just been measured or long since.

A run is a job: the cells of one config, which differ in eps and access. Its id is made of that config, so a job that
goes on later, or is logged again from its folder, continues its run.
"""

from __future__ import annotations

import logging
import math
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from src.checks.flags import unreliable, why_unreliable
from src.keys import content_key
from src.records import Record
from src.tracking import NoTracker, Tracker
from src.variant import beside

log = logging.getLogger(__name__)
# Where and how a job runs, not what it is; of trainer and callbacks, what changes a training counts all the same.
_BESIDE = ("logger", "callbacks", "trainer", "paths", "plan", "analysis")
_NETWORKS = ("classifier", "surrogate")
_NAMES = ("dataset", "classifier", "defense", "attack", "variant")


def run_id(names: Mapping[str, str], config: Mapping[str, Any]) -> str:
    """Of the job with these names and this config, which may have an id of the user's."""
    return (config.get("logger") or {}).get("run_id") or content_key(
        names={name: names.get(name, "") for name in _NAMES},
        config={name: value for name, value in config.items() if name not in _BESIDE} | beside(config),
    )


def log_job(tracker: NoTracker, records: Sequence[Record], config: Mapping[str, Any], pictures: Iterable[Path]) -> None:
    """Config, training curves, accuracy over eps, table, pictures and summary of one job."""
    from src.analysis import training

    first = records[0]
    cell = {name: getattr(first, name) for name in (*_NAMES, "norm", "seed")}
    tracker.log_config({**config, "cell": cell})
    root = Path(str((config.get("paths") or {}).get("artifacts", "artifacts")))
    for prefix, stage in _trainings(first, root):
        tracker.log_curves(training.read(stage / "metrics.csv"), prefix)
    tracker.log_radii(_radii(records))
    tracker.log_table(records)
    for path in pictures:
        tracker.log_image(path.stem, path)
    tracker.summary(_summary(records))


def results_id(folders: Iterable[Path]) -> str:
    """Of the run ``results`` of these sweeps; two of one group and name are told apart by where they lie."""
    return content_key(results_of=sorted({str(folder.resolve()) for folder in folders}))


def log_results(
    tracker: NoTracker, records: Sequence[Record], files: Mapping[str, Path], pictures: Iterable[Path]
) -> None:
    """Table with the worst cases, pictures and counts of a whole sweep."""
    from src.worst import worst_cases

    tracker.log_table([*records, *worst_cases(records, files)])
    for path in pictures:
        tracker.log_image(path.stem, path)
    tracker.summary(counts(records))


def _trainings(record: Record, root: Path) -> list[tuple[str, Path]]:
    """The stages that a cell's models were trained in, with the prefix of their curves.

    A surrogate lies among the classifiers. The key of a detector or a chain is made of others, which ``uses`` names;
    records of earlier versions do not say which part of a chain is which.
    """
    bare = [(kind, root / "classifier" / key) for kind, key in record.stages.items() if kind in _NETWORKS]
    labelled = [(name, root / "defense" / key) for name, key in record.stages.items() if name.startswith("defense_")]
    keys = sorted({*record.uses, *record.stages.values()})
    parts = [root / "defense" / key for key in keys if key and (root / "defense" / key).is_dir()]
    several = len(parts) > 1
    numbered = [(f"defense_{place}" if several else "defense", part) for place, part in enumerate(parts, 1)]
    return [*bare, *(labelled or numbered)]


def relog(
    records: Sequence[Record],
    files: Mapping[str, Path],
    made: Iterable[tuple[Iterable[str], Mapping[str, Any]]],
    *,
    folders: Iterable[Path],
    pictures: Iterable[Path],
    out: Path,
    project: str,
    entity: str | None,
    group: str,
    mode: Literal["offline", "online"],
) -> None:
    """Log finished records as runs of one group, a run a job, and the whole table as the run ``results``.

    Args:
        records: cells; those that failed stand in the table only.
        files: key of a record → its sidecar, for the pictures.
        made: keys of the records and config of each job that is known. A cell of none of them belongs to the job that
            measured it, which may have been another than the one whose folder it was found in.
        folders: where they were found, by which the run ``results`` is known.
        pictures: of all of them together, which that run shows.
        out: the runs lie in its ``wandb`` folder; `wandb sync` sends those made offline.
    """
    from src.analysis import curves
    from src.analysis.pictures import picture_grid

    jobs = _jobs([record for record in records if record.status == "done"], made)
    common: dict[str, Any] = {
        "project": project, "entity": entity, "group": group, "mode": mode, "dir": str(out),
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        for key, (config, cells) in jobs.items():
            first = cells[0]
            drawn = [curves.robustness_curve(cells, Path(scratch) / key / "robustness_curve.png")]
            grid = picture_grid(cells, files, Path(scratch) / key / "pictures.png")
            tags = [first.dataset, first.classifier, *first.defense.split("+"), first.attack]
            tags += sorted({r.access for r in cells})
            name = f"{first.defense} {first.attack} {first.norm}"
            with Tracker(**common, name=name, tags=tags, run_id=key) as tracker:
                log_job(tracker, cells, config, [*drawn, *([grid] if grid else [])])
        with Tracker(**common, name="results", tags=["results"], run_id=results_id(folders)) as tracker:
            log_results(tracker, records, files, pictures)
    print(f"{len(jobs) + 1} runs of group {group} in {out / 'wandb'}")
    if mode == "offline":
        print(f"send them with: wandb sync {out / 'wandb'}/offline-run-*")


def _jobs(
    records: Sequence[Record], made: Iterable[tuple[Iterable[str], Mapping[str, Any]]]
) -> dict[str, tuple[Mapping[str, Any], list[Record]]]:
    """Id of a run → config and cells of its job."""
    places = {record.key: place for place, record in enumerate(records)}
    owned = [(sorted(places[key] for key in keys if key in places), config) for keys, config in made]
    left = set(places.values()).difference(*(cells for cells, _ in owned))
    jobs: dict[str, tuple[Mapping[str, Any], list[Record]]] = {}
    for cells, config in [*owned, *(([place], records[place].config) for place in sorted(left))]:
        for record in (records[place] for place in cells):
            names = {name: getattr(record, name) for name in _NAMES}
            _, known = jobs.setdefault(run_id(names, config), (config, []))
            if record not in known:
                known.append(record)
    return jobs


def counts(records: Sequence[Record]) -> dict[str, int]:
    """Of the cells of a sweep."""
    done = [record for record in records if record.status == "done"]
    return {
        "cells": len(records),
        "failed": len(records) - len(done),
        "unreliable": sum(unreliable(record.flags) for record in done),
    }


def _radii(records: Iterable[Record]) -> list[dict[str, float]]:
    """Accuracy under each access by eps; an infinite eps has no place on an axis and stands in the table.

    A cell that is unreliable leaves a gap.
    """
    rows: dict[float, dict[str, float]] = {}
    for record in records:
        if record.robust_accuracy is None or record.eps is None or math.isinf(record.eps):
            continue
        row = rows.setdefault(record.eps, {"eps": record.eps})
        if unreliable(record.flags):
            continue
        row[record.access] = record.robust_accuracy
        if record.robust_accuracy_bare is not None:
            row["bare"] = record.robust_accuracy_bare
    for row in rows.values():
        if {"gray_box", "white_box"} <= row.keys():
            row["gap"] = row["gray_box"] - row["white_box"]
    return [rows[eps] for eps in sorted(rows)]


def _summary(records: Sequence[Record]) -> dict[str, float | str | None]:
    """The final figures: of every cell, and those that the dashboard's scatters show, at the largest finite eps.

    A cell that is unreliable says so in words, and has no place in the scatters.
    """
    values: dict[str, float | str | None] = {}
    for record in records:
        known = {
            "clean_accuracy": record.clean_accuracy,
            "clean_accuracy_defended": record.clean_accuracy_defended,
            "defense_ms_per_image": record.defense_ms_per_image,
            "defense_memory_mib": record.defense_memory_mib,
            f"attack_ms_per_image/{record.access}": record.attack_ms_per_image,
            f"robust_accuracy/{record.access}/eps_{record.eps:.4g}": "unreliable"
            if unreliable(record.flags)
            else record.robust_accuracy,
        }
        values |= {name: value for name, value in known.items() if value is not None}
    for row in _radii(records)[-1:]:
        # A run that is logged again takes back what it said before.
        values |= {f"largest_eps/{name}": None for r in records if unreliable(r.flags) for name in (r.access, "gap")}
        values |= {f"largest_eps/{name}": value for name, value in row.items()}
    if doubtful := why_unreliable(flag for r in records for flag in r.flags):
        values["unreliable"] = doubtful
    return values
