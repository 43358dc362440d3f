"""Training throughput of CIFAR-sized cnn6: ours through Lightning against a bare loop, in one process, alternating.

    make bench-train

The bare loop is what one would write by hand for speed: bf16 autocast, channels_last, images in memory, the same
augmentation, network, optimiser and batch size. Random pixels serve: throughput does not depend on what they show.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf

from src import fit
from src.classifiers.cnn6 import CNN6
from src.classifiers.module import Classifier
from src.data.augment import augment_batch, to_float
from src.data.npz import NPZ
from src.recipe import Recipe

IMAGES = 8192  # a whole number of batches
ROUNDS = 4
CONF = Path(__file__).resolve().parent.parent / "conf"


def dataset(folder: Path) -> NPZ:
    """CIFAR's shape: 32x32 colour, ten classes."""
    random = np.random.default_rng(0)
    path = folder / "random.npz"
    arrays = {
        name: random.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
        for name, count in (("x_train", IMAGES + 512), ("x_test", 512))
    }
    labels = {name.replace("x", "y"): np.arange(len(images)) % 10 for name, images in arrays.items()}
    np.savez(path, allow_pickle=False, **arrays, **labels)
    data = NPZ(root=str(path), validation=512 / (IMAGES + 512))
    data.prepare()
    return data


def network(data: NPZ) -> CNN6:
    torch.manual_seed(0)
    spec = data.spec
    patches = torch.eye(12).tolist()  # of pixels without correlation
    return CNN6(
        channels=3, size=spec.size, num_classes=10, mean=spec.mean, std=spec.std, patches=patches, symmetric=True
    )


def bare(data: NPZ, recipe: Recipe) -> float:
    """Images per second of one epoch of the loop written by hand."""
    model = network(data).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=recipe.lr, momentum=recipe.momentum, nesterov=True)
    started = time.perf_counter()
    count = 0
    for index in torch.randperm(len(data.train.labels)).split(recipe.batch_size):
        images = to_float(augment_batch(data.train.images[index], "crop_flip"))
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(images.contiguous(memory_format=torch.channels_last))
        loss = F.cross_entropy(logits.float(), data.train.labels[index], label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        count += len(index)
    return count / (time.perf_counter() - started)


class Watch(fit.Callback):
    """Seconds from the first to the last batch of an epoch, validation left out as in the bare loop."""

    def on_train_epoch_start(self, *_: object) -> None:
        self.started = time.perf_counter()

    def on_train_batch_end(self, *_: object) -> None:
        self.seconds = time.perf_counter() - self.started


def ours(data: NPZ, recipe: Recipe, folder: Path) -> float:
    """Images per second of one epoch through Lightning, as every stage is trained."""
    watch = Watch()
    module = Classifier(network=network(data), num_classes=10, label_smoothing=0.1)
    trainer = OmegaConf.to_container(OmegaConf.load(CONF / "trainer" / "cpu.yaml"))
    assert isinstance(trainer, dict)
    fit.fit(module, data, recipe, config=trainer, folder=folder, seed=0, callbacks=[watch])
    return len(data.train.labels) / watch.seconds


def main() -> None:
    base = OmegaConf.load(CONF / "fit" / "default.yaml")
    own = OmegaConf.load(CONF / "classifier" / "cnn6.yaml").fit
    recipe = Recipe(**(OmegaConf.to_container(OmegaConf.merge(base, own)) | {"epochs": 1}))
    with tempfile.TemporaryDirectory() as scratch:
        data = dataset(Path(scratch))
        rates: list[tuple[float, float]] = []
        for turn in range(ROUNDS + 1):
            pair = ours(data, recipe, Path(scratch) / str(turn)), bare(data, recipe)
            if turn:  # the first pair warms up
                rates.append(pair)
                print(f"round {turn}: Lightning {pair[0]:6.0f} img/s, bare {pair[1]:6.0f} img/s", flush=True)
    ratio = statistics.median(a / b for a, b in rates)
    print(f"cnn6 {tuple(CNN6.__init__.__kwdefaults__['widths'])}, bf16 channels_last, batch {recipe.batch_size}, "
          f"{torch.get_num_threads()} threads: Lightning / bare = {ratio:.2f} (goal 0.8)")  # fmt: skip


if __name__ == "__main__":
    main()
