"""dictionary_learning: ae.pt (a state dict) and config.json, whose trainer.dict_class says which dictionary.

AutoEncoder              z = ReLU(W (x - bias) + b) ||D_i||: load_dictionary measures latents along unit directions
AutoEncoderNew           z = ReLU(W x + b)                       (x is not centred first)
AutoEncoderTopK          z = TopK_k(ReLU(W (x - b_dec) + b))
BatchTopKSAE, Matryoshka z = ReLU(pre) where it exceeds `threshold`, one number
JumpReluAutoEncoder      the same, a threshold for each latent; x is not centred first
GatedAutoEncoder         a gate beside a magnitude
"""

from pathlib import Path
from typing import Any

import torch

from vitrail.coders.base import SparseCoder
from vitrail.files import read_json
from vitrail.foreign.base import (
    Opened,
    Peer,
    Weights,
    build,
    exactly,
    folder_of,
    gated,
    positive_int,
    state_of,
    thresholded,
)
from vitrail.foreign.pickles import read_pickle

CONFIG, WEIGHTS = "config.json", "ae.pt"
LINEAR = ("encoder.weight", "encoder.bias", "decoder.weight")
PLAIN = ("W_enc", "b_enc", "W_dec", "b_dec")
TENSORS = {
    "AutoEncoder": (*LINEAR, "bias"),
    "AutoEncoderNew": (*LINEAR, "decoder.bias"),
    "AutoEncoderTopK": (*LINEAR, "b_dec"),
    "BatchTopKSAE": (*LINEAR, "b_dec", "threshold"),
    "MatryoshkaBatchTopKSAE": (*PLAIN, "threshold"),
    "JumpReluAutoEncoder": (*PLAIN, "threshold"),
    "GatedAutoEncoder": ("encoder.weight", "decoder.weight", "decoder_bias", "r_mag", "gate_bias", "mag_bias"),
}
OPTIONAL = {
    "AutoEncoderTopK": ("k", "threshold"),
    "BatchTopKSAE": ("k",),
    "MatryoshkaBatchTopKSAE": ("k", "group_sizes"),
}
B_DEC = {"AutoEncoder": "bias", "AutoEncoderNew": "decoder.bias", "GatedAutoEncoder": "decoder_bias"}
DOES_NOT_CENTRE = ("AutoEncoderNew", "JumpReluAutoEncoder")
ESTIMATOR = "dictionary_learning"


def recognises(path: Path) -> bool:
    folder = folder_of(path)
    return (folder / CONFIG).is_file() and (folder / WEIGHTS).is_file()


def read(path: Path) -> Opened:
    folder = folder_of(path)
    config_path, weights_path = folder / CONFIG, folder / WEIGHTS
    config = read_json(config_path, "dictionary_learning config")
    trainer = config.get("trainer") if isinstance(config, dict) else None
    if not isinstance(trainer, dict):
        raise ValueError(f"{config_path} has no 'trainer' with a dict_class: it is not of dictionary_learning.")
    kind = trainer.get("dict_class")
    if kind not in TENSORS:
        raise ValueError(f"{config_path}: dict_class is {kind!r}; vitrail knows {', '.join(TENSORS)}.")
    tensors = state_of(read_pickle(weights_path), weights_path)
    exactly(tensors, TENSORS[kind], weights_path, optional=OPTIONAL.get(kind, ()))
    k = tensors["k"].item() if "k" in tensors else trainer.get("k")
    notes = []
    if kind == "AutoEncoder":
        notes.append("latents are measured along unit decoder directions, as its load_dictionary does")
    point = trainer.get("submodule_name")
    return Opened(make(kind, tensors, k, config_path), (config_path, weights_path), config, point=point, notes=notes)


def make(kind: str, tensors: dict[str, torch.Tensor], k: Any, path: Path) -> SparseCoder:
    same: dict[str, Any] = {"subtracts_b_dec": kind not in DOES_NOT_CENTRE}
    b_dec = tensors[B_DEC.get(kind, "b_dec")]
    same["dtype"] = torch.promote_types(b_dec.dtype, torch.float32)
    if "W_enc" in tensors:
        weights = Weights(tensors["W_enc"], tensors["b_enc"], tensors["W_dec"], b_dec)
    else:
        b_enc = tensors["gate_bias" if kind == "GatedAutoEncoder" else "encoder.bias"]
        weights = Weights(tensors["encoder.weight"].t(), b_enc, tensors["decoder.weight"].t(), b_dec)
    if kind == "AutoEncoder":
        norms = torch.linalg.vector_norm(weights.W_dec, dim=1)
        unit = torch.allclose(norms, torch.ones_like(norms))  # its own test
        return build("relu", weights if unit else weights.with_decoder_norms_in_codes(), l1=0.0, **same)
    if kind == "AutoEncoderNew":
        return build("relu", weights, l1=0.0, **same)
    if kind == "AutoEncoderTopK":
        return build("topk", weights, k=positive_int(k, "trainer.k", path), **same)
    if kind == "GatedAutoEncoder":
        return gated(weights, tensors["r_mag"], tensors["mag_bias"], **same)
    if kind == "JumpReluAutoEncoder":
        return thresholded(weights, tensors["threshold"], estimator=ESTIMATOR, **same)
    k = positive_int(k, "trainer.k", path)
    prefixes = tensors["group_sizes"].cumsum(0).tolist() if "group_sizes" in tensors else None
    limit = tensors["threshold"].reshape(1)
    return thresholded(weights, limit, k=k, prefixes=prefixes, estimator=ESTIMATOR, **same)


PEER = Peer("dictionary_learning", f"a folder with {CONFIG} and {WEIGHTS}", recognises, read)
