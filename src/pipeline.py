"""The whole story on one page: data → classifier → defense → attack → judge → record."""

from __future__ import annotations

import logging
import platform
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from src import fit, records
from src.callbacks.attack_callback import AttackCallback, Replay
from src.callbacks.collect import Collect
from src.config import Job, build
from src.data.base import ImageDataModule
from src.keys import content_key, source_digest
from src.records import Record, wilson
from src.stages import Stages
from src.threat import Access, ThreatModel
from src.tracking import NoTracker
from src.trained import Workshop

log = logging.getLogger(__name__)

PICTURES = 8  # examples kept beside a record
LOOKED_AT = 32  # first images among which the examples are chosen


@dataclass(frozen=True, kw_only=True)
class Names:
    """What the choices are called, for the columns of the table."""

    dataset: str
    classifier: str
    defense: str
    attack: str
    variant: str = ""


def run(job: Job, names: Names, out: Path, tracker: NoTracker) -> Iterator[Record]:
    """Every cell of a job, each written to ``out/records`` as soon as it is known.

    Raises:
        UserError: input that cannot work, with one line for the user.
    """
    fit.check_devices(job.trainer)
    stages = Stages(Path(job.paths.artifacts))
    data: ImageDataModule = build(job.dataset, "dataset")
    data.prepare()
    data.eval_batch_size = job.eval_batch_size
    workshop = Workshop(job, data, stages, tracker)
    classifier, classifier_key = workshop.classifier(names.classifier)
    defended, defense_key = workshop.defense(names.defense, classifier, classifier_key)
    bench = Bench(job, names, data, stages, classifier, defended, classifier_key, defense_key)
    for eps in job.eps(data.spec.eps.get(job.norm, ())):
        for access in job.access:
            yield bench.cell(eps, access, out / "records")


