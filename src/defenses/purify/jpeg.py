"""JPEG compression."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from src.defenses.base import Purifier

# Tables K.1 and K.2 of ITU-T T.81, https://www.w3.org/Graphics/JPEG/itu-t81.pdf, which every encoder scales.
LUMINANCE = (
    (16, 11, 10, 16, 24, 40, 51, 61),
    (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77),
    (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101),
    (72, 92, 95, 98, 112, 100, 103, 99),
)
CHROMINANCE = (
    (17, 18, 24, 47, 99, 99, 99, 99),
    (18, 21, 26, 66, 99, 99, 99, 99),
    (24, 26, 56, 99, 99, 99, 99, 99),
    (47, 66, 99, 99, 99, 99, 99, 99),
    *((99,) * 8,) * 4,
)
# JFIF 1.02: full-range luminance and two differences of colour, the latter around 128.
TO_YCC = ((0.299, 0.587, 0.114), (-0.168736, -0.331264, 0.5), (0.5, -0.418688, -0.081312))

Pixels = Callable[[Tensor], Tensor]
Quantised = Callable[[Tensor, Tensor], Tensor]  # coefficients, their table → what is left of them


class JPEG(Purifier):
    """Compresses to JPEG and back, in the hope that what an attack added is among what is thrown away.

    Papers: Dziugaite, Ghahramani, Roy 2016, "A study of the effect of JPG compression on adversarial images",
    https://arxiv.org/abs/1608.00853; Guo, Rana, Cisse, van der Maaten 2018, "Countering Adversarial Images using Input
    Transformations", https://arxiv.org/abs/1711.00117. Broken by BPDA: Athalye, Carlini, Wagner 2018,
    https://arxiv.org/abs/1802.00420

    Args:
        quality: 1 to 100, as the encoders of libjpeg count it.

    Shapes: images ``(B, C, H, W)`` in [0, 1] before and after.

    Our own codec: the lossy half of baseline JPEG, without the file, so that a batch stays on its device. Colour is
    halved in both directions (4:2:0) and interpolated back, as libjpeg does; tests hold it to that library within its
    rounding.

    The gradient is ``bpda``: that of the same codec with each rounding of a coefficient replaced by the cubic of Shin,
    Song 2017, "JPEG-resistant Adversarial Images",
    https://machine-learning-and-security.github.io/papers/mlsec17_paper_54.pdf, which is flat where a coefficient is
    rounded away, and each rounding of a pixel by the identity.
    """

    gradient = "bpda"

    cosines: Tensor
    tables: Tensor
    to_ycc: Tensor

    def __init__(self, *, quality: Annotated[int, Field(ge=1, le=100)] = 75) -> None:
        super().__init__()
        scale = 5000 // quality if quality < 50 else 200 - 2 * quality
        tables = (torch.tensor([LUMINANCE, CHROMINANCE]) * scale + 50).div(100, rounding_mode="floor").clamp(1, 255)
        k, n = torch.arange(8.0)[:, None], torch.arange(8.0)
        cosines = ((2 * n + 1) * k * math.pi / 16).cos() * torch.where(k == 0, 0.125**0.5, 0.5)
        for name, value in {"tables": tables.float(), "cosines": cosines, "to_ycc": torch.tensor(TO_YCC)}.items():
            self.register_buffer(name, value, persistent=False)  # constants: they are no weights

    def purify(self, images: Tensor) -> Tensor:
        return self._through(images, torch.round, _rounded)

    def surrogate(self, images: Tensor) -> Tensor:
        return self._through(images, lambda pixels: pixels, _cubic)

    def _through(self, images: Tensor, pixel: Pixels, coefficient: Quantised) -> Tensor:
        """Images in [0, 1] through the codec with the given roundings of pixels and of coefficients."""
        with torch.autocast(images.device.type, enabled=False):  # coefficients go to 1024 and are rounded to units
            levels = pixel(images.float() * 255)
            if images.shape[1] == 1:
                return pixel(self._blocks(levels - 128, self.tables[0], coefficient) + 128).clamp(0, 255) / 255
            height, width = images.shape[2:]
            levels = pixel(torch.einsum("ij,bjhw->bihw", self.to_ycc, levels))
            light = self._blocks(levels[:, :1] - 128, self.tables[0], coefficient) + 128
            # libjpeg repeats the last pixel before it halves the colour, and the last row of blocks after
            even = F.pad(levels[:, 1:], (0, -width % 16, 0, height % 2), mode="replicate")
            small = self._blocks(pixel(_halved(even)), self.tables[1], coefficient)
            small = pixel(small)[..., : -(-height // 2), : -(-width // 2)].clamp(-128, 127)
            colour = F.interpolate(small, scale_factor=2, mode="bilinear")[..., :height, :width]
            back = torch.einsum("ij,bjhw->bihw", self.to_ycc.inverse(), torch.cat([pixel(light), pixel(colour)], dim=1))
            return pixel(back).clamp(0, 255) / 255

    def _blocks(self, plane: Tensor, table: Tensor, quantised: Quantised) -> Tensor:
        """Levels around 0 → the same after rounding the cosine transform of each 8x8 block."""
        height, width = plane.shape[2:]
        padded = F.pad(plane, (0, -width % 8, 0, -height % 8), mode="replicate")
        count, channels, rows, columns = padded.shape
        blocks = padded.reshape(count, channels, rows // 8, 8, columns // 8, 8).transpose(3, 4)
        coefficients = quantised(self.cosines @ blocks @ self.cosines.T, table)
        back = (self.cosines.T @ coefficients @ self.cosines).transpose(3, 4)
        return back.reshape(padded.shape)[..., :height, :width]


def _halved(planes: Tensor) -> Tensor:
    """Means of 2x2 pixels, ready to be rounded: libjpeg rounds halves up in every second column, down in the others."""
    means = F.avg_pool2d(planes, 2)
    return means + 0.25 * (torch.arange(means.shape[3], device=means.device) % 2) - 0.24


def _rounded(coefficients: Tensor, table: Tensor) -> Tensor:
    """As libjpeg: known to an eighth, then halves away from zero. They are frequent; float error must not decide."""
    counts = (8 * coefficients).round() / 8 / table
    return counts.sign() * (counts.abs() + 0.5 + 1e-4).floor() * table


def _cubic(coefficients: Tensor, table: Tensor) -> Tensor:
    counts = coefficients / table
    whole = counts.round().detach()
    return (whole + (counts - whole) ** 3) * table
