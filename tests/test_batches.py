"""How images are dealt out to devices, in which order, and augmented on the way."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from src.data.augment import Augment, augment_batch, to_float
from src.data.digits import Digits
from src.data.image_folder import ImageFolder
from src.data.loaders import BatchPlan, FileLoader, MemoryLoader
from tests.own_data import as_rank, prepared


def indices(loader: MemoryLoader | FileLoader) -> list[list[int]]:
    return [batch["index"].tolist() for batch in loader]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_every_device_count_sees_what_it_should(world: int) -> None:
    module = prepared(Digits())
    module.configure(batch_size=60, eval_batch_size=50)
    single_train, single_test = indices(module.train_dataloader()), indices(module.test_dataloader())
    train, val, test = [], [], []
    for rank in range(world):
        as_rank(module, rank, world)
        train.append(indices(module.train_dataloader()))
        val.append(indices(module.val_dataloader()))
        test.append(indices(module.test_dataloader()))
        assert [len(train[-1]), len(val[-1]), len(test[-1])] == [
            len(module.train_dataloader()), len(module.val_dataloader()), len(module.test_dataloader()),
        ]  # fmt: skip

    assert {len(batch) for one in train for batch in one} == {60 // world}
    joined = [[i for one in step for i in one] for step in zip(*train, strict=True)]
    assert joined == single_train
    assert sorted(i for one in val for batch in one for i in batch) == list(range(len(module.val)))
    dealt = sorted(batch for one in test for batch in one)
    assert dealt == sorted(single_test)
    assert [i for batch in dealt for i in batch] == list(range(len(module.test)))


def test_more_devices_than_test_batches() -> None:
    plans = [BatchPlan(kind="test", count=10, batch_size=8, rank=rank, world=3) for rank in range(3)]
    assert [len(plan) for plan in plans] == [1, 1, 0]
    assert [list(plan) for plan in plans] == [[list(range(8))], [[8, 9]], []]


def test_a_set_smaller_than_a_batch_is_one_batch() -> None:
    plans = [BatchPlan(kind="train", count=7, batch_size=64, rank=rank, world=2) for rank in range(2)]
    assert [len(plan) for plan in plans] == [1, 1]
    assert [len(batch) for plan in plans for batch in plan] == [3, 3]


def test_order_depends_on_seed_and_epoch_alone() -> None:
    module = prepared(Digits())
    module.configure(batch_size=64)

    def order(epoch: int) -> list[list[int]]:
        as_rank(module, 0, 1, epoch)
        return indices(module.train_dataloader())

    assert order(3) == order(3)
    assert order(3) != order(4)
    loader = module.train_dataloader()
    as_rank(module, 0, 1, 3)  # one loader serves all epochs
    assert indices(loader) == order(3)
    assert order(3) != indices(MemoryLoader(split=module.train, plan=BatchPlan(
        kind="train", count=len(module.train), batch_size=64, seed=1, epoch=lambda: 3)))  # fmt: skip
    flat = [i for batch in order(0) for i in batch]
    assert len(set(flat)) == len(flat) == len(module.train) // 64 * 64


@pytest.mark.parametrize("workers", [0, 2])
def test_files_and_memory_give_the_same_batches(folder: Path, workers: int) -> None:
    memory = prepared(ImageFolder(root=str(folder)))
    lazy = prepared(ImageFolder(root=str(folder), memory_limit_gib=1e-9, workers=workers))
    assert memory.spec == lazy.spec
    for epoch in range(2):
        for module in (memory, lazy):
            module.configure(batch_size=8, eval_batch_size=4)
            as_rank(module, 1, 2, epoch)
        for name in ("train_dataloader", "val_dataloader", "test_dataloader"):
            one, other = getattr(memory, name)(), getattr(lazy, name)()
            assert isinstance(one, MemoryLoader)
            assert isinstance(other, FileLoader)
            assert len(one) == len(other)
            for left, right in zip(one, other, strict=True):
                assert left.keys() == right.keys() == {"image", "label", "index"}
                assert all(torch.equal(left[key], right[key]) for key in left)


def test_global_generators_stay_untouched(folder: Path) -> None:
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()  # type: ignore[index]
    for memory_limit in (2.0, 1e-9):
        module = prepared(ImageFolder(root=str(folder), memory_limit_gib=memory_limit))
        module.configure(batch_size=8, augment=True)
        as_rank(module, 0, 1)
        for batch in module.train_dataloader():
            module.on_after_batch_transfer(module.on_before_batch_transfer(batch, 0), 0)
    assert torch.equal(torch.get_rng_state(), before)
    assert np.array_equal(np.random.get_state()[1], numpy_before)  # type: ignore[index]


@pytest.mark.parametrize("kind", ["crop", "crop_flip"])
@pytest.mark.parametrize("size", [(8, 8), (32, 24), (1, 1)])
def test_augmentation_keeps_what_it_must_and_varies(kind: Augment, size: tuple[int, int]) -> None:
    images = torch.randint(1, 255, (64, 3, *size), dtype=torch.uint8)
    images[:] = images[:1]
    made = augment_batch(images, kind, torch.Generator().manual_seed(0))
    assert made.shape == images.shape
    assert made.dtype == torch.uint8
    assert made.is_contiguous()
    low, high = images.aminmax()
    assert low <= made.min() <= made.max() <= high
    assert torch.equal(made, augment_batch(images, kind, torch.Generator().manual_seed(0)))
    if size != (1, 1):
        assert len(torch.unique(made.flatten(1), dim=0)) > 6
    as_float = to_float(made)
    assert as_float.dtype == torch.float32
    assert as_float.min() >= 0
    assert as_float.max() <= 1


def test_crop_shifts_by_a_sixteenth_and_only_crop_flip_mirrors() -> None:
    ramp = torch.arange(32, dtype=torch.uint8).expand(200, 1, 32, 32).contiguous()
    middle = augment_batch(ramp, "crop", torch.Generator().manual_seed(0))[:, 0, 16, 16].tolist()
    assert set(middle) == set(range(14, 19))
    steps = augment_batch(ramp, "crop_flip", torch.Generator().manual_seed(0))[:, 0, 16, 10:20].int().diff()
    assert 60 < int((steps < 0).all(dim=1).sum()) < 140
    assert augment_batch(ramp, "none") is ramp


def test_only_training_batches_are_augmented() -> None:
    module = prepared(Digits())
    module.configure(batch_size=32, augment=True)
    batch = next(iter(module.train_dataloader()))
    plain = to_float(batch["image"])

    def seen(epoch: int = 0, training: bool = True) -> Tensor:
        as_rank(module, 0, 1, epoch, training)
        return module.on_after_batch_transfer(module.on_before_batch_transfer(batch, 0), 0)["image"]

    assert torch.equal(seen(training=False), plain)
    assert not torch.equal(seen(), plain)
    assert torch.equal(seen(), seen())
    assert not torch.equal(seen(epoch=0), seen(epoch=1))
    module.configure(batch_size=32, augment=False)
    assert torch.equal(seen(), plain)
    module.trainer = None
    assert torch.equal(module.on_after_batch_transfer(batch, 0)["image"], plain)
    assert batch["image"].dtype == torch.uint8


class Probe(pl.LightningModule):
    """Notes what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 10)
        self.seen: list[tuple[int, Tensor, Tensor]] = []
        self.tested: list[int] = []

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        self.seen.append((self.current_epoch, batch["index"], batch["image"]))
        return nn.functional.cross_entropy(self.layer(batch["image"].flatten(1)), batch["label"])

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.tested += batch["index"].tolist()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_a_resumed_training_sees_the_same_batches(tmp_path: Path) -> None:
    def run(epochs: int, resume: Path | None = None) -> Probe:
        module, probe = Digits(limit_train=200, limit_test=70), Probe()
        module.configure(batch_size=64, augment=True, eval_batch_size=32)
        trainer = pl.Trainer(
            max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False, default_root_dir=tmp_path,
            enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False, log_every_n_steps=1,
        )  # fmt: skip
        trainer.fit(probe, datamodule=module, ckpt_path=resume, weights_only=True)
        trainer.save_checkpoint(tmp_path / f"{epochs}.ckpt")
        trainer.test(probe, datamodule=module, verbose=False)
        return probe

    whole = run(3)
    run(2)
    resumed = run(3, tmp_path / "2.ckpt")
    last = [step for step in whole.seen if step[0] == 2]
    assert len(last) == len(resumed.seen) == 2
    for one, other in zip(last, resumed.seen, strict=True):
        assert torch.equal(one[1], other[1])
        assert torch.equal(one[2], other[2])
    assert whole.tested == list(range(70))
