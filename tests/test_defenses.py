"""Every defense of conf/defense, found by itself: shape, range, a true declaration, save and load."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Sequence

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from torch import nn

from src.build import build
from src.config import split
from src.defenses.base import Defense, Purifier
from src.defenses.bpda import bpda
from src.defenses.guarded import DefendedModel
from src.defenses.purify.autoencoder import Autoencoder
from src.defenses.purify.vae import VAE
from src.train import CONF
from tests.conftest import Linear, choices

DEFENSES = choices("defense")


def make(name: str, channels: int = 1, side: int = 8, extra: Sequence[str] = ()) -> Defense:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("train", overrides=[f"defense={name}", *extra])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return _built(OmegaConf.to_container(cfg.defense, resolve=True), channels, side).eval()


def _built(choice: dict, channels: int, side: int) -> Defense:
    node, trained = split(choice, "defense")
    if trained.parts:
        return build(node, "defense", parts=[_built(part, channels, side) for part in trained.parts.values()])
    shape = {"channels": channels, "size": (side, side), "num_classes": 2, "mean": (0.5,), "std": (0.5,)}
    bare = Linear(channels, side)
    return build(node, "defense", **shape, classifier=bare, fresh=lambda: Linear(channels, side))


def guarded(defense: Defense, classifier: nn.Module) -> DefendedModel:
    """Behind the defense, with thresholds that let everything through where it detects."""
    defended = defense.guard(classifier).eval()
    if defended.rejects:
        with torch.no_grad():
            defended.set_thresholds(
                torch.tensor([[0.0], [1e3]]).expand(-1, sum(each.columns for each in defended.detections))
            )
    return defended


def images(channels: int = 1, side: int = 8) -> torch.Tensor:
    return torch.rand(4, channels, side, side, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", DEFENSES)
@pytest.mark.parametrize(("channels", "side"), [(1, 8), (1, 28), (3, 32)])
def test_guard_keeps_shape_and_range(name: str, channels: int, side: int) -> None:
    few = ["defense.steps=20"] if name == "defense_gan" else []
    defended = guarded(make(name, channels, side, few), Linear(channels, side))
    x = images(channels, side)
    seen = defended.purified(x)
    assert seen.shape == x.shape
    assert float(seen.min()) >= 0
    assert float(seen.max()) <= 1
    assert defended(x).shape == (4, 2 + defended.rejects)
    assert defended.test_step({"image": x}, 0)["prediction"].shape == (4,)


@pytest.mark.parametrize("name", DEFENSES)
def test_declared_gradient_is_true(name: str) -> None:
    """``exact``: autograd agrees with finite differences along the way that it calls steepest."""
    check_gradient(name, lambda defended, x: (told := defended.adaptive(draws=1)(x))[:, 0].sum() - told[:, 1].sum())
    if guarded(make(name), Linear(side=8)).rejects:
        check_gradient(name, lambda defended, x: defended.suspicion(x).sum())


def check_gradient(name: str, says: Callable[[DefendedModel, torch.Tensor], torch.Tensor]) -> None:
    defense, x = make(name), images()[:1].requires_grad_()
    defended = defense.guard(Linear(side=8)).eval()

    def drawn_alike(image: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(5)
        return says(defended, image)

    assert defended.gradient in ("exact", "bpda", "none")
    for _ in range(15):
        if defended.rejects:
            with torch.no_grad():
                defended.set_thresholds(defended.scores(images()))
        (slope,) = torch.autograd.grad(drawn_alike(x), x)
        if defended.gradient == "none":
            assert not slope.any()
            return
        if slope.abs().sum() > 0.1:
            break
        with torch.no_grad():  # what an untrained network makes of an image changes less than floats resolve
            for weight in defense.parameters():
                weight *= 1.3
    told, direction = float(slope.abs().sum()), slope.sign()
    assert told > 0.1
    if defended.gradient == "exact":
        with torch.no_grad():
            # Long steps cross the kinks of a median, short ones drown in float32: one of them has to agree.
            found = [
                float(drawn_alike(x + step * direction) - drawn_alike(x - step * direction)) / (2 * step)
                for step in (1e-2, 1e-3, 1e-4)
            ]
        assert any(difference == pytest.approx(told, rel=0.05) for difference in found), (told, found)


@pytest.mark.parametrize("name", DEFENSES)
def test_stochastic_defenses_vary_and_others_do_not(name: str) -> None:
    defended = guarded(make(name), Linear(side=8))
    one, two = defended(images()), defended(images())
    assert torch.equal(one, two) != defended.stochastic


@pytest.mark.parametrize(("name", "extra"), [*((name, ()) for name in DEFENSES), ("cwgan_gp", ("defense.refine=1",))])
def test_no_images_get_no_answers(name: str, extra: tuple[str, ...]) -> None:
    """A search in which nothing is left to do asks for them."""
    defended = guarded(make(name, extra=extra), Linear(side=8))
    for model in (defended.adaptive(draws=2), defended.closed()):
        assert model(images()[:0]).shape == (0, 2 + defended.rejects)


@pytest.mark.parametrize("name", DEFENSES)
def test_what_never_asks_its_classifier_says_that_it_replaces_it(name: str) -> None:
    class Asked(Linear):
        asked = False

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.asked = True
            return super().forward(x)

    defense, classifier = make(name), Asked(side=8)
    guarded(defense, classifier)(images())
    assert defense.replaces is not classifier.asked


@pytest.mark.parametrize("name", DEFENSES)
def test_saved_and_loaded_gives_the_same_outputs(name: str) -> None:
    defense = make(name)
    buffer = io.BytesIO()
    torch.save(defense.state_dict(), buffer)
    buffer.seek(0)
    with torch.random.fork_rng():
        torch.manual_seed(99)
        other = make(name)
    for parameter in other.parameters():
        parameter.data.add_(1.0)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    answers = []
    for each in (defense, pickle.loads(pickle.dumps(defense)), other):  # pickled, it goes to other processes and nodes
        torch.manual_seed(3)
        answers.append(guarded(each, Linear(side=8))(images()))
    assert torch.equal(answers[0], answers[1])
    assert torch.equal(answers[0], answers[2])


def test_eot_answers_with_the_log_of_the_mean_probability() -> None:
    defended = make("autoencoder").guard(Linear(side=8))
    assert defended.stochastic
    torch.manual_seed(0)
    answer = defended.adaptive(draws=5)(images())
    torch.manual_seed(0)
    batch = images().repeat(5, 1, 1, 1)
    expected = defended(batch).softmax(dim=1).unflatten(0, (5, 4)).mean(dim=0).log()
    torch.testing.assert_close(answer, expected)
    assert make("vae").guard(Linear(side=8)).adaptive(draws=5).draws == 1


def test_eot_bounds_what_a_pass_holds_where_no_gradient_is_asked_for() -> None:
    class Counted(Purifier):
        stochastic = True

        def purify(self, x: torch.Tensor) -> torch.Tensor:
            held.append(len(x))
            return x + torch.rand(len(x), 1, 1, 1)

    held: list[int] = []
    target = Counted().guard(Linear(side=8)).adaptive(draws=20)
    assert target(torch.rand(80, 1, 8, 8)).shape == (80, 2)
    assert held == [240] * 6 + [160]
    for count, passes in ((300, [300] * 20), (3, [60])):
        held.clear()
        target(torch.rand(count, 1, 8, 8))
        assert held == passes
    held.clear()
    target(torch.rand(100, 1, 8, 8, requires_grad=True)).sum().backward()
    assert held == [2000]


def test_bpda_takes_the_value_of_the_defense_and_the_gradient_of_its_stand_in() -> None:
    class Rounding(Purifier):
        gradient = "bpda"

        def purify(self, x: torch.Tensor) -> torch.Tensor:
            return (x * 4).round() / 4

        def surrogate(self, x: torch.Tensor) -> torch.Tensor:
            return x

    classifier = Linear(side=8)
    defended = Rounding().guard(classifier)
    x = images().requires_grad_()
    logits = defended.adaptive(draws=20)(x)
    torch.testing.assert_close(logits, defended(images()))
    (slope,) = torch.autograd.grad(logits[:, 0].sum(), x)
    torch.testing.assert_close(slope, classifier.layer.weight[0].view(1, 1, 8, 8).expand_as(slope))


def test_bpda_without_a_stand_in_is_a_clear_error() -> None:
    class Silent(Purifier):
        gradient = "bpda"

        def purify(self, x: torch.Tensor) -> torch.Tensor:
            return x.round()

    with pytest.raises(TypeError, match="has to say what replaces its gradient"):
        Silent().guard(Linear(side=8)).adaptive(draws=1)(images().requires_grad_())


def test_none_lets_no_gradient_through() -> None:
    class Closed(Purifier):
        gradient = "none"

        def purify(self, x: torch.Tensor) -> torch.Tensor:
            return x * 1.0

    x = images().requires_grad_()
    assert not Closed().guard(Linear(side=8).requires_grad_(False)).adaptive(draws=1)(x).requires_grad


def test_autoencoder_learns_attacked_to_clean() -> None:
    """The loss compares with the clean image when the batch was attacked."""
    defense = Autoencoder(channels=1, size=(8, 8), noise=0.0)
    attacked, clean = images(), images().flip(0)
    loss = defense._loss({"image": attacked, "clean": clean})
    torch.testing.assert_close(loss, nn.functional.mse_loss(defense.purify(attacked), clean))


def test_autoencoder_adds_noise_of_its_spread_to_the_code() -> None:
    defense = Autoencoder(channels=1, size=(8, 8), noise=0.5)
    torch.manual_seed(0)
    seen = defense.purify(images())
    torch.manual_seed(0)
    code = defense.encoder(images())
    torch.testing.assert_close(seen, defense.decoder(code + 0.5 * torch.randn_like(code)))


@pytest.mark.parametrize("sample", [False, True])
def test_vae_by_hand(sample: bool) -> None:
    """The loss of a drawn code, against torch's own KL; at test its mean, unless a draw is asked for."""
    vae = VAE(channels=1, size=(8, 8), latent=3, beta=2.0, sample=sample).eval()
    given, clean = images(), images().flip(0)
    mean, logvar = vae.encoder(given)
    drawn, prior = torch.distributions.Normal(mean, logvar.div(2).exp()), torch.distributions.Normal(0.0, 1.0)
    torch.manual_seed(0)
    loss, reconstruction, kl = vae.loss({"image": given, "clean": clean})
    torch.manual_seed(0)
    code = drawn.mean + drawn.stddev * torch.randn(4, 3)
    wanted = nn.functional.binary_cross_entropy(vae.decoder(code), clean, reduction="sum") / 4
    torch.testing.assert_close(reconstruction, wanted)
    torch.testing.assert_close(kl, torch.distributions.kl_divergence(drawn, prior).sum(dim=1).mean())
    torch.testing.assert_close(loss, reconstruction + 2 * kl)
    torch.manual_seed(0)
    torch.testing.assert_close(vae.purify(given), vae.decoder(code if sample else mean))


def test_bpda_differentiates_the_draw_that_answers() -> None:
    drawn: list[torch.Tensor] = []

    def noise(x: torch.Tensor) -> torch.Tensor:
        drawn.append(torch.randn_like(x))
        return x + drawn[-1]

    replaced = bpda(noise, noise)
    x = images().requires_grad_()
    torch.manual_seed(0)
    first, second = replaced(x), replaced(x)
    assert torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn[2], drawn[3])
    assert not torch.equal(first, second), "each pass draws anew"
    with torch.no_grad():
        assert not torch.equal(replaced(x), replaced(x))
