"""The model as an attack sees it: it counts what is asked for each image, and answers verdicts in float32."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from src.errors import UserError


class Query:
    """A model whose passes are counted per image of the batch under attack.

    Called with ``(k * R, C, H, W)``, where ``R`` is the number of images this view is of: ``k`` blocks that each hold a
    version of every image, in order.

    Args:
        model: images in [0, 1] → logits.
        images: how many images the batch has.
        device: where they are.
        search: precision of the forward pass when called; :meth:`verdict` is in float32 always.

    A model with ``rejects`` has a last column that is the largest where it refuses an image. That column is folded into
    the class that must not win, so that an attack that knows of classes only has to evade rejection as well: into the
    label to leave, or, when targeted, into every class but the wanted one.
    """

    def __init__(
        self, model: Callable[[Tensor], Tensor], images: int, device: torch.device, search: torch.dtype
    ) -> None:
        self.model = model
        self.search = search
        self.forward_passes = torch.zeros(images, dtype=torch.int64)
        self.backward_passes = torch.zeros(images, dtype=torch.int64)
        self.rejects = bool(getattr(model, "rejects", False))
        self.differentiable = bool(getattr(model, "differentiable", True))
        self.goal: Tensor | None = None  # class of each image to leave, or to reach when `targeted`
        self.targeted = False
        self._clean: Tensor | None = None  # what the model answers to the clean images, in float32, where it was asked
        self._rows: Tensor | None = None  # None: all of them, in order
        self._layouts = _Layouts()

    def of(self, rows: Tensor, search: torch.dtype | None = None) -> Query:
        """A view for some of this view's images (positions or a mask), counting into the same place.

        A position may be given several times, for versions of an image that are searched for side by side.
        """
        view = Query.__new__(Query)
        view.model, view.search = self.model, search or self.search
        view.forward_passes, view.backward_passes = self.forward_passes, self.backward_passes
        view.differentiable, view._clean = self.differentiable, self._clean
        view._layouts = self._layouts
        view.rejects, view.goal, view.targeted = self.rejects, self.goal, self.targeted
        rows = rows.cpu()
        view._rows = self.rows[rows]
        return view

    @property
    def batch(self) -> int:
        """Images of the whole batch under attack: as many as one pass may hold, however few this view is of."""
        return len(self.forward_passes)

    @property
    def rows(self) -> Tensor:
        """Which of them this view is of, ``(R,)`` on the CPU; one may be there several times."""
        return torch.arange(len(self.forward_passes)) if self._rows is None else self._rows

    def __call__(self, x: Tensor) -> Tensor:
        return self._folded(self._answer(x))

    def apart(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits of the classes alone, and by how much the refusal leads over them, ``(B,)``: rejected where over 0.

        None in its place where the model rejects nothing.
        """
        logits = self._answer(x)
        if not self.rejects:
            return logits, None
        classes = logits[:, :-1]
        return classes, logits[:, -1] - classes.amax(dim=1)

    def _answer(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, dtype=self.search, enabled=self.search is not torch.float32):
            logits = self._layouts.ask(self.model, x)
        self._count(self.forward_passes, len(x))
        if logits.requires_grad:
            logits.register_hook(self._count_backward)  # type: ignore[no-untyped-call]
        return logits.float()

    @torch.no_grad()
    def clean(self, x: Tensor) -> Tensor:
        """Logits ``(B, classes)`` of the images as they were before the attack, ``x``: known from their verdict.

        Only where no verdict was taken, when images are made to learn from, is the model asked.
        """
        if self._clean is None:
            return self(x)
        return self._folded(self._clean if self._rows is None else self._clean[self._rows.to(self._clean.device)])

    @torch.no_grad()
    def verdict(self, x: Tensor, *, clean: bool = False) -> Tensor:
        """Logits in float32, checked; those of the clean images are kept for :meth:`clean`."""
        with torch.autocast(x.device.type, enabled=False):
            logits = self._layouts.ask(self.model, x)
        self._count(self.forward_passes, len(x))
        if logits.ndim != 2 or len(logits) != len(x):
            raise UserError(
                f"the model returned {tuple(logits.shape)} for {len(x)} images; expected (B, classes) logits"
            )
        if not bool(torch.isfinite(logits).all()):
            raise UserError("the model returned NaN or infinite logits: it cannot be attacked; check its weights")
        if clean:
            self._clean = logits
            classes = logits.shape[1] - self.rejects
            if self.goal is not None and len(logits) and int(self.goal.max()) >= classes:
                raise UserError(f"labels up to {int(self.goal.max())}, but the model has {classes} classes")
        logits = self._folded(logits)
        if not len(logits) or getattr(self.model, "log_probabilities", False):
            return logits
        if float(logits.logsumexp(dim=1).abs().max()) < 1e-4 and float(logits.max()) <= 0:
            _warn_once("the model seems to return log-probabilities; logits make stronger attacks")
        elif float((logits.sum(dim=1) - 1).abs().max()) < 1e-4 and float(logits.min()) >= 0:
            _warn_once("the model seems to return probabilities; return logits, or gradients vanish")
        return logits

    def _folded(self, logits: Tensor) -> Tensor:
        if not self.rejects or not len(logits):
            return logits[:, :-1] if self.rejects else logits
        assert self.goal is not None
        classes, refusal = logits[:, :-1], logits[:, -1:]
        goal = self.goal if self._rows is None else self.goal[self._rows.to(self.goal.device)]
        goal = goal.repeat(len(logits) // len(goal))[:, None]
        if self.targeted:
            return torch.maximum(classes, refusal).scatter(1, goal, classes.gather(1, goal))
        return classes.scatter(1, goal, torch.maximum(classes.gather(1, goal), refusal))

    def add_backward(self, asked: int) -> None:
        """Count backward passes that the model's own hook cannot see: ``asked`` images, in blocks as in a call.

        Negative takes back what was counted for a pass that failed.
        """
        self._count(self.backward_passes, asked)

    def share(self, forward: int, backward: int) -> None:
        """Count passes made past this view, as evenly over its images as whole numbers allow."""
        rows = self.rows
        for counts, asked in ((self.forward_passes, forward), (self.backward_passes, backward)):
            if len(rows):
                counts[rows] += asked // len(rows) + (torch.arange(len(rows)) < asked % len(rows))

    def _count_backward(self, slope: Tensor) -> None:
        self._count(self.backward_passes, len(slope))

    def _count(self, counts: Tensor, asked: int) -> None:
        images = len(counts) if self._rows is None else len(self._rows)
        if not images:
            return
        if asked % images:
            raise RuntimeError(f"{asked} images asked of a view of {images}: say which are meant with model.of(rows)")
        if self._rows is None:
            counts += asked // images
        else:
            counts.index_add_(0, self._rows, torch.full_like(self._rows, asked // images))


class _Layouts:
    """How images lie in memory when a model is asked; all views share what was learnt."""

    def __init__(self) -> None:
        # Convolutions of few channels run up to twice as fast in this layout; a plain .contiguous() does not set it
        # where there is one channel.
        self.fast: torch.memory_format | None = torch.channels_last

    def ask(self, model: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Logits; a model that flattens with ``.view``, which this layout forbids, is asked in the plain one."""
        if self.fast is not None:
            try:
                return model(x.clone(memory_format=self.fast))
            except RuntimeError as error:
                if "view size is not compatible" not in str(error):
                    raise
                self.fast = None
        return model(x)


_warned: set[str] = set()


def _warn_once(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, stacklevel=4)
