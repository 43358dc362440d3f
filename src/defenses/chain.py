"""Several defenses, one behind the other."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from src.defenses.base import Defense
from src.defenses.guarded import DefendedModel
from src.errors import UserError


class Chain(Defense):
    """Guards with each part in order: the first meets the image first, the last stands before the classifier.

    Declarations combine: the gradient is the worst of the parts', one stochastic part makes the chain stochastic, and
    all detectors together keep to the false-positive rate of the first that detects.

    Args:
        parts: the defenses, each trained as it would be alone. One that replaces the classifier can only be the last.

    Shapes: images ``(B, C, H, W)`` in [0, 1], logits ``(B, classes)``.

    Raises:
        UserError: a part stands behind one that replaces the classifier; :func:`src.config.parse` says so earlier.
    """

    def __init__(self, *, parts: Sequence[Defense]) -> None:
        super().__init__()
        for part in parts[:-1]:
            if part.replaces:
                raise UserError(f"chain: {type(part).__name__} replaces the classifier, so it has to be the last part")
        self.replaces = any(part.replaces for part in parts)
        self.parts = nn.ModuleList(parts)

    def guard(self, classifier: nn.Module) -> DefendedModel:
        for part in reversed(self.parts):
            assert isinstance(part, Defense)
            classifier = part.guard(classifier)
        assert isinstance(classifier, DefendedModel)
        return classifier
