"""One Hydra job around the pipeline: names, output folder, tracking, and what happens when a cell fails."""

from __future__ import annotations

import errno
import logging
import platform
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from src import config, records
from src.errors import UserError
from src.keys import content_key
from src.records import Record
from src.threat import parse_eps_list

log = logging.getLogger(__name__)

# Overrides of these say what is measured, not where or how it is run.
MEASURED = (
    "classifier@",
    "surrogate.",
    "split",
    "eot_draws",
    "search_precision",
    "threat.quantize",
    "dataset.",
    "classifier.",
    "defense.",
    "attack.",
    "limit.",
)
PLACES = ("root", "cache", "workers", "memory_limit_gib", "download", "checkpoint")


def run(cfg: DictConfig) -> None:
    """Run one job. A job that fails leaves a record that says why; in a sweep the others go on.

    Raises:
        SystemExit: the job failed and is not part of a sweep.
    """
    hydra = HydraConfig.get()
    out = Path(hydra.runtime.output_dir)
    in_sweep = hydra.mode is RunMode.MULTIRUN
    names = _names(hydra)
    started = time.perf_counter()
    done: list[Record] = []
    try:
        job = config.parse(cfg)
        if job.plan:
            _plan(job, names, out, in_sweep)
            return
        _measure(job, names, out, done, in_sweep)
    except KeyboardInterrupt:
        raise
    except Exception as error:
        reason = explain(error)
        for record in _failed(cfg, names, reason, done):
            records.save(record, out / "records")
        if not in_sweep:
            if not isinstance(error, UserError | OSError):
                log.exception("the job failed")  # a defect of ours: the traceback belongs in the log
            raise UserError(reason) from None
        log.error("failed: %s", reason, exc_info=None if isinstance(error, UserError) else error)
    else:
        log.info("done in %.1f s", time.perf_counter() - started)


def _plan(job: config.Job, names: dict[str, str], out: Path, in_sweep: bool) -> None:
    """Say what would be done; a sweep says it at its end, for all jobs together."""
    from src import pipeline, plan
    from src.subject import Names

    logging.getLogger("src").setLevel(logging.WARNING)
    found = pipeline.plan(job, Names(**names))
    if in_sweep:
        found.save(out)
    else:
        plan.show(found)


def _measure(job: config.Job, names: dict[str, str], out: Path, done: list[Record], in_sweep: bool) -> None:
    # Seconds of imports: only now, when there is work and the config is known to be right.
    from src import pipeline, relog, report, tables
    from src.subject import Names
    from src.tracking import NoTracker

    settings = job.model_dump(mode="json")
    known = {
        "tags": [*(job.logger.get("tags") or []), *(names[k] for k in ("dataset", "classifier", "defense", "attack")),
                 *map(str, job.access)],
        "run_id": job.logger.get("run_id") or relog.run_id(names, settings),
    }  # fmt: skip
    began = datetime.now(UTC).isoformat(timespec="seconds")
    tracker: NoTracker
    with config.build(job.logger, "logger", **known) as tracker:
        for record in pipeline.run(job, Names(**names), out, tracker):
            done.append(record)
        written = [*report.write_report(done, out / "records", out), *sorted(out.glob("analysis_*.png"))]
        # Cells found in the cache have a run already.
        if job.analysis or any(record.created >= began for record in done):
            relog.log_job(tracker, done, settings, [path for path in written if path.suffix == ".png"])
    if not in_sweep:
        tables.print_table(done)
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


def _names(hydra: Any) -> dict[str, str]:
    choices: Mapping[str, Any] = hydra.runtime.choices
    names = {group: str(choices.get(group)) for group in ("dataset", "classifier", "defense", "attack")}
    overrides = [item.lstrip("+~") for item in hydra.overrides.task]
    variant = [
        item
        for item in sorted(overrides)
        if item.startswith(MEASURED) and item.split("=")[0].rsplit(".", 1)[-1] not in PLACES
    ]
    return names | {"variant": ",".join(variant)}


def _failed(cfg: DictConfig, names: dict[str, str], reason: str, done: list[Record]) -> list[Record]:
    """A record for each cell that was asked for and is not done."""
    plain: Any = OmegaConf.to_container(cfg, resolve=False)
    threat = plain.get("threat") or {}
    eps: list[float | None]
    try:
        eps = [None] if threat.get("eps") is None else list(parse_eps_list(threat["eps"]))
    except UserError:
        eps = [None]
    access = threat.get("access")
    access = [str(a) for a in access] if isinstance(access, list) else [str(access)]
    have = {(record.eps, str(record.access)) for record in done}
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
        Record(key=f"failed-{content_key(**common, eps=e, access=a)}", eps=e, access=a, **common)
        for e in eps
        for a in access
        if (e, a) not in have
    ]


def _short(path: Path) -> str:
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)
