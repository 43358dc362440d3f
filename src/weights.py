"""Weights that lie in files."""

from __future__ import annotations

from pathlib import Path

import torch

from src.errors import UserError


def load_weights(module: torch.nn.Module, path: Path, where: str) -> None:
    """A state dict, bare or inside a Lightning checkpoint, into a module of the same architecture or its network.

    Raises:
        UserError: absent, damaged, a pickle that would run code, or of another architecture.
    """
    if not path.is_file():
        raise UserError(f"{where}: no such file; expected weights saved with torch.save(module.state_dict(), path)")
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:
        if "weights_only" in str(error) or "Unsupported" in str(error):
            raise UserError(
                f"{where}: holds more than tensors and could run code; expected a plain state dict"
            ) from None
        raise UserError(
            f"{where}: damaged or not a checkpoint ({type(error).__name__}); expected a state dict"
        ) from None
    state = state.get("state_dict", state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise UserError(f"{where}: not a state dict; expected names with tensors")
    wanted = module.state_dict()
    network = getattr(module, "hardened", getattr(module, "network", None))
    if isinstance(network, torch.nn.Module) and set(state) != set(wanted):
        alone = {name.removeprefix("network."): value for name, value in state.items()}
        if set(alone) & set(network.state_dict()):  # of the network that answers: what else a training had is not asked
            module, state, wanted = network, alone, network.state_dict()
    wrong = sorted(
        name for name in set(wanted) | set(state)
        if name not in wanted or name not in state or wanted[name].shape != state[name].shape
    )  # fmt: skip
    if wrong:
        named = len(set(wanted) | set(state))
        raise UserError(f"{where}: of another architecture; {len(wrong)} of {named} tensors differ, first {wrong[0]}")
    module.load_state_dict(state)
