"""Adversarial training: the classifier learns from attacked images, in the ways that later work measures itself by."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, NonNegativeFloat, PositiveInt
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from src.defenses.averaging import moving_average
from src.defenses.base import Fresh, Harden, Share
from src.defenses.guarded import DefendedModel
from src.errors import UserError
from src.threat import Norm


class AdversarialTraining(Harden):
    """A new classifier, trained on images that are attacked as it learns.

    The attack, its norm and its radius come from ``trained_on`` in the config. Objectives:

    - ``pgd``: cross-entropy of the attacked images. Madry, Makelov, Schmidt, Tsipras, Vladu 2017,
      https://arxiv.org/abs/1706.06083
    - ``fgsm``: the mean of the cross-entropies of the clean and the attacked images. Goodfellow, Shlens, Szegedy 2014,
      https://arxiv.org/abs/1412.6572, section 6
    - ``fast``: as ``pgd``, for a single step from a random start. Wong, Rice, Kolter 2020,
      https://arxiv.org/abs/2001.03994. Such a training may suddenly learn to hold against its own attack only
      (catastrophic overfitting): it stops once the accuracy under the attack on the validation images falls by
      ``collapse`` below its best.
    - ``free``: each batch is repeated; one backward pass moves the weights and the perturbation, which goes on from
      batch to batch. Shafahi et al. 2019, https://arxiv.org/abs/1904.12843. It makes its own images, so
      ``trained_on.attack`` is null. linf and l2.
    - ``trades``: cross-entropy of the clean images, and KL(clean || attacked), the divergence of the answers on the
      attacked ones from those on the clean ones. Zhang et al. 2019, https://arxiv.org/abs/1901.08573
    - ``mart``: cross-entropy of the attacked images with a margin, and KL(clean || attacked) weighted by how uncertain
      the clean answer is. Wang et al. 2020, https://openreview.net/forum?id=rklOg6EFwS

    Where ours departs from the papers: attacked images, but those of ``free``, are made in eval mode; TRADES' images
    raise the cross-entropy, like all others, instead of the divergence; the perturbation of ``free`` begins at zero in
    each epoch, so that a resumed training goes on as an undisturbed one; the two halves of ``fgsm`` go through the
    network in one batch.

    Args:
        fresh: makes a network of the bare classifier's kind, as it is before its training.
        classifier: the trained bare classifier, for ``warm_start``.
        objective: see above.
        beta: ``trades`` and ``mart``: weight of the divergence.
        replays: ``free``: times each batch is used; the epochs are as many times longer.
        collapse: ``fast``: fall of the validation accuracy, in [0, 1], at which training stops. The weights of the best
            epoch are kept in any case.
        ema: decay, in [0, 1), of the moving average of weights and batch-norm statistics that validation sees and that
            is the new classifier; 0: none. It is lower in the first steps: (1 + n) / (10 + n) after n of them.
        warm_start: begin with the bare classifier's weights.

    Shapes: images ``(B, C, H, W)`` in [0, 1], logits ``(B, classes)``.

    Raises:
        UserError: at fit: no ``trained_on``, an attack in it for ``free`` or none for the others, or a norm that
            ``free`` does not have.
    """

    def __init__(
        self,
        *,
        fresh: Fresh,
        classifier: nn.Module,
        objective: Literal["pgd", "fgsm", "fast", "free", "trades", "mart"] = "pgd",
        beta: NonNegativeFloat = 6.0,
        replays: PositiveInt = 8,
        collapse: Share = 0.2,
        ema: Annotated[float, Field(ge=0, lt=1)] = 0.999,
        warm_start: bool = False,
    ) -> None:
        super().__init__(fresh=fresh)
        self.learns_from_classifier = warm_start
        if warm_start:
            self.network.load_state_dict(getattr(classifier, "network", classifier).state_dict())
        self.average: AveragedModel | None = moving_average(self.network, ema) if ema else None
        self.objective = objective
        self.beta = beta
        self.replays = replays
        self.collapse = collapse
        self.collapsed = False
        self.automatic_optimization = objective != "free"
        self.perturbation: Tensor | None = None  # of free

    @property
    def hardened(self) -> nn.Module:
        """The new classifier."""
        return self.network if self.average is None else self.average.module

    def forward(self, images: Tensor) -> Tensor:
        """Logits of the network that learns while it does (the attack on a training batch), else of the new one."""
        learning = self._trainer is not None and self.trainer.training
        return self.network(images) if learning else self.hardened(images)

    def guard(self, classifier: nn.Module) -> DefendedModel:
        return DefendedModel(classifier=self.hardened, defense=self)

    def on_fit_start(self) -> None:
        if self.threat is None:
            raise UserError(
                "defense.trained_on: missing; adversarial training learns from an attack. Take the block of "
                "conf/defense/adversarial_training.yaml"
            )
        if self.objective == "free" and self.threat.norm not in (Norm.LINF, Norm.L2):
            raise UserError(f"defense.trained_on.norm={self.threat.norm}: objective=free allows linf and l2")

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        attacked, labels = batch["image"], batch["label"]
        if self.objective in ("pgd", "fast"):
            return F.cross_entropy(self.network(attacked).float(), labels)
        clean = batch["clean"]
        if self.objective == "fgsm":
            return F.cross_entropy(self.network(torch.cat([clean, attacked])).float(), labels.repeat(2))
        term = trades if self.objective == "trades" else mart
        return term(self.network(clean).float(), self.network(attacked).float(), labels, self.beta)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Any:
        free, attacked = self.objective == "free", "clean" in batch
        if free and attacked:
            raise UserError(
                "defense.trained_on.attack: objective=free makes its own images. Allowed: null, as in "
                "defense=adversarial_training_free"
            )
        if not free and not attacked:
            raise UserError(
                f"defense.trained_on.attack=null: objective={self.objective} learns from an attack's images. Allowed: "
                "an attack, as in defense=adversarial_training; null for objective=free alone"
            )
        return self._replayed(batch) if free else super().training_step(batch, batch_idx)

    def _replayed(self, batch: dict[str, Tensor]) -> None:
        """Several steps on one batch; each backward pass moves the weights and the perturbation."""
        assert self.threat is not None
        clean, labels = batch["image"], batch["label"]
        optimizer, schedule = self.optimizers(), self.lr_schedulers()
        if self.perturbation is None or self.perturbation.shape != clean.shape:
            self.perturbation = torch.zeros_like(clean)
        for _ in range(self.replays):
            # Projected outside the graph: a pixel at the edge of ball or box would get no gradient, and stay there.
            seen = self.threat.project(clean, clean + self.perturbation).requires_grad_()
            loss = F.cross_entropy(self.network(seen).float(), labels)
            optimizer.zero_grad()  # type: ignore[union-attr]
            self.manual_backward(loss)
            optimizer.step()  # type: ignore[union-attr]
            assert seen.grad is not None
            radius = self.threat.radius(batch["image"])
            self.perturbation = moved(self.perturbation, seen.grad, self.threat.norm, radius)
        if schedule is not None:
            schedule.step()  # type: ignore[union-attr]
        self.log("train_loss", loss.detach(), on_step=False, on_epoch=True, sync_dist=True)

    def on_train_epoch_start(self) -> None:
        self.perturbation = None

    def on_train_batch_end(self, outputs: Any, batch: dict[str, Tensor], batch_idx: int) -> None:
        if self.average is not None:
            self.average.update_parameters(self.network)

    def on_train_epoch_end(self) -> None:
        """Catastrophic overfitting: it does not heal, so nothing is gained by going on."""
        keeper = self.trainer.checkpoint_callback
        best = getattr(keeper, "best_model_score", None)
        if self.objective == "fast" and best is not None:
            now = float(self.trainer.callback_metrics[self.monitor[0]])
            self.collapsed = now < float(best) - self.collapse
            self.trainer.should_stop = self.trainer.should_stop or self.collapsed

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["collapsed"] = self.collapsed

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.collapsed = checkpoint.get("collapsed", False)

    def on_train_start(self) -> None:
        """A training that had stopped before it was killed has stopped."""
        self.trainer.should_stop = self.trainer.should_stop or self.collapsed


def trades(clean: Tensor, attacked: Tensor, labels: Tensor, beta: float) -> Tensor:
    """TRADES from the logits ``(B, classes)`` of clean and attacked images: Zhang et al. 2019."""
    return F.cross_entropy(clean, labels) + beta * _divergence(clean, attacked).mean()


def mart(clean: Tensor, attacked: Tensor, labels: Tensor, beta: float) -> Tensor:
    """MART from the logits ``(B, classes)`` of clean and attacked images: Wang et al. 2020."""
    own = labels[:, None]
    best_other = attacked.softmax(dim=1).scatter(1, own, 0.0).amax(dim=1)
    boosted = F.cross_entropy(attacked, labels, reduction="none") - (1 - best_other).clamp_min(1e-6).log()
    doubt = 1 - clean.softmax(dim=1).gather(1, own).squeeze(1)
    return (boosted + beta * _divergence(clean, attacked) * doubt).mean()


def _divergence(clean: Tensor, attacked: Tensor) -> Tensor:
    """KL(clean || attacked) of the answers to each image and to what was made of it, ``(B,)``, nats."""
    logs = attacked.log_softmax(dim=1), clean.log_softmax(dim=1)
    return F.kl_div(*logs, reduction="none", log_target=True).sum(dim=1)


def moved(change: Tensor, slope: Tensor, norm: Norm, radius: float) -> Tensor:
    """A perturbation one step of that length further up the gradient, kept within the ball."""
    if norm is Norm.LINF:
        return (change + radius * slope.sign()).clamp(-radius, radius)
    further = change + radius * slope / _length(slope)
    return further * (radius / _length(further)).clamp_max(1.0)


def _length(images: Tensor) -> Tensor:
    return torch.linalg.vector_norm(images, dim=(1, 2, 3), keepdim=True).clamp_min(1e-12)
