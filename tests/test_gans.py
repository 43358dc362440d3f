"""GAN purifiers: the penalty and the searches against closed forms, the training, the siamese network."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from pytorch_lightning import Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from src.defenses.purify.cwgan_gp import CWGANGP
from src.defenses.purify.defense_gan import DefenseGAN
from src.defenses.purify.gan import Critic, Generator, descend, gradient_penalty
from src.defenses.purify.siamese import MARGIN, contrastive
from src.errors import UserError
from src.recipe import Recipe
from tests.conftest import Linear

SMALL = {"channels": 1, "size": (8, 8), "latent": 4, "width": 4}


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def images(count: int = 3) -> Tensor:
    return torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def defense_gan(**options: object) -> DefenseGAN:
    return DefenseGAN(**{**SMALL, "restarts": 2, "steps": 5, "candidates": 2, **options}).eval()  # type: ignore


def cwgan_gp(classes: int = 3, **options: object) -> CWGANGP:
    linear = Linear(side=8, classes=classes)
    given = {**SMALL, "num_classes": classes, "classifier": linear, "draws": 4}
    return CWGANGP(**{**given, **options}).eval()  # type: ignore


class Straight(nn.Module):
    """Codes are the images' first pixels: what the projection has to find is known."""

    def forward(self, codes: Tensor) -> Tensor:
        return torch.cat([codes, torch.zeros(len(codes), 60)], dim=1).view(-1, 1, 8, 8)


@pytest.mark.parametrize(("channels", "size"), [(1, (8, 8)), (1, (28, 28)), (3, (32, 32)), (3, (25, 18))])
@pytest.mark.parametrize("classes", [0, 5])
def test_networks_fit_any_size(channels: int, size: tuple[int, int], classes: int) -> None:
    labels = torch.tensor([0, 3]) if classes else None
    made = Generator(channels=channels, size=size, latent=6, width=4, classes=classes)(torch.randn(2, 6), labels)
    assert made.shape == (2, channels, *size)
    assert float(made.min()) >= 0
    assert float(made.max()) <= 1
    assert Critic(channels=channels, size=size, width=4, classes=classes)(made, labels).shape == (2,)


def test_images_too_small_are_refused() -> None:
    with pytest.raises(UserError, match="7x7 are too small"):
        defense_gan(size=(7, 7))


def test_penalty_of_a_linear_critic_is_its_slope() -> None:
    """The score 3 * first pixel has a gradient of length 3 everywhere: (3 - 1)² = 4."""

    class Sloped(nn.Module):
        def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
            return 3 * x[:, 0, 0, 0]

    assert float(gradient_penalty(Sloped(), images(), images().flip(0))) == pytest.approx(4.0)


def test_losses_by_hand() -> None:
    """Of a critic whose score, 16 times the mean of 8x8 pixels, has a slope of norm 2: a penalty of 1."""

    class Bright(nn.Module):
        def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
            return 16 * x.mean(dim=(1, 2, 3))

    defense, told = defense_gan(n_critic=1, penalty=7.0), []
    defense.critic = Bright()  # type: ignore[assignment]
    defense.log_dict = lambda *_, **__: None  # type: ignore[method-assign]
    defense._step = lambda which, losses: told.append(losses) or {}  # type: ignore[method-assign, assignment]
    defense._trainer = SimpleNamespace(current_epoch=0, num_training_batches=1)
    torch.manual_seed(0)
    defense.training_step({"image": images() * 0, "clean": images(), "label": torch.zeros(3)}, 0)
    torch.manual_seed(0)
    fake = 16 * defense.generator(torch.randn(3, 4)).mean()
    distance = 16 * images().mean() - fake
    critic, generator = told
    torch.testing.assert_close(critic["train_critic"], 7 - distance)
    torch.testing.assert_close(critic["train_wasserstein"], distance)
    torch.testing.assert_close(generator["train_loss"], -fake)


def test_descent_follows_momentum_by_hand() -> None:
    """Loss z²/2, rate 1, momentum 0.5: the fifth step of five has a tenth of the rate."""
    z, velocity = 8.0, 0.0
    for rate in (0.5, 0.5, 0.5, 0.5, 0.05):
        velocity = 0.5 * velocity + z
        z -= rate * velocity
    start = torch.tensor([[8.0], [8.0]])
    found = descend(lambda codes: codes.square().sum(1) / 2, start, steps=5, rate=0.5, momentum=0.5)
    torch.testing.assert_close(found.detach(), torch.full((2, 1), z))


