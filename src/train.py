"""The command: ``python -m src.train [GROUP=CHOICE ...] [KEY=VALUE ...]``.

Starts fast: torch, Lightning and the rest are imported when a job runs, not for ``--help`` or ``--cfg job``.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from src.errors import UserError

CONF = Path(__file__).resolve().parent.parent / "conf"


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="train")
def entry(cfg: DictConfig) -> None:
    from src import job

    job.run(cfg)


def main() -> None:
    """Run the command; wrong input ends in one line on stderr and exit code 1."""
    # With this Hydra raises its errors instead of printing several lines and leaving, so that we can say them in one.
    asked = os.environ.setdefault("HYDRA_FULL_ERROR", "1") and os.environ.get("PARAPET_TRACEBACK")
    try:
        entry()
    except KeyboardInterrupt:
        _leave("interrupted; run the same command again to go on from here", 130)
    except (UserError, HydraException, OmegaConfBaseException, OSError) as error:
        if asked:
            raise
        _leave(_one_line(error), 1)


def _one_line(error: Exception) -> str:
    """Hydra's several lines, "Available options" and all, folded into one."""
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


def _leave(line: str, code: int) -> None:
    print(f"error: {line}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
