"""Several choices of one group: ``defense=[a,b]`` is a chain. Hydra lays one over the other, which suits few groups.

Hydra and the tables know such a chain by the name ``a+b``; its parts are ``defense.parts.a`` and ``defense.parts.b``.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterable

from hydra.core.config_store import ConfigStore

from src.errors import UserError

_INSTEAD = {
    "dataset": "-m dataset=A,B runs one after the other",
    "classifier": "-m classifier=A,B runs one after the other",
    "defense": "on the command line defense=[A,B] is a chain, elsewhere defense=chain",
    "attack": "attack=worst_case takes the worst of several image by image, -m attack=A,B runs one after the other",
    "threat": "-m threat=A,B runs one after the other",
}


def understood(overrides: Iterable[str]) -> list[str]:
    """The same overrides with chains by their names, and these made known to Hydra.

    Raises:
        UserError: a list for another group of which a job has one.
    """
    found = []
    for override in overrides:
        key, _, value = override.partition("=")
        group = key.lstrip("+").partition("@")[0]
        if key.removeprefix("~") in _INSTEAD and (override.startswith("~") or value == "[]"):
            bare = "; defense=none is the bare classifier" if "defense" in key else ""
            raise UserError(f"{override}: a job needs one{bare}")
        if group == "defense" and value:
            override = f"{key}={_known(value)}"
        elif group in _INSTEAD and "[" in value:
            raise UserError(f"{override}: a list, where a job has one choice; {_INSTEAD[group]}")
        found.append(override)
    return found


def _known(value: str) -> str:
    value = re.sub(r"\[([\w\s,-]+)\]", lambda listed: "+".join(re.findall(r"[\w-]+", listed[1])), value)
    for name in re.findall(r"[\w-]+(?:\+[\w-]+)+", value):
        parts = name.split("+")
        labels = [part if part not in parts[:i] else f"{part}_{i + 1}" for i, part in enumerate(parts)]
        defaults = [{f"/defense@parts.{label}": part} for label, part in zip(labels, parts, strict=True)]
        node = {"defaults": [*defaults, "_self_"], "_target_": "src.defenses.chain.Chain"}
        ConfigStore.instance().store(group="defense", name=name, node=node)
    return value


def refuse(choices: Container[str]) -> None:
    """A list in a YAML, which was laid one over the other and has left no choice.

    Raises:
        UserError: such a list.
    """
    for group, instead in _INSTEAD.items():
        if group not in choices:
            raise UserError(f"{group}: a list, where a job has one choice; {instead}")
