"""What the README shows works as it stands there."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser

from src import config, records
from tests.conftest import ROOT, choices

README = (ROOT / "README.md").read_text()


def block(path: str) -> str:
    """The code block that follows the name of a file."""
    found = re.search(rf"`{re.escape(path)}`\n\n```\w+\n(.*?)```", README, re.DOTALL)
    assert found, path
    return found[1]


# Not attack and defense: adding one is two files, and the README is not one of them.
@pytest.mark.parametrize("group", ["dataset", "classifier", "threat", "trainer", "logger", "analysis", "experiment"])
def test_every_choice_is_listed(group: str) -> None:
    (row,) = re.findall(rf"^\| `\+?{group}` \|(.*)\|$", README, re.MULTILINE)
    listed = {name for name in re.findall(r"`([\w]+)`", row)}
    assert set(choices(group)) <= listed


def test_adding_an_attack_and_a_defense_takes_the_two_files_shown_each(tmp_path: Path) -> None:
    """In a copy of the sources: the four files are written, nothing else is touched, and both are used."""
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("src", "conf"):
        subprocess.run(["cp", "-r", str(ROOT / name), str(copy)], check=True)
    for path in (
        "src/attacks/corner.py", "conf/attack/corner.yaml",
        "src/defenses/purify/rounding.py", "conf/defense/rounding.yaml",
    ):  # fmt: skip
        assert not (copy / path).exists()
        (copy / path).write_text(block(path))
    done = subprocess.run(
        [sys.executable, "-m", "src.train", "attack=corner", "defense=rounding", "+debug=quick", "logger=none",
         "threat.eps=0.2", "callbacks=none", "trainer.enable_progress_bar=false"],
        cwd=copy, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = records.find([copy / "outputs"])
    assert [(r.attack, r.defense, r.status, r.access) for r in found] == [
        ("corner", "rounding", "done", "gray_box"), ("corner", "rounding", "done", "white_box")
    ]  # fmt: skip
    assert found[0].correct_attacked_bare is not None
    assert found[0].distance_max == pytest.approx(0.2, abs=1e-6)


def test_help_and_config_answer_at_once() -> None:
    import time

    for flag, word in (("--help", "apgd, apgd_dlr, art"), ("--cfg=job", "eot_draws")):
        started = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", "src.train", *flag.split("=")], cwd=ROOT, capture_output=True, text=True, check=True
        )
        assert word in done.stdout
        assert time.perf_counter() - started < 10  # 0.6 s on an idle machine; the bound only catches torch's return


def jobs(line: str) -> list[list[str]]:
    """The overrides of a command of the README; of a sweep so many jobs that every value of a list is in one."""
    parser = OverridesParser.create()
    words = [word for word in shlex.split(line, comments=True)[3:] if word != "-m"]
    values = [
        [f"{word.partition('=')[0]}={each}" for each in parsed.sweep_string_iterator()]
        if (parsed := parser.parse_override(word)).is_sweep_override()
        else [word]
        for word in words
    ]
    return [[each[job % len(each)] for each in values] for job in range(max(map(len, values), default=1))]


def parsed(*overrides: str) -> config.Job:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return config.parse(compose("train", overrides=[*overrides, "logger=none"]))


@pytest.mark.parametrize("line", re.findall(r"(?m)^python -m src\.train(?! --help).*$", README))
def test_every_command_is_accepted(line: str) -> None:
    for overrides in jobs(line):
        parsed(*(word for word in overrides if not word.startswith("hydra")))


@pytest.mark.parametrize("name", choices("experiment"))
def test_an_experiment_goes_with_another_defense_and_classifier(name: str) -> None:
    """What it sets of its own is unknown to these."""
    job = parsed(f"+experiment={name}", "defense=none", "classifier=resnet18")
    assert job.defense == {"_target_": "src.defenses.none.NoDefense"}
    assert job.classifier["fit"]["epochs"] == 60


def test_what_an_experiment_sets_of_its_defense_is_not_set_of_another_in_silence() -> None:
    name = "+experiment=mnist_pgd_autoencoder"
    assert parsed(name, "defense=vae").defense == parsed("defense=vae").defense
    own = parsed(name, "defense.fit.lr=1e-4").defense  # the command line has the last word
    assert (own["latent"], own["fit"]["epochs"], own["fit"]["lr"]) == (32, 16, 1e-4)
