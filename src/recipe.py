"""How a module is trained: the ``fit`` block of a classifier or a defense, and the optimiser it asks for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, PositiveFloat, PositiveInt

if TYPE_CHECKING:
    from torch import nn


class Recipe(BaseModel):
    """Keys of ``conf/fit/default.yaml``; whatever is here is part of the content key of the stage it trains."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    epochs: PositiveInt
    batch_size: PositiveInt  # over all devices together
    optimizer: Literal["sgd", "adam", "adamw"]
    lr: PositiveFloat  # peak
    momentum: Annotated[float, Field(ge=0, lt=1)]  # sgd only
    weight_decay: NonNegativeFloat  # on weights, never on biases and batch norm
    schedule: Literal["onecycle", "cosine", "none"]
    warmup: Annotated[float, Field(gt=0, lt=1)]  # onecycle only: share of the steps
    augment: bool
    patience: PositiveInt | None  # epochs without a better validation figure before stopping
    precision: Literal["32-true", "bf16-mixed", "16-mixed"]
    channels_last: bool

    def optimizers(
        self, module: nn.Module, *, steps: int | None = None, betas: tuple[float, float] = (0.9, 0.999)
    ) -> dict[str, Any]:
        """What ``configure_optimizers`` returns: the optimiser and a schedule stepped once a batch.

        Args:
            module: a LightningModule, or a part of one.
            steps: how often the schedule is stepped; None: once for each batch of ``module.trainer``.
            betas: decay rates of the moments of adam and adamw; these are torch's.
        """
        import torch
        from torch.optim import lr_scheduler

        trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
        groups = [
            {"params": [p for p in trainable if p.ndim > 1], "weight_decay": self.weight_decay},
            {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0},
        ]
        optimizer: torch.optim.Optimizer
        if self.optimizer == "sgd":
            optimizer = torch.optim.SGD(groups, lr=self.lr, momentum=self.momentum, nesterov=self.momentum > 0)
        else:
            kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[self.optimizer]
            optimizer = kind(groups, lr=self.lr, betas=betas)
        if self.schedule == "none":
            return {"optimizer": optimizer}
        if steps is None:
            trainer: Any = module.trainer
            steps = int(trainer.estimated_stepping_batches)
        schedule: lr_scheduler.LRScheduler
        if self.schedule == "cosine":
            schedule = lr_scheduler.CosineAnnealingLR(optimizer, steps)
        elif steps < 2:  # the one rate of a onecycle is that of its end, next to nothing
            schedule = lr_scheduler.ConstantLR(optimizer, factor=1.0)
        else:
            alone = self.warmup * steps == 1  # one step to climb in: torch divides by those after the first
            schedule = lr_scheduler.OneCycleLR(
                optimizer,
                self.lr,
                total_steps=steps,
                pct_start=self.warmup * (1 - 1e-9) if alone else self.warmup,
                anneal_strategy="linear",
                div_factor=10,
                final_div_factor=1000,
                cycle_momentum=False,
            )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
