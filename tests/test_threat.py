"""Norms, radii, projection, and the judge."""

from __future__ import annotations

import math

import pytest
import torch

from src.attacks.deepfool import DeepFool
from src.attacks.pgd import PGD
from src.errors import UserError
from src.threat import Access, BudgetError, Norm, ThreatModel, parse_eps, parse_eps_list, project_l1_box
from tests.conftest import Linear


@pytest.mark.parametrize("text", ["linf", "l-inf", "Linf", "inf", "L_inf"])
def test_norm_spellings(text: str) -> None:
    assert Norm.parse(text) is Norm.LINF


def test_unknown_norm_names_what_is_allowed() -> None:
    with pytest.raises(UserError, match=r"threat\.norm=l7.*l0, l1, l2, linf"):
        Norm.parse("l7")


@pytest.mark.parametrize(
    ("value", "eps"),
    [(0.3, 0.3), ("8/255", 8 / 255), ("inf", math.inf), ("0.1", 0.1), (0, 0.0), (math.inf, math.inf)],
)
def test_eps_spellings(value: object, eps: float) -> None:
    assert parse_eps(value) == eps


@pytest.mark.parametrize("value", [-0.1, "many", "1/0", "1/2/3", None, True, math.nan, "nan", [0.1]])
def test_bad_eps_is_one_line(value: object) -> None:
    with pytest.raises(UserError, match=r"threat\.eps=") as caught:
        parse_eps(value)
    assert "\n" not in str(caught.value)


def test_a_radius_in_8_bit_steps_is_asked_about() -> None:
    """A slip that would otherwise end as a robust accuracy of 0; in other norms 8 is a radius as any other."""
    for wrong in ("8", 1.01, "300/255"):
        with pytest.raises(UserError, match=r"threat\.eps=.*did you mean 8/255") as caught:
            ThreatModel(norm="linf", eps=wrong)
        assert "\n" not in str(caught.value)
    assert [ThreatModel(norm="linf", eps=eps).eps for eps in (1, "255/255", "inf")] == [1, 1, math.inf]
    assert [ThreatModel(norm=norm, eps=8).eps for norm in ("l0", "l1", "l2")] == [8, 8, 8]


def test_eps_lists_are_ascending_without_repeats() -> None:
    assert parse_eps_list(["8/255", 0.1, 8 / 255]) == (8 / 255, 0.1)
    assert parse_eps_list("0.3") == (0.3,)
    with pytest.raises(UserError):
        parse_eps_list([])


def test_access_keeps_order_and_refuses_unknown() -> None:
    assert Access.parse(["white_box", "gray_box", "white_box"]) == (Access.WHITE_BOX, Access.GRAY_BOX)
    assert Access.parse("gray_box") == (Access.GRAY_BOX,)
    with pytest.raises(UserError, match="gray_box, white_box"):
        Access.parse("grey_box")


@pytest.mark.parametrize("norm", [Norm.L2, Norm.LINF])
@pytest.mark.parametrize("eps", [0.0, 0.1, 0.7, math.inf])
def test_projection_keeps_budget_and_box_and_is_idempotent(norm: Norm, eps: float) -> None:
    generator = torch.Generator().manual_seed(0)
    clean = torch.rand(16, 3, 5, 5, generator=generator)
    threat = ThreatModel(norm=norm, eps=eps)
    images = threat.project(clean, clean + torch.randn(clean.shape, generator=generator))
    assert bool((threat.judge(clean, images) <= eps + 1e-5).all())
    torch.testing.assert_close(threat.project(clean, images), images, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("norm", "eps"), [(Norm.L1, 12.0), (Norm.L2, 1.0)])
def test_sums_over_many_pixels_stay_in_the_ball(norm: Norm, eps: float) -> None:
    generator = torch.Generator().manual_seed(0)
    clean = torch.rand(2, 3, 224, 224, generator=generator).round(decimals=1)
    threat = ThreatModel(norm=norm, eps=eps)
    images = clean
    for _ in range(4):
        images = threat.project(clean, images + torch.rand(clean.shape, generator=generator) * 1e-2)
        exact = torch.linalg.vector_norm((images.double() - clean.double()).flatten(1), ord=norm.order, dim=1)
        assert bool((exact <= eps + threat.slack).all())
        torch.testing.assert_close(threat.judge(clean, images).double(), exact, atol=1e-6, rtol=1e-6)
    assert bool((exact > 0.98 * eps).all())


