"""What the adapters of other attack libraries share: the library, the model as it wants it, and what it returns."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import math
import random
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, final

import numpy as np
import torch
from pydantic import AfterValidator
from torch import Tensor, nn

from src.attacks.base import Attack
from src.attacks.query import Query
from src.errors import UserError
from src.threat import Norm, ThreatModel

NOISE = 1e-3  # share of eps by which float rounding may carry a library's images over it

Arguments = dict[str, Any]


def require(library: str, install: str) -> None:
    """Refuse in one line when a library is absent."""
    if importlib.util.find_spec(library) is None:
        raise UserError(
            f"attack={library}: the library {library} is not installed. Make an environment that has it with "
            f"`make peers`, or add it to this one: uv pip install {install}"
        )


def name_in(library: str, install: str) -> AfterValidator:
    """Marks an argument as the name of an attack in ``library``: a config is refused before anything is trained."""

    def check(name: str) -> str:
        require(library, install)
        return name

    return AfterValidator(check)


class Peer(Attack):
    """An attack of another library, by name and arguments, under our judge.

    The library sees the attacked model as an ``nn.Module`` in float32; norm and radius are the threat's. It does not
    say which image a pass was for: the passes are shared evenly among the images it was given.

    An attack that takes a radius may exceed it by float rounding, which is projected away; anything more is a
    :class:`~src.threat.BudgetError`. One that takes none is a minimal one: what it finds beyond eps does not count.
    """

    norms = frozenset(Norm)
    library: ClassVar[str]  # what is imported
    install: ClassVar[str]  # what `uv pip install` is given

    def __init__(self, *, name: str, arguments: Arguments | None = None) -> None:
        require(self.library, self.install)
        self.name = name
        self.arguments = dict(arguments or {})

    @final
    def check(self, norm: Norm, *, targeted: bool = False) -> None:
        """As for every attack, and what the library can say before it has a model."""
        super().check(norm, targeted=targeted)
        self.kind(norm, targeted=targeted)

    def kind(self, norm: Norm, *, targeted: bool) -> Any:
        """The library's class or object; refused where there is none of that name, or none for this norm or mode."""

    @final
    def run(self, model: Query, x: Tensor, y: Tensor, threat: ThreatModel, *, generator: torch.Generator) -> Tensor:
        if model.rejects:
            raise UserError(
                f"attack={self.library}: a library takes an image that the defense rejects for a success and stops "
                "there. Use an attack of ours, such as attack=adaptive"
            )
        library = importlib.import_module(self.library)
        seen = Seen(model, x.device)
        with _seeded(int(torch.randint(2**32, (), generator=generator))):
            try:
                made, bounded = self.attack(library, seen, x, y, threat)
            except UserError:
                raise
            except Exception as error:  # whatever a library may raise
                raise UserError(
                    f"attack={self.library}: its {self.name} failed on images {tuple(x.shape)} in {threat.norm} "
                    f"({type(error).__name__}: {_line(error)})"
                ) from error
        seen.share_passes()
        return settle(made.detach().to(x), x, threat, bounded=bounded)

    @abstractmethod
    def attack(self, library: Any, model: Seen, x: Tensor, y: Tensor, threat: ThreatModel) -> tuple[Tensor, bool]:
        """The library's images for ``x``, and whether it was given the radius to keep to."""

    def make(self, kind: Any, taken: dict[str, Any], *positional: Any) -> Any:
        """An object of the library: the user's arguments, and of ``taken`` what its constructor knows.

        Raises:
            UserError: an argument that the threat decides, or that the library refuses.
        """
        for argument in self.arguments:
            if argument in taken:
                raise UserError(
                    f"attack.arguments.{argument}: comes from the threat and the adapter; set threat.norm, threat.eps "
                    "or threat.targeted instead"
                )
        known = parameters(kind)
        given = {key: value for key, value in taken.items() if key in known}
        try:
            return kind(*positional, **self.arguments, **given)
        except (TypeError, ValueError) as error:
            raise UserError(
                f"attack.arguments={self.arguments}: {self.library}'s {self.name} refuses them ({_line(error)}). "
                f"Allowed: {', '.join(sorted(known - set(taken) - {'model', 'classifier', 'self'}))}"
            ) from None

    def unknown(self, names: list[str]) -> UserError:
        """The error for a name that the library does not have."""
        close = difflib.get_close_matches(self.name, names, n=3, cutoff=0.4)
        return UserError(
            f"attack.name={self.name}: {self.library} has no such attack. Close to it: {', '.join(close) or 'none'}"
        )

    def wrong_norm(self, norm: Norm, allowed: frozenset[Norm]) -> UserError:
        """The error for a norm that this attack of the library does not have."""
        return UserError(
            f"threat.norm={norm}: {self.library}'s {self.name} cannot do it. "
            f"Allowed: {', '.join(sorted(allowed)) or 'none that we know of'}"
        )

    def no_target(self) -> UserError:
        """The error for a targeted threat and an attack without that mode."""
        return UserError(f"threat.targeted=true: {self.library}'s {self.name} has no targeted mode. Allowed: false")


