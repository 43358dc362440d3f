"""One Hydra job around the pipeline: names, output folder, tracking, and what happens when a cell fails."""

from __future__ import annotations

import errno
import logging
import os
import platform
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from src import config, leaving, place, records, retry, several, variant
from src.errors import UserError
from src.keys import content_key
from src.records import Record
from src.threat import parse_eps_list

log = logging.getLogger(__name__)

FAILED = "failed-"  # how the keys of cells that failed begin


def run(cfg: DictConfig, settings: str) -> None:
    """Run one job. A job that fails leaves a record that says why; in a sweep the others go on.

    Args:
        cfg: the composed config.
        settings: hash of them that the job's mark bears, see :mod:`src.retry`.

    Raises:
        SystemExit: the job failed and is not part of a sweep.
    """
    hydra = HydraConfig.get()
    out = Path(hydra.runtime.output_dir)
    in_sweep = hydra.mode is RunMode.MULTIRUN
    names = names_of(hydra.runtime.choices, hydra.overrides.task)
    started = time.perf_counter()
    done: list[Record] = []
    radii: list[float] = []  # those of the job, once they are known
    # Cells of an earlier try in the same folder that was killed before it came to its mark.
    cut_off = set() if (out / retry.MARK).exists() else {file.stem for file in (out / "records").glob("*.json")}
    try:
        (out / retry.MARK).unlink(missing_ok=True)
        for stale in (out / "records").glob(f"{FAILED}*.json"):  # of an earlier try in the same folder
            stale.unlink()
        several.refuse(hydra.runtime.choices)
        job = config.parse(cfg)
        if (gpu := place.claim_gpu(job.trainer)) is not None:
            log.info("job %s: GPU %s", hydra.job.num, gpu)
        if job.plan:
            _plan(job, names)
            return
        with leaving.on_signals():
            _measure(job, names, out, done, radii, in_sweep, cut_off)
        _forget(out / "records", done, Path(job.paths.artifacts) / "records")
        retry.mark(out, settings, [record.key for record in done], job.model_dump(mode="json"))
    except Exception as error:
        leaving.or_leave(error)
        reason = explain(error)
        for record in _failed(cfg, names, reason, done, radii):
            records.save(record, out / "records")
        if not in_sweep:
            if not isinstance(error, UserError | OSError):
                log.exception("the job failed")  # a defect of ours: the traceback belongs in the log
            raise UserError(reason) from None
        log.error("failed: %s", reason, exc_info=None if isinstance(error, UserError) else error)
    else:
        log.info("done in %.1f s", time.perf_counter() - started)


def _plan(job: config.Job, names: dict[str, str]) -> None:
    """Say what would be done; of a sweep :mod:`src.sweep` says it, for all jobs together."""
    from src import pipeline, plan
    from src.subject import Names

    plan.show(pipeline.plan(job, Names(**names)))


