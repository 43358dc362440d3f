"""The variant of a cell: the overrides that its other names do not show, and what they tell."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from src.records import Record

_ADDED = ("+experiment=", "+sweep=", "+debug=")  # groups without a default: they cannot be chosen without the plus
# Overrides of these say what is measured, not where or how it is run. `checks` and `eval_batch_size` are absent: they
# change no more of a cell than how closely it is looked at, and its draws. Of trainer and callbacks: `teaches`.
_MEASURED = (
    *_ADDED,
    "classifier@",
    "defense@",
    "attack@",
    "surrogate.",
    "split",
    "eot_draws",
    "search_precision",
    "threat.quantize",
    "dataset.",
    "classifier.",
    "defense.",
    "attack.",
    "limit.",
)
_PLACES = ("root", "cache", "workers", "memory_limit_gib", "download", "checkpoint")
# Of the trainer and the callbacks: where it runs and what is shown of it. The rest changes what is learnt.
_PLACED = (
    "accelerator", "devices", "num_nodes", "strategy", "enable_progress_bar", "enable_model_summary", "detect_anomaly",
    "profiler", "default_root_dir",
)  # fmt: skip
_SHOWN = "src.callbacks.progress.Progress"  # under the name "progress"
_OF_THE_ATTACK = ("attack", "eot_draws", "search_precision")


def of_task(task: Iterable[str]) -> str:
    """What the overrides of a job leave in the names of its cells."""
    # A plus says how a key is set, not to what. Of "~key" a sweep makes "~key=null".
    overrides = [
        item.split("=")[0] if item.startswith("~") else item if item.startswith(_ADDED) else item.lstrip("+")
        for item in task
    ]
    last = {item.split("=")[0]: item for item in overrides}  # of a key given twice
    named = [
        item
        for item in sorted(last.values())
        if teaches(item)
        or (item.lstrip("~").startswith(_MEASURED) and item.split("=")[0].rsplit(".", 1)[-1] not in _PLACES)
    ]
    return ",".join(named)


def places(record: Record) -> dict[str, str]:
    """Files of its data and of weights of the user's own, by config key: the variant names no places.

    Their last names alone, since folders differ between machines; of weights with the folder, many are `weights.pt`.
    """
    found: dict[str, str] = {}
    root = (record.config.get("dataset") or {}).get("root")
    if root and root != (record.config.get("paths") or {}).get("data"):  # else it is where downloads lie
        found["dataset.root"] = Path(root).name

    def look(node: Any, key: str) -> None:
        for name, value in node.items() if isinstance(node, dict) else ():
            if name == "checkpoint" and isinstance(value, str):
                found[f"{key}.{name}"] = "/".join(Path(value).parts[-2:])
            look(value, f"{key}.{name}")

    for kind in ("classifier", "defense", *(["surrogate"] if record.access == "transfer" else [])):
        look(record.config.get(kind), kind)
    return found


def data_apart(records: Sequence[Record]) -> list[str]:
    """Of each record the file name of its data, as an override, where data sets of one choice lie in several places."""
    roots = [places(record).get("dataset.root", "") for record in records]
    found: dict[str, set[str]] = {}
    for record, root in zip(records, roots, strict=True):
        found.setdefault(record.dataset, set()).add(root)
    return [
        f"dataset.root={root}" if root and len(found[record.dataset]) > 1 else ""
        for record, root in zip(records, roots, strict=True)
    ]


def own_weights(record: Record) -> list[str]:
    """Weights of the user's own that it was measured with, as overrides."""
    return [f"{key}={name}" for key, name in places(record).items() if key.endswith(".checkpoint")]


def what(item: str) -> str:
    """What an override is about: ``defense.parts.first`` of ``defense@defense.parts.first=jpeg``."""
    return item.lstrip("+~").partition("=")[0].rpartition("@")[2]


def group_of(item: str) -> str:
    """The config group, or the key at the top, that an override is about."""
    return what(item).partition(".")[0]


def teaches(item: str) -> bool:
    """Whether an override of the trainer or the callbacks changes what is learnt; a choice of theirs does not say."""
    root, name = [*what(item).split("."), ""][:2]
    return bool(name) and (name not in _PLACED if root == "trainer" else root == "callbacks" and name != "progress")


def beside(config: Mapping[str, Any]) -> dict[str, Any]:
    """What changes a training beside its recipe: arguments of the Trainer and callbacks that the user has added."""
    trainer = {name: value for name, value in (config.get("trainer") or {}).items() if name not in _PLACED}
    if trainer.get("_target_") == "pytorch_lightning.Trainer":
        del trainer["_target_"]
    nodes = (config.get("callbacks") or {}).items()
    callbacks = {name: node for name, node in nodes if (node or {}).get("_target_") != _SHOWN}
    found = {"trainer": trainer, "callbacks": callbacks}
    return {name: value for name, value in found.items() if value}


def overrides_of(record: Record) -> list[str]:
    """The overrides of its variant; a comma in brackets, braces or quotes parts none."""
    found, depth = [""], 0
    for token in re.findall(r"""\\.|'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*"|.""", record.variant, re.DOTALL):
        depth += (token in "([{") - (token in ")]}")
        if token == "," and depth == 0:
            found.append("")
        else:
            found[-1] += token
    return [item for item in found if item]


def variant_of(record: Record, *, attack: bool = False) -> str:
    """The overrides that are the model's, or those that are the attack's."""
    said = ((item, group_of(item)) for item in overrides_of(record))
    return ",".join(item for item, kind in said if (kind in _OF_THE_ATTACK) == attack)
