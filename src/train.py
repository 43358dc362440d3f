"""The command: ``python -m src.train [GROUP=CHOICE ...] [KEY=VALUE ...]``.

Starts fast: torch, Lightning and the rest are imported when a job runs, not for ``--help`` or ``--cfg job``.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from src import leaving, nodes, retry, several
from src.callbacks import results_table
from src.errors import UserError

CONF = Path(__file__).resolve().parent.parent / "conf"
_WITH_A_PLUS = ("experiment", "sweep", "debug")  # groups of which nothing is chosen unless somebody does


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="train")
def entry(cfg: DictConfig) -> None:
    hydra = HydraConfig.get()
    out, settings = Path(hydra.runtime.output_dir), retry.settings(cfg, hydra.runtime.choices)
    if cfg.get("retry") == "failed" and retry.settled(out, settings):
        return  # before anything heavy is imported
    from src import job

    # Leaving from here spares the user Hydra's "Error executing job with overrides".
    try:
        job.run(cfg, settings)
    except UserError as error:
        _leave(str(error), 1)
    except KeyboardInterrupt as error:
        _leave(*leaving.farewell(error))


def main() -> None:
    """Run the command; wrong input ends in one line on stderr and exit code 1."""
    wants_traceback = "HYDRA_FULL_ERROR" in os.environ
    # With this Hydra raises its errors instead of printing several lines and leaving, so that we can say them in one.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    results_table.under_way = None
    try:
        with leaving.on_signals():
            if nodes.join(sys.argv[1:]):
                return
            _refuse_null(sys.argv[1:])
            given = sorted(sys.argv[1:], key=_is_override)  # Hydra's parser wants none before an option
            sys.argv[1:] = retry.with_folder(several.understood(given))
            entry()
    except KeyboardInterrupt as error:
        _leave(*leaving.farewell(error))
    except Exception as error:
        wrong = isinstance(error, UserError | HydraException | OmegaConfBaseException)
        wrong |= str(error).startswith("Only one of --")  # of Hydra, a ValueError
        if (sweep := results_table.under_way) is not None and not wrong:
            # The launcher gave up, since a worker was killed: what the jobs have done so far is on disk.
            results_table.finish(sweep, f"the sweep ended early, go on with {retry.FLAG} ({_named(error)})")
            if not wants_traceback:
                sys.exit(1)
        if wants_traceback or not (wrong or isinstance(error, OSError)):
            raise
        _leave(_one_line(error), 1)


def _is_override(argument: str) -> bool:
    return not argument.startswith("-") and ("=" in argument or argument.startswith("~"))


def _refuse_null(arguments: list[str]) -> None:
    """Hydra has no such choice on the command line, and says so without the name of the group."""
    for argument in arguments:
        found = re.fullmatch(r"\+*(([\w/]+)(@[\w.]+)?)=(.*,)?null(,.*)?", argument)
        if found and (folder := CONF / found[2]).is_dir():
            usual = f"{found[1]}=none" if (folder / "none.yaml").exists() else f"a name in conf/{found[2]}"
            instead = "analysis=[]" if found[2] == "analysis" else usual
            raise UserError(f"{argument}: null is not a choice. Expected {instead}")


def _one_line(error: Exception) -> str:
    """Hydra's several lines, "Available options" and all, folded into one."""
    if (found := re.search(r"Could not override '([\w.@/]+)'", str(error))) and (line := _misspelled(found[1])):
        return line
    cause = error.__cause__
    text = (
        str(error)
        if not (isinstance(error, HydraException) and cause and str(cause) not in str(error))
        else f"{error} ({cause})"
    )
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    folded = ""
    for line in lines:
        glue = ": " if line.startswith("Available options") else " "
        folded += (glue if folded else "") + line
    return folded


def _named(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _misspelled(key: str) -> str | None:
    """Hydra knows that a key is wrong, but not which are right: look them up in the config without that override."""
    from hydra import compose, initialize_config_dir

    from src.build import unknown_key

    if key in ("plan", "retry"):
        return f"{key}: set with a plus, +{'plan=true' if key == 'plan' else 'retry=failed'}"
    if "@" in key:
        return None  # Hydra says it
    if key in _WITH_A_PLUS:
        names = sorted(path.stem for path in (CONF / key).glob("*.yaml"))
        return f"{key}: chosen with a plus, +{key}=NAME. Allowed: {', '.join(names)}"
    parent, _, name = key.rpartition(".")
    others = [a.lstrip() for a in sys.argv[1:] if "=" in a and not a.startswith(("-", key, f"+{key}", "hydra"))]
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            node = OmegaConf.select(compose("train", overrides=others), parent) if parent else compose("train")
            return unknown_key(key, name, [str(allowed) for allowed in node if allowed != "_target_"])
    except (HydraException, OmegaConfBaseException, TypeError):
        return None


def _leave(line: str, code: int) -> None:
    print(f"error: {line}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
