"""Where work beside the Trainer is done: on which device, and in which process."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from src import fit, thresholds
from src.callbacks.collect import Collect
from src.callbacks.progress import Progress
from src.certificate import certified
from src.defenses.guarded import DefendedModel, Detection
from src.stages import Stages


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """A device that is not the CPU, and that every machine has."""
    device = torch.device("meta")
    monkeypatch.setattr(fit, "device", lambda trainer: device)
    return device


def test_certificates_and_thresholds_are_computed_on_the_device_of_the_trainer(
    gpu: torch.device, tmp_path: Path
) -> None:
    where: list[tuple[str, str]] = []

    def score(images: Tensor, *_: Tensor) -> Tensor:
        where.append((images.device.type, defended.device.type))
        return torch.arange(len(images)).float()

    # Without weights: nothing could be brought back from this device.
    defended = DefendedModel(
        classifier=nn.Flatten(), detections=[Detection(score=score)], certify=score, certify_images=6
    )
    batches = [{"image": torch.zeros(4, 1, 2, 2, dtype=torch.uint8), "label": torch.zeros(4)}] * 2
    data: Any = SimpleNamespace(
        val=range(8), test=range(8), train_fingerprint="", configure=lambda **_: None, test_dataloader=lambda: batches,
        val_dataloader=lambda: batches, spec=SimpleNamespace(name="zeros"),
    )  # fmt: skip
    job: Any = SimpleNamespace(seed=0, trainer={}, eval_batch_size=4)
    stages = Stages(tmp_path)
    subject: Any = SimpleNamespace(defended=defended, made={})
    found = certified(subject, {}, data, stages, job)[1]
    assert found["certified_n"] == 6
    assert found["certified"]["1"] == pytest.approx(4 / 6)  # radii 0, 1, 2, 3 and 0, 1
    assert defended.device.type == "cpu"
    thresholds.frozen(defended, {"defense": "d", "classifier": "c"}, {}, data, stages, job)
    assert {value.device.type for value in defended.frozen.values()} == {"cpu"}
    assert defended.device.type == "cpu"
    assert where == [("meta", "meta")] * 4


def test_without_progress_bar_there_is_none() -> None:
    config = {"_target_": "pytorch_lightning.Trainer", "accelerator": "cpu", "enable_progress_bar": False}
    assert fit.trainer(config, callbacks=[Progress()], logger=False).progress_bar_callback is None
    assert fit.trainer(
        config | {"enable_progress_bar": True}, callbacks=[Progress()], logger=False
    ).progress_bar_callback


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
