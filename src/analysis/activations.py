"""How a perturbation grows through the network: difference of activations, layer by layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from src.analysis.curves import BLUE, FONT, VERMILLION, paper_style
from src.analysis.scene import Analysis, Scene, finish
from src.errors import UserError


class Activations(Analysis):
    """Relative difference over depth, and for one image the largest over channels as a map of each layer.

    Of the network that answers: the bare classifier, or what a defense has put in its place.

    Args:
        images: first images looked at.
        maps: layers shown as maps, evenly over the depth.
    """

    def __init__(self, *, images: PositiveInt = 64, maps: PositiveInt = 6) -> None:
        self.images = images
        self.maps = maps

    def draw(self, scene: Scene, path: Path) -> Path:
        from matplotlib.figure import Figure

        clean, labels = scene.take(self.images)
        attacked = scene.attacked(scene.strongest, self.images).images
        with torch.no_grad():
            random = (clean + (attacked - clean).abs() * torch.sign(torch.randn_like(clean))).clamp(0, 1)
        network, called = scene.network
        before, after, noisy = (layers(network, each) for each in (clean, attacked, random))
        if not before:
            raise UserError(f"{called} has no convolution or linear layer to look at")
        names = list(before)
        spatial = [name for name in names if before[name].dim() == 4 and before[name].shape[-1] > 1]
        chosen = spatial[:: max(1, len(spatial) // self.maps)][: self.maps]
        turned = (after[names[-1]].argmax(1) != before[names[-1]].argmax(1)).nonzero().flatten()
        one = int(turned[0]) if len(turned) else 0
        with paper_style():
            figure = Figure(figsize=(7.0, 4.6), dpi=200, layout="constrained")
            halves: Any = figure.subfigures(2, 1, height_ratios=[1.25, 1])
            top, bottom = halves
            axis = top.subplots()
            for label, other, color, marker in (
                (f"attacked ({scene.strongest})", after, VERMILLION, "s"),
                ("random signs of the same size", noisy, BLUE, "o"),
            ):
                values = [relative(before[name], other[name]) for name in names]
                axis.plot(range(len(names)), values, color=color, marker=marker, markersize=3.5, label=label)
            axis.set_xticks(range(len(names)), names, rotation=30, ha="right")
            axis.set_ylabel("relative difference\n(2-norms, mean)")
            axis.set_ylim(bottom=0)
            axis.legend(frameon=False)
            for place, name in zip(bottom.subplots(1, max(1, len(chosen)), squeeze=False).flat, chosen, strict=False):
                change = (after[name][one] - before[name][one]).abs().amax(dim=0)
                place.imshow(change.cpu().numpy(), cmap="cividis")
                place.set(xticks=[], yticks=[])
                place.set_title(f"{name}\nmax {float(change.max()):.2g}", fontsize=FONT)
            text = (
                f"Looked at: {called}. Above: difference of each layer's output to that of the clean image. Below: "
                "for one image, the largest difference over channels, dark = 0, each map on its own scale."
            )
            return finish(figure, f"{scene.caption(len(labels))} {text}", path)


@torch.no_grad()
def layers(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Output of each convolution and linear layer, in the order in which they are passed.

    Of a network that draws at random, the same draw at each call.
    """
    found: dict[str, Tensor] = {}
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            short = name.removeprefix("network.")

            def keep(_: Any, __: Any, output: Tensor, name: str = short) -> None:
                found[name] = output.float()

            handles.append(module.register_forward_hook(keep))
    try:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model(images)
    finally:
        for handle in handles:
            handle.remove()
    return found


def relative(clean: Tensor, other: Tensor) -> float:
    """Mean over images of the 2-norm of the difference, over that of the clean activations."""
    change = (other - clean).flatten(1).norm(dim=1)
    return float((change / clean.flatten(1).norm(dim=1).clamp_min(1e-12)).mean())
