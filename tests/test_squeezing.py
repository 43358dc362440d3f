"""Input transformations: each by hand or against the library it follows."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage

from src.defenses.detect.squeezing_detector import SqueezingDetector
from src.defenses.purify.feature_squeezing import FeatureSqueezing
from src.defenses.purify.jpeg import JPEG, _cubic
from src.defenses.purify.squeezers import median_filter, non_local_means, reduce_bits
from src.errors import UserError
from tests.conftest import Linear


def pictures(channels: int, height: int, width: int, count: int = 8) -> torch.Tensor:
    """Smooth with some noise, whole levels: what an encoder gets to see."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, channels, 6, 6, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bilinear")
    noisy = 0.9 * smooth + 0.1 * torch.rand(smooth.shape, generator=generator)
    return (noisy * 255).round() / 255


@pytest.mark.parametrize("window", [2, 3, 4, 5])
def test_median_is_that_of_scipy(window: int) -> None:
    x = torch.rand(2, 3, 9, 8, generator=torch.Generator().manual_seed(1))
    expected = ndimage.median_filter(x.numpy(), size=(1, 1, window, window), mode="mirror")
    np.testing.assert_array_equal(median_filter(x, window).numpy(), expected)


def test_bits_round_to_equal_levels() -> None:
    x = torch.tensor([0.0, 0.1, 0.16, 0.17, 0.49, 0.51, 0.84, 1.0]).view(1, 1, 2, 4)
    assert reduce_bits(x, 1).flatten().tolist() == [0, 0, 0, 0, 0, 1, 1, 1]
    thirds = (reduce_bits(x, 2) * 3).flatten()
    torch.testing.assert_close(thirds, torch.tensor([0.0, 0, 0, 1, 1, 2, 3, 3]))


def test_non_local_means_by_hand() -> None:
    search, patch, strength = 5, 3, 40.0
    x = torch.rand(1, 3, 9, 9, generator=torch.Generator().manual_seed(2))
    row, column = 1, 7  # near the border: patches reach over it
    padded = np.pad(x[0].numpy().astype(np.float64), ((0, 0), (3, 3), (3, 3)), mode="reflect")

    def around(i: int, j: int) -> np.ndarray:
        return padded[:, i + 3 - 1 : i + 3 + 2, j + 3 - 1 : j + 3 + 2]

    total, weights = np.zeros(3), 0.0
    for i in range(row - 2, row + 3):
        for j in range(column - 2, column + 3):
            unlike = ((around(i, j) - around(row, column)) ** 2).mean() * 255**2
            weight = np.exp(-unlike / strength**2)
            total, weights = total + weight * padded[:, i + 3, j + 3], weights + weight
    seen = non_local_means(x, search, patch, strength)
    np.testing.assert_allclose(seen[0, :, row, column].numpy(), total / weights, rtol=1e-4)


def test_non_local_means_gradient_is_exact() -> None:
    x = torch.rand(1, 1, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).requires_grad_()
    assert torch.autograd.gradcheck(lambda image: non_local_means(image, 3, 3, 60.0), (x,))


def test_squeezers_are_applied_in_order_and_declare_their_gradient() -> None:
    x = pictures(1, 12, 12)
    every = FeatureSqueezing(bits=3, window=2, search=5, patch=3, strength=20.0)
    by_hand = non_local_means(median_filter(reduce_bits(x, 3), 2), 5, 3, 20.0)
    assert torch.equal(every.purify(x), by_hand)
    assert torch.equal(every.surrogate(x), FeatureSqueezing(window=2, search=5, strength=20.0).purify(x))
    assert every.gradient == "bpda"
    assert FeatureSqueezing(window=2, search=5).gradient == "exact"
    x = x.requires_grad_()
    seen = FeatureSqueezing(bits=3, window=None).guard(torch.nn.Flatten())(x)
    assert torch.equal(seen, reduce_bits(x, 3).flatten(1))
    assert (torch.autograd.grad(seen.sum(), x)[0] == 1).all()


def test_wrong_choices_are_one_clear_line() -> None:
    with pytest.raises(UserError, match="nothing to apply"):
        FeatureSqueezing(window=None)
    with pytest.raises(UserError, match="no squeezer"):
        SqueezingDetector(channels=1, bits=None, window=None)
    with pytest.raises(UserError, match="too large for images of 8x8"):
        FeatureSqueezing(search=15).purify(torch.zeros(1, 1, 8, 8))


def test_squeezing_detector_scores_the_largest_change_of_the_answer() -> None:
    x, classifier = pictures(1, 8, 8), Linear(side=8, classes=3)
    score = SqueezingDetector(channels=1).score(x, classifier)
    answers = [classifier(each).softmax(dim=1) for each in (x, reduce_bits(x, 1), median_filter(x, 2))]
    changes = [(answers[0] - each).abs().sum(dim=1) for each in answers[1:]]
    torch.testing.assert_close(score, torch.maximum(*changes))
    colour = SqueezingDetector(channels=3)
    assert len(colour.squeezers) == 3
    assert colour.score(pictures(3, 16, 16), Linear(3, 16)).shape == (8,)


@pytest.mark.parametrize(("channels", "height", "width"), [(1, 28, 28), (3, 32, 32), (3, 21, 30)])
@pytest.mark.parametrize("quality", [20, 75, 95])
def test_jpeg_is_that_of_libjpeg(channels: int, height: int, width: int, quality: int) -> None:
    x = pictures(channels, height, width)
    real = []
    for image in (x * 255).round().byte().permute(0, 2, 3, 1).numpy():
        file = io.BytesIO()
        Image.fromarray(image.squeeze(2) if channels == 1 else image).save(file, "JPEG", quality=quality)
        real.append(np.array(Image.open(file)).reshape(height, width, channels))
    expected = torch.from_numpy(np.stack(real)).permute(0, 3, 1, 2).float()
    ours = JPEG(quality=quality).purify(x) * 255
    torch.testing.assert_close(ours, ours.round(), atol=1e-3, rtol=0)
    change = (expected - x * 255).abs().mean()
    # A coefficient halfway between two steps may fall either way: a few blocks differ by one step.
    assert (ours - expected).abs().mean() < 0.1 * change + 0.2
    assert ((ours - expected).abs() > 2.5).float().mean() < 0.05


def test_jpeg_gradient_is_that_of_its_stand_in() -> None:
    x = pictures(1, 8, 8, count=1).requires_grad_()
    defended = JPEG(quality=30).guard(torch.nn.Flatten())
    weights = torch.randn(64, generator=torch.Generator().manual_seed(4))
    (slope,) = torch.autograd.grad((defended(x) * weights).sum(), x)
    (stand_in,) = torch.autograd.grad((JPEG(quality=30).surrogate(x).flatten(1) * weights).sum(), x)
    torch.testing.assert_close(slope, stand_in)
    assert slope.abs().sum() > 0


def test_the_stand_in_of_a_rounding_is_flat_where_a_coefficient_is_rounded_away() -> None:
    """The cubic: steps of 8 and what is left of one, d, as d³, whose slope is 3 d²."""
    x = torch.tensor([0.0, 2.0, 8.0, 14.0]).requires_grad_()
    left = torch.tensor([0.0, 0.25, 0.0, -0.25])
    seen = _cubic(x, torch.tensor(8.0))
    torch.testing.assert_close(seen, 8 * (torch.tensor([0.0, 0, 1, 2]) + left**3))
    torch.testing.assert_close(torch.autograd.grad(seen.sum(), x)[0], 3 * left**2)
