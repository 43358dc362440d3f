"""Where images lie in the penultimate layer: clean, attacked and purified, joined by lines."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor

from src.analysis.curves import BLUE, GREEN, VERMILLION, paper_style
from src.analysis.scene import Analysis, Scene, finish
from src.errors import UserError


class Representation(Analysis):
    """PCA and, beside it, t-SNE or UMAP of what the last layer sees.

    Papers: van der Maaten, Hinton 2008, "Visualizing Data using t-SNE",
    https://www.jmlr.org/papers/v9/vandermaaten08a.html; McInnes, Healy, Melville 2018, https://arxiv.org/abs/1802.03426

    Args:
        images: first images looked at.
        method: ``tsne``, or ``umap`` where umap-learn is installed.
        seed: of the method, whose picture depends on it.

    Raises:
        UserError: umap without umap-learn.
    """

    def __init__(
        self, *, images: PositiveInt = 150, method: Literal["tsne", "umap"] = "tsne", seed: NonNegativeInt = 0
    ) -> None:
        if method == "umap" and find_spec("umap") is None:
            raise UserError(
                "analysis.representation.method=umap: umap-learn is not installed. Expected tsne, or install it with "
                "pip install umap-learn"
            )
        self.images = images
        self.method = method
        self.seed = seed

    def draw(self, scene: Scene, path: Path) -> Path:
        from matplotlib.figure import Figure
        from matplotlib.lines import Line2D
        from sklearn.decomposition import PCA

        clean, labels = scene.take(self.images)
        if len(labels) < 5:
            raise UserError(f"{len(labels)} images are too few; expected at least 5 (limit.test_images, images)")
        attacked = scene.attacked(scene.strongest, self.images).images
        with torch.no_grad():
            purified = scene.defended.purified(attacked)
        sets = {"clean": clean, f"attacked ({scene.strongest})": attacked}
        if not torch.equal(purified, attacked):
            sets["purified"] = purified
        points = torch.cat([features(scene.classifier, each) for each in sets.values()]).cpu().numpy()
        pca = PCA(2, random_state=self.seed)
        name, nonlinear = self._nonlinear(points)
        planes = {"PCA": pca.fit_transform(points), name: nonlinear}
        kept = 100 * pca.explained_variance_ratio_
        axes_names = {"PCA": [f"component {i + 1} ({kept[i]:.0f} %)" for i in (0, 1)], name: [f"{name} 1", f"{name} 2"]}
        looks = dict(zip(sets, [(BLUE, "o"), (VERMILLION, "X"), (GREEN, "^")], strict=False))
        with paper_style():
            figure = Figure(figsize=(7.0, 3.8), dpi=200, layout="constrained")
            for axis, (title, plane) in zip(figure.subplots(1, 2), planes.items(), strict=True):
                _plane(axis, plane, len(labels), looks)
                axis.set_title(title)
                axis.set_xlabel(axes_names[title][0])
                axis.set_ylabel(axes_names[title][1])
            handles = [Line2D([], [], color=c, marker=m, linestyle="none", label=n) for n, (c, m) in looks.items()]
            figure.legend(handles=handles, loc="outside upper left", ncols=3, frameon=False)
            text = "Penultimate layer of the bare classifier (no unit); a line joins the versions of one image."
            return finish(figure, f"{scene.caption(len(labels))} {text}", path)

    def _nonlinear(self, points: Any) -> tuple[str, Any]:
        """Name of the method and the points in its plane."""
        if self.method == "umap":
            from umap import UMAP

            near = min(15, len(points) - 1)
            return "UMAP", UMAP(n_neighbors=near, n_jobs=1, random_state=self.seed).fit_transform(points)
        from sklearn.manifold import TSNE

        perplexity = min(30.0, (len(points) - 1) / 3)
        return "t-SNE", TSNE(2, random_state=self.seed, perplexity=perplexity, init="pca").fit_transform(points)


@torch.no_grad()
def features(classifier: Any, images: Tensor) -> Tensor:
    """What the last layer of the classifier sees, ``(B, D)``.

    Raises:
        UserError: the classifier does not say what its last layer is.
    """
    network = getattr(classifier, "network", classifier)
    if not hasattr(network, "features"):
        raise UserError(f"{type(network).__name__} has no features(images); use a classifier of conf/classifier")
    return torch.cat([network.features(images[i : i + 256]).float().flatten(1) for i in range(0, len(images), 256)])


def _plane(axis: Any, plane: Any, count: int, looks: dict[str, tuple[str, str]]) -> None:
    versions = plane.reshape(len(looks), count, 2)
    for i in range(count):
        axis.plot(versions[:, i, 0], versions[:, i, 1], color="#bbbbbb", linewidth=0.4, zorder=1)
    for version, (color, marker) in zip(versions, looks.values(), strict=True):
        axis.scatter(
            version[:, 0], version[:, 1], s=12, color=color, marker=marker, linewidths=0.3, zorder=2, alpha=0.8
        )
