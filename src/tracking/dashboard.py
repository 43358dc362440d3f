"""The W&B workspace that people open first: ``python -m src.report wandb PATH --mode online --dashboard``.

The panels read what :mod:`src.tracking.relog` logs; ``docs/dashboard.md`` lists them for those who would rather click.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from src.errors import UserError

if TYPE_CHECKING:
    from wandb_workspaces.workspaces import Workspace

NAME = "Does it hold?"


def workspace(entity: str, project: str) -> Workspace:
    """Accuracy over eps by defense, gray_box against white_box, clean against robust, cost, table and pictures."""
    import wandb_workspaces.reports.v2 as panels
    import wandb_workspaces.workspaces as workspaces

    def scatter(title: str, x: str, y: str, **rest: Any) -> Any:
        return panels.ScatterPlot(title=title, x=panels.SummaryMetric(x), y=panels.SummaryMetric(y), **rest)

    by_defense = panels.Config("cell.defense")
    share: dict[str, Any] = {"range_y": (0, 1)}
    curves = [
        panels.LinePlot(
            title=f"Accuracy over eps, {access}", x="eps", y=[f"robust/{access}"], groupby=by_defense, title_x="eps",
            title_y="accuracy", smoothing_factor=0, groupby_rangefunc="minmax", **share,
        )
        for access in ("white_box", "gray_box")
    ]  # fmt: skip
    scatters = [
        scatter("gray_box against white_box, at the largest eps", "largest_eps/gray_box", "largest_eps/white_box",
                range_x=(0, 1), **share),
        scatter("Clean against robust (white_box)", "clean_accuracy_defended", "largest_eps/white_box",
                range_x=(0, 1), **share),
        scatter("Cost: ms per image of the defended model", "defense_ms_per_image", "largest_eps/white_box",
                log_x=True, **share),
    ]  # fmt: skip
    seen = [panels.MediaBrowser(title="Pictures", media_keys=["pictures"]),
            panels.MediaBrowser(title="Curves, cost", media_keys=["robustness_curve", "cost"]),
            panels.WeavePanelSummaryTable(table_name="results")]  # fmt: skip
    sections = [("Robustness", [*curves, *scatters]), ("Table and pictures", seen)]
    return workspaces.Workspace(
        entity=entity,
        project=project,
        name=NAME,
        sections=[workspaces.Section(name=name, panels=each, is_open=True) for name, each in sections],
        runset_settings=workspaces.RunsetSettings(groupby=[workspaces.Config("cell.defense")]),
    )


def save(entity: str | None, project: str) -> str:
    """Put the workspace on the server and return its address.

    Raises:
        UserError: no login, or no answer.
    """
    import wandb

    from src.tracking import no_login

    if why := no_login():
        raise UserError(f"--dashboard: {why}; log in with `wandb login` or set WANDB_API_KEY")
    try:
        return str(workspace(entity or str(wandb.Api().default_entity), project).save().url)
    except Exception as error:
        raise UserError(f"--dashboard: W&B did not take it ({' '.join(str(error).split())})") from error
