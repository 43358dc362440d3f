"""Randomised smoothing."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn

from src.defenses.base import Fresh, Harden, Share
from src.defenses.guarded import DefendedModel

AT_ONCE = 2**22  # values of noisy images in one pass of the certificate: some 16 MiB of them


class Smoothing(Harden):
    """A network trained under Gaussian noise that answers by majority over noisy copies, with a proven l2 radius.

    Paper: Cohen, Rosenfeld, Kolter 2019, "Certified Adversarial Robustness via Randomized Smoothing",
    https://arxiv.org/abs/1902.02918 (CERTIFY in figure 1). With probability ``1 - alpha`` over the draws no change
    shorter than the certified radius ``sigma * Phi^-1(p)`` turns the smoothed classifier, where ``p`` is the lower
    Clopper-Pearson bound of the share of draws that give its answer.

    Where ours departs from the paper: the answer that attacks meet is the plain majority over ``votes`` draws; only the
    certificate abstains.

    Args:
        fresh: makes a network of the bare classifier's kind, as it is before its training.
        sigma: standard deviation of the noise in [0, 1] pixels, in training and after it.
        votes: draws of an answer.
        alpha: how often a certificate may be wrong.
        select_draws: draws from which the certificate takes its class.
        certify_draws: draws of the bound; the largest radius is ``sigma * Phi^-1(alpha ** (1 / certify_draws))``.
        certify_images: how many of the first test images are certified.

    Shapes: images ``(B, C, H, W)`` in [0, 1], logits ``(B, classes)``.

    Stochastic; the gradient through a draw is exact. Noisy pixels may lie outside [0, 1], as in the paper.
    """

    stochastic = True
    at_test = frozenset({"votes", "alpha", "select_draws", "certify_draws", "certify_images"})

    def __init__(
        self,
        *,
        fresh: Fresh,
        sigma: PositiveFloat = 0.5,
        votes: PositiveInt = 20,
        alpha: Share = 0.001,
        select_draws: PositiveInt = 100,
        certify_draws: PositiveInt = 1000,
        certify_images: NonNegativeInt = 500,
    ) -> None:
        super().__init__(fresh=fresh)
        self.sigma = sigma
        self.votes = votes
        self.alpha = alpha
        self.select_draws = select_draws
        self.certify_draws = certify_draws
        self.certify_images = certify_images

    def forward(self, images: Tensor) -> Tensor:
        """Logits of one noisy copy of each image: what is trained and validated."""
        return Noisy(self.network, self.sigma)(images)

    def guard(self, classifier: nn.Module) -> DefendedModel:
        return DefendedModel(
            classifier=Noisy(self.network, self.sigma),
            defense=self,
            stochastic=True,
            votes=self.votes,
            certify=self.certify if self.certify_images else None,
            certify_images=self.certify_images,
        )

    @torch.no_grad()
    def certify(self, images: Tensor, labels: Tensor) -> Tensor:
        """Proven l2 radius ``(B,)`` in [0, 1] pixels; -1 where the class is wrong or the draws do not decide."""
        from scipy.stats import beta  # here: it costs a second

        images, labels = images.to(self.device), labels.to(self.device)
        answer = self.counts(images, self.select_draws).argmax(dim=1)
        hits = self.counts(images, self.certify_draws).gather(1, answer[:, None]).squeeze(1).double()
        # scipy takes NumPy arrays; no hit at all has no bound, and counts as none.
        low = beta.ppf(self.alpha, hits.cpu().numpy(), (self.certify_draws - hits + 1).cpu().numpy())
        share = torch.from_numpy(low).nan_to_num(0.0)
        proven = (share > 0.5) & (answer == labels).cpu()
        return torch.where(proven, self.sigma * torch.special.ndtri(share), -1.0)

    def counts(self, images: Tensor, draws: int) -> Tensor:
        """How many of the draws answer each class: ``(B, classes)``."""
        total: Tensor | int = 0
        each = max(1, AT_ONCE // max(1, images.numel()))
        for done in range(0, draws, each):
            copies = min(each, draws - done)
            logits = self(images.repeat(copies, 1, 1, 1))
            votes = F.one_hot(logits.argmax(dim=1), logits.shape[1])
            total = total + votes.view(copies, len(images), logits.shape[1]).sum(dim=0)
        assert isinstance(total, Tensor)
        return total


class Noisy(nn.Module):
    """A network that adds its own Gaussian noise to the images."""

    def __init__(self, network: nn.Module, sigma: float) -> None:
        super().__init__()
        self.network = network
        self.sigma = sigma

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images + self.sigma * torch.randn_like(images))
