"""Classification by the nearest image that a conditional generator makes of each class."""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

from src.defenses.guarded import DefendedModel
from src.defenses.purify.gan import ClassifierFeatures, Decay, WassersteinGAN, descend
from src.defenses.purify.siamese import Siamese, contrastive

MOMENTUM = 0.7  # of the refinement, as in Defense-GAN
CHUNK = 1000  # images generated at once


class CWGANGP(WassersteinGAN):
    """Replaces the classifier: images are generated for each class, and the class of the nearest is the answer.

    The shapes are those of system A (docs/systems.md; one image a class, least mean squared
    error; a Siamese network was what it wished for). Related papers: Gulrajani et al. 2017,
    https://arxiv.org/abs/1704.00028; a model of each class as a defense: Schott et al. 2018, "Towards the first
    adversarially robust neural network model on MNIST", https://arxiv.org/abs/1805.09190.

    Logits are minus the Euclidean distances ``(B, classes)``, of pixels or of points of the Siamese network, to the
    nearest image of each class; the order is that of the mean squared error. The codes of the class images are fixed,
    so the answer is deterministic.

    Without refinement the gradient is exact: the distance to fixed images. With it the codes found are taken as fixed
    backwards (bpda), which is nearly true where the descent has come to rest.

    Validation logs the accuracy on the images as they come (under attack where the config names one to train on) and
    ``val_fid``, the Fréchet distance (Heusel et al. 2017, https://arxiv.org/abs/1706.08500) of the bare classifier's
    features on real images and as many generated ones with the same labels, in place of Inception's.

    Departures: images of the data's size instead of 64x64; a critic with projection of the label; a running average
    of the generator's weights; several images a class.

    Args:
        latent: numbers in a code.
        width: channels of the generator's and critic's convolutions next to the image.
        similarity: ``mse`` or ``siamese``: a network trained beside the generator on pairs of an attacked and a clean
            image (of two clean ones where the config names no attack).
        draws: images a class; 1: as in system A.
        refine: steps of descent on the code of each class's nearest image.
        rate: step size of that on the squared error, mean over pixels or over the numbers of a point.
        n_critic: steps of the critic for one of the generator.
        penalty: weight of the gradient penalty.
        betas: decay rates of Adam's moments.
        averaging: decay of the running average of the generator's weights.

    Shapes: images ``(B, C, H, W)`` in [0, 1], logits ``(B, classes)``.

    Raises:
        UserError: images under 8x8.
    """

    monitor = ("val_accuracy", "max")
    replaces = True
    learns_from_classifier = False  # it is asked for features alone, of which the logged FID is made

    def __init__(
        self,
        *,
        channels: int,
        size: tuple[int, int],
        num_classes: int,
        classifier: nn.Module,
        latent: PositiveInt = 64,
        width: PositiveInt = 32,
        similarity: Literal["mse", "siamese"] = "mse",
        draws: PositiveInt = 100,
        refine: NonNegativeInt = 0,
        rate: PositiveFloat = 10.0,
        n_critic: PositiveInt = 5,
        penalty: NonNegativeFloat = 10.0,
        betas: tuple[Decay, Decay] = (0.5, 0.9),
        averaging: Decay = 0.999,
    ) -> None:
        super().__init__(
            channels=channels,
            size=size,
            latent=latent,
            width=width,
            n_critic=n_critic,
            penalty=penalty,
            betas=betas,
            averaging=averaging,
            classes=num_classes,
        )
        self.classes, self.draws, self.refine, self.rate = num_classes, draws, refine, rate
        self.gradient = "bpda" if refine else "exact"
        self.siamese = Siamese(channels=channels, size=size, width=width) if similarity == "siamese" else None
        self.features = ClassifierFeatures(classifier)
        points = nn.Identity()
        points.num_features = self.features.count(channels, size)  # type: ignore[assignment]
        self.fid = FrechetInceptionDistance(feature=points)

    def guard(self, classifier: nn.Module) -> DefendedModel:
        """The class images instead of ``classifier``."""
        return DefendedModel(classifier=ClassImages(self), defense=self, gradient=self.gradient)

    def embed(self, images: Tensor) -> Tensor:
        """The points between which distances are taken: ``(B, D)``."""
        return images.flatten(1).float() if self.siamese is None else self.siamese(images)

    def distances(self, images: Tensor, references: Tensor) -> Tensor:
        """From each image to the nearest image of each class, ``(B, classes)``."""
        points = self.embed(images)
        every = torch.cdist(points, references).view(len(images), self.classes, self.draws)
        nearest, which = every.min(dim=2)
        if not self.refine:
            return nearest
        better = torch.linalg.vector_norm(points[:, None] - self._refined(images, which), dim=2)
        return torch.minimum(nearest, better)

    @torch.no_grad()
    def references(self) -> Tensor:
        """Points of the class images, ``(classes * draws, D)``, those of a class together."""
        codes, labels = self._codes()
        self.average.eval()  # also where the defense is guarded as it was built; it is never trained itself
        made = zip(torch.split(codes, CHUNK), torch.split(labels, CHUNK), strict=True)
        return torch.cat([self.embed(self.average(some, kind)) for some, kind in made])

    def _codes(self) -> tuple[Tensor, Tensor]:
        fixed = torch.Generator().manual_seed(0)
        codes = torch.randn(self.classes * self.draws, self.latent, generator=fixed).to(self.device)
        return codes, torch.arange(self.classes, device=self.device).repeat_interleave(self.draws)

    @torch.no_grad()
    def samples_to_show(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
        """Images of the averaged generator, of each class in turn."""
        labels = (torch.arange(count) % self.classes).to(self.device)
        return self.average(torch.randn(count, self.latent, generator=generator).to(self.device), labels), labels

    def _refined(self, images: Tensor, which: Tensor) -> Tensor:
        """Points of class images made nearer by descent, ``(B, classes, D)``: constants for whoever differentiates."""
        # The search has gradients of its own, also where the caller wants none.
        with torch.inference_mode(False), torch.enable_grad():
            wanted = self.embed(images.detach().clone()).detach().repeat_interleave(self.classes, dim=0)
            start = which.clone() + torch.arange(self.classes, device=which.device) * self.draws
            labels = torch.arange(self.classes, device=which.device).repeat(len(images))

            def made(codes: Tensor) -> Tensor:
                return self.embed(self.average(codes, labels))

            codes = descend(
                lambda codes: (made(codes) - wanted).square().mean(dim=1),
                self._codes()[0][start.flatten()],
                steps=self.refine,
                rate=self.rate,
                momentum=MOMENTUM,
            )
            return made(codes).detach().view(len(images), self.classes, wanted.shape[1])

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        super().training_step(batch, batch_idx)
        if self.siamese is not None:
            left, right = self.siamese(batch["image"]), self.siamese(batch.get("clean", batch["image"]))
            told = self._step(2, {"train_siamese": contrastive(left, right, batch["label"])})
            self.log_dict(told, on_step=False, on_epoch=True, sync_dist=True)

    def configure_optimizers(self) -> Any:
        made = super().configure_optimizers()
        return made if self.siamese is None else [*made, self._optimizer(self.siamese, self._steps)]

    def on_validation_epoch_start(self) -> None:
        self._shown = self.references()

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        labels = batch["label"]
        for name, told in (("image", "val_accuracy"), ("clean", "val_accuracy_clean")):
            if name in batch:
                right = (self.distances(batch[name], self._shown).argmin(dim=1) == labels).float().mean()
                self.log(told, right, batch_size=len(labels), sync_dist=True, prog_bar=True)
        fixed = torch.Generator().manual_seed(batch_idx)
        fake = self.average(torch.randn(len(labels), self.latent, generator=fixed).to(labels.device), labels)
        self.fid.update(self.features(batch.get("clean", batch["image"])), real=True)
        self.fid.update(self.features(fake), real=False)
        self.log("val_fid", self.fid, batch_size=len(labels))


class ClassImages(nn.Module):
    """Minus the distance to each class, ``(B, classes)``: what stands in for the classifier."""

    references: Tensor

    def __init__(self, gan: CWGANGP) -> None:
        super().__init__()
        self.gan = gan
        self.register_buffer("references", gan.references())

    def forward(self, images: Tensor) -> Tensor:
        return -self.gan.distances(images, self.references)
