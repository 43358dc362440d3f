"""Anybody's model is judged by one command."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from src import audit, config, pipeline, records, target
from src.classifiers import own
from src.data.digits import Digits
from src.errors import UserError
from src.stages import Stages
from src.subject import Names
from src.threat import Norm
from src.tracking import NoTracker
from tests import faulty, planted
from tests.conftest import Linear
from tests.test_pipeline import QUIET, Command, ok

QUICK = ("--dataset", "digits", "--images", "60", "--attack", "pgd", "attack.steps=5", "checks=cheap")


def masked() -> nn.Module:
    """What a user's own file might give: a network with quantised activations."""
    return planted.trained(faulty.Quantised)


def sound() -> nn.Module:
    return planted.trained()


NOT_A_MODULE = 3
WEIGHTS_AVERAGED = "pytorch_lightning.callbacks.StochasticWeightAveraging"


@pytest.fixture
def judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    def run(*words: str, code: int = 0) -> str:
        monkeypatch.chdir(tmp_path)
        found = audit.main([*words, "--out", "out"])
        told = capfd.readouterr()
        assert found == code, told.err
        return told.err if code else told.out

    return run


def test_a_module_and_its_callable(judged: Callable[..., str], tmp_path: Path) -> None:
    text = judged("tests.test_audit:sound", *QUICK, "--threat", "linf:0.15", "--threat", "l2:0.5")
    assert "flags:" not in text
    found = records.find([tmp_path / "out"])
    assert [(r.norm, r.eps, r.access, r.classifier, r.n) for r in found] == [
        ("l2", 0.5, "white_box", "own", 60), ("linf", 0.15, "white_box", "own", 60)
    ]  # fmt: skip
    assert {r.variant for r in found} == {"attack.steps=5,classifier.model=tests.test_audit:sound"}
    assert all(0 < r.robust_accuracy < r.clean_accuracy for r in found)
    assert f"worst case linf 0.15    {100 * found[1].robust_accuracy:.1f} %" in text
    lines = [line.strip() for line in text.splitlines() if line.strip().startswith("python -m src.train")]
    assert len(lines) == 5
    assert all("classifier.model=tests.test_audit:sound" in line and "dataset=digits" in line for line in lines)
    assert (tmp_path / "out" / "results.md").exists()


def test_a_masked_model_is_unreliable(judged: Callable[..., str]) -> None:
    text = judged("tests.test_audit:masked", *QUICK, "--threat", "linf:0.15")
    assert re.search(r"worst case linf 0.15 +unreliable \(at most", text)
    assert "gradient_missing = 1 (decisive)" in text


def test_our_stages_a_run_and_a_state_dict(judged: Callable[..., str], command: Command, tmp_path: Path) -> None:
    """One classifier, in each way it may lie about: the same network, so the same figure."""
    ok(command(*QUIET, "limit.epochs=3", "defense=feature_squeezing", "threat.eps=0.1", "attack=noise"))
    (run,) = tmp_path.glob("outputs/*/*")
    (weights,) = tmp_path.glob("artifacts/classifier/[!.]*/weights.pt")
    bare = tmp_path / "bare.pt"
    bare.write_bytes(weights.read_bytes())
    (tmp_path / "net.yaml").write_text("_target_: src.classifiers.cnn3.CNN3\nwidths: [16, 32, 64]\n")
    ways = (
        (str(weights),),
        (str(bare), "classifier=cnn3"),
        (str(bare), "--config", str(tmp_path / "net.yaml")),
    )
    told = [judged(*way, *QUICK, "--threat", "linf:0.1") for way in ways]
    figures = [[line for line in text.splitlines() if line.startswith(("clean", "worst"))] for text in told]
    assert figures[0] == figures[1] == figures[2]
    text = judged(str(run), *QUICK[2:], "--threat", "linf:0.1")
    assert "defense feature_squeezing" in text
    assert "gray_box and white_box" in text
    assert figures[0][0].split()[2] in text  # the same clean accuracy without the defense


