"""Wrong input ends in one line with the key, the value and what is allowed; exit code not 0; nothing half-written."""

from __future__ import annotations

import errno
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from src import fit, records
from src.build import build
from src.config import NOT_OF_TRAINER
from src.job import explain
from tests.conftest import ROOT, Outcome

QUICK = ("+debug=quick", "logger=none", "callbacks=none", "trainer.enable_progress_bar=false")
Command = Callable[..., Outcome]


def refused(outcome: Outcome, *words: str) -> None:
    """One line, every word in it, a failing exit code, and no half-written file."""
    assert outcome.code != 0
    assert len(outcome.error_lines) == 1, outcome.err
    assert "Traceback" not in outcome.err + outcome.out
    for word in words:
        assert word in outcome.error_lines[0]
    assert list(outcome.folder.rglob("*.part")) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["attack=nonsense"], ["attack/nonsense", "fgsm", "pgd"]),
        (["defense=vaes"], ["defense/vaes", "feature_squeezing", "vae"]),
        (["+experiment=nope"], ["experiment/nope", "cifar_pgd_vae"]),
        (["defense=autoencoder", "defense.trained_on.norm=l0"], ["defense.trained_on.norm=l0", "linf"]),
        (["+trainer.limit_val_batches=0"], ["trainer", "no epoch was validated"]),
        (["defense=cwgan_gp", "+trainer.gradient_clip_val=1.0"], ["trainer", "manual optimization"]),
        (["+callbacks.x._target_=pytorch_lightning.callbacks.EarlyStopping"], ["callbacks.x.monitor", "missing"]),
        (
            ["classifier=own", "classifier.model=tests.test_keys:small", "+classifier.arguments={a:1}"],
            ["tests.test_keys:small", "takes no arguments"],
        ),
        (["plan=true"], ["+plan=true"]),
        (["~threat"], ["~threat", "needs one"]),
        (["defense=[]"], ["defense=[]", "defense=none"]),
        (["defense=chain", "~defense.parts.first", "~defense.parts.last"], ["defense.parts", "defense=none"]),
        (
            ["defense=autoencoder", "+defense.trained_on.target=itself"],
            ["defense.trained_on.target=itself", "classifier"],
        ),
        (
            ["defense=[squeezing_detector,vae_kl]", "defense.parts.vae_kl.fpr=0.3"],
            ["defense.parts.squeezing_detector.fpr=0.05", "defense.parts.vae_kl.fpr=0.3", "one share"],
        ),
        (["defense=[jpeg,diffusion]", "defense.parts.diffusion.steps=7"], ["error: defense.parts.diffusion.steps=7"]),
        (["defense=vae", "defense._target_=tests.faulty.Unvalidated"], ["defense.fit", "validation_step", "val_loss"]),
        (["defense=vae", "~defense.fit"], ["defense.fit", "missing"]),
        (["defense=[jpeg,vae]", "defense.parts.vae.fit=null"], ["defense.parts.vae.fit", "missing"]),
        (["seed=99999999999999999999"], ["seed=99999999999999999999", "less than"]),
        (["--multirun", "attack=glob(zzz*)"], ["no jobs"]),
        (["experiment=cifar_pgd_vae"], ["+experiment=NAME", "cifar_pgd_vae"]),
        (["--multirun", "--cfg", "job"], ["--multirun", "--cfg"]),
        (["analysis=null"], ["analysis=null", "analysis=[]"]),
        (["logger=null"], ["logger=null", "logger=none"]),
        (["trainer=null"], ["trainer=null", "conf/trainer"]),
        (["attack.epz=3"], ["attack.epz", "relative_step, restarts"]),
        (["+attack.stepz=3"], ["attack.stepz", "did you mean step?"]),
        (["+threat.epss=3"], ["threat.epss", "did you mean eps?"]),
        (["+sed=3"], ["sed", "did you mean seed?"]),
        (["+classifier.fit.epoch=3"], ["classifier.fit.epoch", "did you mean epochs?"]),
        (["+trainer.acelerator=cpu"], ["trainer.acelerator", "did you mean accelerator?"]),
        (["attack.steps=many"], ["attack.steps", "many", "integer"]),
        (["attack.steps=0"], ["attack.steps=0", "greater than 0"]),
        (["threat.eps=-0.1"], ["threat.eps=-0.1", "negative"]),
        (["threat.eps=big"], ["threat.eps=big", "8/255"]),
        (["threat.eps=[]"], ["threat.eps=[]"]),
        (["threat.eps=[0.1,8]"], ["threat.eps=8", "8/255"]),
        (["defense=adversarial_training", "defense.trained_on.eps=8"], ["defense.trained_on.eps=8", "8/255"]),
        (["threat.norm=l7"], ["threat.norm=l7", "linf"]),
        (["threat.norm=l0"], ["threat.norm=l0", "PGD", "l2, linf"]),
        (["threat.access=grey_box"], ["threat.access=grey_box", "gray_box, white_box"]),
        (["seed=-1"], ["seed=-1"]),
        (["classifier.fit.optimizer=lion"], ["classifier.fit.optimizer=lion", "'sgd'"]),
        (["defense.beta=-1"], ["defense.beta=-1"]),
        (["defense=chain", "defense@defense.parts.first=rbf"], ["parts.first: replaces the classifier", "parts.last"]),
        (["+defense.label_smoothing=0.3"], ["defense.label_smoothing", "change nothing", "of a classifier"]),
        (["+classifier.trained_on={norm:linf,eps:0.1}"], ["classifier.trained_on", "of a defense"]),
        (["defense=[jpeg,vae]", "+defense.checkpoint=w.pt"], ["defense.checkpoint", "of its parts"]),
        (
            ["defense=adversarial_training_free", "defense.trained_on.warmup=0.3"],
            ["defense.trained_on.warmup=0.3", "change nothing", "Allowed: 0"],
        ),
        (["dataset=image_folder"], ["dataset.root"]),
        (["dataset=image_folder", "dataset.root=nowhere"], ["dataset.root=nowhere"]),
        (["dataset=mnist", "dataset.root=nowhere", "dataset.download=false"], ["dataset.root=nowhere"]),
        (["classifier=lenet"], ["lenet", "8x8", "cnn3"]),
        (["trainer.devices=4", "trainer=cpu"], ["trainer.devices=4"]),
        (["trainer=ddp_cpu", "trainer.devices=999"], ["trainer.devices=999", "core"]),
        (["trainer.strategy=ddp", "+trainer.num_nodes=1"], ["trainer.strategy", "ddp_spawn"]),
        (["+trainer.precision=bf16-mixed"], ["trainer.precision", "defense.fit.precision"]),
        (["+trainer.max_epochs=3"], ["trainer.max_epochs", "limit.epochs"]),
        (["+trainer.fast_dev_run=true"], ["trainer.fast_dev_run", "+debug=quick"]),
        (["+trainer.limit_test_batches=1"], ["trainer.limit_test_batches", "limit.test_images"]),
        (["+trainer.log_every_n_steps=1"], ["trainer.log_every_n_steps", "leave it out"]),
        (["classifier.checkpoint=nowhere.pt"], ["classifier.checkpoint=nowhere.pt", "no such file"]),
        (["attack._target_=src.attacks.nowhere.Attack"], ["attack._target_", "cannot be imported"]),
        (["classifier.fit=null"], ["classifier.fit", "missing"]),
    ],
    ids=lambda value: " ".join(value) if value and "=" in value[0] else "",
)
def test_refused_in_one_line(command: Command, arguments: list[str], words: list[str]) -> None:
    strict = [a for a in arguments if a.startswith("trainer.strategy")]
    extra = [f"+{a}" if a in strict else a for a in arguments]
    refused(command(*QUICK, *extra), *words)


