"""A classifier that answers by distance to the classes instead of by directions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor, nn

from src.defenses.base import Fresh, Harden, Share
from src.defenses.guarded import DefendedModel, Detection
from src.errors import UserError


class RBF(Harden):
    """The bare classifier's network, trained anew under a layer of radial basis functions.

    Paper: Zadeh, Hosseini, Sra 2018, "Deep-RBF Networks Revisited: Robust Classification with Rejection",
    https://arxiv.org/abs/1812.03190 (SoftML loss); the layer: LeCun et al. 1998,
    https://doi.org/10.1109/5.726791, section II.B. A class answers with the squared distance of the features' code to
    its centre; the nearest wins. An image far from every class may be rejected.

    Where ours departs from the paper: the classes share the linear map before the distance and have a centre each.

    Args:
        fresh: makes a network of the bare classifier's kind, as it is before its training; it has ``features``.
        code: numbers of the code in which distances are taken.
        margin: squared distance beyond which the centres of the wrong classes are pushed.
        fpr: share of clean validation images that are rejected as far from every class; None: nothing is.

    Shapes: images ``(B, C, H, W)`` in [0, 1], logits ``(B, classes)``.

    Logits are the negative squared distances. The gradient is exact.

    Raises:
        UserError: a network without ``features``.
    """

    at_test = frozenset({"fpr"})

    def __init__(
        self,
        *,
        fresh: Fresh,
        channels: int,
        size: tuple[int, int],
        num_classes: int,
        code: PositiveInt = 64,
        margin: PositiveFloat = 10.0,
        fpr: Share | None = None,
    ) -> None:
        super().__init__(fresh=fresh)
        if not hasattr(self.network, "features"):
            raise UserError(f"defense=rbf: {type(self.network).__name__} has no features(images) to take distances of")
        with torch.no_grad():
            seen = self.network.eval().features(torch.zeros(1, channels, *size))  # type: ignore[operator]
        if seen.ndim != 2:
            raise UserError(
                f"defense=rbf: features(images) of {type(self.network).__name__} is {tuple(seen.shape)}; expected a "
                "row an image, (1, features), to take distances of"
            )
        self.network = RBFNetwork(self.network.train(), seen.shape[1], num_classes, code, margin)
        self.margin = margin
        self.fpr = fpr

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        """SoftML: near the own centre, and beyond the margin of all others."""
        squares, own = -self(batch["image"]).float(), batch["label"][:, None]
        others = F.softplus(self.margin - squares).scatter(1, own, 0.0).sum(dim=1)
        return (squares.gather(1, own).squeeze(1) + others).mean()

    def guard(self, classifier: nn.Module) -> DefendedModel:
        if self.fpr is None:
            return super().guard(classifier)
        far = [Detection(score=self.distance)]
        return DefendedModel(classifier=self.network, defense=self, detections=far, fpr=self.fpr)

    def distance(self, images: Tensor) -> Tensor:
        """Squared distance to the nearest centre, ``(B,)``."""
        return -self.network(images).amax(dim=1)


class RBFNetwork(nn.Module):
    """Features, a linear map to a code, and the negative squared distance of the code to each centre."""

    def __init__(self, body: nn.Module, width: int, num_classes: int, code: int, margin: float) -> None:
        super().__init__()
        body.head = nn.Identity()  # not asked any more
        self.body = body
        self.encode = nn.Linear(width, code)
        # Centres drawn so that the squared distance of two of them is twice the margin, whatever the code's size.
        self.centres = nn.Parameter(torch.randn(num_classes, code) * (margin / code) ** 0.5)

    def forward(self, images: Tensor) -> Tensor:
        codes = self.encode(self.body.features(images)).float()  # type: ignore[operator]
        return -(codes[:, None] - self.centres).square().sum(dim=2)
