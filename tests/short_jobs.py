"""The shortest jobs there are, for tests of what happens around them."""

from __future__ import annotations

from collections.abc import Callable

from tests.conftest import Outcome
from tests.test_pipeline import QUIET

Command = Callable[..., Outcome]
TINY = (
    *QUIET, "limit.epochs=3", "limit.train_images=300", "limit.test_images=50", "attack=fgsm",
    "defense=feature_squeezing", "threat.eps=0.2",
)  # fmt: skip
