"""A Weights & Biases run: offline unless asked for, it never prompts.

It keeps to the job's folder, caches too; `sys.exit` and `sys.excepthook`, which W&B replaces, are put back; offline its
crash reports, which would be sent, are off.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from src.records import Record
from src.tracking.base import NoTracker
from src.tracking.groups import sweep_group

if TYPE_CHECKING:  # wandb and Lightning take seconds to import: only a run that logs pays for them
    import wandb
    from pytorch_lightning.loggers import WandbLogger

INIT_TIMEOUT = 15.0  # seconds to wait for the W&B server before going on offline


class Tracker(NoTracker):
    """A Weights & Biases run, started at first use and closed with the job, whatever happens.

    Args:
        project: W&B project.
        mode: ``offline`` writes to ``dir`` only; ``online`` also sends, and goes offline with one line when
            there is no login or no server within 15 s; ``disabled`` does nothing.
        dir: output folder of the job; the run lies in ``<dir>/wandb``.
        group: name that the runs of a sweep share; None takes the sweep's folder, outside a sweep no group.
        name: display name of the run; None lets W&B choose.
        tags: words to filter runs by.
        entity: W&B user or team; None is the default of the login.
        run_id: of the run; one that exists already is continued. None lets W&B choose.
    """

    def __init__(
        self,
        *,
        project: str = "parapet",
        mode: Literal["offline", "online", "disabled"] = "offline",
        dir: str,
        group: str | None = None,
        name: str | None = None,
        tags: list[str] | None = None,
        entity: str | None = None,
        run_id: str | None = None,
    ) -> None:
        self.run_id = run_id
        self._live: set[str] = set()  # stages whose curves were logged while they trained
        self.project, self.mode, self.dir = project, mode, Path(dir)
        self.group, self.name, self.tags, self.entity = group, name, list(tags or []), entity
        self._run: wandb.Run | None = None
        self._environment: list[str] = []  # variables that we set, to be removed again

    @property
    def run(self) -> wandb.Run:
        """The W&B run; starting it takes about a second."""
        if self._run is None:
            self._run = self._start()
        return self._run

    def close(self, *, failed: bool = False) -> None:
        try:
            if self._run is not None:
                self._run.finish(exit_code=int(failed))
        finally:
            self._run = None
            for name in self._environment:
                os.environ.pop(name, None)
            self._environment = []

    def log_config(self, config: Mapping[str, Any]) -> None:
        if self.mode != "disabled":
            self.run.config.update(dict(config), allow_val_change=True)  # type: ignore[no-untyped-call]

    def log_table(self, records: Iterable[Record], name: str = "results") -> None:
        if self.mode == "disabled":
            return
        import wandb

        from src.frame import COLUMNS, shown, to_frame

        frame = shown(to_frame(records))
        rows: list[Iterable[Any]] = [[_json_value(value) for value in row] for row in frame.to_numpy().tolist()]
        self.run.log({name: wandb.Table(columns=list(COLUMNS), data=rows, allow_mixed_types=True)})

    def log_image(self, name: str, path: Path) -> None:
        if self.mode != "disabled":
            import wandb

            self.run.log({name: wandb.Image(str(path))})

    def summary(self, values: Mapping[str, Any]) -> None:
        if self.mode != "disabled":
            self.run.summary.update(dict(values))

    def log_curves(self, rows: Sequence[Mapping[str, Any]], prefix: str) -> None:
        if self.mode == "disabled" or prefix in self._live or not rows:
            return
        self._axis(prefix)
        for place, row in enumerate(rows):
            values = {f"{prefix}/{k}": v for k, v in row.items() if k != "step" and v is not None}
            self.run.log({**values, f"{prefix}/step": row.get("step", place)})

    def lightning_logger(self, prefix: str) -> WandbLogger | bool:
        if self.mode == "disabled":
            return False
        self._axis(prefix)
        self._live.add(prefix)
        return _stage_logger(self.run, prefix, self.project, self.dir)

    def log_radii(self, rows: Sequence[Mapping[str, float]]) -> None:
        if self.mode == "disabled" or not rows:
            return
        self.run.define_metric("eps", hidden=True)
        self.run.define_metric("robust/*", step_metric="eps")
        for row in rows:
            self.run.log({name if name == "eps" else f"robust/{name}": value for name, value in row.items()})

    def _axis(self, prefix: str) -> None:
        """Each stage has its own step axis: a second fit starts at 0 again, W&B's own step cannot."""
        self.run.define_metric(f"{prefix}/step", hidden=True)
        self.run.define_metric(f"{prefix}/*", step_metric=f"{prefix}/step")

    def _start(self) -> wandb.Run:
        self.dir.mkdir(parents=True, exist_ok=True)
        self._confine()
        import wandb

        mode: Literal["offline", "online", "disabled"] = self.mode
        if mode == "online" and (why := no_login()):
            self._say(why, "log in with `wandb login` or set WANDB_API_KEY")
            mode = "offline"
        if mode == "online":
            try:
                return self._init("online")
            except wandb.Error as error:  # unreachable, or a key that the server refuses
                text = " ".join(str(error).split()).partition(" Consider ")[0]
                self._say(f"no answer from the server ({text or type(error).__name__})", "check the connection")
                mode = "offline"
        try:
            return self._init(mode)
        except wandb.Error as error:  # the results are on disk already: not worth losing the job for
            print(
                f"W&B: could not start, this run is not recorded there ({' '.join(str(error).split())})",
                flush=True,
            )
            return self._init("disabled")

    def _init(self, mode: Literal["offline", "online", "disabled"]) -> wandb.Run:
        import wandb

        settings = wandb.Settings(
            silent=True, console="off", init_timeout=INIT_TIMEOUT, x_disable_stats=True, disable_code=True,
            reinit="create_new",  # ours alone, and no global `wandb.run`
        )  # fmt: skip
        hooks = sys.exit, sys.excepthook
        try:
            return wandb.init(
                project=self.project, entity=self.entity, group=self.group or sweep_group(), name=self.name,
                tags=self.tags, dir=str(self.dir), mode=mode, settings=settings, id=self.run_id, resume="allow",
            )  # fmt: skip
        finally:
            sys.exit, sys.excepthook = hooks

    def _confine(self) -> None:
        """Point W&B's caches into the job's folder unless the user has said where they belong."""
        wanted = {
            "WANDB_CACHE_DIR": str(self.dir.absolute() / "wandb" / "cache"),
            "WANDB_DATA_DIR": str(self.dir.absolute() / "wandb" / "data"),
        }
        if self.mode != "online":
            wanted["WANDB_ERROR_REPORTING"] = "false"
        self._environment = [name for name in wanted if name not in os.environ]
        os.environ.update({name: wanted[name] for name in self._environment})

    def _say(self, why: str, mend: str) -> None:
        sync = f"wandb sync {self.dir / 'wandb'}/offline-run-*"
        print(f"W&B: {why}; this run goes on offline. To send it later: {mend}, then `{sync}`", flush=True)


