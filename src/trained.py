"""The stages that hold weights: classifiers and defenses, trained once and found again."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule

from src import fit, thresholds
from src.build import asked, build
from src.callbacks.attack_callback import AttackCallback
from src.classifiers import own
from src.classifiers.module import Classifier
from src.classifiers.whitening import patch_covariance
from src.config import Job, Trained, split
from src.data import augment, loaders
from src.data.augment import to_float
from src.data.base import ImageDataModule
from src.defenses.base import Defense
from src.defenses.guarded import DefendedModel
from src.errors import UserError
from src.keys import content_key, file_digest, networks_of, source_digest
from src.recipe import Recipe
from src.stages import Stages
from src.threat import Norm, ThreatModel, parse_eps
from src.tracking import NoTracker
from src.variant import beside
from src.weights import load_weights

log = logging.getLogger(__name__)


class Workshop:
    """What training a stage needs: the job's settings, the data, the cache and the tracker."""

    def __init__(self, job: Job, data: ImageDataModule, stages: Stages, tracker: NoTracker) -> None:
        self.job, self.data, self.stages, self.tracker = job, data, stages, tracker
        self.made: dict[str, str] = {}  # see Subject
        spec = data.spec
        kind = spec.augment if data.augmentation in (None, "none") else data.augmentation  # none is silent on mirrors
        self.shape = {
            "channels": spec.channels,
            "size": spec.size,
            "num_classes": spec.num_classes,
            "mean": spec.mean,
            "std": spec.std,
            "symmetric": kind == "crop_flip",
        }

    def classifier(self, name: str) -> tuple[Classifier, str]:
        """The trained classifier of the config, on the CPU and in eval mode, and its key."""
        return self._classifier(self.job.classifier, "classifier", f"classifier {name}", self.job.seed)

    def surrogate(self) -> tuple[Classifier, str]:
        """The classifier a transfer attacker trains: apart, so from another seed."""
        assert self.job.surrogate is not None
        kind = str(self.job.surrogate["_target_"]).rsplit(".", 1)[-1]
        return self._classifier(self.job.surrogate, "surrogate", f"surrogate {kind}", self.job.seed + 1)

    def _network(self, choice: dict[str, Any], group: str) -> torch.nn.Module:
        node, facts = split(choice, group)[0], self.shape
        if "patches" in asked(node, group):
            spec, some = self.data.spec, to_float(self.data.train.batch(_spread(len(self.data.train)))["image"])
            facts = {**facts, "patches": patch_covariance(some, spec.mean, spec.std)}
        try:
            network: torch.nn.Module = build(node, group, **facts)
        except UserError as error:
            if group == "surrogate":  # a network takes itself for the classifier
                told = str(error).replace("classifier=", "classifier@surrogate=").replace("classifier.", "surrogate.")
                raise UserError(told) from None
            raise
        return network

    def _classifier(self, choice: dict[str, Any], group: str, what: str, seed: int) -> tuple[Classifier, str]:
        node, trained = split(choice, group)
        torch.manual_seed(seed)  # the first weights
        network = self._network(choice, group)
        smoothing = trained.label_smoothing
        module = Classifier(network=network, num_classes=self.data.spec.num_classes, label_smoothing=smoothing)
        about: dict[str, Any] = {"node": node}
        if trained.checkpoint is not None:
            key = self._own_weights(module, Path(trained.checkpoint), f"{group}.checkpoint", about)
        if getattr(network, "is_trained", False):  # somebody's own: its code counts as well as its weights
            module.eval()
            return module, f"own-{content_key(**about, network=own.digest(network, node.get('model', '')))}"
        if trained.checkpoint is not None:
            return module, key
        if trained.fit is None:
            raise UserError(f"{group}.fit: missing; it says how to train, see conf/fit/default.yaml")
        what = f"{what} on {self.data.spec.name}"
        about["smoothing"] = smoothing
        return module, self._trained(group, module, trained.fit, what, about, seed=seed)

    def defense(self, name: str, classifier: Classifier, classifier_key: str) -> tuple[DefendedModel, str]:
        """The classifier behind the trained defense of the config, with frozen thresholds, and the defense's key."""
        module, key = self._defense(self.job.defense, "defense", name, classifier, classifier_key)
        defended = module.guard(classifier).eval()
        if defended.rejects:
            keys = {"defense": key, "classifier": classifier_key}
            frozen = thresholds.frozen(defended, keys, self.made, self.data, self.stages, self.job)
            key = content_key(defense=key, thresholds=frozen)
        return defended, key

    def _defense(
        self, choice: dict[str, Any], group: str, name: str, classifier: Classifier, classifier_key: str
    ) -> tuple[Defense, str]:
        node, trained = split(choice, group)
        if trained.parts is not None:
            made = [
                self._part(part, f"{group}.parts.{label}", f"{name}: {label}", classifier, classifier_key)
                for label, part in trained.parts.items()
            ]
            chain: Defense = build(node, group, parts=[part for part, _ in made])
            return chain, content_key(node=node, parts=[key for _, key in made], source=source_digest(type(chain)))
        facts: dict[str, Any] = {
            "classifier": classifier,
            "fresh": lambda: self._network(self.job.classifier, "classifier"),
        }
        about: dict[str, Any] = {"node": node}
        wanted = asked(node, group)
        if "fresh" in wanted:
            about["fresh"] = split(self.job.classifier, "classifier")[0]
            if getattr(classifier.network, "is_trained", False):  # it begins with weights that are not in the node
                torch.manual_seed(self.job.seed)
                about["start"] = own.digest(facts["fresh"]())
        torch.manual_seed(self.job.seed)
        module: Defense = build(node, group, **self.shape, **facts)
        if "classifier" in wanted and module.learns_from_classifier:
            about["classifier"] = classifier_key
        if trained.checkpoint is not None:
            return module, self._own_weights(module, Path(trained.checkpoint), f"{group}.checkpoint", about)
        if trained.fit is None:
            if type(module).training_step is not LightningModule.training_step:
                raise UserError(f"{group}.fit: missing; it says how to train, see conf/fit/default.yaml")
            return module, content_key(**about, source=source_digest(type(module), within="src.defenses"))
        if type(module).validation_step is LightningModule.validation_step:
            raise UserError(
                f"{group}.fit: {type(module).__name__} has no validation_step, by which the best epoch is known. "
                f"Expected one that logs {module.monitor[0]}"
            )
        callbacks = self._trained_on(trained, group, module, classifier, classifier_key, about)
        what = f"defense {name} on {self.data.spec.name}"
        later = {argument: value for argument, value in node.items() if argument in module.at_test}
        about["node"] = {argument: value for argument, value in node.items() if argument not in later}
        about["batch"] = self.job.eval_batch_size  # validation, which chooses the weights, may draw batch by batch
        behind = {"classifier": classifier_key} if "classifier" in wanted else {}
        key = self._trained(group, module, trained.fit, what, about, callbacks, told=behind)
        return module, content_key(training=key, at_test=later) if later else key

    def _part(
        self, choice: dict[str, Any], group: str, name: str, classifier: Classifier, classifier_key: str
    ) -> tuple[Defense, str]:
        """A part of a chain, whose errors name its own keys: a defense takes itself for the only one."""
        try:
            return self._defense(choice, group, name, classifier, classifier_key)
        except UserError as error:
            raise UserError(re.sub(r"\bdefense\.(?!parts\.)", f"{group}.", str(error))) from None

    def _trained_on(
        self,
        trained: Trained,
        group: str,
        module: Defense,
        classifier: Classifier,
        classifier_key: str,
        about: dict[str, Any],
    ) -> list[Callback]:
        """The attack a defense learns from, if its config names one."""
        source = trained.trained_on
        if source is None:
            return []
        assert trained.fit is not None
        norm = Norm.parse(source.norm)
        eps = max(self.data.spec.eps[norm]) if source.eps is None else parse_eps(source.eps, f"{group}.trained_on.eps")
        attack = build(source.attack, f"{group}.trained_on.attack") if source.attack else None
        judge = build(source.validation, f"{group}.trained_on.validation") if source.validation else attack
        if judge is None:
            raise UserError(
                f"{group}.trained_on.validation: missing; where trained_on.attack is null, an attack has to judge what "
                "is learnt. Use /attack@trained_on.validation: pgd"
            )
        if attack is None and source.warmup:
            raise UserError(
                f"{group}.trained_on.warmup={source.warmup:g}: would change nothing: trained_on.attack is null, the "
                "defense makes its own images, at the whole radius. Allowed: 0"
            )
        kinds = [kind for each in (attack, judge) if each for kind in each.kinds(norm)]
        itself = source.target == "itself"
        module.threat = ThreatModel(norm=norm, eps=eps, exhaust=True)
        about["trained_on"] = {
            **source.model_dump(),
            "source": source_digest(*kinds, ThreatModel, AttackCallback, within="src.attacks"),
            "norm": norm,
            "eps": eps,
            "classifier": None if itself else classifier_key,
        }
        return [
            AttackCallback(
                attack=attack,
                threat=module.threat,
                target=None if itself else classifier,
                seed=self.job.seed,
                search=torch.bfloat16 if trained.fit.precision == "bf16-mixed" else torch.float32,
                draw_radius=source.radius == "drawn",
                validation=judge,
                warmup=source.warmup,
            )
        ]

    def _trained(
        self,
        group: str,
        module: Classifier | Defense,
        recipe: Recipe,
        what: str,
        about: dict[str, Any],
        callbacks: list[Callback] | None = None,
        seed: int | None = None,
        told: Mapping[str, str] | None = None,
    ) -> str:
        """Weights found or made, loaded into ``module``; the key.

        ``about`` makes the key; ``told`` is written beside it.
        """
        seed = self.job.seed if seed is None else seed
        if self.job.limit.epochs is not None:
            recipe = recipe.model_copy(update={"epochs": min(recipe.epochs, self.job.limit.epochs)})
        about = {
            **about,
            "recipe": recipe.model_dump(),
            "data": self.data.train_fingerprint,
            "seed": seed,
            "source": source_digest(
                type(module), *networks_of(module), Recipe, augment, loaders, within="src.defenses"
            ),
            **beside(vars(self.job)),
        }
        prefix = group.replace(".parts.", "_")
        key = self.made[prefix] = content_key(**about)

        def train(folder: Path) -> None:
            extra = [build(node, f"callbacks.{name}") for name, node in self.job.callbacks.items()]
            fit.fit(
                module,
                self.data,
                recipe,
                config=self.job.trainer,
                folder=folder,
                seed=seed,
                callbacks=[*(callbacks or []), *extra],
                # One with a connection of its own cannot follow into other processes: the CSV is logged afterwards.
                logger=not fit.in_processes(self.job.trainer) and self.tracker.lightning_logger(prefix),
            )

        kind = "defense" if isinstance(module, Defense) else "classifier"  # a surrogate is one too
        folder = self.stages.make(
            kind,
            key,
            what=what,
            build=train,
            about={**(told or {}), **about},
            like=(what, f"{kind} on {self.data.spec.name}"),
            images=recipe.epochs * len(self.data.train),
        )
        if not self.stages.plan:
            load_weights(module, folder / "weights.pt", str(folder))
        if recipe.channels_last:
            module.to(memory_format=torch.channels_last)
        module.eval()
        return key

    @staticmethod
    def _own_weights(module: LightningModule, path: Path, key: str, about: dict[str, Any]) -> str:
        """Weights that the user brings; their key is their content, ``about`` and the source of what they are in."""
        load_weights(module, path, f"{key}={path}")
        module.eval()
        source = source_digest(type(module), *networks_of(module), within="src.defenses")
        return f"own-{content_key(**about, weights=file_digest(path), source=source)}"


def _spread(count: int, most: int = 5000) -> list[int]:
    """Positions all over a split, which may be in order of class."""
    return torch.linspace(0, count - 1, min(count, most)).round().long().tolist()
