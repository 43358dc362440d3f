"""How much memory a model takes to answer."""

from __future__ import annotations

import os

import torch
from torch import Tensor, nn

BATCH = 64  # images that memory is measured with, whatever the batch size of the evaluation: it grows with them
MIB = 2**20


@torch.no_grad()
def peak_mib(model: nn.Module, images: Tensor) -> float:
    """Most tensor memory alive at once while ``model`` answers ``images``, its weights and the images included, in MiB.

    By the allocator's own peak on CUDA. The CPU's keeps none: there it is the sum of the allocations and releases that
    torch's profiler notes. Both count tensors only, not the libraries' code or work space of their own.
    """
    resident = sum(part.nbytes for part in (*model.parameters(), *model.buffers(), images))
    with torch.random.fork_rng(devices=[images.device] if images.is_cuda else []):
        on_top = _on_cuda(model, images) if images.is_cuda else _on_cpu(model, images)
    return (resident + on_top) / MIB


def _on_cuda(model: nn.Module, images: Tensor) -> int:
    torch.cuda.reset_peak_memory_stats(images.device)
    before = torch.cuda.memory_allocated(images.device)
    model(images)
    return torch.cuda.max_memory_allocated(images.device) - before


def _on_cpu(model: nn.Module, images: Tensor) -> int:
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it would speak of itself on stderr
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        answer = model(images)
        del answer
    noted = watched.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in noted if event.name() == "[memory]")
    now = most = 0
    for _, change in changes:
        now += change
        most = max(most, now)
    return most
