"""Progress bars that clear away when done: the log lines stay, the bars do not."""

from __future__ import annotations

from pydantic import PositiveInt
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import TQDMProgressBar
from pytorch_lightning.callbacks.progress.tqdm_progress import Tqdm


class Progress(TQDMProgressBar):
    """One bar for a training's epoch, one for a pass over the test images; validation shows in the training's figures.

    Args:
        refresh_rate: batches between two redraws.
    """

    def __init__(self, *, refresh_rate: PositiveInt = 10) -> None:
        super().__init__(refresh_rate=refresh_rate, leave=False)

    def init_validation_tqdm(self) -> Tqdm:
        return Tqdm(disable=True)

    def init_test_tqdm(self) -> Tqdm:
        bar = super().init_test_tqdm()
        bar.leave = False
        return bar

    def get_metrics(
        self, trainer: Trainer, pl_module: LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        # v_num is the name of a log folder: nothing to watch.
        return {name: value for name, value in super().get_metrics(trainer, pl_module).items() if name != "v_num"}
