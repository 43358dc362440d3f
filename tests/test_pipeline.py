"""The whole path on the bundled digits: records, second runs, sweeps, processes, interruptions."""

from __future__ import annotations

import csv
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from pytorch_lightning import Callback

from src import records
from src.job import names_of
from src.records import Record
from tests.conftest import ROOT, Outcome, choices, two_cores

QUIET = ("logger=none", "callbacks=none", "trainer.enable_progress_bar=false")
SMALL = (*QUIET, "limit.epochs=3", "limit.test_images=100", "attack.steps=5", "eval_batch_size=32")
Command = Callable[..., Outcome]

MEASURED_TIMES = {
    "created", "wall_seconds", "attack_ms_per_image", "defense_ms_per_image", "host", "device", "config"
}  # fmt: skip


def figures(record: Record) -> dict[str, object]:
    """Everything of a record that must not change from run to run."""
    return {name: value for name, value in record.model_dump().items() if name not in MEASURED_TIMES}


def ok(outcome: Outcome) -> Outcome:
    assert outcome.code == 0, outcome.err
    return outcome


@pytest.mark.pictures
def test_a_run_writes_records_tables_and_pictures_and_the_second_computes_nothing(command: Command) -> None:
    arguments = (*SMALL, "threat.eps=[0.1,0.2]")
    first = ok(command(*arguments))
    (run,) = first.runs()
    found = records.find([run])
    assert [(r.eps, r.access) for r in found] == [
        (0.1, "gray_box"), (0.1, "white_box"), (0.2, "gray_box"), (0.2, "white_box")
    ]  # fmt: skip
    for record in found:
        assert record.n == 100
        assert record.robust_accuracy == record.correct_attacked / 100
        assert record.robust_accuracy_low < record.robust_accuracy < record.robust_accuracy_high
        assert record.distance_max <= record.eps + 1e-6
        assert set(record.stages) == {"data", "classifier", "defense"}
        with np.load(run / "records" / f"{record.key}.npz") as arrays:
            assert (arrays["prediction"] == arrays["label"]).sum() == record.correct_attacked
            assert arrays["index"].tolist() == list(range(100))
            assert arrays["picture_bare_confidence"].shape == arrays["picture_label"].shape
            assert (arrays["picture_bare_confidence"] >= 0.1).all(), "of the likeliest of ten classes"
    assert found[0].robust_accuracy_bare is not None
    for name in ("results.csv", "results.md", "robustness_curve.png", "pictures.png"):
        assert (run / name).stat().st_size > 100
    assert "white_box" in first.out

    stages = sorted(p for p in (first.folder / "artifacts").rglob("*") if p.is_file() and p.suffix != ".lock")
    times = [path.stat().st_mtime_ns for path in stages]
    second = ok(command(*arguments))
    assert "making it" not in second.out + second.err
    assert [path.stat().st_mtime_ns for path in stages] == times
    assert records.find([second.runs()[-1]]) == found


def test_twice_from_scratch_gives_identical_records(command: Command, tmp_path: Path) -> None:
    arguments = (*SMALL, "threat.eps=0.2", "defense=autoencoder", "defense.latent=4", "eot_draws=3")
    for place in ("one", "two"):
        ok(command(*arguments, f"paths.artifacts={place}"))
    one, two = ([figures(r) for r in records.find([tmp_path / place])] for place in ("one", "two"))
    assert len(one) == 2
    assert one == two
    for path in (tmp_path / "one").rglob("*.npz"):
        with np.load(path) as arrays:  # of a random defense another draw is as sure of another answer
            assert "picture_confidence" not in arrays


