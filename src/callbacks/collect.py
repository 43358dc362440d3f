"""Gather what each test image got, over all devices, exactly once."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor

from src import records
from src.keys import seed_of


class Collect(Callback):
    """Writes one tensor a column, in the order of the split, to ``path``.

    Columns: ``index``, ``label``, ``seconds`` (per image, of the module's forward pass), what the module's
    ``test_step`` returned (``prediction`` and more), what an attack said of the image, and the image tensors named in
    ``keep``.
    """

    def __init__(self, *, path: Path, expected: int, seed: int, keep: Mapping[str, int | None]) -> None:
        self.path = path
        self.expected = expected
        self.seed = seed
        self.keep = dict(keep)
        self.parts: list[dict[str, Tensor]] = []
        self.kept: dict[str, list[dict[str, Tensor]]] = {name: [] for name in keep}
        self._started = 0.0

    def on_test_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        # A stochastic defense answers by the images it is shown, not by the device or process that shows them.
        torch.manual_seed(seed_of(self.seed, int(batch["index"][0])))
        self._started = time.perf_counter()

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        told = {name: value.cpu() for name, value in outputs.items()}
        count = len(batch["index"])
        seconds = (time.perf_counter() - self._started) / count
        part = {
            "index": batch["index"].cpu(),
            "label": batch["label"].cpu(),
            "seconds": torch.full((count,), seconds, dtype=torch.float64),
        }
        part |= told
        part |= {name: value.cpu() for name, value in batch.get("verdict", {}).items()}
        self.parts.append(part)
        for name, most in self.keep.items():
            chosen = batch["index"] < (self.expected if most is None else most)
            self.kept[name].append({"index": batch["index"][chosen].cpu(), "value": batch[name][chosen].cpu()})

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Gather and write. Here, since Lightning calls no other hook in a process that got no batch to test."""
        mine = (self.parts, self.kept)
        self.parts, self.kept = [], {name: [] for name in self.keep}
        everyone: list[Any] = [mine]
        if trainer.world_size > 1:
            everyone = [None] * trainer.world_size
            # To the one that writes alone: of large images all processes together could not hold copies.
            torch.distributed.gather_object(mine, everyone if trainer.is_global_zero else None, dst=0)
        if not trainer.is_global_zero:
            return
        result = _in_order([part for parts, _ in everyone for part in parts])
        tested = result["index"]
        if not torch.equal(tested, torch.arange(self.expected)):
            raise RuntimeError(
                f"{len(tested)} images tested, {len(set(tested.tolist()))} of them different; the test split has "
                f"{self.expected}: the data loader pads, drops or repeats"
            )
        for name in self.keep:
            result[name] = _in_order([part for _, kept in everyone for part in kept[name]])["value"]
        records.save_tensors(result, self.path)


def _in_order(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Batches of any processes as one table in the order of the split."""
    table = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    order = table["index"].argsort()
    return {name: column[order] for name, column in table.items()}
