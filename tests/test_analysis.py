"""Looking inside: the figures behind the figures by closed forms, and that each is drawn or says why not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from torch import Tensor, nn

from src import config
from src.analyse import with_steps
from src.analysis import (
    activations,
    attack_loss,
    confusion,
    curves,
    detector,
    distances,
    fid,
    losses,
    over_eps,
    representation,
    training,
)
from src.analysis.fid import inception
from src.analysis.scene import draw
from src.attacks.apgd import APGD
from src.attacks.fgsm import FGSM
from src.attacks.pgd import PGD
from src.build import build
from src.defenses.guarded import DefendedModel
from src.errors import UserError
from src.outcome import _detection
from src.report.command import CONF
from tests.cells import is_drawn
from tests.conftest import Linear, Outcome, choices
from tests.scenes import Remembered, scene, whitened


@pytest.fixture(autouse=True)
def no_inception(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever lies in the home folder of who tests."""
    monkeypatch.setattr(fid, "inception", lambda: None)


def test_confusion_is_a_share_of_each_class() -> None:
    shares = confusion.confusion(torch.tensor([0, 0, 0, 0, 2]), torch.tensor([0, 0, 1, 3, 2]), 4)
    assert shares.tolist() == [[50, 25, 0, 25], [0, 0, 0, 0], [0, 0, 100, 0], [0, 0, 0, 0]]


def test_roc_by_hand() -> None:
    x, y, area = detector.roc(torch.tensor([0.1, 0.2, 0.6]), torch.tensor([0.5, 0.9]))
    assert x.tolist() == pytest.approx([0, 0, 1 / 3, 1 / 3, 2 / 3, 1])
    assert y.tolist() == pytest.approx([0, 0.5, 0.5, 1, 1, 1])
    assert area == pytest.approx(5 / 6)  # of the six pairs one is the wrong way round
    assert float(torch.trapezoid(y, x)) == pytest.approx(area)


def test_the_detector_is_drawn_as_the_record_counts_it(drawn: list[Any], tmp_path: Path) -> None:
    seen = scene(accesses=("white_box",))
    seen.labels = seen.labels.clone()
    seen.labels[:15] = (seen.labels[:15] + 1) % 3  # wrong from the start
    made = seen.attacked("white_box", 40).images
    clean, after = (seen.defended.test_step({"image": images}, 0) for images in (seen.images, made))
    right = clean["prediction"] == seen.labels
    count, area = (
        int((right & (after["behind"] != seen.labels)).sum()),
        _detection(clean | {"label": seen.labels}, after | {"label": seen.labels}, right)["detection_auc"],
    )
    assert 0 < count < int((after["behind"] != seen.labels).sum())
    draw([("detector", detector.Detector(images=40))], seen, tmp_path)
    bars, curve = drawn[0].axes
    assert f"attacked, white_box ({count})" in [text.get_text() for text in bars.get_legend().get_texts()]
    assert [text.get_text() for text in curve.get_legend().get_texts()] == [f"white_box: AUC {area:.3f}"]


def test_no_score_below_the_median_is_lumped_together(drawn: list[Any], tmp_path: Path) -> None:
    seen = scene()
    seen.defended.least = 3.0
    draw([("detector", detector.Detector(images=40))], seen, tmp_path)
    clean = drawn[0].axes[0].patches[:40]
    lowest = float(seen.defended.suspicion(seen.images).min())
    assert lowest < -1
    assert clean[0].get_x() <= lowest
    assert sum(bar.get_height() for bar in clean[:1]) < 5


def test_layers_in_their_order_and_their_difference() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3, bias=False))
    images = torch.rand(2, 1, 4, 4)
    found = activations.layers(model, images)
    assert list(found) == ["0", "3"]
    assert found["3"].equal(model(images))
    assert not any(module._forward_hooks for module in model.modules()), "the hooks are gone"
    assert activations.relative(torch.ones(1, 4), torch.full((1, 4), 1.5)) == pytest.approx(0.5)


def test_frechet_distance_of_shifted_images_is_the_squared_shift() -> None:
    images = torch.rand(200, 1, 2, 2, generator=torch.Generator().manual_seed(0)).double() * 0.5
    distance = fid.Fid(images.float(), Linear(side=2), "lenet")
    assert distance.features == "lenet features"
    assert distance(images.float() + 0.25) == pytest.approx(4 * 0.25**2, abs=1e-3)
    assert distance(images.float()) == pytest.approx(0, abs=1e-4), "what was measured before is forgotten"


def test_inception_is_taken_where_it_lies_and_never_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(fid, "find_spec", lambda name: object())
    assert inception() is None
    weights = tmp_path / "checkpoints" / fid.INCEPTION
    weights.parent.mkdir()
    weights.write_bytes(b"")
    assert inception() == weights
    monkeypatch.setattr(fid, "find_spec", lambda name: None)
    assert inception() is None, "no library to read them with"


