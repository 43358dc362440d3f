"""Hydra composes each job of a sweep twice: once is enough."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from omegaconf import DictConfig

KEPT = 200  # composed configs of jobs that are kept until they run, about a quarter of a MiB each


def compose_once(config: DictConfig) -> None:
    """Keep what Hydra composes, a tenth of a second a job, to see that it can, until it composes it again to run it."""
    from hydra.core.global_hydra import GlobalHydra

    hydra = config.hydra
    if not (hydra.sweeper._target_.endswith(".BasicSweeper") and hydra.launcher._target_.endswith(".BasicLauncher")):
        return  # other launchers compose in their own processes
    loader = GlobalHydra.instance().config_loader()
    compose, kept, seen = loader.load_sweep_config, dict[tuple[str, ...], Any](), set[tuple[str, ...]]()

    def load(master_config: DictConfig, sweep_overrides: list[str]) -> DictConfig:
        key = tuple(sweep_overrides)
        if key in kept:
            return kept.pop(key)
        made = compose(master_config, sweep_overrides)
        if key not in seen and len(seen) < KEPT:  # of two jobs that are the same each gets a config of its own
            seen.add(key)
            kept[key] = made
        return made

    vars(loader)["load_sweep_config"] = load
