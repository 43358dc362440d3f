"""What a generative defense makes out of nothing, and how far that lies from real images."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor

from src.analysis.curves import FONT, paper_style
from src.analysis.fid import Fid
from src.analysis.over_eps import show
from src.analysis.scene import Analysis, Scene, finish
from src.errors import UserError

log = logging.getLogger(__name__)
MOST = 12  # classes shown


class Samples(Analysis):
    """Samples below clean images, a row a class where the defense can be asked for one, with their FID.

    The FID is to held-out clean images; beside it stands that of as many other clean images, the least that is to be
    expected at this n.

    Args:
        shown: images in a row.
        rows: rows of samples, of a defense that is not asked for a class.
        images: clean images, and as many samples, that the distance is taken over.
        seed: of the samples.
    """

    def __init__(
        self,
        *,
        shown: PositiveInt = 10,
        rows: PositiveInt = 4,
        images: PositiveInt = 1000,
        seed: NonNegativeInt = 0,
    ) -> None:
        self.shown, self.rows, self.images, self.seed = shown, rows, images, seed

    @torch.no_grad()
    def draw(self, scene: Scene, path: Path) -> Path:
        from matplotlib.figure import Figure

        # Of a chain or a detector the part that generates lies further in.
        maker = next((part for part in scene.defended.modules() if hasattr(part, "samples_to_show")), None)
        if maker is None:
            raise UserError(
                "this defense makes no images out of nothing; use a generative one, such as defense=vae, defense_gan "
                "or cwgan_gp. What a purifier makes of given images: analysis=reconstructions"
            )
        count = min(self.images, len(scene.images) // 2)
        if count < 2:
            raise UserError(f"{len(scene.images)} images are too few; expected at least 4 (limit.test_images)")
        samples, asked = maker.samples_to_show(count, torch.Generator().manual_seed(self.seed))
        clean, others = scene.images[:count], scene.images[count : 2 * count]
        fid = Fid(clean, scene.classifier, scene.classifier_name)
        text = (
            f"FID on {fid.features}, n={count:,}: samples {fid(samples):.3g}, other clean images {fid(others):.3g} "
            f"(to {count:,} held-out clean images of {scene.dataset})"
        )
        if asked is not None:
            said = scene.answers(scene.classifier, samples)[0]
            read = 100 * float((said == asked.cpu()).double().mean())
            text += f"; the bare classifier reads {read:.1f} % as the class asked for"
        log.info("analysis=samples: %s", text)
        rows = [("clean", clean), *self._rows(scene, samples, asked)]
        with paper_style():
            size = (1.3 + 0.56 * self.shown, 0.8 + 0.58 * len(rows))
            figure = Figure(figsize=size, dpi=200, layout="constrained")
            for line, (name, images) in zip(figure.subplots(len(rows), self.shown, squeeze=False), rows, strict=True):
                line[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=FONT)
                for axis, image in zip(line, images, strict=False):
                    show(axis, image)
                for axis in line[len(images) :]:
                    axis.set_axis_off()
            return finish(figure, f"{text}. Samples of seed {self.seed}, not chosen; nothing is attacked.", path)

    def _rows(self, scene: Scene, samples: Tensor, asked: Tensor | None) -> list[tuple[str, Tensor]]:
        if asked is None:
            parts = torch.split(samples[: self.rows * self.shown], self.shown)
            return list(zip(["samples", *[""] * len(parts)], parts, strict=False))
        return [(scene.name(int(kind)), samples[asked == kind]) for kind in torch.unique(asked)[:MOST]]
