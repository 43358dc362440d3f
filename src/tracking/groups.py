"""What the runs of one sweep share on W&B: the name of their group."""

from __future__ import annotations

import re
from pathlib import Path


def group_of(sweep_dir: str | Path) -> str:
    """Name of a sweep: its folder, with the day where the folder is named by the time only."""
    path = Path(sweep_dir)
    return f"{path.parent.name}_{path.name}" if re.fullmatch(r"\d\d-\d\d-\d\d(-\d+)?", path.name) else path.name


def sweep_group() -> str | None:
    """The group of the sweep this job belongs to; None outside a sweep or outside Hydra."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    if not HydraConfig.initialized():
        return None
    config = HydraConfig.get()
    return group_of(config.sweep.dir) if config.mode == RunMode.MULTIRUN else None
