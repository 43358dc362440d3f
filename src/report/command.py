"""The command that measures a cell again, word for word what to type, from its record alone.

A record keeps the resolved config of its job. What differs from the choices in ``conf/`` under the names in the record
becomes an override. A cell is known by its variant as well: the overrides that are in it are given as they were.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from src import several
from src.records import Record
from src.variant import beside, group_of, overrides_of, what

CONF = Path(__file__).resolve().parent.parent.parent / "conf"
_GROUPS = ("dataset", "classifier", "defense", "attack")
_PLAIN = ("seed", "eval_batch_size", "eot_draws", "search_precision", "checks", "split")
_MISSING = object()
# Unquoted in Hydra's grammar, and nothing but a string there.
_WORD = re.compile(r"(?!(?:null|true|false|nan|inf)$)[A-Za-z_/][\w./+%@-]*", re.IGNORECASE)


def command(record: Record) -> str:
    """One line for a shell. A record without a config (a job that failed early) gives what its names say."""
    choices = [f"{group}={getattr(record, group)}" for group in _GROUPS]
    radius = [] if record.eps is None else [f"threat.eps={_value(record.eps)}"]
    asked = [*radius, *([f"threat.access={record.access}"] if record.access else [])]
    if not record.config:
        changes = [_typed(item, *choices) for item in overrides_of(record)]
        changes += [f"seed={record.seed}", *(["threat.targeted=true"] if record.targeted else [])]
    else:
        changes = list(_changes(record))
    words = [*choices, f"threat={record.norm}", *asked, *changes]
    return " ".join(["python -m src.train", *(shlex.quote(word) for word in words)])


def _typed(item: str, *choices: str) -> str:
    """With the plus that it needs beside these choices: the name of a cell has none."""
    added = f"{'+' if '@' in item.partition('=')[0] else '++'}{item}"
    needed = _composed(*choices, item) is None and _composed(*choices, added) is not None
    return added if needed else item


def _changes(record: Record) -> Iterator[str]:
    """The overrides of the variant, and what else it takes to come to the config."""
    said = overrides_of(record)
    added = tuple(item for item in said if item.startswith("+"))  # an experiment, if conf/ still has it
    if _composed(*added) is None:
        added = ()
    parts = _parts(record, (item for item in said if not item.startswith("+") and _chooses(item)), added)
    yield from added
    for chosen in parts.values():
        yield from chosen
    left = list(_differences(record, added, parts))
    for item in (each for each in said if not _chooses(each)):
        covered = [change for change in left if _same(item, change)]
        left = [change for change in left if change not in covered]
        new = not item.startswith("~") and any(change.startswith("++") for change in covered)
        yield f"++{item}" if new else item
    yield from left


def _chooses(item: str) -> bool:
    return item.startswith("+") or "@" in item.partition("=")[0]


def _same(item: str, change: str) -> bool:
    """Whether two overrides are of one key, or one is of a part of the other; a choice has parts of its own."""
    one, other = what(item), what(change)
    return one == other or f"{other}.".startswith(f"{one}.") or ("." in other and f"{one}.".startswith(f"{other}."))


def _parts(record: Record, items: Iterable[str], added: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """Root of a key → what is chosen below it, such as a part of a chain or the surrogate, where conf/ still has it."""
    found: dict[str, tuple[str, ...]] = {}
    for item in items:
        root = group_of(item)
        before = (*([f"{root}={getattr(record, root)}"] if root in _GROUPS else []), *added, *found.get(root, ()))
        typed = _typed(item, *before)
        if _composed(*before, typed) is not None:
            found[root] = (*found.get(root, ()), typed)
    return found


def _differences(record: Record, added: tuple[str, ...], parts: Mapping[str, tuple[str, ...]]) -> Iterator[str]:
    config = record.config
    roots = {name: config[name] for name in ("seed", "limit", "paths", "threat") if name in config}
    context = json.dumps(roots, sort_keys=True)
    base = _base("dataset", context, f"dataset={record.dataset}", *added) or {}
    for name in _PLAIN:
        if name in config and config[name] != base.get(name, config[name]):
            yield f"{name}={_value(config[name])}"
    defaults = _composed(*added) or {}
    for name in ("limit", "paths"):
        yield from _difference(name, defaults.get(name, {}), config.get(name, {}))
    threat = {k: v for k, v in config.get("threat", {}).items() if k not in ("eps", "access")}
    usual = _base("threat", "{}", f"threat={record.norm}", *added) or {}
    yield from _difference("threat", {k: v for k, v in usual.get("threat", {}).items() if k in threat}, threat)
    for group in _GROUPS:
        chosen = _base(group, context, f"{group}={getattr(record, group)}", *added, *parts.get(group, ()))
        if chosen is not None:  # a choice that is no longer in conf/ has its name only
            yield from _difference(group, chosen[group], config.get(group, {}))
    yield from _nearest("trainer", "trainer=", config.get("trainer"), context, added)
    yield from _difference("callbacks", {}, beside(config).get("callbacks", {}))
    if parts.get("surrogate"):
        chosen = _base("surrogate", context, *added, *parts["surrogate"]) or {}
        yield from _difference("surrogate", chosen.get("surrogate") or {}, config.get("surrogate") or {})
    elif config.get("surrogate"):
        yield from _nearest("classifier", "+classifier@surrogate=", config["surrogate"], context, added, "surrogate")


def _nearest(
    group: str, prefix: str, node: Any, context: str, added: tuple[str, ...], key: str | None = None
) -> Iterator[str]:
    """A choice whose name the record does not hold: the one that needs the fewest overrides."""
    if not node:
        return
    names = sorted(path.stem for path in (CONF / group).glob("*.yaml"))
    ranked: list[tuple[list[str], str]] = []
    for name in sorted(names, key=lambda name: name != "cpu"):  # the usual trainer first: each takes a while to compose
        if base := _base(group, context, f"{group}={name}", *added):
            ranked.append((list(_difference(key or group, base[group], node)), name))
            if not ranked[-1][0]:
                break
    if ranked:
        changes, name = min(ranked, key=lambda each: (len(each[0]), each[1]))
        if key or changes or name != "cpu":
            yield f"{prefix}{name}"
        yield from changes


def _difference(key: str, base: Mapping[str, Any], wanted: Mapping[str, Any]) -> Iterator[str]:
    for name, value in wanted.items():
        before, path = base.get(name, _MISSING), f"{key}.{name}"
        if isinstance(value, dict) and isinstance(before, dict) and value:
            yield from _difference(path, before, value)
        elif value != before:
            yield f"{'++' if before is _MISSING or isinstance(value, dict) else ''}{path}={_value(value)}"
    yield from (f"~{key}.{name}" for name in base if name not in wanted)


def _value(value: Any) -> str:
    """As Hydra's override grammar reads it back."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{','.join(_value(each) for each in value)}]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{name}:{_value(each)}" for name, each in value.items()) + "}"
    if isinstance(value, str) and not _WORD.fullmatch(value):
        return "'" + value.replace("'", "\\'") + "'"
    return str(value)


@cache
def _base(group: str, context: str, *choices: str) -> dict[str, Any] | None:
    """A node of the config with these choices, references to seed, limit and paths resolved as the record has them."""
    from omegaconf import OmegaConf

    raw = _composed(*choices)
    if raw is None:
        return None
    given = json.loads(context)
    whole = OmegaConf.create({**raw, **{key: value for key, value in given.items() if key != group}})
    plain = {key: raw[key] for key in _PLAIN if key in raw}
    return {**plain, group: OmegaConf.to_container(whole, resolve=True)[group]}  # type: ignore[call-overload,index]


@cache
def _composed(*overrides: str) -> dict[str, Any] | None:
    """Unresolved; without what says only where a run is told of."""
    from hydra import compose, initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf import OmegaConf

    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            found: Any = OmegaConf.to_container(compose("train", overrides=several.understood(overrides)))
    except HydraException:
        return None
    return {key: value for key, value in found.items() if key not in ("logger", "callbacks")}
