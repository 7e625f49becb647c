"""Weights from a file on this machine, into a module, completely or not at all."""

import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from vitrail.files import read_tensors

_PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl")


def read_weights(path: Path, *, allow_pickle: bool = False) -> dict[str, Tensor]:
    """A state dict: safetensors, or, only if asked for, a pickle."""
    if path.suffix not in _PICKLES:
        return read_tensors(path, "weights file")
    if not allow_pickle:
        raise ValueError(
            f"{path} is a pickle, which can run code when it is opened. Convert it to safetensors, or, "
            "if you trust its author, pass allow_pickle=True."
        )
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:  # it holds more than tensors
        state = torch.load(path, map_location="cpu", weights_only=False)
    for key in ("state_dict", "model"):  # where training scripts put it
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(
            f"{path} does not hold a state dict: names to tensors, on top or under 'state_dict' or 'model'."
        )
    return state


def load_exactly(module: nn.Module, state: Mapping[str, Tensor], *, what: str) -> None:
    """load_state_dict, whose complaint names the missing, unexpected and misshapen keys, and changes nothing."""
    own = module.state_dict()
    problems = {
        "missing": [name for name in own if name not in state],
        "unexpected": [name for name in state if name not in own],
        "of another shape": [
            f"{name} {tuple(state[name].shape)}, not {tuple(own[name].shape)}"
            for name in own
            if name in state and state[name].shape != own[name].shape
        ],
    }
    found = [f"{kind}: {_some(names)}" for kind, names in problems.items() if names]
    if found:
        raise ValueError(f"these weights are not those of {what}. {'; '.join(found)}.")
    module.load_state_dict(dict(state))


def _some(names: list[str], most: int = 6) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
