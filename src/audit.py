"""Anybody's model, judged: ``python -m src.audit TARGET --dataset digits [KEY=VALUE ...]``.

TARGET is one of: ``package.module:callable`` that gives a torch module (images in [0, 1] → logits); the ``weights.pt``
of a stage of ours, classifier or defense (with ``classifier=NAME`` where a defense was trained without one; what its
training does not read, such as the votes, is as in its config unless given); the output folder of a run; a state dict,
with ``classifier=NAME`` or ``--config`` to say of what; the name of a pretrained model of torchvision, or of timm where
it is installed.
"""

from __future__ import annotations

import argparse
import logging
import shlex
import sys
import warnings
from collections.abc import Iterable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from src.errors import UserError
from src.target import kept, subject_of
from src.variant import group_of, of_task, what

FIXED = ("logger=none", "callbacks=none", "trainer.enable_progress_bar=false")
RADII = ("linf", "l2")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit code: 1 for wrong input, told in one line."""
    parser = argparse.ArgumentParser(
        prog="python -m src.audit", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("target", metavar="TARGET")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="as of src.train, such as dataset.root=DIR")
    parser.add_argument("--dataset", help="one of conf/dataset; a run's folder has its own")
    parser.add_argument("--config", type=Path, help="YAML that says what network a state dict belongs to")
    parser.add_argument(
        "--threat", action="append", metavar="NORM[:EPS]", help="default: linf and l2, the dataset's own"
    )
    parser.add_argument("--attack", help="default: autoattack, or what suits a random or closed defense")
    parser.add_argument("--images", type=int, default=500, help="test images, 0 for all (default: 500)")
    parser.add_argument("--out", type=Path, help="where records, tables and figures go (default: outputs/audit-TIME)")
    options = parser.parse_intermixed_args(arguments)
    try:
        print(audit(options))
    except KeyboardInterrupt:
        print("error: interrupted; run the same command again to go on from here", file=sys.stderr)
        return 130
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def audit(options: argparse.Namespace) -> str:
    """Measure the target under each threat model and say what was found.

    Raises:
        UserError: a target, dataset or threat that cannot be used.
    """
    from src import pipeline, report
    from src.checks.across import across
    from src.measure import Bench
    from src.stages import Stages
    from src.subject import Names
    from src.tracking import NoTracker

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    warnings.filterwarnings("ignore")
    for item in options.overrides:
        if what(item) in ("attack", "threat", "threat.norm", "threat.access"):
            raise UserError(
                f"{item}: would change nothing here. Use --attack NAME and --threat NORM[:EPS]; the access "
                "follows from the defense"
            )
    subject = subject_of(options.target, options.config) + list(options.overrides)
    if options.dataset:
        subject.append(f"dataset={options.dataset}")
    if not any(item.startswith(("dataset=", "+experiment=")) for item in subject):
        raise UserError("--dataset: missing; name one of conf/dataset, such as --dataset digits")
    named = any(item.startswith(("classifier=", "+experiment=")) for item in subject)
    if not named and any(item.startswith("defense.checkpoint=") for item in subject):
        raise UserError(
            f"{options.target}: does not say which classifier it stands before; expected classifier=NAME, with "
            "classifier.checkpoint=FILE for its weights, which are trained otherwise"
        )
    limit = f"limit.test_images={options.images or 'null'}"
    # An experiment's radii are of its own norm: null is the dataset's own.
    common = ["defense=none", "checks=full", "threat.eps=null", *FIXED, limit, *subject]

    # The model first, with an attack that asks nothing of it: which attack suits it is known then.
    model = [item for item in common if group_of(item) not in ("attack", "threat")]
    job, chosen = composed([*model, "attack=noise", "threat=linf", "threat.eps=0"])
    told = {kind: chosen[kind] for kind in ("dataset", "classifier", "defense")}
    names = Names(**told, attack="noise", variant=of_task(subject))
    stages = Stages(Path(job.paths.artifacts))
    first, _ = pipeline.prepare(job, names, stages, NoTracker())
    defended = first.subject.defended
    attack = options.attack or _attack(defended.gradient, defended.stochastic)
    access = "[white_box]" if first.images.bare else "[gray_box,white_box]"
    out = options.out or Path("outputs") / f"audit-{datetime.now():%Y-%m-%d-%H-%M-%S-%f}"

    records = []
    for threat in options.threat or RADII:
        norm, _, eps = threat.partition(":")
        radius = [f"threat.eps={eps}"] if eps else []
        job, _ = composed([*common, f"attack={attack}", f"threat={norm}", *radius, f"threat.access={access}"])
        names = Names(**{**vars(names), "attack": attack})
        bench = Bench(job, names, first.data, stages, first.subject)
        radii = job.eps(first.data.spec.eps.get(job.norm, ()))
        if not radii:
            raise UserError(f"--threat {threat}: {names.dataset} has no radius of its own; give one, as {norm}:0.5")
        if eps and len(radii) > 1:
            raise UserError(f"--threat {threat}: several radii. Give each a --threat of its own")
        records += [bench.cell(max(radii), each, out / "records") for each in job.access]
    records = across(records)
    report.write_report(records, out / "records", out)
    return verdict(options.target, records, out, commands([item for item in subject if kept(item)], records))


def _attack(gradient: str, stochastic: bool) -> str:
    return "square" if gradient == "none" else "autoattack_rand" if stochastic else "autoattack"


def composed(overrides: Sequence[str]) -> tuple[Any, dict[str, str]]:
    """The validated job of these overrides, and the names of what was chosen."""
    from hydra import compose, initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from src import config, several
    from src.train import CONF

    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            whole = compose("train", overrides=several.understood(overrides), return_hydra_config=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(" ".join(str(error).split())) from None
    chosen = {str(name): str(value) for name, value in whole.hydra.runtime.choices.items()}
    several.refuse(chosen)
    plain = {name: whole[name] for name in whole if name != "hydra"}
    from omegaconf import OmegaConf

    return config.parse(OmegaConf.create(plain)), chosen


def commands(subject: Sequence[str], records: Sequence[Any]) -> list[str]:
    """Five commands that look further."""
    from src.tables import format_eps
    from src.threat import parse_eps

    base = [] if any(item.startswith("defense=") for item in subject) else ["defense=none"]
    base += list(subject)
    first = records[0]
    eps = format_eps(first.eps)
    at = [f"threat={first.norm}", f"threat.eps={eps if parse_eps(eps) == first.eps else first.eps}"]
    lines = (
        ["attack=pgd", at[0], "threat.eps=null"],  # the curve over all radii, with pictures
        [f"attack={first.attack}", *at, "checks=full"],  # all test images
        ["attack=square", *at, "threat.access=black_box"],
        ["attack=fmn", "threat=l2", "threat.eps=null", "threat.access=white_box"],
        ["attack=pgd", *at, "threat.access=transfer", "+classifier@surrogate=cnn3"],
    )
    return [shlex.join(["python", "-m", "src.train", *base, *line]) for line in lines]


def verdict(target: str, records: Sequence[Any], out: Path, further: Iterable[str]) -> str:
    """What was found, in words."""
    from src.checks.flags import FLAGS, unreliable
    from src.records import wilson
    from src.tables import format_eps, images_judged, percent

    first = records[0]

    def figure(right: int, n: int) -> str:
        low, high = wilson(right, n)
        return f"{percent(right / n)} % [{percent(low)}, {percent(high)}]"

    judged = f"{first.n} {images_judged(records)} of {first.dataset}"
    lines = [
        f"\nAudit of {target} ({first.classifier}, defense {first.defense}): {judged}",
        f"{'clean accuracy':<24}{figure(first.correct_defended, first.n)}",
    ]
    if first.defense != "none":
        lines.append(f"{'  without the defense':<24}{figure(first.correct_bare, first.n)}")
    groups: dict[tuple[str, float | None], list[Any]] = {}
    for record in records:
        groups.setdefault((record.norm, record.eps), []).append(record)
    for (norm, eps), cells in groups.items():
        told = figure(_worst(cells, out), first.n)
        if any(unreliable(cell.flags) for cell in cells):
            told = f"unreliable (at most {told})"
        access = " and ".join(cell.access for cell in cells)
        lines.append(f"{f'worst case {norm} {format_eps(eps)}':<24}{told} ({cells[0].attack}, {access})")
    raised: dict[str, list[Any]] = {}
    for record in records:
        for flag in record.flags:
            raised.setdefault(flag, []).append(record)
    lines.append("flags: none" if not raised else "flags (docs/checks.md), the worst figure of each:")
    for flag, those in raised.items():
        weight = "decisive" if FLAGS[flag].decisive else "advice"
        lines.append(f"  {flag} = {max(each.checks[flag] for each in those):.3g} ({weight}): {FLAGS[flag].says}")
    lines += [f"records, tables and figures: {out}", "to look further:", *(f"  {line}" for line in further)]
    return "\n".join(lines)


def _worst(cells: Sequence[Any], out: Path) -> int:
    """Images that hold in every cell."""
    import numpy as np

    from src import sidecars
    from src.errors import UserError

    held = []
    for cell in cells:
        path = out / "records" / f"{cell.key}.npz"
        if (found := sidecars.verdicts(cell, path)) is None:
            raise UserError(f"{path}: not the verdicts of its record; delete it and run the same command again")
        held.append(found.held)
    return int(np.logical_and.reduce(held).sum())


if __name__ == "__main__":
    sys.exit(main())