def test_projection_on_a_known_generator() -> None:
    """Images whose first four pixels are free and the others zero: the projection keeps those four."""
    defense = defense_gan(steps=60)
    defense.average = Straight()  # type: ignore[assignment]
    found = defense.purify(images())
    wanted = images().flatten(1)
    wanted[:, 4:] = 0
    torch.testing.assert_close(found.flatten(1), wanted, atol=1e-3, rtol=0)


def test_projection_takes_the_best_restart_and_more_candidates_start_nearer() -> None:
    one, many = defense_gan(restarts=1, candidates=1, steps=1), defense_gan(restarts=8, candidates=500, steps=1)
    many.load_state_dict(one.state_dict())

    def error(defense: DefenseGAN) -> Tensor:
        return (defense.purify(images()) - images()).square().mean(dim=(1, 2, 3))

    assert (error(many) < error(one)).all()
    with pytest.raises(UserError, match="fewer than"):
        defense_gan(restarts=3, candidates=2)


def test_projection_takes_the_best_of_its_restarts() -> None:
    defense = defense_gan(restarts=4, candidates=4, steps=1, rate=3.0, momentum=0.0)
    errors = []
    for code in torch.randn(4, 4, generator=torch.Generator().manual_seed(0)):
        start = code.repeat(3, 1).requires_grad_()
        error = (defense.average(start) - images()).square().mean(dim=(1, 2, 3))
        (slope,) = torch.autograd.grad(error.sum(), start)
        errors.append((defense.average(start - 3 * slope) - images()).square().mean(dim=(1, 2, 3)))
    found = (defense.purify(images()) - images()).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(found, torch.stack(errors).amin(dim=0).detach())


def test_projection_needs_nothing_of_its_caller() -> None:
    """Same images without gradients, in inference mode and alone; the caller's random state and flags stay."""
    defense = defense_gan()
    before = torch.get_rng_state()
    plain = defense.purify(images())
    with torch.no_grad():
        assert torch.equal(defense.purify(images()), plain)
    with torch.inference_mode():
        assert torch.equal(defense.purify(images()), plain)
    torch.testing.assert_close(defense.purify(images()[1:2]), plain[1:2])
    assert torch.equal(torch.get_rng_state(), before)
    assert not plain.requires_grad
    assert all(parameter.grad is None for parameter in defense.parameters())


def test_unrolled_gradient_is_that_of_the_projection() -> None:
    defense = defense_gan(backward="unrolled", steps=4, restarts=1, candidates=1)
    assert defense.gradient == "exact"
    for module in defense.average.modules():
        if isinstance(module, nn.ReLU):
            module.forward = nn.functional.softplus  # type: ignore[assignment]  # without kinks
    x = images(2).requires_grad_()
    direction = torch.randn(2, 1, 8, 8)

    def score(image: Tensor) -> Tensor:
        return (defense.purify(image) * direction).sum()

    (slope,) = torch.autograd.grad(score(x), x)
    assert slope.abs().sum() > 0
    step = 1e-3
    difference = (score(x.detach() + step * direction) - score(x.detach() - step * direction)) / (2 * step)
    assert float(difference) == pytest.approx(float((slope * direction).sum()), rel=0.03)


def test_bpda_differentiates_the_nearest_image() -> None:
    """Of images whose first four pixels are free and the others zero: only those four matter to the classifier."""
    defense, classifier = defense_gan(steps=60), Linear(side=8)
    defense.average = Straight()  # type: ignore[assignment]
    x = images().requires_grad_()
    logits = defense.guard(classifier).adaptive(draws=1)(x)
    torch.testing.assert_close(logits, classifier(defense.purify(images())))
    (slope,) = torch.autograd.grad(logits[:, 0].sum(), x)
    known = classifier.layer.weight[0] * (torch.arange(64) < 4)
    torch.testing.assert_close(slope, known.view(1, 1, 8, 8).expand_as(slope), atol=1e-6, rtol=0.06)


def test_logits_are_minus_the_distance_to_the_nearest_image_of_each_class() -> None:
    defense = cwgan_gp()
    defended = defense.guard(Linear(side=8))
    shown = defense.references().view(3, 4, 64)
    apart = images().flatten(1)[:, None, None] - shown
    torch.testing.assert_close(defended(images()), -apart.norm(dim=3).amin(dim=2), atol=1e-4, rtol=0)
    # A class image itself is of its class, and the bare classifier is not asked.
    assert defended(shown[:, 2].view(3, 1, 8, 8)).argmax(dim=1).tolist() == [0, 1, 2]
    assert defense.gradient == "exact"