def test_whatever_the_pipeline_gives_the_trainer_is_refused_from_others(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: set[str] = set()

    def spied(node: Any, key: str, **options: Any) -> Any:
        given.update(options)
        return build(node, key, **options)

    monkeypatch.setattr(fit, "build", spied)
    quick = ("defense=none", "attack=noise", "threat.eps=0.1", "threat.access=gray_box", "limit.train_images=40")
    assert command(*QUICK, *quick).code == 0
    assert {"max_epochs", "enable_checkpointing"} <= given <= NOT_OF_TRAINER.keys()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
@pytest.mark.parametrize("trainer", ["gpu", "ddp"])
def test_cuda_asked_for_and_absent(command: Command, trainer: str) -> None:
    refused(command(*QUICK, f"trainer={trainer}"), "no CUDA device", "trainer=cpu")


@pytest.mark.parametrize("devices", ["-1", "auto", "2", "[0,1]", "'0,1'"])
@pytest.mark.parametrize("accelerator", ["gpu", "auto"])
def test_one_device_where_the_trainer_is_for_one(
    command: Command, monkeypatch: pytest.MonkeyPatch, devices: str, accelerator: str
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    arguments = ("trainer=gpu", f"trainer.accelerator={accelerator}", f"trainer.devices={devices}")
    told = devices.strip("'").replace(",", ", ") if "[" in devices else devices.strip("'")
    refused(command(*QUICK, *arguments), f"trainer.devices={told}", "trainer=ddp")


def test_misspelled_key_inside_an_experiment(command: Command, tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\nattack:\n  setps: 3\n")
    outcome = command(*QUICK, f"hydra.searchpath=[file://{tmp_path}]", "+experiment=mine")
    refused(outcome, "attack.setps", "did you mean steps?")
    assert list(tmp_path.glob("artifacts/classifier/*")) == []  # refused before any work


def test_nan_and_wrong_shapes_in_npz(command: Command, tmp_path: Path) -> None:
    images = np.random.default_rng(0).random((20, 8, 8)).astype(np.float32)
    images[3, 2, 1] = np.nan
    labels = np.arange(20) % 2
    np.savez(tmp_path / "bad.npz", x_train=images, y_train=labels, x_test=images, y_test=labels)
    refused(command(*QUICK, "dataset=npz", "dataset.root=bad.npz"), "dataset.root=bad.npz", "NaN")


def test_loss_that_diverges(command: Command) -> None:
    arguments = ["classifier.fit.optimizer=sgd", "classifier.fit.lr=1e30", "classifier.fit.schedule=none"]
    outcome = command(*QUICK, *arguments, "defense=none")
    refused(outcome, "training diverged", "fit.lr")
    assert list(outcome.folder.glob("artifacts/classifier/[!.]*")) == []


class Runs:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch it-ran",)


def test_checkpoints_that_cannot_be_used(command: Command, tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(2, 2)}, tmp_path / "other.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "other.pt").read_bytes()[:200])
    (tmp_path / "code.pt").write_bytes(pickle.dumps(Runs()))
    torch.save({"state_dict": {"a": Runs()}}, tmp_path / "code2.pt")
    for name, words in {
        "other.pt": "another architecture",
        "cut.pt": "damaged or not a checkpoint",
        "code.pt": "could run code",
        "code2.pt": "could run code",
    }.items():
        refused(command(*QUICK, f"classifier.checkpoint={name}"), f"classifier.checkpoint={name}", words)
    assert not (tmp_path / "it-ran").exists()


def test_folder_not_writable(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "locked").mkdir(mode=0o555)
    if os.geteuid() == 0:  # root may write anywhere: let the system say what it says to others
        monkeypatch.setattr(os, "access", lambda path, mode: "locked" not in str(path))
    refused(command(*QUICK, "paths.artifacts=locked"), "paths.artifacts=locked", "not writable")


def test_folder_that_is_a_file(command: Command, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    refused(command(*QUICK, "paths.artifacts=taken"), "paths.artifacts=taken", "cannot be created")


def test_no_space_left(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "artifacts/classifier")

    monkeypatch.setattr(torch, "save", full)
    outcome = command(*QUICK, "defense=none")
    refused(outcome, "no space left", "paths.artifacts")
    assert list(outcome.folder.glob("artifacts/classifier/[!.]*")) == []


def test_a_failed_single_run_leaves_a_record_of_why(command: Command) -> None:
    outcome = command(*QUICK, "threat.norm=l0", "threat.eps=3", "threat.access=white_box")
    (record,) = records.find(outcome.runs())
    assert (record.status, record.eps, record.access) == ("failed", 3.0, "white_box")
    assert "PGD" in record.reason


def test_every_error_is_one_line() -> None:
    assert "\n" not in explain(ValueError("two\nlines"))
    assert "not writable" in explain(PermissionError(errno.EACCES, "Permission denied", "somewhere"))


def test_root_of_the_repository_is_not_written_to(command: Command) -> None:
    before = {path for path in ROOT.iterdir()}
    command(*QUICK, "threat.norm=l7")
    assert {path for path in ROOT.iterdir()} == before
