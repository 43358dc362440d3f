"""Every flag is raised by a fault planted for it, none by what is sound, and each has its paragraph."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from src import records, tables
from src.attacks.apgd import APGD
from src.attacks.autoattack import AutoAttack
from src.attacks.base import Attack
from src.attacks.deepfool import DeepFool
from src.attacks.fgsm import FGSM
from src.attacks.orthogonal_pgd import OrthogonalPGD
from src.attacks.pgd import PGD
from src.attacks.square import Square
from src.attacks.worst_case import WorstCase
from src.checks import attack as attack_checks
from src.checks import data as data_checks
from src.checks import model as model_checks
from src.checks import probe
from src.checks.across import CHECKS, across
from src.checks.flags import FLAGS, raised, unreliable
from src.checks.look import Look
from src.data.augment import to_float
from src.data.digits import Digits
from src.defenses.base import Detector
from src.threat import Access, Norm, ThreatModel
from tests.conftest import ROOT, Outcome, choices
from tests.faulty import Brightness, LessRandom, Probabilities
from tests.planted import LINF, PLANTED, SOUND, cell, digits, seen, trained
from tests.test_keys import planned
from tests.test_pipeline import QUIET, ok

Command = Callable[..., Outcome]


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_fault_raises_its_flags(name: str) -> None:
    assert set(PLANTED[name].flags) <= set(raised(PLANTED[name].look()))


@pytest.mark.parametrize("name", SOUND)
def test_what_is_sound_raises_none(name: str) -> None:
    figures = SOUND[name].look()
    assert raised(figures) == [], figures


def test_every_flag_has_its_planted_fault_and_its_check() -> None:
    assert {flag for fault in PLANTED.values() for flag in fault.flags} == set(FLAGS)
    taken = {check.__name__ for check in (*probe.ONCE, *probe.EACH)} | set(CHECKS)
    assert set(FLAGS) - taken == {
        "members_left_out", "label_leaking", "few_images",
        "threshold_not_clean", "threshold_by_hand", "test_in_training"
    }  # fmt: skip


def test_every_flag_has_its_paragraph() -> None:
    text = (ROOT / "docs" / "checks.md").read_text()
    parts = re.split(r"^### ", text, flags=re.MULTILINE)[1:]
    names = [part.split("\n")[0].strip("`") for part in parts]
    assert names == list(FLAGS)
    for name, part in zip(names, parts, strict=True):
        for words in ("- Figure: ", "- Raised if: ", "- What it means: ", "- What to do: "):
            assert words in part, f"{name}: {words}"
        condition = part.split("- Raised if: ")[1].split("- What it means")[0]
        assert ("Decisive" in condition) == FLAGS[name].decisive, name
        assert ("Advice" in condition) != FLAGS[name].decisive, name
        assert _limit(condition) == FLAGS[name].limit, name
        if name != "test_in_training":  # cheap for sets in memory
            assert ("*full*" in condition) == FLAGS[name].full, name


def _limit(condition: str) -> float:
    share = re.match(r"more than (\d+) (%|percentage points)", condition)
    return int(share[1]) / 100 if share else 0.5 if condition.startswith("more than half") else 0.0


def test_a_figure_that_is_no_number_raises_its_flag() -> None:
    assert raised({"gradient_missing": math.nan, "steps_short": 0.03}) == ["gradient_missing"]


def test_defenses_that_are_said_to_vote_have_the_argument() -> None:
    text = (ROOT / "docs" / "checks.md").read_text()
    (said,) = re.findall(r"let the defense vote, which (.*?) know \(`defense.votes`\)", text, re.DOTALL)
    voting = [name for name in choices("defense") if "\nvotes:" in (ROOT / "conf/defense" / f"{name}.yaml").read_text()]
    assert {name.removesuffix("_sketch") for name in voting} == set(re.findall(r"`(\w+)`", said))


def test_cheap_checks_leave_out_those_that_repeat_the_attack() -> None:
    assert {name for name, flag in FLAGS.items() if flag.full} == {
        "steps_short", "restarts_short", "loss_rising", "bf16_changes_verdict"
    }  # fmt: skip


def test_the_loss_of_each_pass_is_kept() -> None:
    """Of PGD: the clean image, the start and each step; it rises, and nobody leaves on the way."""
    images = torch.rand(16, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    model = trained()
    labels = model(images).argmax(dim=1)
    nothing = torch.zeros(16, dtype=torch.bool)
    look = Look(
        target=model, model=model, images=images, labels=labels, attacked=images, turned=nothing,
        attack=PGD(steps=7, restarts=3, random_start=False), threat=LINF,
    )  # fmt: skip
    path, _ = attack_checks.loss_path(look)
    assert path.shape == (1 + 7 + 1, 16)
    torch.testing.assert_close(path[0], path[1])  # without a random start the first step begins at the image
    assert (path[-1] > path[0]).all()


def test_autoattack_says_itself_how_often_it_starts() -> None:
    """As docs/checks.md says: other ensembles are tried with twice the restarts, this one with twice the steps only."""
    image, model = torch.full((1, 1, 8, 8), 0.5), trained()
    look = Look(
        target=model, model=model, images=image, labels=model(image).argmax(dim=1), attacked=image,
        turned=torch.zeros(1, dtype=torch.bool), attack=AutoAttack(steps=2, queries=1), threat=LINF,
    )  # fmt: skip
    assert attack_checks.restarts_short(look) is attack_checks.loss_rising(look) is None
    assert attack_checks.steps_short(look) is not None
    look.attack = WorstCase(members={"pgd": PGD(steps=1)})
    assert attack_checks.restarts_short(look) is not None


def test_checks_leave_the_random_state_alone() -> None:
    model, state = trained(), torch.get_rng_state()
    seen(model, PGD(steps=2))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_declared_random_model_is_no_fault_of_an_attack_without_gradients() -> None:
    """Nor is batch or bfloat16 asked of what nobody declares."""
    declared = seen(trained(LessRandom), Square(queries=5), stochastic=True, count=32)
    undeclared = seen(trained(LessRandom), Square(queries=5), count=32)
    assert "random_without_eot" not in declared
    assert set(undeclared) - set(declared) == {"random_without_eot"}
    assert undeclared["random_without_eot"] == 1
    assert "redraws_disagree" not in seen(trained(), Square(queries=5), count=32)


class Linear(nn.Module):
    """Saturated, and as easily turned as any linear model."""

    def forward(self, x: Tensor) -> Tensor:
        light = ((x - 0.5) * torch.linspace(0.5, 1.5, 64).view(1, 8, 8)).mean(dim=(1, 2, 3))
        return 1e4 * torch.stack([light, -light, torch.full_like(light, -1.0)], dim=1)


def weak(attack: Attack, eps: float = 0.05, *, turned: bool | None = None) -> set[str]:
    """What is said of the gradients that an attack on the saturated model meets."""
    images = torch.cat([torch.linspace(0.2, 0.4, 8), torch.linspace(0.6, 0.8, 8)]).view(-1, 1, 1, 1).repeat(1, 1, 8, 8)
    model, threat = Linear(), ThreatModel(norm=Norm.LINF, eps=eps)
    labels = model(images).argmax(dim=1)
    made = attack(model, images, labels, threat)
    success = made.success if turned is None else torch.full_like(made.success, turned)
    look = Look(
        target=model, model=model, images=images, labels=labels, attacked=made.images, turned=success, attack=attack,
        threat=threat,
    )  # fmt: skip
    return set(raised(probe.take(look, (model_checks.gradient_missing, model_checks.logits_saturated), full=False)))


@pytest.mark.parametrize(
    "attack",
    [
        PGD(steps=5), FGSM(), APGD(steps=5), WorstCase(members={"pgd": PGD(steps=5), "square": Square(queries=1)}),
        WorstCase(members={"pgd": PGD(steps=5), "orthogonal": OrthogonalPGD(steps=5)}),  # nothing rejects: spared
    ],
)  # fmt: skip
def test_an_attack_on_cross_entropy_stands_still_where_logits_are_saturated(attack: Attack) -> None:
    assert weak(attack) == {"gradient_missing", "logits_saturated"}
    assert weak(attack, turned=True) == set(), "an upper bound of 0 is exact"


@pytest.mark.parametrize(
    "attack",
    [
        PGD(steps=5, loss="margin"), APGD(steps=5, loss="dlr"), APGD(steps=5, loss="dlr_targeted", target_classes=2),
        DeepFool(), OrthogonalPGD(steps=5),
        WorstCase(members={"pgd": PGD(steps=5), "both": WorstCase(members={"deepfool": DeepFool()})}),
    ],
)  # fmt: skip
def test_an_attack_on_differences_of_logits_does_not(attack: Attack) -> None:
    """Also where the budget is too small for any: that images hold is no sign of a weak attack."""
    assert weak(attack, turned=False) == set()


def test_a_cell_that_fails_a_decisive_check_shows_unreliable(tmp_path: Path) -> None:
    gray = cell(300, access="gray_box", correct_attacked_bare=20)
    broken = [gray, cell(310, flags=["gradient_missing"])]
    advised = [gray, cell(310, flags=["few_images"])]
    text = tables.write_markdown(broken, tmp_path / "r.md").read_text()
    row = next(line for line in text.splitlines() if line.startswith("| digits"))
    assert "unreliable" in row
    assert "gradient_missing" in row
    assert "86.4" not in row  # 310 of 359
    assert tables.side_by_side(broken)[0].gap is None
    text = tables.write_markdown(advised, tmp_path / "a.md").read_text()
    assert "86.4" in text
    assert not unreliable(["few_images"])


def test_records_of_the_first_schema_still_load(tmp_path: Path) -> None:
    path = records.save(cell(100, flags=["no_gradient_pgd_left_out"]), tmp_path)
    old = json.loads(path.read_text())
    del old["checks"], old["digest"]
    path.write_text(json.dumps(old | {"schema_version": 1}))
    found = records.load(path)
    assert found.checks == {}
    assert across([found])[0].flags == ["no_gradient_pgd_left_out"]
    assert not unreliable(found.flags)


def test_a_job_says_that_its_attack_fails(command: Command) -> None:
    outcome = ok(
        command(
            *QUIET, "limit.epochs=3", "defense=none", "threat.eps=0.3", "threat.access=white_box", "attack.steps=2",
            "attack.step=1e-4", "attack.random_start=false", "checks=full",
        )
    )  # fmt: skip
    (run,) = outcome.runs()
    (record,) = records.find([run])
    assert {"one_step_stronger", "unbounded_holds"} <= set(record.flags)
    assert record.checks["gradient_missing"] == record.checks["test_in_training"] == 0
    assert {"steps_short", "loss_rising", "bf16_changes_verdict"} <= set(record.checks)
    assert "unreliable" in (run / "results.md").read_text()
    assert "unreliable" in outcome.out


def test_a_threshold_by_hand_is_said(command: Command) -> None:
    outcome = ok(
        command(
            *QUIET, "limit.epochs=3", "limit.test_images=50", "defense=squeezing_detector", "defense.threshold=100",
            "threat.eps=0.1", "threat.access=gray_box", "attack.steps=3",
        )
    )  # fmt: skip
    (record,) = records.find(outcome.runs())
    assert "threshold_by_hand" in record.flags
    assert record.checks["threshold_by_hand"] == pytest.approx(0.05)
    assert not unreliable(record.flags), "a threshold that the config declares is a protocol, not a fault"


def test_a_stochastic_defense_is_drawn_again(command: Command) -> None:
    """Each draw of its noise has its own accuracy; the first is the one that counts."""
    outcome = ok(
        command(
            *QUIET, "limit.epochs=3", "limit.test_images=100", "defense=smoothing", "defense.votes=1",
            "defense.certify_images=0", "defense.sigma=0.2", "threat.eps=0.1", "threat.access=white_box",
            "attack.steps=10", "eot_draws=2", "checks=full",
        )
    )  # fmt: skip
    (run,) = outcome.runs()
    (record,) = records.find([run])
    assert len(record.robust_accuracy_redraws) == 4
    assert len(set(record.robust_accuracy_redraws)) > 1
    assert max(abs(value - record.robust_accuracy) for value in record.robust_accuracy_redraws) < 0.2
    assert record.checks["redraws_disagree"] > 0
    assert "one_step_stronger" not in record.flags, "an image that one draw gets wrong is attacked on"
    assert "## Over redraws" in (run / "results.md").read_text()


def test_an_attack_against_rejection_is_missed_only_where_something_rejects() -> None:
    both = WorstCase(members={"orthogonal": OrthogonalPGD(), "square": Square()})
    assert attack_checks.members_left_out(both) == 0
    assert attack_checks.members_left_out(both, rejects=True) == 1


def test_checks_meet_the_model_that_each_access_attacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    bench = planned("defense=smoothing", "eot_draws=3", "limit.test_images=4")
    met: list[Look] = []

    def take(look: Look, checks: Any, *, full: bool) -> dict[str, float]:
        met.append(look)
        return {"random_without_eot": float(look.draws)} if checks is probe.ONCE else {}

    monkeypatch.setattr(probe, "take", take)
    table = {"image": torch.zeros(4, 1, 8, 8), "success": torch.zeros(4, dtype=torch.bool)}
    for access, draws in ((Access.WHITE_BOX, 3), (Access.GRAY_BOX, 1), (Access.WHITE_BOX, 3)):
        found = bench.checked.of_cell(bench._threat(0.1), access, table, table)
        assert (found["random_without_eot"], met[-1].draws) == (draws, draws)
        assert getattr(met[-1].target, "draws", 1) == draws, "what the attack averages over"
    assert len(met) == 5, "of each access what every eps shares once"
    assert met[2].target is bench.subject.classifier


def test_images_chosen_by_are_among_those_that_no_test_image_may_be() -> None:
    data = Digits()
    data.prepare()
    data.val.images[:5] = data.test.images[:5]
    assert data_checks.test_in_training(data, full=False) == 5 / len(data.test)


def test_to_check_a_threshold_changes_none() -> None:
    data = digits()
    defended = Brightness(fpr=0.1).guard(Linear())
    defended.set_thresholds(torch.rand(50, 1, generator=torch.Generator().manual_seed(0)))
    before = {name: value.clone() for name, value in defended.frozen.items()}
    assert data_checks.thresholds(defended, data, 0)["threshold_not_clean"] > 0
    assert all(torch.equal(defended.frozen[name], value) for name, value in before.items())


class Drawn(Detector):
    """Suspects at random."""

    def score(self, images: torch.Tensor, classify: Any) -> torch.Tensor:
        return torch.rand(len(images))


def test_the_threshold_of_a_random_detector_is_checked_by_the_draws_that_set_it() -> None:
    data = digits()
    for seed in range(50):  # by other draws every twentieth is raised
        defended = Drawn(fpr=0.1).guard(Linear())
        torch.manual_seed(seed)
        scores = [defended.scores(to_float(batch["image"])) for batch in data.val_dataloader()]
        defended.set_thresholds(torch.cat(scores))
        before = torch.get_rng_state()
        assert data_checks.thresholds(defended, data, seed) == {"threshold_not_clean": 0.0}
        assert torch.equal(torch.get_rng_state(), before)


def test_probabilities_are_seen_beside_the_column_for_rejection() -> None:
    images = to_float(digits().test.batch(range(8))["image"])
    defended = Brightness(fpr=0.1).guard(Probabilities())
    defended.set_thresholds(defended.scores(images))
    look = Look(
        target=defended, model=defended, images=images, labels=torch.zeros(8), attacked=images,
        turned=torch.zeros(8), attack=FGSM(), threat=LINF,
    )  # fmt: skip
    assert model_checks.softmax_as_logits(look) == 1


def test_validation_images_are_judged_without_being_their_own_doubles() -> None:
    """A sweep of hyperparameters is judged by them, and an unreliable cell gives it no objective."""
    data = Digits()
    data.judge_on_validation()
    assert data_checks.test_in_training(data, full=False) == 0
    data.train.images[:5] = data.test.images[:5]
    assert data_checks.test_in_training(data, full=False) == 5 / len(data.test)
