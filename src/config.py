"""What a job's config has to say, checked before any work."""

from __future__ import annotations

import typing
from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PositiveInt,
    SerializerFunctionWrapHandler,
    model_serializer,
)
from pydantic_core import from_json, to_json

from src.build import build, check, locate, validate
from src.errors import UserError
from src.recipe import Recipe
from src.threat import Access, Norm, parse_eps, parse_eps_list

# What the Trainer is given by the pipeline, for trainings or for verdicts, and where its user can say it instead.
NOT_OF_TRAINER = {
    "precision": "classifier.fit.precision or defense.fit.precision; verdicts are in float32",
    "max_epochs": "classifier.fit.epochs, defense.fit.epochs or limit.epochs",
    "logger": "logger=wandb, csv or none",
    "callbacks": "+callbacks.NAME._target_=package.Class",
    "fast_dev_run": "+debug=quick",
    "limit_test_batches": "limit.test_images",
    **dict.fromkeys(
        ("enable_checkpointing", "enable_model_summary", "inference_mode", "log_every_n_steps", "num_sanity_val_steps",
         "plugins", "use_distributed_sampler"),
        "nothing: leave it out",
    ),
}  # fmt: skip


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="strings")


class ThreatConfig(Strict):
    norm: str
    eps: Any = None
    access: Any
    targeted: bool
    quantize: bool


class Limit(Strict):
    epochs: PositiveInt | None
    train_images: PositiveInt | None
    test_images: PositiveInt | None


class Paths(Strict):
    data: str
    artifacts: str


class TrainedOn(Strict):
    """The attack whose images a defense learns from."""

    attack: dict[str, Any] | None = None  # null: the defense makes its own images; `validation` judges them
    norm: str
    eps: Any  # largest radius; null: the largest of the dataset's own for that norm
    target: typing.Literal["classifier", "itself"] = (
        "classifier"  # what is attacked: the bare classifier or the defense
    )
    radius: typing.Literal["drawn", "full"] = "drawn"  # drawn: each batch has its own, up to eps
    validation: dict[str, Any] | None = None  # another attack for the validation images; null: the same
    warmup: float = Field(0.0, ge=0, lt=1)  # share of the training in which the radius grows from 0


class Trained(Strict):
    """What a classifier or a defense has beside the arguments of its class."""

    fit: Recipe | None = None  # absent: nothing to train
    checkpoint: str | None = None  # weights of one's own instead of training
    label_smoothing: float = Field(0.0, ge=0, lt=1)  # classifiers only
    trained_on: TrainedOn | None = None
    parts: dict[str, dict[str, Any]] | None = None  # of a chain: each as it would stand under `defense`


def split(node: Mapping[str, Any], key: str) -> tuple[dict[str, Any], Trained]:
    """The arguments of the class, and how it is trained."""
    beside = {name: value for name, value in node.items() if name in Trained.model_fields}
    return {name: value for name, value in node.items() if name not in beside}, validate(Trained, beside, key)


class Job(Strict):
    """The root of the config: one cell, or several that differ in eps and access only."""

    seed: typing.Annotated[int, Field(ge=0, lt=2**63)]
    eval_batch_size: PositiveInt
    eot_draws: PositiveInt
    search_precision: typing.Literal["32-true", "bf16-mixed"] | None
    checks: typing.Literal["cheap", "full"] = "cheap"
    dataset: dict[str, Any]
    classifier: dict[str, Any]
    surrogate: dict[str, Any] | None
    defense: dict[str, Any]
    attack: dict[str, Any]
    threat: ThreatConfig
    trainer: dict[str, Any]
    logger: dict[str, Any]
    callbacks: dict[str, Any]
    analysis: dict[str, dict[str, Any]] = Field(default_factory=dict)
    split: typing.Literal["test", "validation"] = "test"  # images that are judged
    limit: Limit
    paths: Paths
    # Not of what is measured, so not in a record's config:
    plan: bool = Field(False, exclude=True)  # say what would be done, and stop
    retry: typing.Literal["failed"] | None = Field(None, exclude=True)  # of a sweep: leave finished jobs alone

    @model_serializer(mode="wrap", when_used="json")
    def _with_infinity(self, handler: SerializerFunctionWrapHandler) -> Any:
        """JSON has none: it is written as a string, which a radius is read from as well."""
        return from_json(to_json(handler(self), inf_nan_mode="strings"))

    @property
    def norm(self) -> Norm:
        return Norm.parse(self.threat.norm)

    @property
    def access(self) -> tuple[Access, ...]:
        return Access.parse(self.threat.access)

    def eps(self, default: tuple[float, ...]) -> tuple[float, ...]:
        return default if self.threat.eps is None else parse_eps_list(self.threat.eps, norm=self.norm)


