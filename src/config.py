"""From a composed config to objects, with wrong input turned into one clear line.

The class is the schema: the keyword arguments of the class that ``_target_`` names, with their annotations, say which
keys a choice has and what values they take. A new attack or defense therefore needs no entry here.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
import typing
from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveInt,
    SerializerFunctionWrapHandler,
    ValidationError,
    create_model,
    model_serializer,
)
from pydantic_core import from_json, to_json

from src.errors import UserError
from src.recipe import Recipe
from src.threat import Access, Norm, parse_eps_list

# Filled in from the dataset's spec and the stages, never typed by a user.
FROM_PIPELINE = frozenset(
    {"channels", "size", "num_classes", "mean", "std", "patches", "symmetric", "classifier", "fresh", "parts"}
)


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

    seed: NonNegativeInt
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
        return default if self.threat.eps is None else parse_eps_list(self.threat.eps)


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
    for group in ("classifier", "defense", "surrogate"):
        if getattr(job, group) is None:
            continue
        _check_trained(getattr(job, group), group)
    build(job.attack, "attack").check(job.norm, targeted=job.threat.targeted)
    if Access.TRANSFER in job.access and job.surrogate is None:
        raise UserError(
            "threat.access=transfer: no surrogate to attack. Name the classifier that the attacker trains: "
            "+classifier@surrogate=lenet"
        )
    for group in ("callbacks", "analysis"):
        for name, node in getattr(job, group).items():
            check(node, f"{group}.{name}")
    return job


def _check_trained(choice: Mapping[str, Any], key: str) -> None:
    node, trained = split(choice, key)
    check(node, key)
    if trained.trained_on:
        for name in ("attack", "validation"):
            if (attack := getattr(trained.trained_on, name)) is not None:
                check(attack, f"{key}.trained_on.{name}")
    parts = trained.parts or {}
    for name, part in parts.items():
        _check_trained(part, f"{key}.parts.{name}")
    for name in list(parts)[:-1]:
        if _replaces(parts[name], f"{key}.parts.{name}"):
            raise UserError(
                f"{key}.parts.{name}: replaces the classifier, so the parts behind it would never be asked. Allowed: "
                f"such a defense as the last part, {key}.parts.{list(parts)[-1]}"
            )


def _replaces(choice: Mapping[str, Any], key: str) -> bool:
    """Whether a defense answers in place of the classifier: it does, or a part of the chain that it is."""
    parts = choice.get("parts") or {}
    itself = bool(getattr(locate(choice, key), "replaces", False))
    return itself or any(_replaces(part, f"{key}.parts.{name}") for name, part in parts.items())


def check(node: object, key: str) -> None:
    """Validate a node with ``_target_``, and those inside it, without making anything."""
    if not isinstance(node, Mapping) or "_target_" not in node:
        raise UserError(f"{key}={node}: expected one of the choices in conf/{key}, which name a _target_")
    _arguments(locate(node, key), node, key)


def build(node: Mapping[str, Any], key: str, **given: Any) -> Any:
    """Make the object that ``node`` describes; ``given`` adds what the pipeline knows, where the class asks for it."""
    target = locate(node, key)
    arguments = _arguments(target, node, key)
    arguments.update({name: given[name] for name in asked(node, key) if name in given})
    return target(**arguments)


def asked(node: Mapping[str, Any], key: str) -> list[str]:
    """What the class of a node takes from the pipeline: an argument with a default is the user's."""
    parameters = _parameters(locate(node, key))
    return [name for name, parameter in parameters.items() if name not in FROM_PIPELINE or _given(parameter)]


def locate(node: Mapping[str, Any], key: str) -> Any:
    """The class or function that ``_target_`` names."""
    path = str(node["_target_"])
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"{key}._target_={path}: cannot be imported ({error}). Expected package.module.Class") from None


def _arguments(target: Any, node: Mapping[str, Any], key: str) -> dict[str, Any]:
    """Keyword arguments out of a node: known names only, values as the annotations want them."""
    values = {name: value for name, value in node.items() if name != "_target_"}
    parameters = _parameters(target)
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    allowed = [n for n, p in parameters.items() if not _given(p) and p.kind is not p.VAR_KEYWORD]
    for name in values:
        if name not in allowed and not open_ended:
            raise UserError(unknown_key(f"{key}.{name}", name, allowed))
    if not str(node["_target_"]).startswith("src."):
        return {name: _nested(value, f"{key}.{name}") for name, value in values.items()}

    checked = validate(_schema(target), values, key)
    return {name: getattr(checked, name) for name in values}


@functools.cache
def _schema(target: Any) -> type[BaseModel]:
    """The arguments of one of our classes as a pydantic model; a sweep asks for the same few again and again."""
    parameters = _parameters(target)
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    hints = typing.get_type_hints(target.__init__ if inspect.isclass(target) else target, include_extras=True)
    fields: dict[str, Any] = {}
    for name, parameter in parameters.items():
        if not _given(parameter) and parameter.kind is not parameter.VAR_KEYWORD:
            default = ... if parameter.default is inspect.Parameter.empty else parameter.default
            fields[name] = (hints.get(name, Any), default)
    config = ConfigDict(
        extra="allow" if open_ended else "forbid", arbitrary_types_allowed=True, protected_namespaces=()
    )
    return create_model("Arguments", __config__=config, **fields)


@functools.cache
def _parameters(target: Any) -> dict[str, inspect.Parameter]:
    """The arguments a choice takes. Our own classes take those that we wrote down, not Lightning's ``*args``."""
    if inspect.isclass(target) and target.__module__.startswith("src."):
        owner = next((cls for cls in target.__mro__ if "__init__" in vars(cls)), object)
        if not owner.__module__.startswith("src."):
            return {}
    parameters = inspect.signature(target).parameters
    return {name: p for name, p in parameters.items() if p.kind is not p.VAR_POSITIONAL}


def _given(parameter: inspect.Parameter) -> bool:
    """Whether the pipeline fills it in: a fact of the data, asked for without a default."""
    return parameter.name in FROM_PIPELINE and parameter.default is inspect.Parameter.empty


def _nested(value: Any, key: str) -> Any:
    """Objects inside the arguments of other libraries' classes (a Trainer's profiler, say)."""
    return build(value, key) if isinstance(value, Mapping) and "_target_" in value else value


Model = typing.TypeVar("Model", bound=BaseModel)


def validate(model: type[Model], values: Mapping[str, Any], key: str) -> Model:
    """Pydantic's verdict as one line that names the key, the value and what is allowed."""
    try:
        return model.model_validate(dict(values))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(part for part in [key, *(str(p) for p in first["loc"])] if part)
        if first["type"] == "extra_forbidden":
            known = list(model.model_fields)
            for part in first["loc"][:-1]:
                annotation = model.model_fields[str(part)].annotation
                models = [a for a in (annotation, *typing.get_args(annotation)) if _is_model(a)]
                known = list(models[0].model_fields) if models else []
            raise UserError(unknown_key(where, str(first["loc"][-1]), known)) from None
        if first["type"] == "missing":
            raise UserError(f"{where}: missing; it has to be given") from None
        raise UserError(f"{where}={first['input']}: {first['msg']}") from None


def _is_model(annotation: Any) -> bool:
    return inspect.isclass(annotation) and issubclass(annotation, BaseModel)


def unknown_key(where: str, name: str, allowed: typing.Iterable[str]) -> str:
    allowed = sorted(allowed)
    close = difflib.get_close_matches(name, allowed, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    return f"{where}: unknown key; {hint}Allowed: {', '.join(allowed) or 'none'}"