@pytest.mark.parametrize("asked", [False, True])
def test_samples_have_their_distance_beside_that_of_clean_images(
    asked: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    seen = scene()
    labels = seen.labels.roll(1) if asked else None
    seen.defended.generates = Remembered(seen.images, labels)
    with caplog.at_level("INFO", logger="src.analysis.samples"):
        draw([("samples", built("samples"))], seen, tmp_path)
    assert "FID on linear features, n=20: samples 0, other clean images" in caplog.text
    right = 100 * float((labels == seen.labels)[:20].double().mean()) if labels is not None else 0.0
    assert (f"reads {right:.1f} % as the class asked for" in caplog.text) == asked


def test_curves_of_a_training_by_epoch(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("epoch,step,val_loss,train_loss\n0,9,,3\n0,9,2,\n1,19,,1\n")
    rows = training.read(tmp_path / "metrics.csv")
    assert list(training.series(rows).items()) == [("train_loss", [(1, 3), (2, 1)]), ("val_loss", [(1, 2)])]
    assert training.read(tmp_path / "nothing.csv") == []


def test_umap_asks_for_its_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(representation, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"method=umap: umap-learn is not installed.*pip install umap-learn"):
        representation.Representation(method="umap")


def test_features_are_found_behind_wrappers() -> None:
    network = Linear()
    wrapped = nn.Module()
    wrapped.network = network
    images = torch.rand(3, 1, 4, 4)
    assert representation.features(wrapped, images).equal(images.flatten(1))
    with pytest.raises(UserError, match="features"):
        representation.features(nn.Flatten(), images)


def built(name: str) -> Any:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        job = config.parse(compose("train", overrides=[f"analysis={name}", "logger=none", "callbacks=none"]))
    return build(job.analysis[name], f"analysis.{name}")


@pytest.mark.parametrize("name", choices("analysis"))
def test_each_choice_draws_with_a_caption(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    captions: list[str] = []
    write = Figure.supxlabel
    monkeypatch.setattr(Figure, "supxlabel", lambda self, text, **k: captions.append(text) or write(self, text, **k))
    (tmp_path / "metrics.csv").write_text("epoch,step,train_loss\n0,9,3\n1,19,1\n")
    (tmp_path / "meta.json").write_text('{"what": "defense vae on digits", "about": {}}')
    seen = scene(trainings=(tmp_path,))
    seen.defended.generates = Remembered(seen.images, None)
    (path,) = draw([(name, built(name))], seen, tmp_path)
    assert path == tmp_path / f"analysis_{name}.png"
    assert is_drawn(path)
    facts = {"samples": ("n=20", "linear features"), "losses": ("n = 2 epochs", "defense vae on digits")}
    attacked = ("n = ", "noise (untargeted), linf", "ε = ")
    assert all(part in " ".join(captions[0].split()) for part in facts.get(name, attacked))


@pytest.mark.parametrize(
    ("name", "changes", "instead"),
    [
        ("attack_loss", {"steps": None}, "attack=pgd"),
        ("distances", {"minimal": False}, "attack=fmn"),
        ("samples", {}, "defense=vae"),
        ("losses", {}, "defense=vae"),
        ("detector", {"defended": Linear(side=8, classes=3)}, "defense=squeezing_detector"),
    ],
)
def test_what_cannot_be_looked_at_says_what_can(
    name: str, changes: dict[str, Any], instead: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=f"^analysis={name}: .*{instead}"):
        draw([(name, built(name))], scene(**changes), tmp_path)


def test_a_rejected_image_has_held_in_every_figure(drawn: list[Any], tmp_path: Path) -> None:
    seen = scene(attack=whitened())
    accepted = 100 * float((seen.defended.suspicion(seen.images) <= 1).double().mean())  # the others are lost
    assert 0 < accepted < 100
    looks = [attack_loss.AttackLoss(images=40), confusion.Confusion(images=40), over_eps.OverEps(images=1)]
    draw([(type(each).__name__, each) for each in looks], seen, tmp_path)
    loss, matrices, pictures = drawn
    assert [float(y) for y in loss.axes[1].lines[0].get_ydata()] == pytest.approx([accepted] * 4)
    assert f"defended, attacked (white_box): {accepted:.1f} % held" in [axis.get_title() for axis in matrices.axes]
    attacked = pictures.axes[-1].title
    assert "rejected" in attacked.get_text()
    assert attacked.get_color() == curves.REJECTED


@pytest.mark.parametrize(("norm", "unit"), [("l0", "pixels changed"), ("l2", "l2 distance, pixels in [0, 1]")])
def test_distances_are_in_the_unit_of_their_norm(norm: str, unit: str, drawn: list[Any], tmp_path: Path) -> None:
    draw([("distances", distances.Distances(images=5))], scene(norm=norm), tmp_path)
    assert unit in drawn[0].axes[0].get_xlabel()


def test_activations_are_those_of_the_network_that_answers(drawn: list[Any], tmp_path: Path) -> None:
    seen = scene()
    assert seen.network == (seen.defended, "the network of the defense, which replaces the bare classifier")
    inner = DefendedModel(classifier=seen.classifier, purify=lambda images: images)
    assert scene(defended=DefendedModel(classifier=inner), classifier=seen.classifier).network[0] is seen.classifier
    hardened = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Linear(8, 3))
    draw([("a", activations.Activations(images=5))], scene(defended=DefendedModel(classifier=hardened)), tmp_path)
    axis = drawn[0].subfigs[0].axes[0]
    assert [text.get_text() for text in axis.get_xticklabels()] == ["1", "2"]
    assert "the network of the defense" in " ".join(drawn[0].get_supxlabel().split())


def test_a_network_that_draws_is_looked_at_in_one_draw() -> None:
    class Noisy(Linear):
        def features(self, x: Tensor) -> Tensor:
            return (x + torch.randn_like(x)).flatten(1)

    model, images = Noisy(), torch.rand(2, 1, 4, 4)
    state = torch.random.get_rng_state()
    assert activations.layers(model, images)["layer"].equal(activations.layers(model, images)["layer"])
    assert torch.random.get_rng_state().equal(state)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (None, "on images that nothing attacks"),
        ({"attack": {"_target_": "src.attacks.pgd.PGD"}, "radius": "full"}, "by pgd, untargeted, linf, ε = 0.3"),
        ({"attack": None, "validation": {"_target_": "src.attacks.pgd.PGD"}, "radius": "drawn"},
         "by itself, validation images by pgd, untargeted, linf, ε = up to 0.3"),
    ],
)  # fmt: skip
def test_losses_name_the_threat_that_was_learnt_from(
    source: dict[str, Any] | None, said: str, drawn: list[Any], tmp_path: Path
) -> None:
    about = {"trained_on": {**source, "norm": "linf", "eps": 0.3}} if source else {}
    (tmp_path / "metrics.csv").write_text("epoch,step,train_loss\n0,9,3\n")
    (tmp_path / "meta.json").write_text(json.dumps({"what": "defense x", "about": about}))
    draw([("losses", losses.Losses())], scene(trainings=(tmp_path,)), tmp_path)
    assert said in " ".join(drawn[0].get_supxlabel().split())