def test_flat_images_whose_sums_all_round_upwards_stay_in_the_ball() -> None:
    values = torch.linspace(0.1, 0.9, 40)
    clean = values.view(-1, 1, 1, 1).expand(-1, 3, 224, 224)
    threat = ThreatModel(norm="l2", eps=1.0)
    images = threat.project(clean, clean + 0.1)
    exact = torch.linalg.vector_norm((images.double() - clean.double()).flatten(1), dim=1)
    assert bool((exact <= 1 + 1e-6).all())
    assert bool((exact > 0.999).all())


def test_distances_by_hand() -> None:
    clean = torch.zeros(1, 2, 2, 2)
    images = clean.clone()
    images[0, 0, 0, 0], images[0, 1, 0, 0], images[0, 0, 1, 1] = 0.3, 0.4, 0.5
    expected = {Norm.L0: 2.0, Norm.L1: 1.2, Norm.L2: math.sqrt(0.5), Norm.LINF: 0.5}
    for norm, distance in expected.items():
        assert ThreatModel(norm=norm, eps=math.inf).distance(clean, images).item() == pytest.approx(distance)


@pytest.mark.parametrize("norm", list(Norm))
def test_an_infinite_radius_is_the_width_of_the_box(norm: Norm) -> None:
    clean = torch.zeros(1, 3, 4, 5)
    threat = ThreatModel(norm=norm, eps=math.inf)
    assert threat.radius(clean) == pytest.approx(threat.distance(clean, clean + 1).item())


def test_l0_keeps_the_pixels_that_change_most_inside_the_box() -> None:
    clean = torch.tensor([[[[0.5, 0.5, 0.9, 0.5]]]])
    images = clean + torch.tensor([-0.4, 0.3, 0.9, 0.0])
    expected = torch.tensor([[[[0.1, 0.5, 0.9, 0.5]]]])
    torch.testing.assert_close(ThreatModel(norm="l0", eps=1).project(clean, images), expected)


