"""The contract of every attack.

An attack of one's own is a class with ``norms`` and ``run`` in ``src/attacks/x.py`` and its ``conf/attack/x.yaml``.
It works on any callable from images to logits, without Hydra::

    attack = PGD(steps=40)
    attacked = attack(model, images, labels, ThreatModel(norm="linf", eps=8 / 255))
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, final

import torch
from torch import Tensor, nn

from src.attacks import inputs
from src.attacks.gradients import margin
from src.attacks.query import Query
from src.errors import UserError
from src.threat import Norm, ThreatModel

Model = Callable[[Tensor], Tensor]

TINY = 1e-12
COARSE = 2**-8  # of the largest logit: the last digit of a bfloat16 number
PUSHES = (1e-4, 1e-3, 0.01, 0.02, 0.04, 0.08, 0.16)  # shares by which what fell back is pushed on
ROUNDED = (0.3, 0.6, 1.0, 2.0, 4.0)  # and further, where rounding to 8 bits swallows small changes


@dataclass(frozen=True, kw_only=True)
class Attacked:
    """What an attack made of a batch. All tensors have the batch's first dimension ``B``."""

    images: Tensor  # (B, C, H, W) in [0, 1], within the budget
    prediction: Tensor  # (B,) the attacked model's class for `images`, in float32 and eval mode
    attempted: Tensor  # (B,) bool: the attack worked on it: right before, or meant for others (`threat.exhaust`)
    success: Tensor  # (B,) bool: of these, wrong after it (untargeted), or the target
    distance: Tensor  # (B,) in the threat's norm; 0 where nothing was changed
    forward_passes: Tensor  # (B,) times the image, or a version of it, went through the model, verdicts included
    backward_passes: Tensor  # (B,)