def _measure(
    job: config.Job,
    names: dict[str, str],
    out: Path,
    done: list[Record],
    radii: list[float],
    in_sweep: bool,
    cut_off: set[str],
) -> None:
    # Seconds of imports: only now, when there is work and the config is known to be right.
    from src import pipeline, report
    from src.analyse import look
    from src.build import build
    from src.checks.across import across
    from src.stages import Stages
    from src.subject import Names
    from src.terminal import print_table
    from src.tracking import NoTracker, relog

    done += pipeline.recall(job, Names(**names), out)
    # Figures and W&B run were made when the cells were, unless that was cut off; an agent of W&B waits for its own.
    told = bool(done) and cut_off.isdisjoint(record.key for record in done) and "WANDB_SWEEP_ID" not in os.environ
    if told and in_sweep:
        return  # the sweep's table shows them
    settings = job.model_dump(mode="json")
    known = {
        "tags": [*(job.logger.get("tags") or []), names["dataset"], names["classifier"], *names["defense"].split("+"),
                 names["attack"], *map(str, job.access)],
        "run_id": relog.run_id(names, settings),
    }  # fmt: skip
    tracker: NoTracker = NoTracker() if told else build(job.logger, "logger", **known)
    bench = None
    with tracker:
        if not done:
            bench, asked = pipeline.prepare(job, Names(**names), Stages(Path(job.paths.artifacts)), tracker)
            radii += asked
            for record in pipeline.run(bench, asked, out):
                done.append(record)
        done[:] = across(done)
        for record in done:
            records.save(record, out / "records")
        written: list[Path] = []
        if not (in_sweep and type(tracker) is NoTracker):  # the sweep draws its own figures; these would be for W&B
            written += report.write_report(done, out / "records", out)
        if not in_sweep:
            print_table(done)
        if type(tracker) is not NoTracker:
            relog.log_job(tracker, done, settings, [path for path in written if path.suffix == ".png"])
        # Last: an analysis that fails takes nothing of the above with it.
        for path in look(bench, tuple(radii), out) if bench else ():
            tracker.log_image(path.stem, path)
            written.append(path)
    if not in_sweep:
        print("\nWritten:")
        wandb_runs = sorted((out / "wandb").glob("*run-*"))
        for path in [out / "records", *written, *wandb_runs]:
            print(f"  {_short(path)}")


def explain(error: BaseException) -> str:
    """One line for people."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"no space left on the device ({error.filename or 'no file named'}): free some, or set paths.artifacts"
    if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
        return f"{error.filename}: not writable; set paths.artifacts and hydra.run.dir to folders you can write to"
    return f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"


def names_of(choices: Mapping[str, Any], task: Iterable[str]) -> dict[str, str]:
    """What a cell is called, by what was chosen for it and the overrides of its job."""
    names = {group: str(choices.get(group) or "?") for group in ("dataset", "classifier", "defense", "attack")}
    return names | {"variant": variant.of_task(task)}


def _failed(
    cfg: DictConfig, names: dict[str, str], reason: str, done: list[Record], radii: list[float]
) -> list[Record]:
    """A record for each cell that was asked for and is not done; where all are, one in the name of the job."""
    plain: Any = OmegaConf.to_container(cfg, resolve=False)
    threat = plain.get("threat") or {}
    eps: list[float | None] = [*(radii or {record.eps for record in done})]
    if not eps:  # it failed before the data could say what its usual ones are
        try:
            eps = [None] if threat.get("eps") is None else list(parse_eps_list(threat["eps"]))
        except UserError:
            eps = [None]
    access = threat.get("access")
    access = [str(a) for a in access] if isinstance(access, list) else [str(access)]
    have = {(record.eps, str(record.access)) for record in done}
    left = [(e, a) for e in eps for a in access if (e, a) not in have]
    seed = plain.get("seed")
    common = {
        **names,
        "norm": str(threat.get("norm")),
        "seed": seed if isinstance(seed, int) else -1,
        "targeted": bool(threat.get("targeted")),
        "status": "failed",
        "reason": reason,
        "host": platform.node(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    return [
        Record(key=f"{FAILED}{content_key(**common, eps=e, access=a)}", eps=e, access=a, **common)
        for e, a in left or [(None, "")]
    ]


def _forget(folder: Path, done: list[Record], cache: Path) -> None:
    """Remove what an earlier try left of the cells in ``done`` under other keys; other jobs may share the folder."""
    if folder.resolve() == cache.resolve():  # somebody gave the cache as the folder of the run
        return
    keys, cells = {record.key for record in done}, {(record.gap_key, record.access) for record in done}
    for path in folder.glob("*.json"):
        with suppress(UserError):  # what cannot be read is the report's to name
            found = records.load(path)
            if found.key not in keys and (found.gap_key, found.access) in cells:
                for stale in (path, path.with_suffix(".npz")):
                    stale.unlink(missing_ok=True)


def _short(path: Path) -> str:
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)
