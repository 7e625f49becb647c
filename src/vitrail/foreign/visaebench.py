"""ViSAEBench, and Overcomplete, which trained its coders: sae.pt, model.safetensors or model.pt, and a config.

    z = select(ReLU(x @ W^T + b)),    x_hat = z @ D      (+ decoder.bias)        x is not centred by the coder

    topk       the k largest of a row
    batchtopk  z >= threshold: of the config, or `_running_threshold`
    jumprelu   a threshold for each latent

Two readings of one file. ViSAEBench's GenericSAE takes the stored dictionary as it is, times exp(multiplier).
Overcomplete puts its rows on the unit sphere first, takes the exponential of JumpReLU's thresholds, and also has
encoders without a bias: `--peer overcomplete` reads it so. Activations are centred and divided by one number outside of
the file.
"""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitrail.coders.base import SparseCoder
from vitrail.files import read_json, read_tensors
from vitrail.foreign.base import (
    Opened,
    Peer,
    Weights,
    build,
    exactly,
    folder_of,
    next_below,
    positive_int,
    state_of,
    thresholded,
)
from vitrail.foreign.pickles import read_pickle

CONFIGS = ("config.json", "config.yaml", "config.yml")
WEIGHTS = ("sae.pt", "model.safetensors", "model.pt")
SIMPLE = ("encoder.weight", "encoder.bias", "decoder.weight")
TRAINED = ("encoder.final_block.0.weight", "encoder.final_block.0.bias", "dictionary._weights")
UNTIED = ("encoder.weight", "dictionary._weights")
NOTE = "takes activations centred and divided by one standard deviation ((x - mean) / s), not raw ones"


def recognises(path: Path) -> bool:
    folder = folder_of(path)
    config, weights = _first(folder, CONFIGS), _first(folder, WEIGHTS)
    if config is None or weights is None or starts_with_brace(weights):  # saev writes an sae.pt too
        return False
    settings = read_config(config)
    return bool({"activation", "sae_type", "architecture"} & set(settings)) and "hook_point_layer" not in settings


def read(path: Path, *, overcomplete: bool = False) -> Opened:
    folder = folder_of(path)
    config_path, weights_path = _first(folder, CONFIGS), _first(folder, WEIGHTS)
    if config_path is None or weights_path is None:
        raise ValueError(f"{folder} needs one of {', '.join(WEIGHTS)} and one of {', '.join(CONFIGS)}.")
    config = read_config(config_path)
    if weights_path.suffix == ".safetensors":
        tensors = read_tensors(weights_path, "ViSAEBench weights")
    else:
        tensors = state_of(read_pickle(weights_path), weights_path)
    coder = make(config, tensors, weights_path, overcomplete)
    point = config.get("hook_point") or config.get("hook_name")
    return Opened(coder, (config_path, weights_path), config, point=point, notes=[NOTE], outside="mean_std")


def make(config: dict[str, Any], tensors: dict[str, Tensor], path: Path, overcomplete: bool) -> SparseCoder:
    kind = str(config.get("activation", config.get("sae_type", config.get("architecture", "topk")))).lower()
    if kind not in ("topk", "batchtopk", "jumprelu"):
        raise ValueError(f"{path}: the activation is {kind!r}; ViSAEBench has topk, batchtopk, jumprelu.")
    limits = ["jump_thresholds", "thresholds"] if kind == "jumprelu" else ["_running_threshold"]
    weights = weights_of(tensors, path, limits, overcomplete)
    same: dict[str, Any] = {"subtracts_b_dec": False}  # the bias is added at the end only
    k = config.get("k")
    if kind == "topk":
        return build("topk", weights, k=positive_int(k, "k", path), **same)
    if kind == "batchtopk":
        limit = config.get("threshold", tensors.get("_running_threshold"))
        if limit is None:
            raise ValueError(
                f"{path} has no threshold, neither in its config nor as _running_threshold, so no row can be encoded "
                f"on its own. (ViSAEBench would take 0, which is a ReLU.) Write the training's into the config."
            )
        limits_ = next_below(torch.as_tensor(limit).reshape(1))
        known = k if isinstance(k, int) and 1 <= k <= weights.W_dec.shape[0] else None
        return thresholded(weights, limits_, k=known, estimator="ViSAEBench, running threshold", **same)
    if overcomplete:
        exactly(tensors, ("thresholds",), path, optional=set(tensors))
        return thresholded(weights, next_below(tensors["thresholds"].exp()), estimator="Overcomplete, learned", **same)
    if "jump_thresholds" not in tensors:
        raise ValueError(
            f"{path} lacks jump_thresholds. ViSAEBench takes `thresholds` as they are, Overcomplete their exponential; "
            f"say which with --peer overcomplete, or rename them."
        )
    return thresholded(weights, tensors["jump_thresholds"], estimator="ViSAEBench, learned", **same)


def weights_of(tensors: dict[str, Tensor], path: Path, limits: list[str], overcomplete: bool) -> Weights:
    if "dictionary._weights" not in tensors and not overcomplete:
        exactly(tensors, SIMPLE, path, optional=["decoder.bias", *limits])
        encoder, b_enc, dictionary = (tensors[name].float() for name in SIMPLE)
        return Weights(
            encoder.t(), b_enc, dictionary, tensors.get("decoder.bias", dictionary.new_zeros(dictionary.shape[1]))
        )
    names = UNTIED if overcomplete and "encoder.weight" in tensors else TRAINED
    exactly(tensors, names, path, optional=["encoder.bias", "dictionary.multiplier", *limits])
    encoder, dictionary = tensors[names[0]].float(), tensors["dictionary._weights"].float()
    if overcomplete:
        dictionary = dictionary / (torch.linalg.vector_norm(dictionary, dim=1, keepdim=True) + 1e-8)
    dictionary = dictionary * tensors.get("dictionary.multiplier", torch.zeros(())).exp()
    b_enc = tensors.get(TRAINED[1], tensors.get("encoder.bias", encoder.new_zeros(len(encoder)))).float()
    return Weights(encoder.t(), b_enc, dictionary, dictionary.new_zeros(dictionary.shape[1]))


def read_config(path: Path) -> dict[str, Any]:
    if path.suffix == ".json":
        settings = read_json(path, "config")
    else:
        try:
            import yaml
        except ImportError as error:
            raise ImportError(
                f"{path} is YAML, which needs PyYAML: pip install vitrail[hub], or rewrite it as config.json."
            ) from error
        try:
            settings = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is not readable YAML: {str(error).splitlines()[0]}.") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path} holds no settings by name.")
    return {str(name): value for name, value in settings.items()}


def starts_with_brace(path: Path) -> bool:
    with path.open("rb") as stream:
        return stream.read(1) == b"{"


def _first(folder: Path, names: tuple[str, ...]) -> Path | None:
    return next((folder / name for name in names if (folder / name).is_file()), None)


LAYOUT = f"a folder with {' or '.join(WEIGHTS)} and {' or '.join(CONFIGS)}"
PEER = Peer("visaebench", LAYOUT, recognises, read)
OVERCOMPLETE = Peer("overcomplete", f"{LAYOUT}; only if named", lambda path: False, partial(read, overcomplete=True))
