"""SAELens: cfg.json and sae_weights.safetensors, versions 2 to 6.

    z = act((n(x) - b_dec) @ W_enc + b_enc)     b_dec is subtracted if apply_b_dec_to_input
    x_hat = n^-1(z @ W_dec + b_dec)

`standard`, `topk`, `jumprelu`, `gated`; a BatchTopK coder is saved for use as a JumpReLU with one threshold, and, in
the middle of training, with `topk_threshold`. rescale_acts_by_decoder_norm measures latents in ||W_dec[i]||. The
transcoders subtract nothing and do not undo n; `transcoder` and `skip_transcoder` (+ x @ W_skip^T) can be opened.
"""

from collections.abc import Mapping
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
    choice,
    exactly,
    folder_of,
    gated,
    positive_int,
    thresholded,
    transcoder,
)

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
NORMALIZATIONS = {"none": "none", "layer_norm": "layer_norm", "constant_norm_rescale": "row_norm"}
FOUR = ("W_enc", "b_enc", "W_dec", "b_dec")
TENSORS = {
    "standard": FOUR,
    "topk": FOUR,
    "jumprelu": (*FOUR, "threshold"),
    "gated": ("W_enc", "W_dec", "b_dec", "b_gate", "r_mag", "b_mag"),
    "batchtopk": (*FOUR, "topk_threshold"),
    "matryoshka_batchtopk": (*FOUR, "topk_threshold"),
    "transcoder": FOUR,
    "skip_transcoder": (*FOUR, "W_skip"),
}
ESTIMATOR = "SAELens, running mean of batch minima"
NAMES_BEFORE_6 = {"hook_point": "hook_name", "activation_fn_str": "activation_fn"}


def recognises(path: Path) -> bool:
    folder = folder_of(path)
    return (folder / CONFIG).is_file() and (folder / WEIGHTS).is_file()


def read(path: Path) -> Opened:
    folder = folder_of(path)
    config_path, weights_path = folder / CONFIG, folder / WEIGHTS
    stored = read_json(config_path, "SAELens config")
    tensors = read_tensors(weights_path, "SAELens weights")
    config = as_version_6(stored)
    architecture = config["architecture"]
    if architecture not in TENSORS:
        raise ValueError(
            f"{config_path}: the architecture {architecture!r} has no counterpart in vitrail; "
            f"SAELens's {', '.join(TENSORS)} have."
        )
    drop_unit_scaling_factor(tensors, weights_path)
    exactly(tensors, TENSORS[architecture], weights_path)
    normalization = config.get("normalize_activations") or "none"
    if normalization in ("expected_average_only_in", "covariance_whitening"):
        raise ValueError(
            f"{config_path}: normalize_activations is {normalization!r}, whose numbers this file does not hold. Fold "
            f"them in with SAELens (fold_activation_norm_scaling_factor, fold_activation_whitening) and save again."
        )
    coder = make(
        architecture,
        tensors,
        config,
        config_path,
        subtracts_b_dec=bool(config.get("apply_b_dec_to_input", True)),
        normalization=choice(NORMALIZATIONS, normalization, "normalize_activations", config_path),
    )
    about = config.get("metadata") or config
    notes = []
    if normalization == "layer_norm":
        notes.append("codes are SAELens's; x_hat - mean is larger by a factor 1 + 1e-5/sd: our inverse is exact")
    if config.get("reshape_activations", "none") != "none":
        notes.append(f"rows are head outputs, flattened (reshape_activations {config['reshape_activations']!r})")
    return Opened(coder, (config_path, weights_path), stored, point=about.get("hook_name"), notes=notes)


def make(
    architecture: str,
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    path: Path,
    *,
    subtracts_b_dec: bool,
    normalization: str,
) -> SparseCoder:
    dtype = torch.promote_types(tensors["W_dec"].dtype, torch.float32)
    if architecture in ("transcoder", "skip_transcoder"):
        encoder, W_skip = tensors["W_enc"], tensors.get("W_skip")
        weights = Weights(encoder, tensors["b_enc"], tensors["W_dec"], encoder.new_zeros(len(encoder)))
        return transcoder(
            "relu_transcoder",
            weights,
            tensors["b_dec"],
            None if W_skip is None else W_skip.t(),
            normalization=normalization,
            output_normalization="none",
            l1=0.0,
            dtype=dtype,
        )
    same: dict[str, Any] = {"subtracts_b_dec": subtracts_b_dec, "normalization": normalization, "dtype": dtype}
    b_enc = tensors["b_gate"] if architecture == "gated" else tensors["b_enc"]
    weights = Weights(tensors["W_enc"], b_enc, tensors["W_dec"], tensors["b_dec"])
    if architecture == "gated":
        return gated(weights, tensors["r_mag"], tensors["b_mag"], **same)
    if config.get("rescale_acts_by_decoder_norm", False):
        weights = weights.with_decoder_norms_in_codes()
    if architecture == "standard":
        return build("relu", weights, l1=0.0, **same)
    if architecture == "topk":
        return build("topk", weights, k=positive_int(config.get("k"), "k", path), **same)
    if architecture == "jumprelu":
        return thresholded(weights, tensors["threshold"], estimator="SAELens", **same)
    k = max(1, round(config.get("k") or 1))  # a float, and per row
    thresholds, prefixes = tensors["topk_threshold"].reshape(1), config.get("matryoshka_widths")
    return thresholded(weights, thresholds, k=k, prefixes=prefixes, estimator=ESTIMATOR, **same)


def as_version_6(config: Any) -> dict[str, Any]:
    """The config under the names of SAELens 6, with the defaults that it takes for older ones."""
    if not isinstance(config, dict):
        raise ValueError(f"{CONFIG} of SAELens holds settings by name, got {type(config).__name__}.")
    version = str(config.get("sae_lens_version") or (config.get("metadata") or {}).get("sae_lens_version") or "0")
    if version.split(".")[0].isdigit() and int(version.split(".")[0]) >= 6:
        return {"architecture": "standard", **config}
    new: dict[str, Any] = {NAMES_BEFORE_6.get(str(name), str(name)): value for name, value in config.items()}
    new.setdefault("architecture", "standard")
    activation = new.get("activation_fn", "relu")
    if activation == "topk":
        new["architecture"], new["k"] = "topk", (new.get("activation_fn_kwargs") or {}).get("k")
    elif activation != "relu":
        raise ValueError(f"the activation is {activation!r}; vitrail's coders have a ReLU.")
    if isinstance(new.get("normalize_activations"), bool):
        new["normalize_activations"] = "expected_average_only_in" if new["normalize_activations"] else "none"
    if "hook_z" in str(new.get("hook_name", "")):
        new.setdefault("reshape_activations", "hook_z")
    return new


def drop_unit_scaling_factor(tensors: dict[str, Tensor], path: Path) -> None:
    """Old versions saved a finetuning factor of ones. SAELens 6 opens nothing else, nor do we."""
    factor = tensors.pop("scaling_factor", None)
    if factor is not None and not torch.allclose(factor, torch.ones_like(factor)):
        raise ValueError(f"{path} has a finetuning scaling_factor, which SAELens no longer applies; it is not opened.")


PEER = Peer("saelens", f"a folder with {CONFIG} and {WEIGHTS}", recognises, read)
