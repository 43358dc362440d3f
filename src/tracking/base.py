"""What a run may be told besides the files it writes: the interface, here of one that tells nobody."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from src.records import Record

if TYPE_CHECKING:  # Lightning takes seconds to import: only a run that logs pays for it
    from pytorch_lightning.loggers import Logger


class NoTracker:
    """Records nothing besides the files every run writes; the others override what they can do."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(failed=error is not None)

    def close(self, *, failed: bool = False) -> None:
        """Finish; safe to call twice. ``failed`` marks the run as crashed."""

    def log_config(self, config: Mapping[str, Any]) -> None:
        """The resolved config of the job."""

    def log_table(self, records: Iterable[Record], name: str = "results") -> None:
        """All cells, with the columns of results.csv; *unreliable* in place of a figure that is."""

    def log_image(self, name: str, path: Path) -> None:
        """A picture that lies on disk."""

    def summary(self, values: Mapping[str, Any]) -> None:
        """Numbers that sum up the run."""

    def log_curves(self, rows: Sequence[Mapping[str, Any]], prefix: str) -> None:
        """Training curves after the fact, one mapping a step, numbered by its ``step`` or else its place."""

    def log_radii(self, rows: Sequence[Mapping[str, float]]) -> None:
        """Accuracy over eps, one mapping a radius, by its ``eps``."""

    def lightning_logger(self, prefix: str) -> Logger | bool:
        """What to hand to ``Trainer(logger=...)`` for the stage called ``prefix``; False for no logger.

        ``log_curves`` gets the same prefix when the job is done.
        """
        return False
