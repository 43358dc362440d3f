"""Fixtures shared by the tests: small models, and the command run in this process."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch

from tests.own_data import draw

os.environ["WANDB_MODE"] = "offline"  # whatever a test does, nothing leaves this machine
if "PYTEST_XDIST_WORKER" in os.environ:  # a process a core: threads of several would wait for one another
    os.environ["OMP_NUM_THREADS"] = "1"  # for what a test starts
    torch.set_num_threads(1)

ROOT = Path(__file__).parent.parent
two_cores = pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="trainer=ddp_cpu is refused on a single core")


def choices(group: str) -> list[str]:
    """Names of a config group: one YAML, one choice."""
    return sorted(path.stem for path in (ROOT / "conf" / group).glob("*.yaml"))


@dataclass
class Outcome:
    code: int
    out: str
    err: str
    folder: Path  # where the command was run

    @property
    def error_lines(self) -> list[str]:
        return [line for line in self.err.splitlines() if line.startswith("error: ")]

    def runs(self) -> list[Path]:
        return sorted(self.folder.glob("outputs/*/*"))


@pytest.fixture
def command(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
) -> Callable[..., Outcome]:
    """``python -m src.train ARGS`` in this process, in a folder of its own; fast, since imports are paid once.

    Its figures are laid out and written, but each as a single pixel: rendering takes longer than most of these runs.
    With ``@pytest.mark.pictures`` they are rendered.
    """
    from src import train

    if request.node.get_closest_marker("pictures") is None:
        monkeypatch.setattr("matplotlib.figure.Figure.savefig", _pixel)

    def run(*args: str) -> Outcome:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["src/train.py", *args])
        monkeypatch.setenv("HYDRA_FULL_ERROR", "")  # so that what the command sets is gone after the test
        monkeypatch.delenv("HYDRA_FULL_ERROR")
        code = 0
        try:
            train.main()
        except SystemExit as leaving:
            code = int(leaving.code or 0)
        out, err = capfd.readouterr()
        return Outcome(code, out, err, tmp_path)

    return run


def _pixel(figure: object, file: BinaryIO, *, format: str, **options: object) -> None:
    from PIL import Image

    Image.new("RGB", (1, 1)).save(file, format=format)


class Linear(torch.nn.Module):
    """A linear classifier of images, for closed forms."""

    def __init__(self, channels: int = 1, side: int = 4, classes: int = 2, seed: int = 0) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(channels * side * side, classes)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))

    def features(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(self.features(x))


@pytest.fixture
def linear() -> Linear:
    return Linear()


@pytest.fixture
def small_network() -> torch.nn.Module:
    """An untrained convolutional network with batch norm and dropout, left in training mode."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return torch.nn.Sequential(
            torch.nn.Conv2d(3, 8, 3, padding=1),
            torch.nn.BatchNorm2d(8),
            torch.nn.ReLU(),
            torch.nn.Dropout(0.5),
            torch.nn.AdaptiveAvgPool2d(2),
            torch.nn.Flatten(),
            torch.nn.Linear(32, 5),
        )


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that were drawn, none of them rendered."""
    figures: list[Any] = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda self, *_, **__: figures.append(self))
    return figures


@pytest.fixture(scope="session")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache for all tests of a process that ask for it: what two of them need is trained once."""
    return tmp_path_factory.mktemp("artifacts")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """train/ with 12 pictures and test/ with 5 of each of two classes, and a hidden file as in real copies."""
    root = tmp_path / "pets"
    for part, count in (("train", 12), ("test", 5)):
        for number, name in enumerate(("cat", "dog")):
            for i in range(count):
                draw(root / part / name / f"{i:02}.png", seed=1000 * number + 100 * (part == "test") + i)
    (root / ".complete").touch()
    (root / "train" / "cat" / ".hidden.png").write_bytes(b"no picture")
    return root
