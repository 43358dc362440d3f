"""What an audit is of: from a file, a folder or a name to the overrides that choose it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError  # type: ignore[import-untyped, unused-ignore]

from src.errors import UserError
from src.variant import beside, teaches, what

KEPT = (
    "dataset",
    "classifier",
    "defense",
    "seed",
    "eot_draws",
    "eval_batch_size",
    "paths",
    "limit.epochs",
    "limit.train_images",
    "experiment",
    "sweep",
    "debug",
)
_BESIDE = {"fit", "checkpoint", "trained_on", "_target_", "label_smoothing"}  # not what the class is called with


def subject_of(target: str, config: Path | None) -> list[str]:
    """The overrides that choose the target.

    Raises:
        UserError: nothing of that name, or weights of which it is not said what network they belong to.
    """
    path = Path(target)
    if (path / ".hydra" / "overrides.yaml").is_file():
        return _run(path / ".hydra")
    if path.is_file():
        return _weights(path, config)
    if config is not None:
        raise UserError(f"--config {config}: says what network a state dict belongs to, and {target} is no file")
    if ":" in target:
        return ["classifier=own", f"classifier.model={target}"]
    for source in ("torchvision", "timm"):
        if target in _names(source):
            return ["classifier=own", f"classifier.model={source}:{target}"]
    raise UserError(
        f"{target}: not a file, the folder of a run, module:callable, or a model of torchvision or an installed timm"
    )


def _run(folder: Path) -> list[str]:
    """What a run was told, and what it chose without being told."""
    from omegaconf import OmegaConf

    given = [str(item) for item in OmegaConf.load(folder / "overrides.yaml")]
    choices = OmegaConf.select(OmegaConf.load(folder / "hydra.yaml"), "hydra.runtime.choices")
    chosen = [f"{group}={choices[group]}" for group in ("dataset", "classifier", "defense")]
    told = ("dataset=", "classifier=", "defense=")
    model = [item for item in given if kept(item) and not item.startswith(told) and not teaches(item)]
    # From the config: a trainer or callbacks of one's own say more than their names, which say where it ran as well.
    whole: Any = OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"))
    added = [f"++{kind}.{name}={_value(node)}" for kind, found in beside(whole).items() for name, node in found.items()]
    return [*chosen, *model, *added]


def kept(item: str) -> bool:
    """Whether an override says what the model is, or where it lies."""
    return teaches(item) or any(f"{what(item)}.".startswith(f"{name}.") for name in KEPT)


def _names(source: str) -> list[str]:
    try:
        if source == "timm":
            import timm  # type: ignore[import-not-found, unused-ignore]

            return list(timm.list_models())
        from torchvision import models

        return list(models.list_models(module=models))
    except ImportError:
        return []


def _weights(path: Path, config: Path | None) -> list[str]:
    from omegaconf import OmegaConf

    checkpoint = f"checkpoint={_value(str(path.absolute()))}"
    if config is not None:
        if not config.is_file():
            raise UserError(f"--config {config}: no such file; expected YAML with a _target_, or the config of a run")
        try:
            node: Any = OmegaConf.to_container(OmegaConf.load(config), resolve=True)
        except (YAMLError, OmegaConfBaseException) as error:
            raise UserError(f"--config {config}: not YAML ({' '.join(str(error).split())})") from None
        node = node.get("classifier", node) if isinstance(node, dict) else {}
        if "_target_" not in node:
            raise UserError(f"--config {config}: says no _target_ of a network, nor has it a classifier that does")
        ours = str(node["_target_"]).startswith("src.")
        return [*(_choice("classifier", node) if ours else _foreign(node)), f"classifier.{checkpoint}"]
    meta = path.parent / "meta.json"
    if not meta.is_file():
        return [f"classifier.{checkpoint}"]  # of the classifier that the overrides choose
    try:
        found = json.loads(meta.read_text())
        kind, about = found["kind"], found["about"]
    except (ValueError, KeyError, TypeError):  # somebody else's
        return [f"classifier.{checkpoint}"]
    if kind not in ("classifier", "defense"):
        raise UserError(f"{path}: {found['what']}; expected the weights of a classifier or a defense")
    seed = [f"seed={about['seed']}"] if "seed" in about else []  # it decides the validation images
    chosen = [*_choice(kind, about["node"]), f"{kind}.{checkpoint}", *seed]
    key = about.get("classifier") or (about.get("trained_on") or {}).get("classifier")
    found_at = path.parent.parent.parent / "classifier" / str(key) / "weights.pt"
    if key and found_at.is_file():
        return [*_weights(found_at, None), *chosen]
    return [*(_choice("classifier", about["fresh"]) if "fresh" in about else []), *chosen]


def _foreign(node: Mapping[str, Any]) -> list[str]:
    """Overrides that call the class or function of someone else with the arguments of the node."""
    module, _, name = str(node["_target_"]).rpartition(".")
    arguments = {key: value for key, value in node.items() if key not in _BESIDE}
    given = [f"+classifier.arguments={_value(arguments)}"] if arguments else []
    return ["classifier=own", f"classifier.model={module}:{name}", *given]


def _choice(group: str, node: Mapping[str, Any]) -> list[str]:
    """Overrides that make the same node: the choice named like its module, and all its arguments."""
    name = str(node["_target_"]).split(".")[-2]
    given = {key: value for key, value in node.items() if key not in _BESIDE}
    # An own model's arguments are not in its YAML.
    return [
        f"{group}={name}",
        *(f"{'+' * (key == 'arguments')}{group}.{key}={_value(value)}" for key, value in given.items()),
    ]


def _value(value: Any) -> str:
    """A value as Hydra's command line reads it."""
    if isinstance(value, str) and not re.fullmatch(r"[\w./:+-]+", value):
        return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"
    if isinstance(value, list):
        return f"[{','.join(_value(item) for item in value)}]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{_value(item)}" for key, item in value.items()) + "}"
    return value if isinstance(value, str) else json.dumps(value)