def test_more_steps_are_as_long_as_before() -> None:
    assert with_steps(PGD(steps=8), 2, 0.3).step == pytest.approx(2.5 * 0.3 / 8)
    assert with_steps(FGSM(steps=4), 1, 0.2).step == pytest.approx(0.05)
    assert with_steps(PGD(steps=8, step=0.1), 2, 0.3).step == 0.1
    assert with_steps(APGD(steps=8), 2, 0.3).steps == 2


def test_where_classes_flow_is_of_images_right_before(drawn: list[Any], tmp_path: Path) -> None:
    seen = scene(accesses=("white_box",))
    seen.labels = seen.labels.clone()
    kind = int(seen.labels[0])
    seen.labels[seen.labels == kind] = (kind + 1) % 3  # all of them wrong from the start
    draw([("confusion", confusion.Confusion(images=40))], seen, tmp_path)
    clean, attacked = (drawn[0].axes[place].images[0].get_array()[(kind + 1) % 3] for place in (0, 1))
    assert clean[kind] > 0
    before = seen.classifier(seen.images).argmax(1) == seen.labels
    after = seen.classifier(seen.attacked("white_box", 40).images).argmax(1)
    expected = confusion.confusion(seen.labels[before], after[before], 4)[(kind + 1) % 3]
    assert list(attacked) == pytest.approx(expected.tolist())


def test_of_the_loss_a_rejection_counts_as_the_right_answer() -> None:
    logits = torch.tensor([[1.0, 5.0, 9.0], [1.0, 5.0, 0.0]])
    assert attack_loss._accepted(logits, torch.tensor([0, 0])).tolist() == [[9.0, 5.0], [1.0, 5.0]]


def test_the_largest_finite_radius_is_looked_at() -> None:
    assert scene().eps == 0.3
    assert scene(radii=(float("inf"),)).eps == float("inf")
    assert scene(accesses=("gray_box",)).strongest == "gray_box"


def test_a_job_draws_what_it_was_asked_for(command: Callable[..., Outcome]) -> None:
    words = ["+debug=quick", "defense=jpeg", "attack=fgsm", "threat.eps=0.1", "logger=none"]
    done = command(*words, "analysis=[confusion,over_eps]", "hydra.run.dir=a")
    assert done.code == 0
    names = {path.name for path in (done.folder / "a").glob("analysis_*.png")}
    assert names == {"analysis_confusion.png", "analysis_over_eps.png"}
    wrong = command(*words, "analysis=distances", "hydra.run.dir=b")
    assert wrong.code == 1
    assert wrong.error_lines
    assert "analysis=distances" in wrong.error_lines[0]
