"""Which GPU a job of a parallel sweep gets."""

from __future__ import annotations

import multiprocessing
import os
import re
from collections.abc import Mapping
from typing import Any

VISIBLE = "CUDA_VISIBLE_DEVICES"
_DEALT = "PARAPET_GPU_DEALT"  # set in a worker that has its GPU


def claim_gpu(trainer: Mapping[str, Any]) -> str | None:
    """Give this worker of ``hydra/launcher=joblib`` a GPU, in turn, and return which; None where it needs none.

    A worker serves several jobs, and a process that has used one GPU cannot turn to another: so GPUs are dealt to
    workers, not to job numbers. That also keeps two long jobs off one GPU while another is idle.
    """
    worker = re.match(r"LokyProcess-(\d+)", multiprocessing.current_process().name)
    if worker is None or trainer.get("accelerator") not in ("gpu", "cuda") or trainer.get("devices") != 1:
        return None
    if _DEALT not in os.environ:
        import torch

        given = os.environ.get(VISIBLE)
        gpus = given.split(",") if given else [str(number) for number in range(torch.cuda.device_count())]
        if not gpus:
            return None
        os.environ[VISIBLE] = gpus[(int(worker[1]) - 1) % len(gpus)]
        os.environ[_DEALT] = "1"
    return os.environ[VISIBLE]
