"""What lets a training that was interrupted go on, and end as if it had not been."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint

from src.keys import seed_of
from src.stages import clear

log = logging.getLogger(__name__)


class Seeded(Callback):
    """Sets the global random state at each epoch, so that a resumed training goes on as an undisturbed one."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        torch.manual_seed(seed_of(self.seed, trainer.current_epoch, trainer.global_rank))


class Patience(EarlyStopping):
    """Early stopping that knows, when a training is resumed, that it had stopped already."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.should_stop = self.wait_count >= self.patience


class Checkpoints(ModelCheckpoint):
    """Knows them again where their folder has another name than before: Lightning forgets the best score then."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        here, before = str(self.dirpath), str(state_dict["dirpath"])

        def moved(value: Any) -> Any:
            if isinstance(value, dict):
                return {moved(name): moved(each) for name, each in value.items()}
            return here + value.removeprefix(before) if isinstance(value, str) and value.startswith(before) else value

        super().load_state_dict(moved(state_dict))


def last_of(folder: Path) -> Path | None:
    """The checkpoint an interrupted training left, if it can be read: that of the last epoch, else of the best."""
    best, last = folder / "best.ckpt", folder / "last.ckpt"
    if _readable(best):  # without it the last is of no use: no later epoch need be as good
        return last if _readable(last) else best
    if best.exists() or last.exists():
        log.warning("%s: training begins again: there is no checkpoint of the best epoch that can be read", folder)
        clear(folder, "*.ckpt", "curves")
    return None


def _readable(path: Path) -> bool:
    try:
        torch.load(path, weights_only=True, map_location="cpu")
    except FileNotFoundError:
        return False
    except Exception as error:  # cut short, not a checkpoint, or a pickle that would run code
        log.warning("%s: cannot be read (%s)", path, type(error).__name__)
        return False
    return True