class Seen(nn.Module):
    """The attacked model as an ``nn.Module`` of no weights and no layers, so that no library meddles with it."""

    def __init__(self, query: Query, device: torch.device) -> None:
        super().__init__()
        self._ask = [query]  # inside a list: not a submodule
        self.forwards = self.backwards = 0
        self.anchor = nn.Parameter(torch.zeros(1, device=device), requires_grad=False)  # libraries ask for the device
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        with torch.autocast(images.device.type, enabled=False):
            logits = self._ask[0].model(images.float())
        self.forwards += len(images)
        if logits.requires_grad:
            logits.register_hook(self._count)  # type: ignore[no-untyped-call]
        return logits

    def _count(self, slope: Tensor) -> None:
        self.backwards += len(slope)

    @torch.no_grad()
    def classes(self, x: Tensor) -> int:
        """How many classes the model has; one image is asked."""
        return self(x[:1]).shape[1]

    def share_passes(self) -> None:
        """Book the passes on the images, as evenly as whole numbers allow."""
        self._ask[0].share(self.forwards, self.backwards)


def settle(made: Tensor, x: Tensor, threat: ThreatModel, *, bounded: bool) -> Tensor:
    """A library's images without the float rounding by which they break the rules; the judge sees the rest."""
    if made.shape != x.shape or not bool(torch.isfinite(made).all()):
        return made
    if float(made.min()) > -NOISE and float(made.max()) < 1 + NOISE:
        made = made.clamp(0, 1)
    if threat.norm is Norm.L0:  # a round trip to other units moves every pixel a little
        made = torch.where((made - x).abs() < 1e-6, x, made)
    if not math.isfinite(threat.eps):
        return made
    distance = threat.distance(x, made)
    over = distance > threat.eps + threat.slack
    if not bounded:
        return torch.where(over.view(-1, 1, 1, 1), x, made)
    barely = over & (distance <= threat.eps * (1 + NOISE) + NOISE * 1e-2) & (threat.norm is not Norm.L0)
    return torch.where(barely.view(-1, 1, 1, 1), threat.project(x, made), made)


def parameters(kind: Any) -> set[str]:
    """Names of the arguments of a constructor, those of its bases too where it passes keywords on."""
    names: set[str] = set()
    for member in inspect.getmro(kind):
        if "__init__" not in vars(member) or member is object:
            continue
        found = inspect.signature(vars(member)["__init__"]).parameters
        names |= set(found)
        if not any(p.kind is p.VAR_KEYWORD for p in found.values()):
            break
    return names - {"self", "args", "kwargs"}


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """NumPy's and Python's global randomness set by ``seed`` inside, as before outside; torch's is set by the base."""
    kept, python = np.random.get_state(), random.getstate()
    np.random.seed(seed)
    random.seed(seed)
    try:
        yield
    finally:
        np.random.set_state(kept)
        random.setstate(python)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
