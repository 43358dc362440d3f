"""DiffPure: its process in closed form, with networks of which the answer is known."""

from __future__ import annotations

import ast
import inspect
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from src.defenses.purify import diffusion
from src.defenses.purify.diffusion import Diffusion
from src.errors import UserError


def make(*, channels: int = 1, size: tuple[int, int] = (8, 8), **options: Any) -> Diffusion:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Diffusion(channels=channels, size=size, **{"widths": (8, 16), "patch": 1, **options}).eval()


class Oracle(nn.Module):
    """Knows the clean image, and so the noise: x_t = sqrt(a) x_0 + sqrt(1 - a) noise."""

    def __init__(self, clean: torch.Tensor) -> None:
        super().__init__()
        self.clean = clean
        self.kept = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), dim=0)  # DDPM's linear process

    def forward(self, noisy: torch.Tensor, time: torch.Tensor) -> SimpleNamespace:
        kept = self.kept[time].reshape(-1, 1, 1, 1)
        return SimpleNamespace(sample=(noisy - kept.sqrt() * (2 * self.clean - 1)) / (1 - kept).sqrt())


@pytest.mark.parametrize(
    ("t_star", "steps", "times"),
    [(0.2, 4, [199, 149, 99, 49]), (0.1, 1, [99]), (0.5, 4, [499, 374, 249, 124]), (0.003, 3, [2, 1, 0])],
)
def test_steps_divide_the_process_evenly_down_to_the_clean_image(t_star: float, steps: int, times: list[int]) -> None:
    assert make(t_star=t_star, steps=steps).times == times


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_who_knows_the_noise_finds_the_clean_image(steps: int, eta: float) -> None:
    """A network that names the noise exactly leads back to its image, whatever came in."""
    clean = torch.rand(2, 1, 8, 8)
    defense = make(steps=steps, eta=eta)
    defense.network = Oracle(clean)
    torch.testing.assert_close(defense.purify(torch.rand(2, 1, 8, 8)), clean, atol=1e-4, rtol=0)
    torch.testing.assert_close(defense.surrogate(torch.rand(2, 1, 8, 8)), clean, atol=1e-4, rtol=0)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_each_step_has_the_noise_of_its_time_and_as_much_of_it_fresh_as_eta_says(eta: float) -> None:
    """Of variance 1 - a at every step; the share of it that is new is eta^2 (1 - a / a') / (1 - a)."""
    clean, noises = torch.rand(8, 1, 32, 32), list[torch.Tensor]()
    defense = make(size=(32, 32), t_star=0.2, steps=4, eta=eta)
    defense.network = oracle = Oracle(clean)
    oracle.register_forward_hook(lambda module, inputs, output: noises.append(output.sample))
    torch.manual_seed(0)
    defense.purify(clean)
    kept = oracle.kept[defense.times]
    assert [float(noise.std()) for noise in noises] == pytest.approx([1.0] * 4, abs=0.03)
    fresh = eta**2 * (1 - kept[:-1] / kept[1:]) / (1 - kept[:-1])
    alike = [float((one * other).mean()) for one, other in pairwise(noises)]
    assert alike == pytest.approx((1 - fresh).sqrt().tolist(), abs=0.03)


def test_t_star_decides_how_much_is_left_of_the_image() -> None:
    """The noised image has mean sqrt(a) x and variance 1 - a."""
    defense = make(size=(64, 64), t_star=0.2)
    kept = float(torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), dim=0)[199])
    torch.manual_seed(0)
    noisy = defense._noised(torch.ones(16, 1, 64, 64))
    assert float(noisy.mean()) == pytest.approx(kept**0.5, abs=0.01)
    assert float(noisy.var()) == pytest.approx(1 - kept, abs=0.01)


def test_the_stand_in_is_the_single_step() -> None:
    images = torch.rand(2, 1, 8, 8)
    single, several = make(t_star=0.2, steps=1), make(t_star=0.2, steps=4)
    torch.manual_seed(1)
    one = single.purify(images)
    torch.manual_seed(1)
    assert torch.equal(several.surrogate(images), one)
    torch.manual_seed(1)
    assert not torch.equal(several.purify(images), one)


@pytest.mark.parametrize("size", [(7, 9), (28, 28), (32, 20)])
def test_sides_that_cannot_be_halved_are_padded_and_cropped(size: tuple[int, int]) -> None:
    seen = []
    defense = make(channels=3, size=size, patch=2)
    defense.network.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].shape))
    images = torch.rand(2, 3, *size)
    assert defense.purify(images).shape == images.shape
    assert {shape[1] for shape in seen} == {12}
    assert all(side % 2 == 0 for shape in seen for side in shape[2:])


def test_loss_is_the_error_of_the_noise_and_validation_draws_it_alike() -> None:
    defense = make(size=(32, 32))
    clean = torch.rand(64, 1, 32, 32)
    twice = [float(defense._loss(clean, torch.Generator().manual_seed(3)).detach()) for _ in range(2)]
    assert twice[0] == twice[1]
    defense.network = Oracle(clean)
    assert float(defense._loss(clean, None)) == pytest.approx(0, abs=1e-6)
    for weight in (silent := make(size=(32, 32))).network.conv_out.parameters():
        weight.data.zero_()
    drawn = torch.Generator().manual_seed(4)
    assert float(silent._loss(clean, drawn).detach()) == pytest.approx(1, abs=0.02)  # the noise's own variance


def test_it_trains_on_the_clean_images() -> None:
    defense = make()
    seen = []
    defense._loss = lambda images, generator: seen.append(images) or torch.zeros(())  # type: ignore[assignment]
    defense.log = lambda *_, **__: None  # type: ignore[assignment]
    attacked, clean = torch.rand(2, 1, 8, 8), torch.rand(2, 1, 8, 8)
    defense.training_step({"image": attacked, "clean": clean}, 0)
    defense.validation_step({"image": attacked}, 0)
    assert seen[0] is clean
    assert seen[1] is attacked


def test_a_few_steps_of_training_lower_the_loss() -> None:
    defense = make().train()
    clean = (torch.arange(8) % 2).float().expand(16, 1, 8, 8)
    before = float(defense._loss(clean, torch.Generator().manual_seed(0)).detach())
    optimizer = torch.optim.Adam(defense.parameters(), lr=5e-3)
    for _ in range(25):
        optimizer.zero_grad()
        defense._loss(clean, None).backward()
        optimizer.step()
    assert float(defense._loss(clean, torch.Generator().manual_seed(0)).detach()) < 0.7 * before


def test_wrong_numbers_are_one_clear_line() -> None:
    with pytest.raises(UserError, match=r"defense.widths=\[8, 12\]: expected multiples of 8"):
        make(widths=(8, 12))
    with pytest.raises(UserError, match=r"defense.steps=11: does not divide the 10 .* such as 2, 5, 10"):
        make(t_star=0.01, steps=11)
    with pytest.raises(UserError, match=r"defense.steps=50: does not divide the 75 .* such as 15, 25, 75"):
        make(t_star=0.075, steps=50)
    with pytest.raises(UserError, match=r"the 0 noise levels"):
        make(t_star=1e-4, steps=1)


def test_the_heavy_import_waits_for_the_class() -> None:
    top = [node for node in ast.parse(inspect.getsource(diffusion)).body if isinstance(node, ast.ImportFrom)]
    assert top
    assert not any((node.module or "").startswith("diffusers") for node in top)
