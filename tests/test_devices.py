"""Where work beside the Trainer is done: on which device, and in which process."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from src.callbacks.collect import Collect


def test_only_the_process_that_writes_gets_the_images_of_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[Any] = []

    def gather(mine: Any, into: list[Any] | None, dst: int) -> None:
        """Of two processes that come one after the other, the last of them being rank 0."""
        sent.insert(0, mine)
        assert dst == 0
        if into is not None:
            into[:] = sent

    monkeypatch.setattr(torch.distributed, "gather_object", gather)
    for rank in (1, 0):
        collect = Collect(path=tmp_path / "out.pt", expected=4, seed=0, keep={"image": None})
        trainer: Any = SimpleNamespace(world_size=2, is_global_zero=rank == 0)
        index = torch.arange(rank, 4, 2)
        batch = {"index": index, "label": index, "image": index.float()}
        collect.on_test_batch_end(trainer, None, {"prediction": index}, batch, 0)  # type: ignore[arg-type]
        collect.teardown(trainer, None, "test")  # type: ignore[arg-type]
    found = torch.load(tmp_path / "out.pt", weights_only=True)
    assert found["image"].tolist() == [0, 1, 2, 3]
