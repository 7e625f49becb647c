"""Training checkpoints: a folder per checkpoint, `checkpoint-<step>`, that is whole or absent.

    state.json           config, coder, source and its position, counters, length of the log
    tensors.safetensors  coder/..., optimizer/<parameter>/..., average/..., rows_since_fired, fired_since_line, rng

The folder is written under another name, flushed and renamed; only then are older ones removed. So a kill at any moment
leaves at least the last whole checkpoint, and the newest `checkpoint-*` is always whole.
"""

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitrail.files import read_json, read_tensors, write_json, write_tensors

FORMAT = "vitrail-training"
VERSION = 2


def write_checkpoint(out: Path, step: int, state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    final = out / f"checkpoint-{step:09d}"
    writing = out / f".{final.name}.writing"
    shutil.rmtree(writing, ignore_errors=True)
    write_tensors(writing / "tensors.safetensors", tensors)
    write_json(writing / "state.json", {"format": FORMAT, "version": VERSION, "step": step, **state})
    _flush_folder(writing)
    writing.rename(final)
    _flush_folder(out)
    for older in _folders(out)[:-1]:
        shutil.rmtree(older)


def read_checkpoint(out: Path) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """The newest checkpoint in the folder; None if there is none."""
    folders = _folders(out)
    if not folders:
        return None
    state = read_json(folders[-1] / "state.json", "training checkpoint")
    if state.get("format") != FORMAT or state.get("version") != VERSION:
        raise ValueError(
            f"{folders[-1]} is not a training checkpoint this vitrail reads: format {state.get('format')!r}, "
            f"version {state.get('version')}; {FORMAT!r}, version {VERSION} is read. Train into another folder."
        )
    return state, read_tensors(folders[-1] / "tensors.safetensors", "training checkpoint's tensors")


def remove_checkpoints(out: Path) -> None:
    for folder in [*_folders(out), *out.glob(".checkpoint-*.writing")]:
        shutil.rmtree(folder)


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Its moments and step counts, by number of parameter: Adam's state without Python objects."""
    state = optimizer.state_dict()["state"]
    return {f"optimizer/{i}/{key}": tensor for i, tensors in state.items() for key, tensor in tensors.items()}


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        kind, _, rest = name.partition("/")
        if kind != "optimizer":
            continue
        number, key = rest.split("/")
        parameter = parameters[int(number)]
        if tensor.shape == parameter.shape:
            # empty_like keeps the parameter's memory layout (W_enc lies transposed); fused Adam walks raw memory.
            tensor = torch.empty_like(parameter).copy_(tensor)
        state.setdefault(int(number), {})[key] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _folders(out: Path) -> list[Path]:
    return sorted(out.glob("checkpoint-*"))


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