def parse(cfg: DictConfig) -> Job:
    """Validate the whole composed config before any work.

    Raises:
        UserError: an unknown or misspelled key, a value of the wrong kind, an interpolation that leads nowhere.
    """
    try:
        plain = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise UserError(f"{error.full_key or 'config'}: {str(error).splitlines()[0]}") from None
    assert isinstance(plain, dict)
    job = validate(Job, typing.cast(dict[str, Any], plain), "")
    _ = job.access, job.eps((0.0,))
    for group in ("dataset", "attack", "trainer", "logger"):
        check(getattr(job, group), group)
    for name in job.trainer:
        if name in NOT_OF_TRAINER:
            raise UserError(f"trainer.{name}: set by the pipeline itself; use {NOT_OF_TRAINER[name]}")
    for group in ("classifier", "defense", "surrogate"):
        if getattr(job, group) is None:
            continue
        _check_trained(getattr(job, group), group)
    build(job.attack, "attack").check(job.norm, targeted=job.threat.targeted)
    if Access.TRANSFER in job.access and job.surrogate is None:
        raise UserError(
            "threat.access=transfer: no surrogate to attack. Name the classifier that the attacker trains: "
            "+classifier@surrogate=cnn3"
        )
    for group in ("callbacks", "analysis"):
        for name, node in getattr(job, group).items():
            check(node, f"{group}.{name}")
    return job


def _check_trained(choice: Mapping[str, Any], key: str) -> None:
    node, trained = split(choice, key)
    check(node, key)
    _check_fits(choice, key)
    if trained.trained_on and trained.trained_on.target == "itself" and not _answers(choice, key):
        raise UserError(f"{key}.trained_on.target=itself: gives no logits to attack. Allowed: classifier, the bare one")
    if trained.trained_on:
        if trained.trained_on.eps is not None:
            parse_eps(trained.trained_on.eps, f"{key}.trained_on.eps", Norm.parse(trained.trained_on.norm))
        for name in ("attack", "validation"):
            if (attack := getattr(trained.trained_on, name)) is not None:
                check(attack, f"{key}.trained_on.{name}")
                norm = Norm.parse(trained.trained_on.norm)
                if norm not in (able := build(attack, f"{key}.trained_on.{name}").norms):
                    raise UserError(
                        f"{key}.trained_on.norm={norm}: {key}.trained_on.{name} cannot do it. "
                        f"Allowed: {', '.join(sorted(able))}"
                    )
    parts = trained.parts or {}
    if trained.parts is not None and not parts:
        raise UserError(f"{key}.parts: no parts are left. Allowed: one or more, or defense=none")
    for name, part in parts.items():
        _check_trained(part, f"{key}.parts.{name}")
    rates = {name: part["fpr"] for name, part in parts.items() if part.get("fpr") is not None}
    if len(set(rates.values())) > 1:
        told = ", ".join(f"{key}.parts.{name}.fpr={rate}" for name, rate in rates.items())
        raise UserError(
            f"{told}: a chain rejects one share of clean images, by all its detectors together. Give them one"
        )
    for name in list(parts)[:-1]:
        if _replaces(parts[name], f"{key}.parts.{name}"):
            raise UserError(
                f"{key}.parts.{name}: replaces the classifier, so the parts behind it would never be asked. Allowed: "
                f"such a defense as the last part, {key}.parts.{list(parts)[-1]}"
            )


def _check_fits(choice: Mapping[str, Any], key: str) -> None:
    """What a classifier, a defense or a chain of them has no use for would change nothing, and be believed."""
    defense = key.partition(".")[0] == "defense"
    useless = {"trained_on": "of a defense", "parts": "of a chain"}
    if defense:
        useless = {"label_smoothing": "of a classifier"}
    if choice.get("parts"):
        useless |= dict.fromkeys(("fit", "checkpoint", "trained_on"), "of its parts")
    for name, owner in useless.items():
        if choice.get(name) is not None:
            raise UserError(f"{key}.{name}: would change nothing. Allowed: {name} {owner}, or leave it out")


def _answers(choice: Mapping[str, Any], key: str) -> bool:
    """Whether a defense is called with images and gives logits itself."""
    from pytorch_lightning import LightningModule

    return getattr(locate(choice, key), "forward", None) is not LightningModule.forward


def _replaces(choice: Mapping[str, Any], key: str) -> bool:
    """Whether a defense answers in place of the classifier: it does, or a part of the chain that it is."""
    parts = choice.get("parts") or {}
    itself = bool(getattr(locate(choice, key), "replaces", False))
    return itself or any(_replaces(part, f"{key}.parts.{name}") for name, part in parts.items())
