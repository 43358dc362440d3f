"""The whole story on one page: data → classifier → defense → attack → judge → record."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from src import fit
from src.build import build
from src.config import Job
from src.data.base import ImageDataModule
from src.errors import UserError
from src.keys import content_key
from src.measure import Bench
from src.plan import Plan
from src.records import Record
from src.stages import Stages
from src.subject import Names, Subject
from src.threat import Access
from src.tracking import NoTracker
from src.trained import Workshop


def run(bench: Bench, radii: tuple[float, ...], out: Path) -> Iterator[Record]:
    """Every cell of a job, each written to ``out/records`` as soon as it is known."""
    for eps in radii:
        for access in bench.job.access:
            yield bench.cell(eps, access, out / "records")


def recall(job: Job, names: Names, out: Path) -> list[Record]:
    """The records of a job whose cells are all in the cache, copied to ``out/records``; else nothing.

    No weights are read for it, no trainer is built. A job with an analysis wants the models in any case.
    """
    if job.analysis:
        return []
    bench, radii = prepare(job, names, Stages(Path(job.paths.artifacts), plan=True), NoTracker())
    found: list[Record] = []
    for eps in radii:
        for access in job.access:
            record = bench.recall(eps, access, out / "records")
            if record is None:
                return []
            found.append(record)
    return found


def plan(job: Job, names: Names) -> Plan:
    """The cells of a job and the stages they need, and which of them are there."""
    stages = Stages(Path(job.paths.artifacts), plan=True)
    bench, radii = prepare(job, names, stages, NoTracker())
    cells = [bench.planned(eps, access) for eps in radii for access in job.access]
    return Plan({cell["key"]: cell for cell in cells}, stages.asked, artifacts=str(stages.root))


def prepare(job: Job, names: Names, stages: Stages, tracker: NoTracker) -> tuple[Bench, tuple[float, ...]]:
    """Data, classifier and defense, trained or found, on the bench; and the radii to measure.

    Raises:
        UserError: input that cannot work, with one line for the user.
    """
    fit.check_devices(job.trainer)
    data = _data(job)
    data.eval_batch_size = job.eval_batch_size
    radii = job.eps(data.spec.eps.get(job.norm, ()))
    if not radii:
        raise UserError(f"threat.eps: {data.spec.name} has no default radii for {job.norm}; give threat.eps=...")

    workshop = Workshop(job, data, stages, tracker)
    classifier, classifier_key = workshop.classifier(names.classifier)
    defended, defense_key = workshop.defense(names.defense, classifier, classifier_key)
    surrogate, surrogate_key = workshop.surrogate() if Access.TRANSFER in job.access else (None, None)

    subject = Subject(
        classifier=classifier,
        defended=defended,
        surrogate=surrogate,
        keys={"classifier": classifier_key, "defense": defense_key}
        | ({"surrogate": surrogate_key} if surrogate_key else {}),
        made=workshop.made,
    )
    return Bench(job, names, data, stages, subject), radii


_last: dict[str, ImageDataModule] = {}  # the data of the last job: those of a sweep seldom change them


def _data(job: Job) -> ImageDataModule:
    key = content_key(dataset=job.dataset, split=job.split)
    if key not in _last:
        data: ImageDataModule = build(job.dataset, "dataset")
        data.prepare()
        if job.split == "validation":
            data.judge_on_validation()
        _last.clear()
        _last[key] = data
    _last[key].trainer = None  # that of the last job
    return _last[key]
