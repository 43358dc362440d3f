"""Training curves as CSV files."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from src.records import write_whole
from src.tracking.base import NoTracker

if TYPE_CHECKING:  # Lightning takes seconds to import: only a run that logs pays for it
    from pytorch_lightning.loggers import CSVLogger


class CSVTracker(NoTracker):
    """Training curves as ``<dir>/metrics/<stage>/metrics.csv``; tables and pictures are files already.

    Args:
        dir: output folder of the job.
    """

    def __init__(self, *, dir: str) -> None:
        self.dir = Path(dir)

    def log_curves(self, rows: Sequence[Mapping[str, Any]], prefix: str) -> None:
        if rows:
            text = io.StringIO()
            writer = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)))
            writer.writeheader()
            writer.writerows(rows)
            write_whole(self.dir / "metrics" / prefix / "metrics.csv", text.getvalue().encode())

    def lightning_logger(self, prefix: str) -> CSVLogger:
        from pytorch_lightning.loggers import CSVLogger

        return CSVLogger(save_dir=self.dir, name="metrics", version=prefix)
