"""Any LightningModule is attacked without knowing it."""

from __future__ import annotations

import pytest
import torch
from pytorch_lightning import LightningModule, Trainer
from torch.utils.data import DataLoader, TensorDataset

from src import fit
from src.attacks.fgsm import FGSM
from src.attacks.pgd import PGD
from src.callbacks.attack_callback import AttackCallback
from src.callbacks.float32 import Float32
from src.errors import UserError
from src.keys import seed_of
from src.threat import ThreatModel
from tests.conftest import Linear


class Foreign(LightningModule):
    """Somebody's module: batches are lists, and nothing in it speaks of attacks."""

    def __init__(self) -> None:
        super().__init__()
        self.network = Linear(side=4)
        self.seen: list[torch.Tensor] = []

    def forward(self, x):
        return self.network(x)

    def training_step(self, batch, batch_idx):
        self.seen.append(batch[0].detach().clone())
        return torch.nn.functional.cross_entropy(self(batch[0]), batch[1])

    def test_step(self, batch, batch_idx):
        self.seen.append(batch[0].detach().clone())
        self.log("right", (self(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.fixture
def loader() -> DataLoader:
    x = torch.rand(32, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(x, Linear(side=4)(x).argmax(1)), batch_size=16)


def trainer(callback: AttackCallback, **options) -> Trainer:
    return Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, callbacks=[callback],
        enable_model_summary=False, inference_mode=False, **options,
    )  # fmt: skip


def test_foreign_module_is_attacked_at_test(loader: DataLoader) -> None:
    threat = ThreatModel(norm="linf", eps=0.3)
    module = Foreign()
    (clean,) = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False).test(
        module, loader, verbose=False
    )
    (attacked,) = trainer(AttackCallback(attack=PGD(steps=5), threat=threat)).test(module, loader, verbose=False)
    assert clean["right"] == 1.0
    assert attacked["right"] < 0.9
    moved = (module.seen[2] - module.seen[0]).abs().amax()
    assert 0 < moved <= 0.3 + 1e-6


def test_an_attack_does_not_draw_what_the_verdict_draws(loader: DataLoader) -> None:
    """The verdict of a random model is drawn from (seed, first image): noise that knew it would be no control."""
    seeds: list[int] = []

    class Notes(FGSM):
        def run(self, model, x, y, threat, *, generator):
            seeds.append(generator.initial_seed())
            return super().run(model, x, y, threat, generator=generator)

    attack = AttackCallback(attack=Notes(), threat=ThreatModel(norm="linf", eps=0.1), seed=3)
    trainer(attack).test(Foreign(), loader, verbose=False)
    assert len(set(seeds)) == 2
    assert not {seed_of(3, first) for first in range(32)} & set(seeds)


@pytest.mark.parametrize("stage", ["fit", "test"])
def test_the_target_goes_to_the_device_and_back(
    loader: DataLoader, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, moves = Linear(side=4), []
    monkeypatch.setattr(target, "to", lambda device: moves.append(("to", str(device))))
    monkeypatch.setattr(target, "cpu", lambda: moves.append("back"))
    callback = AttackCallback(attack=FGSM(), threat=ThreatModel(norm="linf", eps=0.2), target=target)
    getattr(trainer(callback, max_epochs=1), stage)(Foreign(), loader)
    assert moves == [("to", "cpu"), "back"]


def test_foreign_module_learns_from_attacked_batches(loader: DataLoader) -> None:
    module = Foreign()
    trainer(AttackCallback(attack=FGSM(), threat=ThreatModel(norm="linf", eps=0.2)), max_epochs=1).fit(module, loader)
    clean = torch.cat([x for x, _ in loader])
    moved = [float((seen - part).abs().max()) for seen, part in zip(module.seen, clean.split(16), strict=True)]
    assert all(0 < size <= 0.2 + 1e-6 for size in moved)
    assert moved[0] != moved[1]  # each batch has a radius of its own
    assert module.training


def test_a_batch_it_cannot_change_is_refused() -> None:
    callback = AttackCallback(attack=FGSM(), threat=ThreatModel(norm="linf", eps=0.2))
    with pytest.raises(UserError, match="batches are tuple"):
        callback.on_test_batch_start(None, Foreign(), (torch.rand(1, 1, 4, 4), torch.zeros(1)), 0)  # type: ignore[arg-type]


def test_training_attacks_every_image_with_the_whole_radius_where_asked() -> None:
    """At test a misclassified image is left alone; to learn from, it is attacked like any other."""
    module = Foreign()
    x = torch.rand(16, 1, 4, 4, generator=torch.Generator().manual_seed(0)) * 0.5 + 0.25
    wrong = 1 - module(x).argmax(1)
    threat = ThreatModel(norm="linf", eps=0.1)
    callback = AttackCallback(attack=FGSM(), threat=threat, draw_radius=False)
    batch = {"image": x.clone(), "label": wrong}
    attack = FGSM()
    assert not attack(module, x, wrong, threat).attempted.any()
    callback._perturb(attack, module, batch, seed=0)
    torch.testing.assert_close((batch["image"] - x).abs().amax(dim=(1, 2, 3)), torch.full((16,), 0.1))
    assert torch.equal(batch["clean"], x)
    assert "verdict" not in batch


def test_validation_may_have_an_attack_of_its_own() -> None:
    module, x = Foreign(), torch.rand(4, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    labels = module(x).argmax(1)
    threat = ThreatModel(norm="l2", eps=0.5)
    callback = AttackCallback(attack=FGSM(), threat=threat, validation=PGD(steps=3), draw_radius=False)
    trainer = type("T", (), {"global_rank": 0, "current_epoch": 0})()
    learnt, judged = {"image": x, "label": labels}, {"image": x, "label": labels}
    callback.on_train_batch_start(trainer, module, learnt, 0)
    callback.on_validation_batch_start(trainer, module, judged, 0)
    expected = PGD(steps=3).perturb(
        module, x, labels, threat, generator=torch.Generator().manual_seed(seed_of(0, 0, 0))
    )
    assert torch.equal(judged["image"], expected)
    assert not torch.equal(learnt["image"], judged["image"])


def test_every_trainer_keeps_convolutions_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    made = fit.trainer({"_target_": "pytorch_lightning.Trainer", "accelerator": "cpu", "devices": 1, "logger": False})
    assert not torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = True  # as in a process that is started later
    (own,) = [callback for callback in made.callbacks if isinstance(callback, Float32)]
    own.setup(made, None, "test")
    assert not torch.backends.cudnn.allow_tf32
