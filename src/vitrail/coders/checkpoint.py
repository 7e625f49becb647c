"""A coder on disk: a folder with coder.json (what it is) and weights.safetensors (its parameters and buffers).

    coder.json: format, version, architecture, config (constructor arguments), d_in, d_sae, weights_sha256, metadata

No pickle: opening a stranger's coder runs none of its code. docs/coders.md describes the format.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitrail.coders.base import SparseCoder
from vitrail.coders.table import make_coder
from vitrail.files import file_digest, read_json, read_tensors, write_json, write_tensors
from vitrail.provenance import provenance

FORMAT = "vitrail-coder"
VERSION = 1


def save_coder(path: Path | str, coder: SparseCoder, metadata: Mapping[str, Any] | None = None) -> None:
    """Write the folder. `metadata`: hook point, tokens, backbone, digests, training; provenance is added."""
    folder = Path(path)
    weights = folder / "weights.safetensors"
    write_tensors(weights, coder.state_dict())
    description = {
        "format": FORMAT,
        "version": VERSION,
        "architecture": coder.name,
        "config": coder.config,
        "d_in": coder.d_in,
        "d_sae": coder.d_sae,
        "weights_sha256": file_digest(weights),
        "metadata": {
            "normalization": coder.normalization,
            "calibration": coder.calibration,
            "provenance": provenance(),
            **(metadata or {}),
        },
    }
    write_json(folder / "coder.json", description)  # last: a folder with a coder.json is whole


def load_coder(path: Path | str, *, device: torch.device | str = "cpu") -> SparseCoder:
    """The coder, in eval mode. Raises if the folder is not whole, was altered, or needs a newer vitrail."""
    folder = Path(path)
    description = _description(folder)
    weights = folder / "weights.safetensors"
    tensors = read_tensors(weights, "coder's weights")
    if (digest := file_digest(weights)) != description["weights_sha256"]:
        raise ValueError(
            f"{weights} is not the file that {folder / 'coder.json'} describes: its sha256 begins {digest[:12]}, "
            f"{description['weights_sha256'][:12]} is recorded. It was altered or replaced; copy the folder again."
        )
    try:
        coder = make_coder(description["architecture"], **description["config"])
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{folder / 'coder.json'} does not describe a coder this vitrail can build: {error}"
        ) from error
    widths = (description["d_in"], description["d_sae"])
    if widths != (coder.d_in, coder.d_sae):
        raise ValueError(
            f"{folder / 'coder.json'} says d_in={widths[0]}, d_sae={widths[1]}, but its config makes a coder of "
            f"d_in={coder.d_in}, d_sae={coder.d_sae}. It was edited; copy the folder again."
        )
    _load_tensors(coder, tensors, weights)
    coder.calibration = dict(description["metadata"].get("calibration", {}))
    return coder.to(device).eval()


def coder_metadata(path: Path | str) -> dict[str, Any]:
    """What was recorded beside the weights: hook point, tokens, backbone, training, calibration, provenance."""
    return _description(Path(path))["metadata"]


def _description(folder: Path) -> dict[str, Any]:
    path = folder / "coder.json"
    description = read_json(path, "coder")
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        raise ValueError(f"{path} does not describe a vitrail coder: its format is not {FORMAT!r}.")
    if description.get("version") != VERSION:
        raise ValueError(
            f"{path} has format version {description.get('version')}; this vitrail reads version {VERSION}. "
            f"Upgrade vitrail to open it."
        )
    needed = ("architecture", "config", "d_in", "d_sae", "weights_sha256", "metadata")
    if missing := [name for name in needed if name not in description]:
        raise ValueError(f"{path} is not whole: it lacks {', '.join(missing)}.")
    return description


def _load_tensors(coder: SparseCoder, tensors: dict[str, Tensor], path: Path) -> None:
    expected = coder.state_dict()
    if set(tensors) != set(expected):
        differing = ", ".join(sorted(set(tensors) ^ set(expected)))
        raise ValueError(f"{path} does not hold the tensors of a {coder.name} coder; the lists differ in: {differing}.")
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape:
            raise ValueError(
                f"{path}: {name} has shape {tuple(tensor.shape)}; a {coder.name} coder with d_in={coder.d_in} and "
                f"d_sae={coder.d_sae} has {tuple(expected[name].shape)}."
            )
    coder.to(tensors["W_dec"].dtype).load_state_dict(tensors)
