"""Prisma (ViT-Prisma): weights.pt with config.json, or one older .pt of {"cfg": a pickled config, "state_dict": ...}.

    z = act((n(x) - b_dec) @ W_enc + b_enc),    x_hat = n^-1(z @ W_dec + b_dec)

n is layer_norm (the default), constant_norm_rescale or nothing. TopK ranks pre-activations, then applies the ReLU.
Transcoders end in n^-1(z @ W_dec + b_dec_out), with the numbers of the input's row. Some versions of 2024 subtracted
b_dec from x instead of n(x); weights are read as the released code reads them. The pickled config never gets its class
(pickles.py).
"""

from pathlib import Path
from typing import Any

from torch import Tensor

from vitrail.coders.base import SparseCoder
from vitrail.files import read_json
from vitrail.foreign.base import Opened, Peer, Weights, build, exactly, gated, positive_int, state_of, transcoder
from vitrail.foreign.pickles import attributes, read_pickle

CONFIG = "config.json"
NORMALIZATIONS = {"layer_norm": "layer_norm", "constant_norm_rescale": "row_norm"}
FOUR = ("W_enc", "b_enc", "W_dec", "b_dec")


def recognises(path: Path) -> bool:
    weights = weights_file(path)
    if weights is None:
        return False
    if (config := weights.parent / CONFIG).is_file():
        settings = read_json(config, "config")
        return isinstance(settings, dict) and "hook_point_layer" in settings and "layer_subtype" in settings
    content = read_pickle(weights)
    return isinstance(content, dict) and {"cfg", "state_dict"} <= set(content)


def read(path: Path) -> Opened:
    weights_path = weights_file(path)
    if weights_path is None:
        raise ValueError(f"{path} holds no single .pt file. Name the weights themselves: FOLDER/weights.pt.")
    content, files = read_pickle(weights_path), (weights_path,)
    if isinstance(content, dict) and {"cfg", "state_dict"} <= set(content):
        settings, content = attributes(content["cfg"]), content["state_dict"]
    else:
        config_path = weights_path.parent / CONFIG
        settings, files = read_json(config_path, "Prisma config"), (config_path, weights_path)
    if not isinstance(settings, dict):
        raise ValueError(f"the config of {weights_path} holds no settings by name.")
    coder = make(settings, state_of(content, weights_path), weights_path)
    point = settings.get("hook_point") or f"blocks.{settings.get('hook_point_layer')}.{settings.get('layer_subtype')}"
    notes = []
    if settings.get("normalize_activations", "layer_norm") == "layer_norm":
        notes.append("codes are Prisma's; x_hat - mean is larger by a factor 1 + 1e-5/sd: our inverse is exact")
    if settings.get("is_transcoder"):
        notes.append(f"reconstructs blocks.{settings.get('out_hook_point_layer')}.{settings.get('layer_out_subtype')}")
    if settings.get("cls_token_only"):
        notes.append("trained on the CLS token only")
    return Opened(coder, files, settings, point=point, notes=notes)


def make(settings: dict[str, Any], tensors: dict[str, Tensor], path: Path) -> SparseCoder:
    architecture = settings.get("architecture", "standard")
    is_transcoder = bool(settings.get("is_transcoder")) or "b_dec_out" in tensors
    normalization = NORMALIZATIONS.get(settings.get("normalize_activations", "layer_norm"), "none")
    if architecture == "gated" and not is_transcoder:
        exactly(tensors, (*FOUR, "b_gate", "r_mag", "b_mag"), path)  # its b_enc is not used
        weights = Weights(tensors["W_enc"], tensors["b_gate"], tensors["W_dec"], tensors["b_dec"])
        return gated(weights, tensors["r_mag"], tensors["b_mag"], subtracts_b_dec=True, normalization=normalization)
    if architecture != "standard":
        raise ValueError(f"{path}: the architecture is {architecture!r}; Prisma's own code opens standard and gated.")
    coder, config = activation(settings, path)
    of_transcoder = ["b_dec_out", *(["W_skip"] if "W_skip" in tensors else [])] if is_transcoder else []
    exactly(tensors, [*FOUR, *of_transcoder], path)
    weights = Weights(*(tensors[name] for name in FOUR))
    if not is_transcoder:
        return build(coder, weights, subtracts_b_dec=True, normalization=normalization, **config)
    W_skip = tensors.get("W_skip")
    return transcoder(
        f"{coder}_transcoder",
        weights,
        tensors["b_dec_out"],
        None if W_skip is None else W_skip.t(),
        normalization=normalization,
        output_normalization="none" if normalization == "none" else "input_row",
        **config,
    )


def activation(settings: dict[str, Any], path: Path) -> tuple[str, dict[str, Any]]:
    """The name of our architecture, and what its constructor needs to know."""
    name, options = settings.get("activation_fn_str", "relu"), settings.get("activation_fn_kwargs") or {}
    if name == "relu":
        return "relu", {"l1": float(settings.get("l1_coefficient") or 0.0)}
    after = options.get("postact_fn")
    if name == "topk" and (after is None or str(after.get("class", "")).endswith("activation.ReLU")):
        return "topk", {"k": positive_int(options.get("k"), "activation_fn_kwargs.k", path)}
    raise ValueError(f"{path}: the activation is {name!r} with {options}; vitrail's coders have ReLU and TopK.")


def weights_file(path: Path) -> Path | None:
    """The .pt of a folder that has only one, or the file itself."""
    if path.is_file():
        return path if path.suffix == ".pt" else None
    found = sorted(path.glob("*.pt")) if path.is_dir() else []
    named = [file for file in found if file.name == "weights.pt"]
    return named[0] if named else found[0] if len(found) == 1 else None


PEER = Peer("prisma", "weights.pt and config.json, or one .pt with config and weights", recognises, read)
