"""What a cell is of: the names in the table, and the models behind them."""

from __future__ import annotations

from dataclasses import dataclass

from src.classifiers.module import Classifier
from src.defenses.guarded import DefendedModel


@dataclass(frozen=True, kw_only=True)
class Names:
    """What the choices are called, for the columns of the table."""

    dataset: str
    classifier: str
    defense: str
    attack: str
    variant: str = ""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What is measured: models and their content keys."""

    classifier: Classifier
    defended: DefendedModel
    surrogate: Classifier | None
    keys: dict[str, str]
    # Stages behind the models → key: "classifier", "surrogate", "defense" or, for a part of a chain, "defense_LABEL";
    # "thresholds". The key of a defense may be made of theirs, and then names no stage.
    made: dict[str, str]