def stage_keys(job: config.Job, artifacts: Path) -> dict[str, str]:
    names = Names(dataset="digits", classifier="c", defense="d", attack="a")
    bench, _ = pipeline.prepare(job, names, Stages(artifacts, plan=True), NoTracker())
    return {kind: bench.subject.keys[kind] for kind in ("classifier", "defense")}


@pytest.mark.parametrize(
    "words",
    [
        ["defense=chain", "defense@defense.parts.first=jpeg", "+defense@defense.parts.between=feature_squeezing"],
        ["defense=autoencoder", "attack@defense.trained_on.attack=pgd", "++defense.noise=0", "~defense.activation"],
        ["+sweep=defenses_mnist", "defense=rbf", "threat.access=transfer", "+classifier@surrogate=cnn3"],
        ["+experiment=cifar_pgd_counter_gan", "dataset=digits", "seed=3", "+debug=quick", "attack.steps=3"],
        ["defense=vae", "eval_batch_size=64"],
        ["callbacks=default", "+trainer.gradient_clip_val=0.5", "trainer.enable_progress_bar=true", "trainer=debug"],
        ["defense=none", f"+callbacks.mine={{_target_:{WEIGHTS_AVERAGED},swa_lrs:1e-2}}", "++trainer.max_steps=9"],
    ],
    ids=["chain", "plus", "sweep", "experiment", "batch", "trainer", "callback"],
)
def test_of_a_run_the_very_model_is_judged(command: Command, words: list[str], tmp_path: Path) -> None:
    outcome = command(*QUIET, *words, "paths.data=x", "+plan=true", "paths.artifacts=elsewhere")
    (run,) = outcome.folder.glob("outputs/*/*")
    subject = target.subject_of(str(run), None)
    found, _ = audit.composed([*audit.FIXED, *subject])
    whole = OmegaConf.create({**OmegaConf.load(run / ".hydra" / "config.yaml"), "logger": None})
    wanted = cast(dict[str, Any], OmegaConf.to_container(whole, resolve=True))
    for name in ("classifier", "defense", "dataset", "seed", "eot_draws"):
        assert getattr(found, name) == wanted[name], name
    assert (found.limit.epochs, found.paths.artifacts) == (wanted["limit"]["epochs"], "elsewhere")
    assert found.surrogate is None
    if not words[0].startswith("+"):  # those are of images that are not at hand
        run_job = config.parse(OmegaConf.load(run / ".hydra" / "config.yaml"))
        assert stage_keys(found, tmp_path) == stage_keys(run_job, tmp_path)
    assert not [item for item in subject if "attack.steps" in item or "threat" in item]


def test_radii_of_an_experiment_are_not_those_of_another_norm(
    command: Command, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ("+experiment=digits_pgd_vae", "+debug=quick", "defense=none", "threat=l2", "attack=noise")
    (run,) = ok(command(*QUIET, *words, "+plan=true")).runs()
    assert audit.main([str(run), "--images", "20", "--attack", "noise", "checks=cheap"]) == 0
    text = capfd.readouterr().out
    (out,) = tmp_path.glob("outputs/audit-*")
    assert re.fullmatch(r"audit(-\d+){6}-\d{6}", out.name)  # to the microsecond: two started together have one each
    data = Digits()
    data.prepare()
    own = data.spec.eps
    for norm in (Norm.LINF, Norm.L2):
        assert f"worst case {norm} {max(own[norm]):g} " in text
    further = [shlex.split(line) for line in text.splitlines() if line.strip().startswith("python -m src.train")]
    for words_ in further:
        job, _ = audit.composed([*words_[3:], *audit.FIXED])
        assert set(job.eps(own[job.norm])) <= set(own[job.norm])


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["nothing"], "module:callable"),
        (["nowhere:net", "--dataset", "digits"], "classifier.model=nowhere:net"),
        (["tests.test_audit:NOT_A_MODULE", "--dataset", "digits"], "classifier.model=tests.test_audit:NOT_A_MODULE"),
        (["tests.test_audit:sound"], "--dataset"),
        (["tests.test_audit:sound", "--dataset", "digit"], "digits"),
        (["tests.test_audit:sound", *QUICK, "--threat", "linf:-1"], "threat.eps=-1"),
        (["tests.test_audit:sound", *QUICK, "--threat", "l7"], "threat"),
        (["tests.test_audit:sound", *QUICK, "--threat", "linf:[0.1,0.2]"], "several radii"),
        (["tests.test_audit:sound", *QUICK, "attack=fgsm"], "--attack NAME"),
        (["tests.test_audit:sound", *QUICK, "threat.access=black_box"], "--threat NORM"),
        (["tests.test_audit:sound", *QUICK, "--config", "network.yaml"], "no file"),
    ],
)
def test_wrong_input_is_one_line(judged: Callable[..., str], words: list[str], told: str) -> None:
    text = judged(*words, code=1)
    (line,) = [line for line in text.splitlines() if line.startswith("error: ")]
    assert told in line


