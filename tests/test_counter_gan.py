"""counterGAN: its losses by hand, who learns from what, and that it undoes an attack."""

from __future__ import annotations

import math
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from src.defenses.purify.counter_gan import CounterGAN, frozen
from src.recipe import Recipe
from tests.conftest import Linear

RECIPE = Recipe(
    epochs=1, batch_size=4, optimizer="adamw", lr=5e-3, momentum=0.9, weight_decay=0.1, schedule="none", warmup=0.2,
    augment=False, patience=None, precision="32-true", channels_last=False,
)  # fmt: skip
VARIANTS = [("linear", "bce"), ("linear", "mse"), ("conv", "mse"), ("conv", "bce"), ("linear", "wgan_gp")]


def make(*, channels: int = 1, size: tuple[int, int] = (8, 8), **options: Any) -> CounterGAN:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        target = Linear(channels, size[0]) if size[0] == size[1] else Linear()
        return CounterGAN(channels=channels, size=size, classifier=target, **{"width": 8, **options}).eval()


def batches(count: int, batch: int = 4) -> list[dict[str, Tensor]]:
    made = torch.Generator().manual_seed(7)
    images = torch.rand(count, 2, batch, 1, 8, 8, generator=made)
    return [{"image": a, "clean": b, "label": torch.tensor([0, 1] * (batch // 2))} for a, b in images]


def fit(defense: CounterGAN, data: list[dict[str, Tensor]], *watchers: pl.Callback) -> None:
    defense.recipe = RECIPE
    defense.train()
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=list(watchers),
    )  # fmt: skip
    trainer.fit(defense, DataLoader(data, batch_size=None))


class Mean(nn.Module):
    """A discriminator of which everything is known: four times the mean of 8x8 pixels, a slope of norm 1/2."""

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        return 4 * images.mean(dim=(1, 2, 3))


@pytest.mark.parametrize(
    ("loss", "judging", "fooling"),
    [
        ("bce", math.log1p(math.exp(-4)) + math.log1p(math.exp(1)), math.log1p(math.exp(-1))),
        ("mse", (4 - 1) ** 2 + 1**2, (1 - 1) ** 2),
        ("wgan_gp", 1 - 4 + 10 * (0.5 - 1) ** 2, -1),
    ],
)
def test_losses_by_hand(loss: str, judging: float, fooling: float) -> None:
    defense = make(loss=loss)
    defense.discriminator = Mean()
    clean, repaired = torch.ones(3, 1, 8, 8), torch.full((3, 1, 8, 8), 0.25)
    assert float(defense._judging(clean, repaired).detach()) == pytest.approx(judging)
    assert float(defense._fooling(defense.discriminator(repaired))) == pytest.approx(fooling)


@pytest.mark.parametrize(("network", "loss"), VARIANTS)
@pytest.mark.parametrize("condition", ["image", "sketch"])
def test_discriminator_is_stepped_every_tenth_batch_and_the_target_never(
    network: str, loss: str, condition: str
) -> None:
    defense = make(network=network, loss=loss, condition=condition, every=3)
    target = defense._target[0]
    before = [weight.clone() for weight in target.parameters()]
    moved: dict[str, list[bool]] = {"generator": [], "discriminator": []}

    class Watch(pl.Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            self.weights = {name: next(getattr(defense, name).parameters()).clone() for name in moved}

        def on_train_batch_end(self, *_: Any) -> None:
            for name, old in self.weights.items():
                moved[name].append(not torch.equal(old, next(getattr(defense, name).parameters())))

    fit(defense, batches(5), Watch())
    assert moved == {"generator": [True] * 5, "discriminator": [True, False, False, True, False]}
    assert all(torch.equal(old, new) for old, new in zip(before, target.parameters(), strict=True))
    assert all(weight.grad is None and weight.requires_grad for weight in target.parameters())


def test_the_target_is_no_part_of_what_is_saved() -> None:
    defense = make()
    assert not any(isinstance(part, Linear) for part in defense.modules())
    assert {name.split(".")[0] for name in defense.state_dict()} == {"generator", "discriminator"}


def test_frozen_answers_alike_and_passes_the_gradient_of_the_image_only() -> None:
    network, x = Linear(side=8), torch.rand(2, 1, 8, 8, requires_grad=True)
    answer = frozen(network, x)
    assert torch.equal(answer, network(x))
    answer[:, 1].sum().backward()
    torch.testing.assert_close(x.grad, network.layer.weight[1].view(1, 1, 8, 8).expand_as(x))
    assert network.layer.weight.grad is None


def test_part_of_each_batch_is_clean_and_the_losses_have_their_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    defense, (batch,) = make(clean_share=0.5, classification=3.0, likeness=2.0, adversarial=0.5), batches(1)
    seen: list[Tensor] = []
    monkeypatch.setattr(defense, "purify", lambda images: seen.append(images) or images.requires_grad_())
    monkeypatch.setattr(defense, "log_dict", lambda *_, **__: None)
    loss = defense.training_step(batch, 1)  # not a turn of the discriminator
    assert torch.equal(seen[0], torch.cat([batch["clean"][:2], batch["image"][2:]]))
    answer, fooling = defense._target[0](seen[0]), defense._fooling(defense.discriminator(seen[0]))
    parts = nn.functional.cross_entropy(answer, batch["label"]), nn.functional.mse_loss(seen[0], batch["clean"])
    torch.testing.assert_close(loss, 3 * parts[0] + 2 * parts[1] + 0.5 * fooling)


def test_the_repair_is_the_image_and_the_noise_cut_to_the_box() -> None:
    defense, images = make(), torch.rand(2, 1, 8, 8)
    noise = torch.linspace(-1, 1, 64).view(1, 1, 8, 8)
    defense.generator.forward = lambda seen, code: noise  # type: ignore[method-assign]
    assert torch.equal(defense.purify(images), (images + noise).clamp(0, 1))


@pytest.mark.parametrize("network", ["linear", "conv"])
def test_a_sketch_is_all_that_the_generator_sees(network: str) -> None:
    """Light above, dark below: images of the same sketch get the same noise, the upside-down one another."""
    defense = make(network=network, condition="sketch", size=(10, 10))
    drawn: list[Tensor] = []
    defense.generator.register_forward_hook(lambda module, inputs, output: drawn.extend([inputs[0], output]))
    light = torch.full((1, 1, 10, 10), 0.4)
    light[..., :5, :] = 0.6
    defense.purify(torch.cat([light, 0.9 * light.square(), light.flip(2)]))
    sketch, noise = drawn
    assert torch.equal(sketch[0], (torch.arange(100) < 50).float())
    assert torch.equal(sketch[0], sketch[1])
    torch.testing.assert_close(noise[0], noise[1])
    assert not torch.allclose(noise[0], noise[2], atol=1e-4)


def test_declarations_follow_the_condition_and_the_votes() -> None:
    assert (make().gradient, make().stochastic, make().votes) == ("exact", False, 1)
    voting = make(condition="sketch", votes=5)
    assert (voting.gradient, voting.stochastic, voting.votes) == ("bpda", True, 5)
    images = torch.rand(2, 1, 8, 8)
    assert not torch.equal(voting.purify(images), voting.purify(images))


def test_its_moments_decay_as_asked() -> None:
    defense = make(betas=(0.3, 0.8))
    defense.recipe = RECIPE
    groups = defense.configure_optimizers()["optimizer"].param_groups
    assert {group["betas"] for group in groups} == {(0.3, 0.8)}


@pytest.mark.parametrize("network", ["linear", "conv"])
@pytest.mark.parametrize("condition", ["image", "sketch"])
def test_any_size_works(network: str, condition: str) -> None:
    images = torch.rand(2, 3, 9, 14)
    defense = make(channels=3, size=(9, 14), network=network, condition=condition, votes=2)
    assert defense.purify(images).shape == images.shape
    assert defense.discriminator(images).shape == (2,)


@pytest.mark.parametrize(("network", "loss"), VARIANTS)
def test_it_undoes_the_attack_it_learnt_and_lets_clean_images_through(network: str, loss: str) -> None:
    """A linear classifier, turned by a step along its weights, is right again after a few dozen batches."""
    defense = make(network=network, loss=loss, clean_share=0.5)
    target = defense._target[0]
    slope = (target.layer.weight[0] - target.layer.weight[1]).detach().view(1, 1, 8, 8)
    target.layer.bias.data = torch.stack([-0.5 * slope.sum(), torch.zeros(())])  # both classes alike: chance is 0.5
    made = torch.Generator().manual_seed(1)
    clean = 0.2 + 0.6 * torch.rand(45 * 32, 1, 8, 8, generator=made)
    label = target(clean).argmax(dim=1)
    side = (2 * label - 1).view(-1, 1, 1, 1)  # class 1 is reached against the slope
    attacked = clean + 0.15 * side * slope.sign()
    data = [
        {"image": a, "clean": c, "label": y}
        for a, c, y in zip(attacked.split(32), clean.split(32), label.split(32), strict=True)
    ]
    fit(defense, data[:40])
    defense.eval()
    with torch.no_grad():
        for images, bare in ((attacked[-160:], 0.1), (clean[-160:], 1.0)):
            assert float((target(images).argmax(dim=1) == label[-160:]).float().mean()) == pytest.approx(bare, abs=0.1)
            assert float(defense._right(images, label[-160:])) > 0.75
