"""MSAE: one .pth, whose name is its configuration.

    {d_sae}_{d_in}_{activation}[_{k}][_UW|_RW]_{tied}_{normalize}_{soft cap}_{data set}.pth

    y = (x - mean_center) scaling_factor,    z = cap(ReLU((y - pre_bias) @ encoder + latent_bias)),
    y_hat = z @ decoder + pre_bias

In use every positive latent counts: their tables drop TopK, and so does this (`forward_eval`). PEERS.md, section 3.
"""

import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vitrail.coders.base import SparseCoder
from vitrail.foreign.base import Opened, Peer, Weights, build, exactly, state_of, thresholded
from vitrail.foreign.pickles import attributes, read_pickle

NAME = re.compile(
    r"(?P<d_sae>\d+)_(?P<d_in>\d+)_(?P<activation>[A-Za-z]+)(?:_(?P<number>\d+))?(?:_(?P<weighting>UW|RW))?"
    r"_(?P<tied>True|False)_(?P<normalize>True|False)_(?P<soft_cap>\d+(?:\.\d+)?)(?:_(?P<data>.*))?\.pth?"
)
WEIGHTINGS = {"UW": "uniform", "RW": "reverse"}


class Named(NamedTuple):
    """What the file's name says."""

    d_sae: int
    d_in: int
    activation: str
    number: int | None  # k, or the digits of the L1 weight
    weighting: str | None
    tied: bool
    normalize: bool
    soft_cap: float | None
    data: str | None


def recognises(path: Path) -> bool:
    return path.suffix in (".pth", ".pt") and NAME.fullmatch(path.name) is not None


def read(path: Path) -> Opened:
    named = parse_name(path)
    content = read_pickle(path)
    needed = {"model", "mean_center", "scaling_factor"}
    if not isinstance(content, dict) or not needed <= set(content):
        raise ValueError(
            f"{path} does not hold MSAE's {', '.join(sorted(needed))}: vitrail knows no other layout of it."
        )
    tensors = state_of(content["model"], path)
    coder = make(named, tensors, normalization(content, named, path), path)
    notes = ["all positive latents are used, as in MSAE's tables; its TopK is of training"]
    if named.activation.startswith("BatchTopK"):
        notes.append("opened as relu: with every positive latent in use, nothing is left of BatchTopK")
    config = {**named._asdict(), "target_norm": attributes(content.get("target_norm"))}
    return Opened(coder, (path,), config, notes=notes)


def make(named: Named, tensors: dict[str, Tensor], same: dict[str, Any], path: Path) -> SparseCoder:
    needed = ["pre_bias", "encoder", "latent_bias"] + ([] if named.tied else ["decoder"])
    if jump := named.activation == "JumpReLU":
        needed.append("activation.log_threshold")
    exactly(tensors, needed, path, optional=("latents_activation_frequency",))
    decoder = tensors["encoder"].t() if named.tied else tensors["decoder"]
    weights = Weights(tensors["encoder"], tensors["latent_bias"], decoder, tensors["pre_bias"])
    if (d_sae := weights.W_dec.shape[0]) != named.d_sae:
        raise ValueError(f"{path} is named as of {named.d_sae} latents, but holds {d_sae}. Was it renamed?")
    same |= {"subtracts_b_dec": True, "normalization": "msae_code"}
    if jump:
        if named.soft_cap is not None:
            raise ValueError(f"{path}: JumpReLU with a soft cap is not one of vitrail's coders.")
        limits = tensors["activation.log_threshold"].double().exp()
        return thresholded(weights, limits, estimator="MSAE, learned", **same)
    if named.activation not in ("ReLU", "TopKReLU", "BatchTopKReLU"):
        raise ValueError(
            f"{path}: with {named.activation} latents in use may be negative or are ranked by size without sign; "
            f"vitrail's are ReLU'd. MSAE's ReLU, TopKReLU and BatchTopKReLU can be opened."
        )
    if named.weighting is not None:
        weighting = WEIGHTINGS[named.weighting]
        return build("matryoshka", weights, ks=levels(named), weighting=weighting, soft_cap=named.soft_cap, **same)
    topk = named.activation == "TopKReLU"
    if named.soft_cap is not None:  # one level of matryoshka is the coder with a cap
        return build("matryoshka", weights, ks=[named.number if topk else d_sae], soft_cap=named.soft_cap, **same)
    if topk:
        return build("topk", weights, k=named.number, inference="relu", **same)
    return build("relu", weights, l1=0.0, **same)


def levels(named: Named) -> list[int]:
    """k, 2k, 4k, ... below d_sae, then d_sae: train.py's nesting list."""
    ks, k = [], named.number or named.d_sae
    while k < named.d_sae:
        ks.append(k)
        k *= 2
    return [*ks, named.d_sae]


def normalization(content: dict[str, Any], named: Named, path: Path) -> dict[str, Any]:
    """The mean and one over the scaling factor, as buffers."""
    if named.normalize:
        raise ValueError(f"{path} normalises each row after centring (normalize=True), which no coder of vitrail does.")
    mean = torch.as_tensor(content["mean_center"]).double().flatten()
    factor = float(torch.as_tensor(content["scaling_factor"]).double())
    if mean.shape != (named.d_in,):
        raise ValueError(f"{path}: mean_center has {len(mean)} numbers; the name says d_in={named.d_in}.")
    if not factor > 0:
        raise ValueError(f"{path}: scaling_factor must be positive, got {factor}.")
    return {"buffers": {"normalize.mean": mean, "normalize.scale": 1 / factor}}


def parse_name(path: Path) -> Named:
    found = NAME.fullmatch(path.name)
    if found is None:
        raise ValueError(
            f"{path.name} is not a name that MSAE gives: D_SAE_D_IN_ACTIVATION_..._TIED_NORMALIZE_SOFTCAP_DATA.pth. "
            f"The name is the configuration, so keep the published one."
        )
    said = found.groupdict()
    cap = float(said["soft_cap"])
    return Named(
        d_sae=int(said["d_sae"]),
        d_in=int(said["d_in"]),
        activation=said["activation"],
        number=None if said["number"] is None else int(said["number"]),
        weighting=said["weighting"],
        tied=said["tied"] == "True",
        normalize=said["normalize"] == "True",
        soft_cap=cap if cap > 0 else None,
        data=said["data"],
    )


PEER = Peer("msae", "one .pth with its published name", recognises, read)