@pytest.mark.parametrize("defense", ["distillation", "autoencoder", "rbf"])
def test_a_defense_of_ours_brings_its_classifier(defense: str, tmp_path: Path) -> None:
    """From what is written beside the weights: the classifier's own, or its network where no weights were needed."""
    small = ["dataset=digits", "attack=noise", "limit.epochs=1", "limit.train_images=200"]

    def prepared(*words: str) -> tuple[dict[str, str], torch.Tensor, list[Path]]:
        job, chosen = audit.composed([*audit.FIXED, *small, f"paths.artifacts={tmp_path}", *words])
        names = Names(**{group: chosen[group] for group in ("dataset", "classifier", "defense", "attack")})
        stages = Stages(tmp_path)
        subject = pipeline.prepare(job, names, stages, NoTracker())[0].subject
        torch.manual_seed(0)
        logits = subject.defended.logits(torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0)))
        return subject.keys, logits, stages.folders

    _, wanted, folders = prepared("classifier.widths=[4,4,8]", f"defense={defense}")
    (weights,) = [folder / "weights.pt" for folder in folders if folder.parent.name == "defense"]
    keys, found, used = prepared(*target.subject_of(str(weights), None))
    torch.testing.assert_close(found, wanted, atol=1e-3, rtol=0)  # another memory format, another order of sums
    if defense != "rbf":
        assert keys["classifier"].startswith("own-")
        assert not [folder for folder in used if folder.parent.name == "classifier"]  # none was trained or looked for


def test_a_defense_that_knows_no_classifier_asks_for_one(judged: Callable[..., str], tmp_path: Path) -> None:
    about = {"node": {"_target_": "src.defenses.purify.vae.VAE", "latent": 4}}
    (tmp_path / "weights.pt").write_bytes(b"")
    (tmp_path / "meta.json").write_text(json.dumps({"kind": "defense", "what": "defense vae", "about": about}))
    words = [str(tmp_path / "weights.pt"), "--dataset", "digits"]
    assert "expected classifier=NAME" in judged(*words, code=1).splitlines()[-1]
    assert "damaged" in judged(*words, "classifier=cnn3", "limit.epochs=1", code=1).splitlines()[-1]


def test_the_seed_of_a_training_is_that_of_its_audit_unless_given(tmp_path: Path) -> None:
    about = {"node": {"_target_": "src.classifiers.cnn3.CNN3", "widths": [4, 4, 8]}, "seed": 3}
    (tmp_path / "weights.pt").touch()
    (tmp_path / "meta.json").write_text(json.dumps({"kind": "classifier", "what": "classifier cnn3", "about": about}))
    subject = target.subject_of(str(tmp_path / "weights.pt"), None)
    for given, seed in (((), 3), (("seed=5",), 5)):
        assert audit.composed([*audit.FIXED, "attack=noise", *subject, *given])[0].seed == seed