def test_a_sweep_trains_each_classifier_once_and_tabulates_failures(command: Command) -> None:
    outcome = command(
        "-m", *SMALL, "threat.access=gray_box", "threat.eps=0.1,0.2", "classifier=cnn3,lenet",
        "defense=none,feature_squeezing",
    )  # fmt: skip
    assert outcome.code == 1
    (sweep,) = outcome.folder.glob("multirun/*/*")
    with open(sweep / "results.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 8
    failed = [row for row in rows if row["status"] == "failed"]
    assert {row["classifier"] for row in failed} == {"lenet"}
    assert len(failed) == 4
    assert all("cnn3" in row["reason"] and row["eps"] in ("0.1", "0.2") for row in failed)
    artifacts = outcome.folder / "artifacts"
    assert len(list((artifacts / "classifier").glob("[!.]*"))) == 1
    assert len(list((artifacts / "examples").glob("[!.]*"))) == 2  # one an eps, shared by the defenses
    assert all((sweep / name).exists() for name in ("results.md", "robustness_curve.png", "cost.png"))


@two_cores
def test_two_processes_count_exactly_what_one_does(command: Command, tmp_path: Path) -> None:
    """The stages of one device, attacked and tested on two: image by image the same verdict. Others are trained there.

    Of 101 images each process has a batch, of 50 the second has none.
    """
    arguments = (
        *QUIET, "limit.epochs=3", "attack.steps=2", "eval_batch_size=64", "threat.eps=0.15", "defense=autoencoder",
        "eot_draws=2",
    )  # fmt: skip
    ok(command("-m", *arguments, "limit.test_images=${seed}", "seed=101"))
    before = {r.access: r for r in records.find([tmp_path / "artifacts"])}
    (tmp_path / "artifacts" / "records").rename(tmp_path / "one_device")
    (tmp_path / "artifacts" / "examples").rename(tmp_path / "one_device_examples")
    done = subprocess.run(
        [sys.executable, "-m", "src.train", "-m", *arguments, "trainer=ddp_cpu", "trainer.devices=2", "seed=101,50",
         "limit.test_images=${seed}"],
        cwd=tmp_path, env={**__import__("os").environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    after = records.find([tmp_path / "artifacts"])
    assert sorted((r.seed, r.n, r.access) for r in after) == [
        (n, n, access) for n in (50, 101) for access in ("gray_box", "white_box")
    ]
    assert all(record.clean_accuracy > 0.3 for record in after)  # what two trained has learnt as well: chance is 0.1
    for record in (r for r in after if r.n == 101):
        assert figures(record) == figures(before[record.access])
        with (
            np.load(tmp_path / "one_device" / f"{record.key}.npz") as one,
            np.load(tmp_path / "artifacts" / "records" / f"{record.key}.npz") as two,
        ):
            assert np.array_equal(one["prediction"], two["prediction"])
            assert len(one["prediction"]) == 101


@two_cores
@pytest.mark.slow
def test_trainings_with_steps_of_their_own_over_two_processes(tmp_path: Path) -> None:
    """Each of their backward passes reaches only some of the weights."""
    defenses = ["distillation", "defense_gan", "cwgan_gp_siamese"]
    done = subprocess.run(
        [sys.executable, "-m", "src.train", "-m", *QUIET, "+debug=quick", "trainer=ddp_cpu", "threat.eps=0.1",
         "threat.access=gray_box", "attack=fgsm", "limit.epochs=2", f"defense={','.join(defenses)}"],
        cwd=tmp_path, env={**__import__("os").environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert [record.defense for record in records.find(tmp_path.glob("multirun/*/*"))] == sorted(defenses)


class Interrupt(Callback):
    """Ctrl-C at the end or in the middle of the second epoch, or in the second pass over the test images."""

    def __init__(self, *, when: str) -> None:
        self.when = when
        self.passes = 0

    def on_train_epoch_end(self, trainer, pl_module) -> None:
        if Path("stop").exists() and self.when == "fit" and trainer.current_epoch == 1:
            raise KeyboardInterrupt

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if Path("stop").exists() and self.when == "batch" and trainer.current_epoch == 1 and batch_idx > 20:
            raise KeyboardInterrupt

    def on_test_start(self, trainer, pl_module) -> None:
        if Path("stop").exists() and self.when == "test" and any((Path("artifacts") / "records").glob("*.json")):
            raise KeyboardInterrupt


@pytest.mark.parametrize("when", ["fit", "batch", "test"])
def test_ctrl_c_leaves_what_the_second_run_goes_on_from(command: Command, tmp_path: Path, when: str) -> None:
    stop = (f"+callbacks.stop._target_={__name__}.Interrupt", f"+callbacks.stop.when={when}")
    arguments = (*SMALL, "threat.eps=0.2", "classifier.dropout=0.2", "defense=feature_squeezing", *stop)
    if when == "batch":  # what is looked at in mid-epoch is no place to go on from
        arguments += ("+trainer.val_check_interval=0.5", "classifier.fit.batch_size=32")
    ok(command(*arguments, "paths.artifacts=undisturbed"))
    (tmp_path / "stop").touch()
    stopped = command(*arguments)
    (tmp_path / "stop").unlink()
    assert stopped.code != 0
    assert "interrupted" in stopped.err
    assert "Traceback" not in stopped.err
    resumed = ok(command(*arguments))
    assert ("resuming" in resumed.out) == (when != "test")
    (one,), (two,) = (
        list(tmp_path.glob(f"{place}/classifier/[!.]*/weights.pt")) for place in ("undisturbed", "artifacts")
    )
    one, two = torch.load(one, weights_only=True), torch.load(two, weights_only=True)
    assert all(torch.equal(one[name], two[name]) for name in one)
    first, second = ([figures(r) for r in records.find([tmp_path / place])] for place in ("undisturbed", "artifacts"))
    assert first == second


def test_fewer_test_images_train_nothing_again(command: Command) -> None:
    arguments = (*SMALL, "threat.eps=0.2", "threat.access=gray_box", "defense=vae")
    ok(command(*arguments))
    again = ok(command(*arguments, "limit.test_images=50"))
    assert "classifier cnn3 on digits: found" in again.out
    assert "defense vae on digits: found" in again.out
    assert records.find([again.runs()[-1]])[0].n == 50


def test_damaged_weights_are_made_again(command: Command, tmp_path: Path) -> None:
    arguments = (*SMALL, "defense=none", "threat.access=gray_box")
    ok(command(*arguments, "threat.eps=0.2"))
    (weights,) = tmp_path.glob("artifacts/classifier/*/weights.pt")
    good = weights.read_bytes()
    weights.write_bytes(good[: len(good) // 2])
    again = ok(command(*arguments, "threat.eps=0.3"))  # a cell that is not there yet: found ones need no weights
    assert "damaged" in again.out
    one = torch.load(weights, weights_only=True)
    assert weights.stat().st_size == len(good)
    assert all(bool(torch.isfinite(value).all()) for value in one.values())


@pytest.fixture(scope="module")
def random_sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sets of noise with the shapes of MNIST and CIFAR-10."""
    folder = tmp_path_factory.mktemp("sets")
    random = np.random.default_rng(0)
    for name, shape in (("mnist", (28, 28)), ("cifar", (32, 32, 3))):
        arrays = {
            part: random.integers(0, 256, (count, *shape), dtype=np.uint8)
            for part, count in (("x_train", 40), ("x_test", 5))
        }
        labels = {part.replace("x", "y"): np.arange(len(images)) % 10 for part, images in arrays.items()}
        np.savez(folder / f"{name}.npz", **arrays, **labels)
    return folder


@pytest.mark.parametrize("name", choices("experiment"))
def test_every_experiment_runs(command: Command, random_sets: Path, name: str) -> None:
    """With its own defense and attack and its network, narrowed, on noise of its dataset's shape."""
    data = [] if "digits" in name else ["dataset=npz", f"dataset.root={random_sets / name.split('_')[0]}.npz"]
    few = ["classifier.widths=[8,16,16]"] if "cifar" in name else []
    few += ["attack.steps=3"] if "cifar_pgd" in name else []
    outcome = ok(command(*QUIET, f"+experiment={name}", *data, "+debug=quick", "eot_draws=2", *few))
    found = records.find(outcome.runs())
    assert len(found) >= 2
    assert {record.status for record in found} == {"done"}
    if "cifar_pgd" in name:
        assert 8 / 255 in {record.eps for record in found}
    if "mnist_pgd" in name:
        assert {record.eps for record in found} == {0.15, 0.3}
        assert found[0].config["attack"]["steps"] == 40


SLOW = {"defense_gan"} | {a for a in choices("defense") for b in choices("defense") if a.startswith(f"{b}_")}
BIG = {"own", "torchvision", "vgg16_bn", "resnet18"}
PAIRS = [
    # Each defense with a quick one in the default run, with all of them in the full one; variants of one (a_fast of a),
    # and defense_gan, which takes four times as long as any other, there only.
    pytest.param(
        network,
        defense,
        marks=[] if network == ("cnn3", "lenet")[row % 2] and defense not in SLOW else [pytest.mark.slow],
    )
    for row, defense in enumerate(choices("defense"))
    for network in sorted(set(choices("classifier")) - BIG)
]


@pytest.mark.parametrize(("classifier", "defense"), PAIRS)
def test_every_small_classifier_goes_with_every_defense(
    command: Command, random_sets: Path, classifier: str, defense: str
) -> None:
    outcome = ok(
        command(
            *QUIET, "+debug=quick", f"classifier={classifier}", f"defense={defense}", "attack=fgsm", "threat=l2",
            "dataset=npz", f"dataset.root={random_sets / 'mnist.npz'}", "threat.eps=1", "threat.targeted=true",
            "eot_draws=2",
        )
    )  # fmt: skip
    assert {r.status for r in records.find(outcome.runs())} == {"done"}


@pytest.mark.parametrize(
    ("task", "variant"),
    [
        (["attack=pgd", "defense=vae", "threat.eps=0.1", "seed=1", "logger=none", "checks=full"], ""),
        (["defense@defense.parts.first=vae_kl"], "defense@defense.parts.first=vae_kl"),
        (["attack@attack.members.pgd=apgd"], "attack@attack.members.pgd=apgd"),
        (["~attack@attack.members.square"], "~attack@attack.members.square"),
        (["~attack@attack.members.square=null"], "~attack@attack.members.square"),  # the same, of a sweep
        (["+classifier@surrogate=lenet"], "classifier@surrogate=lenet"),
        (["+sweep=defenses_mnist", "defense=vae", "threat.eps=0.1"], "+sweep=defenses_mnist"),
        (["++attack.steps=3", "+experiment=x", "+debug=quick"], "+debug=quick,+experiment=x,attack.steps=3"),
        (["trainer=gpu", "trainer.devices=2", "callbacks=none", "callbacks.progress.refresh_rate=1"], ""),
        (["+trainer.max_steps=1", "++callbacks.mine.x=1"], "callbacks.mine.x=1,trainer.max_steps=1"),
        (["attack.steps=3", "attack.steps=5"], "attack.steps=5"),
        (["dataset.root=a", "classifier.checkpoint=b", "dataset.classes=3"], "dataset.classes=3"),
    ],
)
def test_a_cell_is_named_by_every_override_that_says_what_is_measured(task: list[str], variant: str) -> None:
    assert names_of({"dataset": "d"}, task)["variant"] == variant
