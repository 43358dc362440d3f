"""From a node of the config to an object, with wrong input turned into one clear line.

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

from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from src.errors import UserError

# Filled in from the dataset's spec and the stages, never typed by a user.
FROM_PIPELINE = frozenset(
    {"channels", "size", "num_classes", "mean", "std", "patches", "symmetric", "classifier", "fresh", "parts"}
)


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
        for name in allowed:
            if parameters[name].default is inspect.Parameter.empty and name not in values:
                raise UserError(f"{key}.{name}: missing; it has to be given")
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
