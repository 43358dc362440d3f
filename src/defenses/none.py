"""No defense: the bare classifier, the row every other is compared with."""

from __future__ import annotations

from torch import nn

from src.defenses.base import Defense
from src.defenses.guarded import DefendedModel


class NoDefense(Defense):
    """Passes the classifier through unchanged; gray_box and white_box are then the same attack.

    Shapes: images ``(B, C, H, W)`` in [0, 1], logits ``(B, classes)``.
    """

    def guard(self, classifier: nn.Module) -> DefendedModel:
        return classifier if isinstance(classifier, DefendedModel) else DefendedModel(classifier=classifier)