@pytest.mark.parametrize("text", ["{", "[]", '{"author": "me"}'])
def test_somebody_elses_meta_says_nothing_of_the_weights(tmp_path: Path, text: str) -> None:
    (tmp_path / "weights.pt").touch()
    (tmp_path / "meta.json").write_text(text)
    (only,) = target.subject_of(str(tmp_path / "weights.pt"), None)
    assert only.startswith("classifier.checkpoint=")


def test_a_config_that_is_no_yaml_is_said(tmp_path: Path) -> None:
    (tmp_path / "w.pt").touch()
    (tmp_path / "net.yaml").write_text("a: [1")
    with pytest.raises(UserError, match="not YAML"):
        target.subject_of(str(tmp_path / "w.pt"), tmp_path / "net.yaml")


def test_the_digest_knows_weights_and_code() -> None:
    one, two = sound(), sound()
    assert own.digest(one) == own.digest(two)
    with torch.no_grad():
        next(two.parameters())[0] += 1e-3
    assert len({own.digest(one), own.digest(two), own.digest(nn.Flatten())}) == 3


def test_a_missing_library_or_a_name_it_does_not_know_is_said() -> None:
    with pytest.raises(UserError, match="timm"):
        own.load(model="timm:no_such_model", channels=1, size=(8, 8), num_classes=10)


def test_weights_go_into_a_class_of_someone_else(tmp_path: Path) -> None:
    network = Linear(side=8, classes=10, seed=1)
    torch.save(network.state_dict(), tmp_path / "w.pt")
    (tmp_path / "net.yaml").write_text("_target_: tests.conftest.Linear\nside: 8\nclasses: 10\n")
    given = target.subject_of(str(tmp_path / "w.pt"), tmp_path / "net.yaml")
    job, _ = audit.composed([*audit.FIXED, "dataset=digits", "defense=none", "attack=noise", *given])
    names = Names(dataset="digits", classifier="own", defense="none", attack="noise")
    bench, _ = pipeline.prepare(job, names, Stages(tmp_path), NoTracker())
    images = torch.rand(4, 1, 8, 8)
    torch.testing.assert_close(bench.subject.classifier(images), network(images))
    (tmp_path / "run.yaml").write_text(OmegaConf.to_yaml({"classifier": job.classifier}))  # the config of a run of it
    given = target.subject_of(str(tmp_path / "w.pt"), tmp_path / "run.yaml")
    assert audit.composed([*audit.FIXED, "dataset=digits", *given])[0].classifier == job.classifier


def test_a_lenet_of_someone_else_is_not_ours(tmp_path: Path) -> None:
    (tmp_path / "w.pt").touch()
    (tmp_path / "net.yaml").write_text("_target_: my.lenet.X\n")
    given = target.subject_of(str(tmp_path / "w.pt"), tmp_path / "net.yaml")
    assert given[:2] == ["classifier=own", "classifier.model=my.lenet:X"]


def wide() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Linear(64, 20))


@pytest.mark.parametrize(
    ("classes", "size", "told"),
    [(10, (8, 8), "gives \\(1, 20\\) .*logits \\(1, 10\\)"), (20, (9, 9), "fails on an image of 1x9x9")],
)
def test_a_model_for_other_classes_or_images_is_refused(classes: int, size: tuple[int, int], told: str) -> None:
    with pytest.raises(UserError, match=told):
        own.load(model="tests.test_audit:wide", channels=1, size=size, num_classes=classes)


def test_a_model_is_tried_without_a_trace() -> None:
    torch.manual_seed(0)
    untouched, state = wide(), torch.get_rng_state()
    torch.manual_seed(0)
    network = own.load(model="tests.test_audit:wide", channels=1, size=(8, 8), num_classes=20)
    assert own.digest(network) == own.digest(untouched)
    assert all(module.training for module in network.modules())
    assert torch.equal(torch.get_rng_state(), state)