class Attack(ABC):
    """Base of all attacks. Authors write :meth:`run`; callers use ``attack(model, images, labels, threat)``.

    Attributes:
        norms: what it can be asked for; anything else is refused.
        needs: what of the model it cannot do without: ``gradient``, ``scores`` (logits) or ``labels`` (their argmax).
        exact: it compares losses that bfloat16 cannot tell apart, and searches in float32 always.
        minimal: searches the smallest change instead of filling a budget, so that one run answers every eps.
        can_target: whether it has a targeted mode.
        against_rejection: made for models that reject; an ensemble spares others this member.
    """

    norms: ClassVar[frozenset[Norm]]
    needs: ClassVar[Literal["gradient", "scores", "labels"]] = "gradient"
    minimal: ClassVar[bool] = False
    can_target: ClassVar[bool] = True
    exact: ClassVar[bool] = False
    against_rejection: ClassVar[bool] = False

    @final
    def __call__(
        self,
        model: Model,
        images: Tensor,
        labels: Tensor,
        threat: ThreatModel,
        *,
        generator: torch.Generator | None = None,
        target: Tensor | None = None,
        search: torch.dtype = torch.float32,
    ) -> Attacked:
        """Attack the images the model gets right and judge the outcome.

        With ``threat.exhaust`` all are attacked, but by a search for the smallest change, which is none where the model
        is wrong already.

        Args:
            model: any callable ``(B, C, H, W) in [0, 1] → logits (B, classes)``.
            images: float32 in [0, 1]. Most attacks show them to the model all at once: give batches that its memory can
                take, as the pipeline does (``eval_batch_size``).
            labels: true classes ``(B,)``.
            threat: norm, radius, targeted or not.
            generator: CPU generator of all the attack's randomness; the same generator state gives the same images.
            target: wanted classes ``(B,)`` of a targeted attack; drawn among the wrong classes when absent.
            search: precision of the model inside the search (autocast); bfloat16 is faster where the machine has it.
                Verdicts are in float32 whatever stands here, and so are attacks that are ``exact``; images that only
                bfloat16 takes for turned are searched again in float32.

        Raises:
            UserError: a norm or mode the attack does not have, images outside [0, 1], labels or targets that make no
                sense, a model that gives NaN or the wrong shape, or no gradient where one is needed.
            BudgetError: the attack's own images break the rules.
        """
        self.check(threat.norm, targeted=threat.targeted)
        inputs.check(images, labels)
        if target is not None and not threat.targeted:
            raise UserError("target is given, but the threat is untargeted; expected ThreatModel(..., targeted=True)")
        generator = generator or torch.Generator().manual_seed(0)
        # A batch made under Lightning's inference mode can never carry gradients; a copy made outside can.
        with torch.inference_mode(False), torch.enable_grad(), _untouched(model, images.device, generator):
            query = Query(model, len(images), images.device, search)
            query.goal = labels
            images = images.detach().clone()
            logits = query.verdict(images, clean=True)
            result, prediction = images.clone(), logits.argmax(dim=1)
            attempted = prediction == labels
            if threat.exhaust and not self.minimal:  # what is wrong here may be right for others, or in another draw
                attempted = torch.ones_like(attempted)
            goal = inputs.targets(labels, logits.shape[1], generator, target) if threat.targeted else labels
            query.goal, query.targeted = goal, threat.targeted
            todo = attempted.nonzero().flatten()
            if threat.eps > 0 and len(todo):
                made, answer = self._made(query.of(todo), images[todo], goal[todo], threat, generator)
                result[todo], prediction[todo] = made, answer.argmax(dim=1)
            distance = threat.judge(images, result)
            success = attempted & ((prediction == goal) if threat.targeted else (prediction != labels))
        return Attacked(
            images=result,
            prediction=prediction,
            attempted=attempted,
            success=success,
            distance=distance,
            forward_passes=query.forward_passes,
            backward_passes=query.backward_passes,
        )

    @final
    def perturb(
        self,
        model: Model,
        images: Tensor,
        labels: Tensor,
        threat: ThreatModel,
        *,
        generator: torch.Generator,
        search: torch.dtype = torch.float32,
    ) -> Tensor:
        """Images to learn from ``(B, C, H, W)``: all are attacked, also those misclassified, and none is judged.

        The arguments are those of a call; ``threat`` must not be targeted.
        """
        self.check(threat.norm)
        if threat.eps == 0:
            return images
        with torch.inference_mode(False), torch.enable_grad(), _untouched(model, images.device, generator):
            query = Query(model, len(images), images.device, torch.float32 if self.exact else search)
            query.goal = labels
            images = images.detach().clone()
            made = self.run(query, images, labels, threat, generator=generator).detach().to(images.dtype)
            return threat.project(images, made) if self.minimal else made  # such a search does not know the radius

    def _made(
        self, model: Query, clean: Tensor, y: Tensor, threat: ThreatModel, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Images made of ``clean``, and the model's logits for each, in float32."""
        if self.exact:
            model = model.of(torch.arange(len(clean)), torch.float32)
        made, logits = self._searched(model, clean, y, threat, generator)
        if model.search is not torch.float32:
            # An attack stops at what the coarser search takes for turned: there, or as good as there, it goes again.
            missed = (~fooled(logits, y, threat)).nonzero().flatten()
            if len(missed):
                with torch.no_grad():
                    coarse = model.of(missed)(made[missed])
                ahead = torch.maximum(*(lead(answer, y[missed], threat) for answer in (coarse, logits[missed])))
                doubtful = missed[ahead > -COARSE * coarse.abs().amax(dim=1)]
                if len(doubtful):
                    exact = model.of(doubtful, torch.float32)
                    again = self._searched(exact, clean[doubtful], y[doubtful], threat, generator)
                    made[doubtful], logits[doubtful] = again
        return made, logits

    def _searched(
        self, model: Query, clean: Tensor, y: Tensor, threat: ThreatModel, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        levels = threat.before_rounding(clean)
        found = self.run(model, clean, y, levels, generator=generator).detach().to(clean.dtype) if levels.eps else clean
        made = self._allowed(clean, found, threat)
        logits = model.verdict(made)
        if threat.quantize and not self.minimal and not threat.exhaust:
            # The search stopped at the first image that was turned, and rounding turned that back: now to the end.
            back = (~fooled(logits, y, threat) & (made != found).flatten(1).any(dim=1)).nonzero().flatten()
            back = back[fooled(model.of(back).verdict(found[back]), y[back], threat)] if len(back) else back
            if len(back):
                on = replace(threat, exhaust=True)
                made[back], logits[back] = self._searched(model.of(back), clean[back], y[back], on, generator)
        if self.minimal:
            # What was found, not what is left of it: rounding may have taken the whole change back.
            within = threat.distance(clean, found) <= threat.eps + threat.slack
            fallen = ~fooled(logits, y, threat) & within & (found != clean).flatten(1).any(dim=1)
            if bool(fallen.any()):
                view = model.of(fallen)
                made[fallen], logits[fallen] = self._pushed(view, clean[fallen], found[fallen], y[fallen], threat)
        return made, logits

    def _pushed(
        self, model: Query, clean: Tensor, found: Tensor, y: Tensor, threat: ThreatModel
    ) -> tuple[Tensor, Tensor]:
        """``found``, pushed on along the same change until it has the goal; as it was where it never has.

        An image right behind the boundary falls back when it is computed in a batch of another size, rounded to 8 bits,
        or was brought there in bfloat16; a change up to a sixth longer mends most of these. Rounding swallows changes
        of less than half a level, which takes more.
        """
        result = self._allowed(clean, found, threat)
        logits, rows = model.verdict(result), torch.arange(len(clean), device=clean.device)
        if threat.quantize:  # at least as far as the largest value needs not to be rounded away
            largest = (found - clean).flatten(1).abs().amax(dim=1).clamp_min(TINY)
            found = clean + (found - clean) * (0.501 / 255 / largest).clamp_min(1).view(-1, 1, 1, 1)
        for push in (*PUSHES, *(ROUNDED if threat.quantize else ())):
            further = (clean[rows] + (1 + push) * (found[rows] - clean[rows])).clamp(0, 1)
            further = self._allowed(clean[rows], further, threat)
            answer = model.of(rows).verdict(further)
            hit = fooled(answer, y[rows], threat)
            result[rows[hit]], logits[rows[hit]] = further[hit], answer[hit]
            rows = rows[~hit]
            if not len(rows):
                break
        return result, logits

    def _allowed(self, clean: Tensor, found: Tensor, threat: ThreatModel) -> Tensor:
        """Rounded where the threat asks for it. A minimal search does not know the budget: what is beyond is undone."""
        made = threat.to_8_bit(clean, found) if threat.quantize else found
        if not self.minimal:
            return made
        beyond = threat.distance(clean, made) > threat.eps + threat.slack
        return torch.where(beyond.view(-1, 1, 1, 1), clean, made)

    def check(self, norm: Norm, *, targeted: bool = False) -> None:
        """Refuse a norm or a mode that this attack does not have."""
        name = type(self).__name__
        if norm not in self.norms:
            allowed = ", ".join(sorted(self.norms))
            raise UserError(f"threat.norm={norm}: {name} cannot do it. Allowed: {allowed}")
        if targeted and not self.can_target:
            raise UserError(f"threat.targeted=true: {name} has no targeted mode. Allowed: false")

    def reach(self, height: int, width: int) -> float:
        """The largest change that a search for the smallest one looks for when eps is inf."""
        return math.inf

    def parts(self, norm: Norm) -> dict[str, Attack]:
        """The attacks that it runs in this norm, by name; most are made of none."""
        return {}

    def kinds(self, norm: Norm) -> list[type]:
        """Its class and those of all that it is made of: whose code its images depend on."""
        return [type(self), *(kind for part in self.parts(norm).values() for kind in part.kinds(norm))]

    @abstractmethod
    def run(self, model: Query, x: Tensor, y: Tensor, threat: ThreatModel, *, generator: torch.Generator) -> Tensor:
        """Adversarial images for ``x``, same shape, in [0, 1] and within ``threat``.

        All of ``x`` is classified correctly but with ``threat.exhaust``. ``y`` is the label to leave, or the target to
        reach when ``threat.targeted``. Parameters of the model carry no gradient; the model is in eval mode. ``model``
        is a :class:`~src.attacks.query.Query`: an attack that drops images on the way says which are left with
        ``model.of(rows)``, so that passes are counted for the image they were spent on.
        """


def fooled(logits: Tensor, y: Tensor, threat: ThreatModel) -> Tensor:
    """Which images have reached the attack's goal, shape ``(B,)``."""
    prediction = logits.argmax(dim=1)
    return prediction == y if threat.targeted else prediction != y


def lead(logits: Tensor, y: Tensor, threat: ThreatModel) -> Tensor:
    """By how much the attack's goal leads, ``(B,)``: reached where positive."""
    return -margin(logits, y) if threat.targeted else margin(logits, y)


@contextmanager
def _untouched(model: Model, device: torch.device, generator: torch.Generator) -> Iterator[None]:
    """Eval mode and no parameter gradients inside; mode, flags and the caller's random state as before outside."""
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    parameters = [p for p in model.parameters() if p.requires_grad] if isinstance(model, nn.Module) else []
    training = [module for module in modules if module.training]
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        # A stochastic model draws from the global state: let the attack's generator decide that as well.
        torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
        try:
            for module in training:
                module.training = False
            for parameter in parameters:
                parameter.requires_grad_(False)
            yield
        finally:
            for module in training:
                module.training = True
            for parameter in parameters:
                parameter.requires_grad_(True)