class Bench:
    """One defended classifier on one test split, measured cell by cell."""

    def __init__(
        self,
        job: Job,
        names: Names,
        data: ImageDataModule,
        stages: Stages,
        classifier: Any,
        defended: Any,
        classifier_key: str,
        defense_key: str,
    ) -> None:
        self.job, self.names, self.data, self.stages = job, names, data, stages
        self.classifier, self.defended = classifier, defended
        self.keys = {"data": data.fingerprint, "classifier": classifier_key, "defense": defense_key}
        self.attack = build(job.attack, "attack")

    def cell(self, eps: float, access: Access, folder: Path) -> Record:
        """The record of a cell, found in the cache or measured; a copy with its pictures lands in ``folder``."""
        threat = ThreatModel(norm=self.job.norm, eps=eps, targeted=self.job.threat.targeted)
        key = self._key(threat, access)
        store = self.stages.root / "records"
        path = store / f"{key}.json"
        if path.exists():
            record = records.load(path)
            log.info("record %s eps %.4g %s: found (%s)", self.names.attack, eps, access, key)
        else:
            record, sidecar = self._measure(key, threat, access)
            store.mkdir(parents=True, exist_ok=True)
            records.save_sidecar(store / f"{key}.npz", sidecar)
            records.save(record, store)
        folder.mkdir(parents=True, exist_ok=True)
        records.save(record, folder)
        if (store / f"{key}.npz").exists():
            shutil.copyfile(store / f"{key}.npz", folder / f"{key}.npz")
        return record

    def _key(self, threat: ThreatModel, access: Access) -> str:
        return content_key(
            names=asdict(self.names),
            **self.keys,
            attack=self._attack_parts(threat),
            access=access,
            draws=self.job.eot_draws if self.defended.stochastic else 1,
            source=source_digest(type(self.defended), Collect, Bench),
        )

    def _attack_parts(self, threat: ThreatModel) -> dict[str, Any]:
        return {
            "node": self.job.attack,
            "threat": asdict(threat),
            "seed": self.job.seed,
            "batch": self.job.eval_batch_size,
            "source": source_digest(type(self.attack), ThreatModel, AttackCallback),
        }

    def _measure(self, key: str, threat: ThreatModel, access: Access) -> tuple[Record, dict[str, Any]]:
        started = time.perf_counter()
        clean = self._clean
        bare = self.defended.defense is None
        made = self._attacked_bare(threat) if access is Access.GRAY_BOX or bare else None
        if made is None:
            seen = self._through_defense(threat)
        else:
            seen = made if bare else self._shown_to_defense(made["image"])
        attack = made or seen
        right, held = clean["defended"] == clean["label"], seen["prediction"] == clean["label"]
        n, low_high = len(right), wilson(int(held.sum()), len(right))
        attempted = attack["attempted"]
        turned = (seen["prediction"] != clean["label"]) & right & attempted
        if threat.targeted:
            turned = attack["success"]
        record = Record(
            key=key,
            **asdict(self.names),
            norm=threat.norm,
            eps=threat.eps,
            access=access,
            seed=self.job.seed,
            targeted=threat.targeted,
            n=n,
            correct_bare=int((clean["bare"] == clean["label"]).sum()),
            correct_defended=int(right.sum()),
            correct_attacked=int(held.sum()),
            correct_attacked_bare=int((made["prediction"] == clean["label"]).sum()) if made else None,
            clean_accuracy=float((clean["bare"] == clean["label"]).double().mean()),
            clean_accuracy_defended=float(right.double().mean()),
            robust_accuracy=float(held.double().mean()),
            robust_accuracy_low=low_high[0],
            robust_accuracy_high=low_high[1],
            robust_accuracy_bare=float((made["prediction"] == clean["label"]).double().mean()) if made else None,
            attack_success_rate=_share(turned, right & attempted),
            distance_median=_over(attack["distance"], attempted, "median"),
            distance_max=_over(attack["distance"], attempted, "amax"),
            forward_passes=_over(attack["forward_passes"], attempted, "mean"),
            backward_passes=_over(attack["backward_passes"], attempted, "mean"),
            attack_ms_per_image=_over(attack["attack_seconds"] * 1e3, attempted, "mean"),
            defense_ms_per_image=float(clean["seconds"].mean() * 1e3),
            stages=self.keys,
            config=self.job.model_dump(mode="json"),
            versions={name: version(name) for name in ("torch", "pytorch-lightning", "hydra-core", "numpy")},
            host=platform.node(),
            device=str(self.job.trainer.get("accelerator", "auto")),
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            wall_seconds=round(time.perf_counter() - started, 3),
        )
        log.info("%s %s eps %.4g %s: robust accuracy %.4f (n=%d)", self.names.defense, self.names.attack,
                 threat.eps, access, record.robust_accuracy, n)  # fmt: skip
        return record, self._sidecar(clean, seen, attack)

    @cached_property
    def _clean(self) -> dict[str, Tensor]:
        """Clean predictions of the bare classifier and of the defended model."""
        defended = self._test(self.defended)
        bare = self._test(self.classifier)["prediction"] if self.defended.defense else defended["prediction"]
        return {
            "index": defended["index"],
            "label": defended["label"],
            "bare": bare,
            "defended": defended["prediction"],
            "seconds": defended["seconds"],
        }

    def _attacked_bare(self, threat: ThreatModel) -> dict[str, Tensor]:
        """Attacked images made on the bare classifier: a stage, shared by every defense."""
        threat = ThreatModel(norm=threat.norm, eps=threat.eps, targeted=threat.targeted, exhaust=True)
        parts = {
            "data": self.keys["data"],
            "classifier": self.keys["classifier"],
            **self._attack_parts(threat),
        }
        what = f"examples {self.names.attack} {threat.norm} eps {threat.eps:.4g} on {self.names.classifier}"

        def make(folder: Path) -> None:
            callback = AttackCallback(attack=self.attack, threat=threat, seed=self.job.seed)
            self._test(
                self.classifier,
                callback,
                path=folder / "examples.pt",
                keep={"image": None, "clean": LOOKED_AT},
            )

        folder = self.stages.make("examples", content_key(**parts), what=what, build=make, about=parts)
        examples: dict[str, Tensor] = torch.load(folder / "examples.pt", weights_only=True)
        return examples

    def _shown_to_defense(self, images: Tensor) -> dict[str, Tensor]:
        return self._test(self.defended, Replay(images), keep={"image": LOOKED_AT, "clean": LOOKED_AT})

    def _through_defense(self, threat: ThreatModel) -> dict[str, Tensor]:
        """White box: the attack goes through the defense, by the defense's declaration."""
        target = self.defended.adaptive(self.job.eot_draws)
        callback = AttackCallback(attack=self.attack, threat=threat, target=target, seed=self.job.seed)
        return self._test(self.defended, callback, keep={"image": LOOKED_AT, "clean": LOOKED_AT})

    def _test(self, module: Any, *callbacks: Any, path: Path | None = None, keep: Any = None) -> dict[str, Tensor]:
        progress = [build(node, f"callbacks.{name}") for name, node in self.job.callbacks.items()]
        with tempfile.TemporaryDirectory() as scratch:
            return fit.evaluate(
                module,
                self.data,
                config=self.job.trainer,
                path=path or Path(scratch) / "collected.pt",
                seed=self.job.seed,
                callbacks=[*callbacks, *progress],
                keep=keep,
            )

    @torch.no_grad()
    def _sidecar(self, clean: dict[str, Tensor], seen: dict[str, Tensor], attack: dict[str, Tensor]) -> dict[str, Any]:
        """Verdicts of every image, and a few pictures, so that figures need no model."""
        # Right before the attack with and without the defense: gray_box and white_box then show the same images.
        right = (clean["bare"] == clean["label"]) & (clean["defended"] == clean["label"])
        chosen = right[: len(seen["clean"])].nonzero().flatten()[:PICTURES]
        before, after = seen["clean"][chosen], seen["image"][chosen]
        torch.manual_seed(self.job.seed)
        names = np.array(self.data.spec.classes, dtype=np.str_)
        pictures = {
            "clean": before,
            "adversarial": after,
            "purified_clean": self.defended.purified(before),
            "purified": self.defended.purified(after),
            "picture_label": clean["label"][chosen],
            "picture_clean_prediction": clean["defended"][chosen],
            "picture_prediction": seen["prediction"][chosen],
            "picture_bare_prediction": self.classifier(after).argmax(dim=1),
        }
        verdicts = {
            "index": clean["index"],
            "label": clean["label"],
            "clean_prediction": clean["defended"],
            "prediction": seen["prediction"],
            "attempted": attack["attempted"],
            "distance": attack["distance"],
        }
        return {"class_names": names} | {name: value.numpy() for name, value in (pictures | verdicts).items()}


def _share(part: Tensor, whole: Tensor) -> float | None:
    return float(part.sum() / whole.sum()) if bool(whole.any()) else None


def _over(values: Tensor, mask: Tensor, how: str) -> float | None:
    """A figure over the images the attack worked on; None when there are none."""
    return float(getattr(values[mask].double(), how)()) if bool(mask.any()) else None
