"""Training and testing through Lightning: the one place that builds a Trainer."""

from __future__ import annotations

import logging
import math
import multiprocessing
import os
import signal
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from lightning_fabric.plugins.environments.lightning import LightningEnvironment, find_free_network_port
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import ProgressBar
from pytorch_lightning.loggers import CSVLogger, Logger
from torch import Tensor

from src import curves, nodes, records
from src.build import build
from src.callbacks.collect import Collect
from src.callbacks.float32 import Float32, exact
from src.classifiers.module import Classifier
from src.data.base import ImageDataModule
from src.defenses.base import Defense
from src.errors import UserError
from src.recipe import Recipe
from src.resuming import Checkpoints, Patience, Seeded, last_of
from src.stages import clear

log = logging.getLogger(__name__)
# Lightning's start-up chatter is about itself; what the user needs to know, we say.
logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
for message in (
    ".*does not have many workers.*",
    ".*`isinstance\\(treespec, LeafSpec\\)`.*",
    ".*smaller than the logging.*",
    ".*exists and is not empty.*",  # that is how a training is resumed
    ".*lr_scheduler.step\\(\\).*",
):
    warnings.filterwarnings("ignore", message)


class Finite(Callback):
    """Stops at a loss that is NaN or infinite, before it is saved as a result."""

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for name, value in trainer.callback_metrics.items():
            if not math.isfinite(float(value)):
                raise UserError(
                    f"{name}={float(value)} in epoch {trainer.current_epoch} of {type(pl_module).__name__}: "
                    "training diverged; lower fit.lr or use fit.precision=32-true"
                )


class OneNode(LightningEnvironment):
    """Processes of this machine alone, even where the environment tells of several, each with a job of its own."""

    main_address = "127.0.0.1"

    @property
    def main_port(self) -> int:
        if self._main_port == -1:
            self._main_port = find_free_network_port()
        return self._main_port

    def node_rank(self) -> int:
        return 0


def trainer(config: Mapping[str, Any], *, callbacks: Sequence[Callback] = (), **options: Any) -> Trainer:
    """A Trainer from ``conf/trainer`` with what every run of ours needs."""
    check_devices(config)
    if in_processes(config):  # of its own making, also under Slurm and torchrun
        options["plugins"] = [LightningEnvironment() if nodes_of(config) > 1 else OneNode()]
    if config.get("enable_progress_bar") is False:  # with a bar among the callbacks Lightning refuses that
        callbacks = [each for each in callbacks if not isinstance(each, ProgressBar)]
    try:
        return build(
            config,
            "trainer",
            callbacks=[Float32(), *callbacks],
            use_distributed_sampler=False,  # it pads; src.data shards exactly
            inference_mode=False,  # attacks need gradients at test time
            num_sanity_val_steps=0,
            enable_model_summary=False,
            **options,
        )
    except Exception as error:  # Lightning's own checks of accelerator, devices, strategy
        raise UserError(f"trainer: {' '.join(str(error).split())}") from error


def check_devices(config: Mapping[str, Any]) -> None:
    """Whether these can be used; what follows, with or without a Trainer, computes in float32.

    Raises:
        UserError: they are not there, or cannot be counted on.
    """
    exact()  # here, and by the callback in processes that a Trainer starts
    accelerator, strategy = config.get("accelerator", "auto"), str(config.get("strategy", "auto"))
    devices = config.get("devices", "auto")
    count = _count(devices, torch.cuda.device_count() if accelerator in ("gpu", "cuda", "auto") else 1)
    if strategy not in ("auto", "ddp_spawn", "ddp_fork"):
        raise UserError(
            f"trainer.strategy={strategy}: it would run this command again in every process, and a sweep would test a "
            "part of the data only. Allowed: auto (one device), ddp_spawn (trainer=ddp), ddp_fork (trainer=ddp_cpu)"
        )
    if accelerator in ("gpu", "cuda"):
        found = torch.cuda.device_count()
        if found == 0:
            raise UserError(
                f"trainer.accelerator={accelerator}: no CUDA device on this machine. Use trainer=cpu or ddp_cpu"
            )
        if count > found:
            raise UserError(
                f"trainer.devices={devices}: this machine has {found} CUDA device(s); ask for at most {found}"
            )
    if accelerator == "cpu":
        cores = os.cpu_count() or 1
        if count > cores:
            raise UserError(f"trainer.devices={devices}: this machine has {cores} CPU core(s); ask for at most {cores}")
    if count > 1 and strategy == "auto":
        raise UserError(
            f"trainer.devices={devices}: this trainer is for one device. Use trainer=ddp or trainer=ddp_cpu"
        )
    if (several := nodes_of(config)) > 1 and strategy == "auto":
        raise UserError(
            f"trainer.num_nodes={several}: this trainer is for one machine. Use trainer=ddp or trainer=ddp_cpu"
        )
    if several > 1 and devices in ("auto", -1, "-1"):
        raise UserError(f"trainer.devices={devices}: with trainer.num_nodes={several} say how many each node gives")


def _count(devices: Any, found: int) -> int:
    """How many devices are asked for, of those that are ``found``; one where Lightning chooses or refuses."""
    if isinstance(devices, str) and "," in devices:
        devices = [each for each in devices.split(",") if each.strip()]
    if isinstance(devices, list):
        return len(devices)
    if str(devices) in ("auto", "-1"):
        return max(1, found)
    return int(devices) if str(devices).isdigit() else 1