def no_login() -> str:
    """Why W&B could not log in without asking; empty when it can. The same look-up that W&B makes itself."""
    import wandb
    from wandb.sdk.lib import wbauth

    try:
        found = wbauth.authenticate_session(
            host=wandb.setup().settings.base_url, source="parapet", prompt=False, update_session=False
        )
    except wandb.Error as error:  # a key of the wrong form
        return f"the API key is not usable ({' '.join(str(error).split())})"
    return "" if found else "no login found"


def _json_value(value: Any) -> Any:
    """JSON has no infinity and no NaN, and W&B's table viewer refuses both."""
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    return value


def _stage_logger(run: wandb.Run, prefix: str, project: str, folder: Path) -> WandbLogger:
    from pytorch_lightning.loggers import WandbLogger
    from pytorch_lightning.utilities import rank_zero_only

    class StageLogger(WandbLogger):
        """Lightning's own joins prefixes with ``-`` and gives all fits one step axis; this does neither."""

        @rank_zero_only
        def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
            row: dict[str, Any] = {f"{prefix}/{name}": value for name, value in metrics.items()}
            self.experiment.log(row if step is None else {**row, f"{prefix}/step": step})

        @rank_zero_only
        def log_hyperparams(self, params: Any, *_: Any, **__: Any) -> None:
            """Nothing: the job's whole config is logged once, and two stages would overwrite each other."""

    return StageLogger(experiment=run, project=project, save_dir=folder)