@pytest.mark.parametrize(("norm", "eps"), [("l1", 1000.0), ("l2", 30.0)])
def test_rounding_of_large_radii_breaks_no_rule(norm: str, eps: float) -> None:
    clean = torch.rand(64, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    threat = ThreatModel(norm=norm, eps=eps)
    threat.judge(clean, threat.project(clean, 1 - clean.round()))


@pytest.mark.parametrize("norm", list(Norm))
def test_the_order_of_a_norm_is_what_its_name_says(norm: Norm) -> None:
    assert norm.order == float(norm.removeprefix("l"))


def test_judge_refuses_what_breaks_the_rules() -> None:
    threat = ThreatModel(norm=Norm.LINF, eps=0.1)
    clean = torch.full((2, 1, 2, 2), 0.5)
    assert threat.judge(clean, clean + 0.1).tolist() == pytest.approx([0.1, 0.1])
    for bad in (clean + 0.11, clean.double(), clean[:1], torch.full_like(clean, math.nan)):
        with pytest.raises(BudgetError):
            threat.judge(clean, bad)
    with pytest.raises(BudgetError, match="box"):
        ThreatModel(norm=Norm.LINF, eps=math.inf).judge(clean, clean + 0.6)


@pytest.mark.parametrize("eps", [0.5, 3.0, 20.0])
def test_l1_projection_is_the_nearest_point(eps: float) -> None:
    """Against bisection over the threshold, on the same closed form."""
    generator = torch.Generator().manual_seed(3)
    clean = torch.rand(8, 3, 4, 4, generator=generator)
    delta = torch.randn(clean.shape, generator=generator)
    ours = project_l1_box(clean, delta, eps)
    room = torch.where(delta > 0, 1 - clean, clean)

    def shrunk(threshold: torch.Tensor) -> torch.Tensor:
        return torch.minimum((delta.abs() - threshold.view(-1, 1, 1, 1)).clamp_min(0), room)

    low, high = torch.zeros(8), torch.full((8,), 10.0)
    for _ in range(60):
        middle = (low + high) / 2
        over = shrunk(middle).sum(dim=(1, 2, 3)) > eps
        low, high = torch.where(over, middle, low), torch.where(over, high, middle)
    torch.testing.assert_close(ours, delta.sign() * shrunk(high), atol=1e-5, rtol=0)


def test_each_image_may_have_an_l1_radius_of_its_own() -> None:
    generator = torch.Generator().manual_seed(4)
    clean = torch.rand(5, 3, 4, 4, generator=generator)
    delta = torch.randn(clean.shape, generator=generator)
    radii = torch.tensor([0.0, 0.5, 3.0, 1e6, math.inf])
    alone = [project_l1_box(clean[i : i + 1], delta[i : i + 1], float(eps)) for i, eps in enumerate(radii)]
    assert torch.equal(project_l1_box(clean, delta, radii), torch.cat(alone))
    assert torch.equal((clean[-1:] + alone[-1]).clamp(0, 1), (clean + delta)[-1:].clamp(0, 1)), (
        "the box alone bounds it"
    )


@pytest.mark.parametrize("norm", list(Norm))
@pytest.mark.parametrize("eps", [0.0, 1.0, 5.0, math.inf])
def test_every_norm_projects_into_budget_and_box(norm: Norm, eps: float) -> None:
    generator = torch.Generator().manual_seed(0)
    clean = torch.rand(16, 3, 5, 5, generator=generator)
    threat = ThreatModel(norm=norm, eps=min(eps, 1.0) if norm is Norm.LINF else eps)
    images = threat.project(clean, clean + torch.randn(clean.shape, generator=generator))
    threat.judge(clean, images)
    if norm is Norm.L0:
        assert int(threat.distance(clean, images).max()) <= min(eps, 25)


@pytest.mark.parametrize("norm", [Norm.L1, Norm.L2, Norm.LINF])
def test_8_bit_images_lie_on_the_grid_and_in_the_budget(norm: Norm) -> None:
    generator = torch.Generator().manual_seed(0)
    clean = torch.randint(0, 256, (8, 3, 4, 4), generator=generator) / 255
    threat = ThreatModel(norm=norm, eps=0.1)
    saved = threat.to_8_bit(clean, threat.project(clean, clean + torch.randn(clean.shape, generator=generator)))
    threat.judge(clean, saved)
    assert torch.equal((saved * 255).round() / 255, saved)
    assert not torch.equal(saved, clean)


@pytest.mark.parametrize(("norm", "eps"), [("linf", 8 / 255), ("l2", 0.5), ("l1", 4.0), ("linf", 0.3 / 255), ("l0", 3)])
def test_off_the_grid_an_8_bit_image_keeps_the_budget_or_stays_clean(norm: str, eps: float) -> None:
    generator = torch.Generator().manual_seed(0)
    clean = torch.rand(8, 3, 8, 8, generator=generator)
    threat = ThreatModel(norm=norm, eps=eps)
    near = threat.project(clean, clean + torch.randn(clean.shape, generator=generator))
    saved = threat.to_8_bit(clean, near)
    threat.judge(clean, saved)
    on_grid, stayed = (((saved * 255).round() / 255 == saved), saved == clean)
    assert bool((on_grid.flatten(1).all(dim=1) | stayed.flatten(1).all(dim=1)).all())
    possible = eps > 1 / 255 and norm != "l0"  # there every pixel would have to change
    assert stayed.flatten(1).all(dim=1).tolist() == [not possible] * 8
    if norm == "linf" and possible:  # nothing is given away but the fraction of a level
        assert float((near - saved).abs().max()) < 1 / 255


@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.1), ("l2", 0.3), ("l1", 1.0), ("l0", 2)])
def test_rounding_hides_no_image_that_was_over_the_budget(norm: str, eps: float) -> None:
    clean, threat = torch.full((1, 1, 4, 4), 0.4), ThreatModel(norm=norm, eps=eps)
    with pytest.raises(BudgetError):
        threat.judge(clean, threat.to_8_bit(clean, clean + 0.2))


def test_a_quantized_attack_on_images_that_were_never_8_bit(linear: Linear) -> None:
    images = torch.rand(32, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    labels = linear(images).argmax(dim=1)
    for attack, norm, eps in ((PGD(steps=5), "linf", 8 / 255), (PGD(steps=5), "l2", 0.5), (DeepFool(), "l2", 0.5)):
        attacked = attack(linear, images, labels, ThreatModel(norm=norm, eps=eps, quantize=True))
        assert attacked.success.any()
