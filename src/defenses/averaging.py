"""The moving average of a network's weights, which is steadier than the last ones."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


def moving_average(network: nn.Module, decay: float) -> AveragedModel:
    """An average of weights and batch-norm statistics, moved on by ``update_parameters(network)``; never trained.

    Args:
        network: what it begins with.
        decay: share kept at a step, in [0, 1); lower in the first steps: (1 + n) / (10 + n) after n of them.
    """
    # A partial of a function of this module: other processes can be sent it.
    average = AveragedModel(network, multi_avg_fn=partial(_follow, decay=decay), use_buffers=True)
    return average.requires_grad_(False)


def _follow(average: Any, current: Any, count: Tensor, *, decay: float) -> None:
    """One step; at the beginning, where there is little to average, nearer to the present."""
    steps = float(count)
    step = get_ema_multi_avg_fn(min(decay, (1 + steps) / (10 + steps)))  # type: ignore[no-untyped-call]
    step(average, current, count)
