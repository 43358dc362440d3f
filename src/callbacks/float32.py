"""Float32 that is float32."""

from __future__ import annotations

import torch
from pytorch_lightning import Callback, LightningModule, Trainer


class Float32(Callback):
    """Convolutions on a GPU in float32, in each process: cuDNN's default there, TF32, has the mantissa of a half."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        exact()


def exact() -> None:
    torch.backends.cudnn.allow_tf32 = False
