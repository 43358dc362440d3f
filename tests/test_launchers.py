"""One sweep, the same records, wherever its jobs run."""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from src import place, records
from tests.conftest import ROOT, Outcome
from tests.test_pipeline import QUIET, figures, ok

Command = Callable[..., Outcome]
SWEEP = (
    *QUIET, "limit.epochs=2", "limit.test_images=50", "attack=fgsm,mi_fgsm",
    "defense=none,feature_squeezing,jpeg", "threat.eps=[0.1,0.2]",
)  # fmt: skip
CELLS = 24


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, object]]:
    """The records of the default launcher."""
    return _sweep(tmp_path_factory.mktemp("local"))


def _sweep(folder: Path, *more: str) -> list[dict[str, object]]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "src.train", "-m", *SWEEP, "hydra.sweep.dir=out", *more],
        cwd=folder, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout + done.stderr)[-2000:]
    found = records.find([folder / "out"])
    assert (folder / "out" / "results.csv").read_text().count("\n") == CELLS + 1
    return [figures(record) for record in found]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "more"),
    [
        ("joblib", ["hydra.launcher.n_jobs=2"]),
        ("submitit_local", []),
        ("ray", ["+hydra.launcher.ray.init.num_cpus=2", "+hydra.launcher.ray.init.include_dashboard=false"]),
    ],
)
def test_every_launcher_gives_the_same_records(
    tmp_path: Path, undisturbed: list[dict[str, object]], launcher: str, more: list[str]
) -> None:
    plugin = f"hydra_plugins.hydra_{launcher.split('_')[0]}_launcher"
    if importlib.util.find_spec(plugin) is None:
        pytest.skip(f"hydra/launcher={launcher}: its plugin is not installed")
    assert len(undisturbed) == CELLS
    assert _sweep(tmp_path, f"hydra/launcher={launcher}", *more) == undisturbed


def test_the_sbatch_script_asks_for_what_the_config_says(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    submitit = pytest.importorskip("submitit", reason="the plugin of hydra/launcher=slurm is not installed")
    (tmp_path / "srun").write_text("#!/bin/sh\n")  # submitit looks for it
    (tmp_path / "srun").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    scripts: list[str] = []

    def submit(self: Any, launch: Any, overrides: Any, *rest: Any) -> list[Any]:
        slurm = self._executor
        scripts.append(slurm._make_submission_file_text("the command", "id"))
        scripts.append(str(len(list(overrides))))
        return []

    monkeypatch.setattr(submitit.AutoExecutor, "map_array", submit)
    command(
        "-m", *SWEEP, "hydra/launcher=slurm", "hydra.launcher.partition=long",
        "hydra.launcher.gpus_per_node=1", "hydra.launcher.timeout_min=90",
    )  # fmt: skip
    script, jobs = scripts
    assert jobs == "6"
    for line in ("--partition=long", "--gpus-per-node=1", "--time=90", "--cpus-per-task=4", "--signal=USR2@120"):
        assert f"#SBATCH {line}\n" in script
    assert "\nsrun " in script


def test_workers_are_dealt_the_gpus_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = {"accelerator": "gpu", "devices": 1}
    dealt = []
    for worker in range(1, 6):
        monkeypatch.delenv(place.VISIBLE, raising=False)
        monkeypatch.delenv("PARAPET_GPU_DEALT", raising=False)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
        named = SimpleNamespace(name=f"LokyProcess-{worker}")
        monkeypatch.setattr(multiprocessing, "current_process", lambda named=named: named)
        dealt.append(place.claim_gpu(gpu))
        assert place.claim_gpu(gpu) == dealt[-1]  # of its second job
    assert dealt == ["0", "1", "2", "0", "1"]
    assert place.claim_gpu({"accelerator": "cpu", "devices": 1}) is None


def test_a_share_of_the_machine_is_kept_to_and_the_main_process_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(place.VISIBLE, "4,6")
    assert place.claim_gpu({"accelerator": "gpu", "devices": 1}) is None
    monkeypatch.setattr(multiprocessing, "current_process", lambda: SimpleNamespace(name="LokyProcess-2:1"))
    monkeypatch.delenv("PARAPET_GPU_DEALT", raising=False)
    assert place.claim_gpu({"accelerator": "gpu", "devices": 1}) == "6"
    monkeypatch.delenv("PARAPET_GPU_DEALT")


def test_the_default_runs_in_this_process(command: Command) -> None:
    shown = ok(command("--cfg", "hydra", "-p", "hydra.launcher")).out
    assert "BasicLauncher" in shown
