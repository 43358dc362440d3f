"""At the end of a sweep: one table of all its cells, whatever launcher ran them. It reads files only.

Hydra calls this only if no job raised: its sweepers raise the first failure again and then skip
``on_multirun_end``. So a job that raises is turned into a failed record here (``on_job_end``, in the job's own
process), and the exit code is set when the table is out. Where a launcher raises, since one of its workers was killed,
``src.train`` asks for the table.
"""

from __future__ import annotations

import copy
import logging
import sys
from datetime import UTC, datetime
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.experimental.callback import Callback

from src import leaving
from src.callbacks.compose_once import compose_once

if TYPE_CHECKING:  # a callback is built for every command, also for --cfg job: nothing heavy at import
    from hydra.core.utils import JobReturn
    from omegaconf import DictConfig

    from src.records import Record

log = logging.getLogger(__name__)
SHOWN = 1000  # cells printed at most; the files have all
_JOB = "job-"  # how the keys of failed jobs begin; those of cells are hashes
SILENT = "the job left no record of its end: killed, or still at work elsewhere"
under_way: DictConfig | None = None  # config of the sweep that this process has begun


class ResultsTable(Callback):
    """Prints the table, writes it and the figures into the sweep's folder, logs both to W&B as run ``results``."""

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """With ``+plan=true`` say what the sweep would do, and leave: after an exception here Hydra would go on."""
        global under_way
        if not config.get("plan"):
            under_way = config
            return compose_once(config)
        try:
            from src import plan, sweep

            whole, refused = sweep.planned(config)
            plan.show(whole)
        except Exception as error:
            log.debug("plan", exc_info=True)
            refused = [" ".join(str(error).split())]
        for reason in refused:
            print(f"error: {reason}", file=sys.stderr)
        raise SystemExit(1 if refused else 0)

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **_: Any) -> None:
        """Let a job that raised not end the sweep: its cell becomes a row that says why."""
        from hydra.core.utils import JobStatus
        from hydra.types import RunMode

        if config.hydra.mode != RunMode.MULTIRUN:
            return
        folder = Path(config.hydra.runtime.output_dir) / "records"
        if job_return.status == JobStatus.COMPLETED:
            for stale in folder.glob(f"{_JOB}*.json"):  # of an earlier try in the same folder
                stale.unlink()
            return
        from src import records as store
        from src.errors import UserError

        error = job_return._return_value
        leaving.or_leave(error)
        reason = " ".join(str(error).split())
        if not isinstance(error, UserError):  # a mistake of ours, not of the user: the trace belongs in the log
            reason = f"{type(error).__name__}: {reason}"
            log.error("job failed: %s", reason, exc_info=error)
        if not _says_why(folder):
            job = failure(folder.parent, config, config.hydra, reason)
            store.save(job, folder)
        # Last, so that a failure that could not be written down still ends the sweep with an error.
        job_return.return_value = None
        job_return.status = JobStatus.COMPLETED

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        """Gather, print, write, log; exit code 1 when a cell or a job failed.

        Hydra turns an exception of a callback into a warning and exits with 0: hence SystemExit.
        """
        if not finish(config):
            raise SystemExit(1)


def finish(config: DictConfig, ended: str = "") -> bool:
    """Gather, and say whether all is well; ``ended`` is why the sweep came to no end of its own."""
    global under_way
    under_way = None
    try:
        return gather(config, ended) == 0 and not ended
    except Exception as error:
        leaving.or_leave(error)
        log.debug("results table", exc_info=True)
        why = f"{ended}; " if ended else ""
        print(f"error: {why}no results table: {type(error).__name__}: {error}", file=sys.stderr)
        return False


def gather(config: DictConfig, ended: str = "") -> int:
    """Do all of the above for a finished sweep and return how many cells failed."""
    from src.checks.across import across
    from src.report import write_report
    from src.terminal import print_table

    sweep = Path(config.hydra.sweep.dir)
    records, problems = collect(sweep, whole=not ended)
    if not records and not ended:
        print("error: a sweep of no jobs: a glob() or a range() of it matches nothing", file=sys.stderr)
        return 1
    records = across(records)
    shown = records if len(records) <= SHOWN else [record for record in records if record.status == "failed"][:SHOWN]
    if len(shown) < len(records):
        print(f"{len(records)} cells are too many to show here: {sweep / 'results.md'}; failed: {len(shown)}")
    if shown:
        print_table(shown)
    paths = write_report(records, sweep, sweep)
    failed = sum(record.status == "failed" for record in records)
    log_results(config, sweep, records, paths)
    print(f"{sweep}/*/records")
    for path in paths:
        print(path)
    for problem in problems:
        print(f"warning: {problem}", file=sys.stderr)
    if failed or problems or ended:
        unread = f", {len(problems)} records could not be read" if problems else ""
        why = f"{ended}; so far " if ended else ""
        print(f"error: {why}{failed} of {len(records)} cells failed{unread}; the notes say why", file=sys.stderr)
    return failed + len(problems)


