"""The command that a record gives composes to the very config of the record."""

from __future__ import annotations

import shlex
from typing import Any

import pytest
from hydra import compose, initialize_config_dir

from src import config
from src.job import names_of
from src.records import Record
from src.report.command import CONF, command


def composed(overrides: list[str]) -> dict[str, Any]:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        job = config.parse(compose("train", overrides=[*overrides, "logger=none", "callbacks=none"]))
    return job.model_dump(mode="json")


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["dataset=mnist", "paths.data='/a b/it\\'s'", "seed=3", "limit.test_images=100"],
        [
            "attack=apgd",
            "++attack.steps=7",
            "attack.rho=75e-2",
            "defense=autoencoder_pgd",
            "defense.trained_on.attack.steps=3",
        ],
        ["defense=none", "classifier=cnn6", "classifier.fit.lr=1e-4", "threat=l2", "threat.targeted=true"],
        [
            "threat.access=transfer",
            "+classifier@surrogate=lenet",
            "surrogate.fit.epochs=2",
            "~surrogate.label_smoothing",
        ],
        [
            "trainer=ddp_cpu",
            "search_precision=bf16-mixed",
            "defense=chain",
            "eot_draws=2",
            "checks=full",
            "defense@defense.parts.first=vae_kl",
            "+defense@defense.parts.third=jpeg",
        ],
        ["+experiment=cifar_pgd_vae", "+debug=quick", "classifier.checkpoint='x=1.pt'", "limit.epochs=2"],
        ["defense=autoencoder", "defense.trained_on.eps=inf", "defense.trained_on.norm=l2"],
        ["+trainer.gradient_clip_val=0.5", "+callbacks.mine={_target_:torch.nn.Linear,in_features:1,out_features:2}"],
    ],
    ids=["defaults", "paths", "nested", "norm", "transfer", "trainer", "experiment", "infinite", "taught"],
)
def test_the_command_gives_the_config_back(overrides: list[str]) -> None:
    wanted = composed(overrides)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        choices = compose("train", overrides=overrides, return_hydra_config=True).hydra.runtime.choices
    names = names_of(choices, overrides)
    access = "transfer" if "threat.access=transfer" in overrides else "white_box"
    record = Record(
        key="k", norm=wanted["threat"]["norm"], eps=8 / 255, access=access, seed=wanted["seed"], config=wanted, **names
    )
    words = shlex.split(command(record))
    assert words[:3] == ["python", "-m", "src.train"]
    assert names_of(choices, words[3:]) == names, "which a cell is found by as well"
    found = composed(words[3:])
    if "defense.trained_on.eps=inf" in overrides:
        assert found["defense"]["trained_on"]["eps"] == "Infinity"
    assert (found["threat"]["eps"], found["threat"]["access"]) == (8 / 255, access)
    for config_ in (found, wanted):
        config_["threat"] |= {"eps": None, "access": None}
    assert found == wanted


def test_what_is_as_usual_is_not_said() -> None:
    record = Record(
        key="k", dataset="digits", classifier="cnn3", defense="vae", attack="pgd", norm="linf", eps=0.1,
        access="gray_box", seed=0, config=composed([]),
    )  # fmt: skip
    assert command(record) == (
        "python -m src.train dataset=digits classifier=cnn3 defense=vae attack=pgd threat=linf threat.eps=0.1 "
        "threat.access=gray_box"
    )


@pytest.mark.parametrize(
    ("variant", "said"),
    [
        ("defense.temperatures=[10,40],classifier@surrogate=lenet", "+classifier@surrogate=lenet"),
        ("surrogate.fit.epochs=2,trainer.max_steps=3,classifier@surrogate=lenet", "++trainer.max_steps=3"),
        ("attack@defense.trained_on.validation=pgd,attack.steps=3", "attack.steps=3"),
        ("+debug=quick,defense.parts={a:{x:1,y:[1,2]},b:'it\\'s, {so'}", "+debug=quick"),
        ("~defense.detectors,callbacks.mine={_target_:a.B,x:1}", "++callbacks.mine={_target_:a.B,x:1}"),
    ],
)
def test_of_a_failed_cell_the_command_composes(variant: str, said: str) -> None:
    """It has no config; its variant has the overrides without a plus, a comma between two."""
    record = Record(
        key="k", dataset="digits", classifier="cnn3", defense="magnet", attack="pgd", norm="linf", eps=0.1,
        access="transfer", seed=2, variant=variant, status="failed",
    )  # fmt: skip
    words = shlex.split(command(record))[3:]
    assert said in words
    with initialize_config_dir(str(CONF), version_base="1.3"):
        compose("train", overrides=words)
    assert ",".join(word.lstrip("+") for word in words[7:-1]) == variant.lstrip("+")


def test_a_record_without_config_and_a_choice_that_is_gone() -> None:
    record = Record(
        key="k", dataset="digits", classifier="cnn3", defense="mine", attack="pgd", norm="linf", eps=None, access="",
        seed=2, variant="attack.steps=3",
    )  # fmt: skip
    assert command(record).endswith("defense=mine attack=pgd threat=linf attack.steps=3 seed=2")
    assert "defense=mine" in command(record.model_copy(update={"config": composed([])}))
