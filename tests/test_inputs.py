"""Images, labels, targets and models that make no sense are one line that says so; drawn targets are wrong classes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from src.attacks.fgsm import FGSM
from src.attacks.inputs import targets
from src.attacks.pgd import PGD
from src.errors import UserError
from src.threat import ThreatModel
from tests.conftest import Linear


class Broken(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1)[:, :2] * math.nan


@pytest.mark.parametrize(
    ("images", "labels", "words"),
    [
        (torch.rand(2, 1, 4, 4) + 1, torch.zeros(2, dtype=torch.int64), "expected [0, 1]"),
        (torch.rand(2, 1, 4, 4).double(), torch.zeros(2, dtype=torch.int64), "float32"),
        ((torch.rand(2, 1, 4, 4) * 255).to(torch.uint8), torch.zeros(2, dtype=torch.int64), "float32"),
        (torch.rand(2, 4, 4), torch.zeros(2, dtype=torch.int64), "(B, C, H, W)"),
        (torch.rand(2, 1, 4, 4), torch.zeros(3, dtype=torch.int64), "labels are"),
        (torch.rand(2, 1, 4, 4) - 1, torch.zeros(2, dtype=torch.int64), "expected [0, 1]"),
        (torch.rand(2, 1, 4, 4), torch.zeros(2, dtype=torch.int32), "int32; expected (2,) int64"),
        (torch.rand(2, 1, 4, 4), torch.tensor([0, 2]), "the model has 2 classes"),
        (torch.rand(2, 1, 4, 4), torch.tensor([0, 9]), "the model has 2 classes"),
        (torch.rand(2, 1, 4, 4), torch.tensor([0, -1]), "labels go down to -1"),
        (torch.full((2, 1, 4, 4), math.nan), torch.zeros(2, dtype=torch.int64), "expected [0, 1]"),
    ],
)
def test_wrong_input_is_one_clear_line(images: torch.Tensor, labels: torch.Tensor, words: str, linear: Linear) -> None:
    with pytest.raises(UserError) as caught:
        FGSM()(linear, images, labels, ThreatModel(norm="linf", eps=0.1))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_labels_of_a_model_that_rejects_are_those_of_its_classes(linear: Linear) -> None:
    class Rejects(nn.Module):
        rejects = True

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cat([linear(x), torch.zeros(len(x), 1)], dim=1)

    for label in (2, 9):
        with pytest.raises(UserError, match=f"labels up to {label}, but the model has 2 classes"):
            PGD()(Rejects(), torch.rand(2, 1, 4, 4), torch.tensor([0, label]), ThreatModel(norm="linf", eps=0.1))


def test_norm_the_attack_cannot_do(linear: Linear) -> None:
    with pytest.raises(UserError, match=r"threat\.norm=l0: FGSM cannot do it. Allowed: l2, linf"):
        FGSM()(linear, torch.rand(1, 1, 4, 4), torch.zeros(1, dtype=torch.int64), ThreatModel(norm="l0", eps=1))


def test_model_with_nan_and_target_equal_to_label(linear: Linear) -> None:
    images, labels = torch.rand(2, 1, 4, 4), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(UserError, match="NaN"):
        FGSM()(Broken(), images, labels, ThreatModel(norm="linf", eps=0.1))
    with pytest.raises(UserError, match="target equals the label"):
        FGSM()(linear, images, labels, ThreatModel(norm="linf", eps=0.1, targeted=True), target=torch.tensor([1, 0]))


@pytest.mark.parametrize(
    ("target", "targeted", "words"),
    [
        (torch.tensor([1, 1]), False, "targeted=True"),
        (torch.tensor([1, 1], dtype=torch.int32), True, "int32; expected (2,) int64"),
        (torch.tensor([1]), True, "expected (2,) int64"),
        (torch.tensor([1, 2]), True, "from 1 to 2, but the model has 2 classes"),
        (torch.tensor([-1, 1]), True, "from -1 to 1, but the model has 2 classes"),
    ],
)
def test_a_wrong_target_is_one_clear_line(target: torch.Tensor, targeted: bool, words: str, linear: Linear) -> None:
    images, labels = torch.rand(2, 1, 4, 4), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(UserError) as caught:
        FGSM()(linear, images, labels, ThreatModel(norm="linf", eps=0.1, targeted=targeted), target=target)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_model_of_one_class_has_no_wrong_one_to_aim_at() -> None:
    images, labels = torch.rand(2, 1, 4, 4), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(UserError, match="at least two classes"):
        FGSM()(Linear(classes=1), images, labels, ThreatModel(norm="linf", eps=0.1, targeted=True))


def test_targets_that_nobody_names_are_drawn_among_all_wrong_classes() -> None:
    labels = torch.arange(300) % 4
    drawn, again = (targets(labels, 4, torch.Generator().manual_seed(3), None) for _ in range(2))
    assert torch.equal(drawn, again)
    shifts = ((drawn - labels) % 4).bincount(minlength=4).tolist()
    assert shifts[0] == 0
    assert min(shifts[1:]) > 60  # of 300, a hundred each


def test_without_a_budget_the_model_is_asked_for_its_verdict_alone(linear: Linear) -> None:
    asked: list[int] = []
    linear.register_forward_hook(lambda *_: asked.append(1))
    images, threat = torch.rand(3, 1, 4, 4), ThreatModel(norm="linf", eps=0)
    attack, generator = PGD(steps=3), torch.Generator().manual_seed(0)
    labels = linear(images).argmax(dim=1)
    assert torch.equal(attack(linear, images, labels, threat, generator=generator).images, images)
    assert torch.equal(attack.perturb(linear, images, labels, threat, generator=generator), images)
    assert len(asked) == 2  # the first is that for the labels