def log_results(config: DictConfig, sweep: Path, records: list[Record], paths: list[Path]) -> None:
    """Table and pictures as one run named ``results`` in the group of the sweep's jobs."""
    from hydra.utils import get_class
    from omegaconf import OmegaConf, open_dict, read_write

    from src import sidecars
    from src.tracking import NoTracker, group_of, relog

    try:
        node = copy.deepcopy(config.logger)  # keeps its parent, which interpolations may refer to
        with read_write(node), open_dict(node):
            # What is known only inside a job (its folder) is replaced before anything is resolved.
            if "group" in node and node.group is None:
                node.group = group_of(sweep)
            known = {"dir": str(sweep), "name": "results", "run_id": relog.results_id([sweep])}
            node.update({k: v for k, v in known.items() if k in node})
            settings: Any = OmegaConf.to_container(node, resolve=True)
        tracker: NoTracker = get_class(settings.pop("_target_"))(**settings)
        with tracker:
            pictures = [path for path in paths if path.suffix == ".png"]
            relog.log_results(tracker, records, sidecars.find([sweep]), pictures)
    except Exception as error:  # everything is on disk already
        print(f"warning: the results were not logged ({type(error).__name__}: {error})", file=sys.stderr)


def collect(sweep: Path, *, whole: bool = True) -> tuple[list[Record], list[str]]:
    """All records under a sweep, and what could not be read. A job that left none becomes a failed row.

    Of a sweep that is not ``whole`` so does one that left some, but neither a failed one nor the mark of a done job.
    """
    from omegaconf import OmegaConf

    from src import records as store
    from src import retry
    from src.errors import UserError

    found: dict[str, Record] = {}
    problems: list[str] = []
    reporting: set[Path] = set()
    for file in sorted(sweep.rglob("records/*.json")):
        try:
            record = store.load(file)
        except UserError as error:
            problems.append(str(error))
            continue
        job = file.parent.parent
        if whole or record.status == "failed" or (job / retry.MARK).exists():
            reporting.add(job)
        if record.key not in found or record.created >= found[record.key].created:
            found[record.key] = record
    for job in sorted({file.parent.parent for file in sweep.rglob(".hydra/hydra.yaml")} - reporting):
        config: Any = OmegaConf.load(job / ".hydra" / "config.yaml")
        hydra: Any = OmegaConf.load(job / ".hydra" / "hydra.yaml")
        record = failure(job, config, OmegaConf.select(hydra, "hydra"), SILENT)
        found[record.key] = record
    return sorted(found.values(), key=store.order), problems


def failure(job: Path, config: Any, hydra: Any, reason: str) -> Record:
    """A failed cell in the name of a whole job, described by its config and by what Hydra knows of it."""
    from omegaconf import OmegaConf

    from src.records import Record
    from src.variant import of_task

    choices = OmegaConf.select(hydra, "runtime.choices") or {}
    names = {kind: str(choices.get(kind) or "?") for kind in ("dataset", "classifier", "defense", "attack")}
    norm, seed = OmegaConf.select(config, "threat.norm"), OmegaConf.select(config, "seed")
    return Record(
        key=f"{_JOB}{job.parent.name}-{job.name}", status="failed", reason=reason, access="", norm=str(norm or "?"),
        eps=_eps(OmegaConf.select(config, "threat.eps")), seed=seed if isinstance(seed, int) else 0,
        targeted=OmegaConf.select(config, "threat.targeted") is True,
        variant=of_task(OmegaConf.select(hydra, "overrides.task") or []),
        created=datetime.now(UTC).isoformat(timespec="seconds"), **names,
    )  # fmt: skip


def _eps(value: Any) -> float | None:
    """The radius if there is one; ``threat.parse_eps`` would import torch and refuse what failed the job."""
    try:
        return float(Fraction(value) if isinstance(value, str) and "/" in value else value)
    except (TypeError, ValueError, ZeroDivisionError):
        return None


def _says_why(folder: Path) -> bool:
    """Whether the job has written a failed cell itself."""
    from src import records as store
    from src.errors import UserError

    for file in folder.glob("*.json"):
        try:
            if store.load(file).status == "failed" and not file.name.startswith(_JOB):
                return True
        except UserError:
            continue
    return False
