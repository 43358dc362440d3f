"""``defense=[a,b]``: a chain in that order, under a name that tells its parts. Of other groups a job has one."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from src import records
from src.audit import composed
from src.report.command import command as retyped
from src.several import understood
from tests.conftest import Outcome
from tests.test_pipeline import QUIET, ok
from tests.test_wrong_input import refused

Command = Callable[..., Outcome]
QUICK = (*QUIET, "+debug=quick", "limit.test_images=20", "attack=noise", "threat.eps=0.1", "threat.access=gray_box")


def test_a_list_of_defenses_is_the_chain_of_them() -> None:
    listed, chosen = composed(["defense=[vae_kl, autoencoder_pgd]", "defense.parts.vae_kl.latent=3", *QUIET])
    by_hand, _ = composed(
        ["defense=chain", "defense@defense.parts.first=vae_kl", "defense@defense.parts.last=autoencoder_pgd",
         "defense.parts.first.latent=3", *QUIET]
    )  # fmt: skip
    assert chosen["defense"] == "vae_kl+autoencoder_pgd"
    assert list(listed.defense["parts"]) == ["vae_kl", "autoencoder_pgd"]
    assert list(listed.defense["parts"].values()) == list(by_hand.defense["parts"].values())
    assert listed.defense["_target_"] == by_hand.defense["_target_"]
    twice, _ = composed(["defense=[jpeg,none,jpeg]", *QUIET])
    assert list(twice.defense["parts"]) == ["jpeg", "none", "jpeg_3"]
    assert understood(["defense=[jpeg]"]) == ["defense=jpeg"]


def test_other_lists_stay_as_they_are() -> None:
    words = [
        "analysis=[confusion,over_eps]",
        "defense.temperatures=[10,40]",
        "~defense.fit",
        "threat.eps=[0.1]",
        "--help",
    ]
    assert understood(words) == words


def test_a_sweep_over_chains_names_them_in_its_records(command: Command) -> None:
    outcome = ok(command("-m", "defense=none,[squeezing_detector,jpeg]", *QUICK))
    one, other = records.find(sorted(outcome.folder.glob("multirun/*/*")))
    assert [one.defense, other.defense] == ["none", "squeezing_detector+jpeg"]
    assert set(other.config["defense"]["parts"]) == {"squeezing_detector", "jpeg"}
    job, _ = composed([*shlex.split(retyped(other))[3:], *QUIET])
    assert job.defense == other.config["defense"]


@pytest.mark.parametrize(
    ("override", "instead"),
    [("attack=[fgsm,pgd]", "worst_case"), ("classifier=[cnn3,lenet]", "-m"), ("dataset=mnist,[digits]", "-m"),
     ("threat=[linf,l2]", "-m"), ("+classifier@surrogate=[cnn3,lenet]", "-m")],
)  # fmt: skip
def test_a_list_where_a_job_has_one_is_refused(command: Command, override: str, instead: str) -> None:
    refused(command("-m", *QUIET, override), f"{override}: a list", instead)


def test_a_sweep_file_that_lists_is_refused_in_its_row(command: Command, tmp_path: Path) -> None:
    (tmp_path / "sweep").mkdir()
    params = 'hydra: {sweeper: {params: {defense: "[none,jpeg]"}}}\n'
    (tmp_path / "sweep" / "mine.yaml").write_text(f"# @package _global_\n{params}")
    outcome = command("-m", f"hydra.searchpath=[file://{tmp_path}]", "+sweep=mine", *QUICK)
    (record,) = records.find(outcome.folder.glob("multirun/*/*"))
    assert outcome.code == 1
    assert (record.status, record.defense) == ("failed", "?")
    assert "defense=[A,B] is a chain" in record.reason
