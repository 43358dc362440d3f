"""Known faults of defenses, attacks and data, and the flags they raise; ``python -m tests.planted`` prints them."""

from __future__ import annotations

import copy
import functools
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from src.attacks.apgd import APGD
from src.attacks.base import Attack
from src.attacks.pgd import PGD
from src.attacks.square import Square
from src.attacks.worst_case import WorstCase
from src.checks import attack as attack_checks
from src.checks import data as data_checks
from src.checks import probe
from src.checks.across import across
from src.checks.flags import FLAGS, raised
from src.checks.look import Look
from src.classifiers.module import Classifier
from src.config import Job, Limit, Paths, ThreatConfig
from src.data.augment import to_float
from src.data.digits import Digits
from src.defenses.base import Detector
from src.defenses.guarded import DefendedModel
from src.measure import Bench
from src.records import Record, wilson
from src.stages import Stages
from src.subject import Names, Subject
from src.threat import Access, Norm, ThreatModel
from tests import faulty

LINF = ThreatModel(norm=Norm.LINF, eps=0.15)
STRONG = PGD(steps=20)


@functools.cache
def digits() -> Digits:
    data = Digits()
    data.prepare()
    return data


@functools.cache
def weights(adversarial: bool) -> dict[str, Tensor]:
    """Of a network trained in seconds, on PGD's images where ``adversarial``."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net, everything = faulty.Net(), digits().train.batch(range(len(digits().train)))
        optimizer = torch.optim.Adam(net.parameters(), 3e-3)
        images, labels = to_float(everything["image"]), everything["label"]
        generator = torch.Generator().manual_seed(0)
        for _ in range(15 if adversarial else 8):
            for rows in torch.randperm(len(labels), generator=generator).split(64):
                x = images[rows]
                if adversarial:
                    x = PGD(steps=5).perturb(net, x, labels[rows], LINF, generator=generator)
                optimizer.zero_grad()
                F.cross_entropy(net(x), labels[rows]).backward()
                optimizer.step()
    return net.state_dict()


def trained(kind: type[faulty.Net] = faulty.Net, *, adversarial: bool = True) -> faulty.Net:
    """A network, sound or faulty, with weights that are sound."""
    net = kind()
    net.load_state_dict(weights(adversarial), strict=False)
    return net.eval()


def seen(
    model: nn.Module,
    attack: Attack = STRONG,
    threat: ThreatModel = LINF,
    *,
    target: nn.Module | None = None,
    count: int = 64,
    **declared: Any,
) -> dict[str, float]:
    """Figures of all checks of a model under an attack, as a cell would have them with ``checks=full``.

    Args:
        target: what is attacked instead.
    """
    target = target or model
    batch = digits().test.batch(range(count))
    images, labels = to_float(batch["image"]), batch["label"]
    made = attack(target, images, labels, threat)
    look = Look(
        target=target, model=model, images=images, labels=labels, attacked=made.images, turned=made.success,
        attack=attack, threat=threat, **declared,
    )  # fmt: skip
    return probe.take(look, (*probe.ONCE, *probe.EACH), full=True)


def measured(
    model: nn.Module,
    attack: str = "pgd.PGD",
    access: str = "white_box",
    *,
    eps: float = 0.2,
    n: int = 359,
    **given: Any,
) -> Record:
    """A cell of an undefended model, as a job measures it."""
    data = copy.copy(digits())
    data.test, data.eval_batch_size = digits().test.take(slice(0, n)), n
    names = Names(dataset="digits", classifier="net", defense="none", attack=attack)
    trainer = {
        "_target_": "pytorch_lightning.Trainer", "accelerator": "cpu", "devices": 1, "enable_progress_bar": False,
        "enable_model_summary": False,
    }  # fmt: skip
    job = Job(
        seed=0, eval_batch_size=n, eot_draws=1, search_precision=None, dataset={}, classifier={}, surrogate=None,
        defense={}, attack={"_target_": attack if attack.startswith("tests.") else f"src.attacks.{attack}"} | given,
        threat=ThreatConfig(norm="linf", access=access, targeted=False, quantize=False), trainer=trainer, logger={},
        callbacks={}, limit=Limit(epochs=None, train_images=None, test_images=None), paths=Paths(data="", artifacts=""),
    )  # fmt: skip
    classifier = Classifier(network=model, num_classes=10)
    defended = DefendedModel(classifier=classifier)
    keys = {"classifier": "", "defense": ""}
    subject = Subject(classifier=classifier, defended=defended, surrogate=None, keys=keys, made={})
    with tempfile.TemporaryDirectory() as folder:
        return Bench(job, names, data, Stages(Path(folder)), subject).cell(eps, Access(access), Path(folder) / "run")


def pgd_and_square(model: nn.Module) -> tuple[Record, Record]:
    return measured(model, steps=10), measured(model, "square.Square", "black_box", queries=100)


def cell(right: int, n: int = 359, **changes: Any) -> Record:
    low, high = wilson(right, n)
    known: dict[str, Any] = {
        "dataset": "digits", "classifier": "cnn3", "defense": "vae", "attack": "pgd", "norm": "linf", "eps": 0.1,
        "access": "white_box", "seed": 0, "n": n, "robust_accuracy": right / n, "robust_accuracy_low": low,
        "robust_accuracy_high": high, "backward_passes": 30.0, "config": {"attack": {"steps": 40}},
    } | changes  # fmt: skip
    return Record(**{"key": f"{right}{changes}"} | known)


def side_by_side(*cells: Record) -> dict[str, float]:
    found: dict[str, float] = {}
    for record in across(cells):
        found |= record.checks
    return found


def threshold(
    kind: type[Detector] = faulty.Brightness, *, attacked: bool = False, by_hand: float | None = None
) -> dict[str, float]:
    batch = digits().val.batch(range(len(digits().val)))
    clean = to_float(batch["image"])
    shown = (clean + 0.2).clamp(0, 1) if attacked else clean
    defended: DefendedModel = kind(fpr=0.1, threshold=by_hand).guard(trained())
    defended.set_thresholds(defended.scores(shown))
    return data_checks.thresholds(defended, digits(), 0)


def leak(data: Digits) -> dict[str, float]:
    data.prepare()
    return {"test_in_training": data_checks.test_in_training(data, full=False) or 0.0}


@dataclass(frozen=True)
class Fault:
    """Something broken on purpose.

    Attributes:
        look: takes the checks and returns their figures.
        flags: those it must raise; it may raise others as well.
    """

    look: Callable[[], dict[str, float]]
    flags: tuple[str, ...] = ()


SHORT = PGD(steps=4, step=0.01)
CLOSED = WorstCase(members={"pgd": PGD(), "square": Square()})
FGSM_CELL = {"attack": "fgsm", "backward_passes": 1.0, "config": {"attack": {"steps": 1}}}
NOISE_CELL = {"attack": "noise", "backward_passes": 0.0, "config": {}}

SOUND: dict[str, Fault] = {
    "adversarially trained, PGD": Fault(lambda: seen(trained(), count=256)),
    "the same, Square": Fault(lambda: seen(trained(), Square(queries=300))),
    "the same in l2": Fault(lambda: seen(trained(), PGD(steps=20), ThreatModel(norm=Norm.L2, eps=0.5))),
    "cells in order": Fault(
        lambda: side_by_side(cell(200), cell(150, eps=0.2), cell(240, access="gray_box"), cell(230, **FGSM_CELL))
    ),
    "Square beside PGD": Fault(lambda: side_by_side(*pgd_and_square(trained()))),
    "threshold of clean images": Fault(threshold),
    "the same, tied scores": Fault(lambda: threshold(faulty.Grey)),
    "the digits": Fault(lambda: leak(digits())),
}

PLANTED: dict[str, Fault] = {
    "quantised activations": Fault(lambda: seen(trained(faulty.Quantised)), ("gradient_missing", "unbounded_holds")),
    "NaN gradient": Fault(lambda: seen(trained(faulty.NotANumber)), ("gradient_missing",)),
    "gradient of the mean only": Fault(lambda: seen(trained(faulty.OneMean)), ("gradient_missing",)),
    "purifier detaches, declares exact": Fault(lambda: seen(trained(faulty.Detached)), ("gradient_untrue",)),
    "straight-through, declares exact": Fault(lambda: seen(trained(faulty.StraightThrough)), ("gradient_untrue",)),
    "saturated logits": Fault(lambda: seen(trained(faulty.Saturated)), ("logits_saturated",)),
    "softmax for logits": Fault(lambda: seen(trained(faulty.Probabilities)), ("softmax_as_logits",)),
    "random, undeclared": Fault(lambda: seen(trained(faulty.Random)), ("random_without_eot",)),
    "random, undeclared, Square": Fault(
        lambda: seen(trained(faulty.LessRandom), Square(queries=30)), ("random_without_eot",)
    ),
    "random, undeclared, gray_box": Fault(
        lambda: seen(trained(faulty.LessRandom), target=trained()), ("redraws_disagree",)
    ),
    "random, undeclared, one member averages": Fault(
        lambda: seen(
            trained(faulty.Random), WorstCase(members={"pgd": PGD(steps=5), "apgd": APGD(steps=5, eot_iter=4)})
        ),
        ("random_without_eot",),
    ),
    "random, one draw": Fault(lambda: seen(trained(faulty.Random), stochastic=True, draws=20), ("redraws_disagree",)),
    "statistics over the batch": Fault(lambda: seen(trained(faulty.Neighbours)), ("batch_changes_verdict",)),
    "logits around 10,000": Fault(lambda: seen(trained(faulty.Offset)), ("bf16_changes_verdict",)),
    "PGD, sign reversed": Fault(
        lambda: seen(trained(adversarial=False), faulty.Reversed(), ThreatModel(norm=Norm.LINF, eps=0.4)),
        ("one_step_stronger", "noise_stronger", "unbounded_holds"),
    ),
    "the same in gray_box": Fault(
        lambda: measured(trained(adversarial=False), "tests.faulty.Reversed", "gray_box", eps=0.4).checks,
        ("label_leaking",),
    ),
    "PGD, too few steps": Fault(
        lambda: seen(trained(adversarial=False), SHORT), ("steps_short", "loss_rising", "one_step_stronger")
    ),
    "too few restarts": Fault(
        lambda: seen(trained(adversarial=False), faulty.Guess(), ThreatModel(norm=Norm.LINF, eps=0.4), count=256),
        ("restarts_short",),
    ),
    "ensemble without gradients": Fault(
        lambda: {"members_left_out": attack_checks.members_left_out(CLOSED) or 0.0}, ("members_left_out",)
    ),
    "attack shrinks as eps grows": Fault(
        lambda: side_by_side(*(measured(trained(), "tests.faulty.Shrinking", eps=eps) for eps in (0.1, 0.3))),
        ("accuracy_rises_with_eps",),
    ),
    "Square beside masked gradients": Fault(
        lambda: side_by_side(*pgd_and_square(trained(faulty.Saturated))), ("weaker_access_stronger",)
    ),
    "gray_box does more harm": Fault(
        lambda: side_by_side(cell(200), cell(150, access="gray_box")), ("weaker_access_stronger",)
    ),
    "FGSM cell does more harm": Fault(lambda: side_by_side(cell(200), cell(150, **FGSM_CELL)), ("one_step_stronger",)),
    "noise cell does more harm": Fault(lambda: side_by_side(cell(200), cell(150, **NOISE_CELL)), ("noise_stronger",)),
    "twenty images": Fault(lambda: measured(trained(), steps=2, n=20).checks, ("few_images",)),
    "threshold of attacked images": Fault(lambda: threshold(attacked=True), ("threshold_not_clean",)),
    "threshold by hand": Fault(lambda: threshold(by_hand=0.3), ("threshold_by_hand",)),
    "test images trained on": Fault(lambda: leak(faulty.Leaky()), ("test_in_training",)),
}


def main() -> int:
    """Print planted faults by flags; 1 where a fault stays unseen or something sound is flagged."""
    names = list(FLAGS)
    wrong, lines = 0, []
    for name, fault in (SOUND | PLANTED).items():
        found = raised(fault.look())
        missing = set(fault.flags) - set(found)
        alarm = bool(found) if name in SOUND else bool(missing)
        wrong += alarm
        marks = "  ".join(f"{'X' if flag in found else '!' if flag in missing else '.':>2}" for flag in names)
        lines.append(f"{name:<36}{marks}{'  WRONG' if alarm else ''}")
    print("\n".join(f"{number:>2}  {flag}" for number, flag in enumerate(names, start=1)))
    print(f"\n{'':<36}{'  '.join(f'{number:>2}' for number in range(1, len(names) + 1))}")
    print("\n".join(lines))
    print("\nX raised, . not raised, ! planted and not raised")
    return int(wrong > 0)


if __name__ == "__main__":
    raise SystemExit(main())
