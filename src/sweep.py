"""The plan of a whole sweep, made in one process before any job is launched: ``-m ... +plan=true``.

Hydra composes each job anew, a tenth of a second each; thousands of jobs would be planned for minutes. Here jobs that
differ in eps and access only are one, as they are in the cache, and a config is composed once for each combination of
choices: what else varies is a value put into it.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from src.errors import UserError
from src.plan import Plan

_LISTS = ("threat.eps", "threat.access")  # values that a job takes several of


def planned(config: DictConfig) -> tuple[Plan, list[str]]:
    """The cells and stages of a sweep, and why jobs of it cannot work.

    Args:
        config: of the sweep, as Hydra's callbacks get it.
    """
    whole, refused = _planned(config, joined=True)
    # What one of a list makes impossible, such as an access, is no fault of the others.
    return (whole, refused) if not refused else _planned(config, joined=False)


def _planned(config: DictConfig, *, joined: bool) -> tuple[Plan, list[str]]:
    from src import config as schema
    from src import job, pipeline, several
    from src.subject import Names

    whole, refused = Plan(), []
    for cfg, choices, overrides in _jobs(config, joined=joined):
        try:
            several.refuse(choices)
            names = job.names_of(choices, overrides)
            part = pipeline.plan(schema.parse(cfg), Names(**names))
        except Exception as error:
            refused.append(job.explain(error))
            continue
        whole.cells |= part.cells
        whole.stages |= part.stages
        whole.artifacts = part.artifacts
    return whole, list(dict.fromkeys(refused))


def _jobs(config: DictConfig, *, joined: bool) -> Iterator[tuple[DictConfig, Any, list[str]]]:
    """Config, choices and overrides of each job; the config may be one seen before, with other values.

    ``joined``: jobs that differ in eps and access only are one.
    """
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.compose import compose
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.hydra_config import HydraConfig
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.core.override_parser.types import OverrideType

    hydra = config.hydra
    if not str(hydra.sweeper._target_).endswith(".BasicSweeper"):
        raise UserError("+plan=true: a sweeper that searches decides as it goes; only hydra/sweeper=basic has a plan")
    loader = GlobalHydra.instance().config_loader()
    parser = OverridesParser.create(config_loader=loader)
    given = [f"{key}={value}" for key, value in (hydra.sweeper.params or {}).items()] + list(hydra.overrides.task)
    choices: dict[str, list[str]] = {}
    values: dict[str, list[str]] = {}
    for override in parser.parse_overrides(given):
        key = override.get_key_element()
        options = [only for (only,) in BasicSweeper.split_arguments([override], None)[0]]
        if joined and key in _LISTS and len(options) > 1 and f"{key}=null" not in options:
            listed = ",".join(option.partition("=")[2].strip("[]") for option in options)
            options = [f"{key}=[{listed}]"]
        plain = override.type is OverrideType.CHANGE and not loader.get_group_options(key.partition("@")[0])
        choices.pop(key, None), values.pop(key, None)  # the last of a key counts
        (values if plain and len(options) > 1 else choices)[key] = options

    parsed = {text: parser.parse_override(text).value() for options in values.values() for text in options}

    @functools.cache
    def composed(*chosen: str) -> tuple[DictConfig, Any]:
        first = [*chosen, *(options[0] for options in values.values())]
        cfg = compose(hydra.job.config_name, overrides=first, return_hydra_config=True)
        with read_write(cfg), open_dict(cfg):
            cfg.hydra.runtime.output_dir = str(hydra.sweep.dir)
            HydraConfig.instance().set_config(cfg)
            task = OmegaConf.masked_copy(cfg, [str(name) for name in cfg if name != "hydra"])
        return task, cfg.hydra.runtime.choices

    # Jobs on the same data follow one another: it is read when it changes.
    datasets = [[text] for text in choices.pop("dataset", [])] or [[]]
    for data, some in itertools.product(datasets, list(itertools.product(*values.values()))):
        for rest in itertools.product(*choices.values()):
            chosen = [*data, *rest]
            task, names = composed(*chosen)
            for text in some:
                OmegaConf.update(task, text.partition("=")[0], parsed[text])
            yield task, names, [*chosen, *some]
