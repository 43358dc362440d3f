"""``+retry=failed``: a sweep once more in its own folder; jobs that are done stay as they are.

Without it, a sweep that is run again finds its finished cells in the cache. With it, finished jobs are not even
started: nothing is imported and nothing looked up for them. A job is done when it left this module's mark, for the same
settings, and its records still lie there.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from src.errors import UserError
from src.keys import content_key

FLAG = "+retry=failed"
MARK = "done.json"
_ELSEWHERE = ("retry", "plan", "logger")  # settings that change no figure


def settings(cfg: DictConfig, choices: Mapping[str, Any]) -> str:
    """A hash of all that a job's figures depend on, before anything is resolved."""
    plain: Any = OmegaConf.to_container(cfg, resolve=False)
    names = {group: str(choices.get(group)) for group in ("dataset", "classifier", "defense", "attack")}
    return content_key(names=names, **{name: value for name, value in plain.items() if name not in _ELSEWHERE})


def mark(out: Path, of: str, keys: Iterable[str], config: Mapping[str, Any]) -> None:
    """Say that the job in ``out`` is done, with the keys of its records and its resolved config."""
    (out / MARK).write_text(json.dumps({"settings": of, "records": list(keys), "config": config}))


def settled(out: Path, of: str) -> bool:
    """Whether the job in ``out`` was done with these settings."""
    try:
        left = json.loads((out / MARK).read_text())
        return left["settings"] == of and all((out / "records" / f"{key}.json").exists() for key in left["records"])
    except (OSError, ValueError, KeyError, TypeError):
        return False


def marked(folders: Iterable[Path]) -> list[tuple[list[str], dict[str, Any]]]:
    """Keys of the records and config of each job that was done in these folders or below."""
    found = []
    for file in sorted({file for folder in folders for file in folder.rglob(MARK)}):
        with suppress(OSError, ValueError, KeyError, TypeError):
            left = json.loads(file.read_text())
            found.append((left["records"], left["config"]))
    return found


def with_folder(arguments: Sequence[str], sweeps: Path = Path("multirun")) -> list[str]:
    """The arguments of a sweep with ``+retry=failed``, and the folder of the newest sweep of the same command.

    Raises:
        UserError: there is none, and no ``hydra.sweep.dir`` names one.
    """
    if FLAG not in arguments:
        return list(arguments)
    if not any(argument in ("-m", "--multirun") or argument.startswith("hydra.mode=") for argument in arguments):
        raise UserError(f"{FLAG}: of a sweep. Give its command as it was given then, with -m")
    if any(argument.startswith("hydra.sweep.dir=") for argument in arguments):
        return list(arguments)
    asked = _measured(arguments)
    for file in sorted(sweeps.glob("*/*/multirun.yaml"), reverse=True):
        if _of(file) == asked:
            return [*arguments, f"hydra.sweep.dir={file.parent}"]
    raise UserError(
        f"{FLAG}: no earlier sweep of this command under {sweeps}/. Give it as it was given then, with -m, or name its "
        "folder: hydra.sweep.dir=FOLDER"
    )


def _of(file: Path) -> set[str] | None:
    """What a sweep measures by its ``multirun.yaml``; None where a full disk left that empty or half."""
    try:
        before: Any = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
        return _measured(str(override) for override in before["hydra"]["overrides"]["task"])
    except Exception:  # not YAML, half a config: OmegaConf and the parser behind it raise whatever comes
        return None


def _measured(arguments: Iterable[str]) -> set[str]:
    """The overrides among them that say what is measured; options of Hydra, and their values, are none."""
    others = ("hydra.", "hydra/", "-", *_ELSEWHERE)
    overrides = (argument for argument in arguments if "=" in argument or argument.startswith("~"))
    return {override for override in overrides if not override.lstrip("+").startswith(others)}