def in_processes(config: Mapping[str, Any]) -> bool:
    """Whether the Trainer of a config starts processes to work in."""
    return str(config.get("strategy", "auto")) != "auto"


def nodes_of(config: Mapping[str, Any]) -> int:
    """How many machines the Trainer of a config spans."""
    count = config.get("num_nodes", 1)
    return count if isinstance(count, int) else 1  # a wrong one is refused with the other arguments


def device(config: Mapping[str, Any]) -> torch.device:
    """Where work outside the Trainer belongs, by the config of the Trainer."""
    accelerator = config.get("accelerator", "auto")
    return torch.device("cuda" if accelerator in ("gpu", "cuda", "auto") and torch.cuda.is_available() else "cpu")


def fit(
    module: Classifier | Defense,
    data: ImageDataModule,
    recipe: Recipe,
    *,
    config: Mapping[str, Any],
    folder: Path,
    seed: int,
    callbacks: Sequence[Callback] = (),
    logger: Logger | bool = False,
) -> None:
    """Train ``module``, or go on with what lies in ``folder``; leaves the weights of the best validation epoch in it.

    Writes ``folder/weights.pt`` and ``folder/metrics.csv``, the training curves. Checkpoints are removed after that.
    """
    monitor, mode = module.monitor
    module.recipe = recipe
    if recipe.channels_last:
        module.to(memory_format=torch.channels_last)
    data.configure(batch_size=recipe.batch_size, augment=recipe.augment)
    best = Checkpoints(folder, "best", monitor=monitor, mode=mode, enable_version_counter=False)
    # Apart: Lightning's own save_last keeps an epoch only where it was the best so far. Whole epochs alone can go on.
    last = Checkpoints(folder, "last", enable_version_counter=False, save_on_train_epoch_end=True)
    watchers: list[Callback] = [Seeded(seed), Finite(), best, last]
    if recipe.patience is not None:
        watchers.append(Patience(monitor, mode=mode, patience=recipe.patience, check_finite=False, strict=False))
    curves.gather(folder)  # of the tries before, whose file the logger would remove
    written = CSVLogger(save_dir=folder, name="", version="curves", flush_logs_every_n_steps=50)
    options: dict[str, Any] = {
        "callbacks": [*watchers, *callbacks],
        "logger": [written, *([logger] if isinstance(logger, Logger) else [])],
        "max_epochs": recipe.epochs,
        "precision": recipe.precision,
        "log_every_n_steps": 50,
    }
    if in_processes(config) and not module.automatic_optimization:  # its backward passes reach some of the weights each
        options["strategy"] = f"{config['strategy']}_find_unused_parameters_true"
    _together(Run(config, options, "fit", module, data, {"ckpt_path": last_of(folder), "weights_only": True}))
    if not best.best_model_path:
        raise UserError(
            "trainer: no epoch was validated, so none can be chosen. Leave out max_steps, limit_val_batches and "
            "check_val_every_n_epoch, or train for longer"
        )
    state = torch.load(best.best_model_path, weights_only=True, map_location="cpu")["state_dict"]
    module.load_state_dict(state)
    records.save_tensors(module.state_dict(), folder / "weights.pt")
    curves.gather(folder)
    clear(folder, "*.ckpt", "curves")


@dataclass(frozen=True)
class Run:
    """One call of a Trainer that is still to be made; it can go to another machine, which takes part in it."""

    config: Mapping[str, Any]
    options: Mapping[str, Any]
    method: Literal["fit", "test"]
    module: LightningModule
    data: ImageDataModule
    arguments: Mapping[str, Any]
    state: Tensor = field(default_factory=torch.get_rng_state)

    def __call__(self) -> None:
        torch.set_rng_state(self.state)
        run = trainer(self.config, **self.options)
        with _interruptible():
            try:
                getattr(run, self.method)(self.module, datamodule=self.data, **self.arguments)
            except MisconfigurationException as error:
                raise UserError(f"trainer: {' '.join(str(error).split())}") from None


def _together(run: Run) -> None:
    run.data.trainer = None  # that of the last run stays here
    nodes.together(run, nodes_of(run.config))


@contextmanager
def _interruptible() -> Iterator[None]:
    """Ctrl-C as Python knows it: Lightning exits instead, and leaves SIGINT ignored from then on."""
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as leaving:
        for child in multiprocessing.active_children():  # of a strategy; it would wait for them at exit
            child.kill()
        cause = leaving.__context__
        raise (cause if isinstance(cause, KeyboardInterrupt) else KeyboardInterrupt()) from None
    finally:
        signal.signal(signal.SIGINT, handler)


def evaluate(
    module: LightningModule,
    data: ImageDataModule,
    *,
    config: Mapping[str, Any],
    path: Path,
    seed: int,
    callbacks: Sequence[Callback] = (),
    keep: Mapping[str, int | None] | None = None,
) -> dict[str, Tensor]:
    """Run the test split through ``module`` and collect what each image got, in the order of the split.

    Args:
        path: file the collected tensors are written to, by the process of rank zero.
        callbacks: what happens to a batch before the module sees it, such as an attack.
        keep: image tensors of the batch to collect, with how many of the first images (None: all).

    Raises:
        RuntimeError: an image was counted twice or not at all.
    """
    collect = Collect(path=path, expected=len(data.test), seed=seed, keep=keep or {})
    options = {"callbacks": [*callbacks, collect], "logger": False, "enable_checkpointing": False}
    _together(Run(config, options, "test", module, data, {"verbose": False}))
    return torch.load(path, weights_only=True)