def test_refinement_lowers_the_distances_and_is_constant_backwards() -> None:
    plain, fine = cwgan_gp(), cwgan_gp(refine=10)
    fine.load_state_dict(plain.state_dict())
    x = images().requires_grad_()
    near, nearer = (-defense.guard(Linear(side=8))(x) for defense in (plain, fine))
    assert (nearer <= near).all()
    assert (nearer < near - 1e-4).any()
    assert fine.gradient == "bpda"
    with torch.inference_mode():
        torch.testing.assert_close(-fine.guard(Linear(side=8))(images()), nearer.detach())
    # The distance to a fixed image grows by one for a unit step away from it.
    (slope,) = torch.autograd.grad(nearer[:, 0].sum(), x)
    torch.testing.assert_close(slope.flatten(1).norm(dim=1), torch.ones(3))


def test_contrastive_loss_by_hand() -> None:
    """Same class at distances 0 and 2, others at MARGIN + 1 and 2."""
    left = torch.tensor([[0.0], [2.0]])
    right = torch.tensor([[0.0], [2.0]])
    alike = contrastive(left, right, torch.tensor([1, 1]))
    assert float(alike) == pytest.approx((0 + 4 + 4 + 0) / 4)
    other = contrastive(left, right, torch.tensor([0, 1]))
    assert float(other) == pytest.approx((MARGIN - 2) ** 2)
    assert float(contrastive(left * 0, right * 0 + MARGIN + 1, torch.tensor([0, 1]))) == pytest.approx(
        (MARGIN + 1) ** 2
    )


@pytest.mark.parametrize(("decay", "kept"), [(0.15, 0.15), (0.999, 2 / 11)])
def test_the_running_average_of_the_generator_is_lower_in_the_first_steps(decay: float, kept: float) -> None:
    """By hand: the first weights are copied, then (1 + n) / (10 + n) is kept, the decay at most."""
    defense = DefenseGAN(**SMALL, averaging=decay)
    for value in (1.0, 2.0):
        for weight in defense.generator.parameters():
            weight.data.fill_(value)
        defense.average.update_parameters(defense.generator)
    for weight in defense.average.parameters():
        torch.testing.assert_close(weight, torch.full_like(weight, kept * 1 + (1 - kept) * 2))
        assert not weight.requires_grad


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_training_moves_every_network_and_logs_its_figures(precision: str) -> None:
    """Two epochs of four batches, n_critic 4: eight steps of the critic, two of the generator."""
    defense = cwgan_gp(similarity="siamese", n_critic=4)
    parts = {"generator": defense.generator, "critic": defense.critic, "siamese": defense.siamese}
    before = {name: [p.clone() for p in part.parameters()] for name, part in parts.items()}
    defense.recipe = Recipe(
        epochs=2, batch_size=6, optimizer="adam", lr=1e-3, momentum=0.9, weight_decay=0.0, schedule="cosine",
        warmup=0.2, augment=False, patience=None, precision=precision, channels_last=False,
    )  # fmt: skip
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    batches = [{"image": images(6) * share, "clean": images(6), "label": labels} for share in (1.0, 0.9, 0.8, 0.7)]
    trainer = Trainer(
        accelerator="cpu", max_epochs=2, precision=precision, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(defense, DataLoader(batches, batch_size=None), DataLoader(batches[:1], batch_size=None))
    for name, part in parts.items():
        assert any(not torch.equal(old, new) for old, new in zip(before[name], part.parameters(), strict=True)), name
    assert int(defense.average.n_averaged) == 2
    assert {optimizer.param_groups[0]["betas"] for optimizer in trainer.optimizers} == {(0.5, 0.9)}
    told = trainer.callback_metrics
    figures = {"train_loss", "train_critic", "train_wasserstein", "train_siamese", "val_accuracy", "val_fid"}
    assert figures <= set(told)
    assert all(torch.isfinite(told[name]) for name in figures)


def test_fid_of_images_with_themselves_is_zero_and_grows_with_a_shift() -> None:
    """The Fréchet distance of the same points moved by d is |d|²."""
    defense = cwgan_gp()
    points = torch.randn(200, 64)
    for shift, expected in ((0.0, 0.0), (2.0, 256.0)):
        defense.fid.reset()
        defense.fid.update(points, real=True)
        defense.fid.update(points + shift, real=False)
        assert float(defense.fid.compute()) == pytest.approx(expected, abs=1e-2)


def test_classifier_is_no_part_of_the_weights() -> None:
    defense = cwgan_gp()
    assert torch.equal(defense.features(images()), images().flatten(1))  # what the linear layer sees
    plain = cwgan_gp(classifier=nn.Sequential(nn.Flatten(), nn.Linear(64, 3)))
    assert plain.features(images()).shape == (3, 3)  # no features by name: its logits
    assert not [name for name in defense.state_dict() if "layer" in name or "fid" in name]
