"""What every reader of a peer's checkpoint shares.

A reader names the peer's tensors and conventions; here they become one of vitrail's coders, exactly or not at all:

    b_dec only added at the end      b_enc' = b_enc + b_dec @ W_enc, because ours subtracts b_dec first
    latents measured in ||W_dec[i]|| W_enc' = W_enc ||W_dec||, b_enc' = b_enc ||W_dec||, W_dec' = W_dec / ||W_dec||
    z >= t instead of z > t          t' = the next number below t

Folded in float64 and kept in float32 (float64 if the peer's weights are).
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from vitrail.coders.base import SparseCoder
from vitrail.coders.table import make_coder


@dataclass
class Opened:
    """A peer's coder as one of ours, and where it came from."""

    coder: SparseCoder
    files: tuple[Path, ...]
    config: dict[str, Any]  # the peer's own, for the record
    point: str | None = None  # the hook point as the peer names it
    notes: list[str] = field(default_factory=list)  # what a user must know to use it as its authors do
    # The normalisation that the peer applies before its coder, with statistics that its file does not hold.
    outside: str | None = None


@dataclass(frozen=True)
class Peer:
    """One file format. `layout` says what it looks like; `recognises` looks without reading tensors."""

    name: str
    layout: str
    recognises: Callable[[Path], bool]
    read: Callable[[Path], Opened]


class Weights(NamedTuple):
    """In our orientation. The encoder reads y, or y - b_dec where the peer subtracts it."""

    W_enc: Float[Tensor, "d_in d_sae"]
    b_enc: Float[Tensor, " d_sae"]
    W_dec: Float[Tensor, "d_sae d_in"]
    b_dec: Float[Tensor, " d_in"]

    def with_decoder_norms_in_codes(self) -> "Weights":
        """Latents measured along unit decoder directions: the same reconstruction, z times ||W_dec[i]||."""
        norms = torch.linalg.vector_norm(self.W_dec.double(), dim=1)
        if not bool((norms > 0).all()):
            raise ValueError("a decoder direction is zero, so the codes cannot be measured in decoder norms.")
        return Weights(
            self.W_enc.double() * norms, self.b_enc.double() * norms, self.W_dec / norms[:, None], self.b_dec
        )


def build(
    architecture: str,
    weights: Weights,
    *,
    subtracts_b_dec: bool,
    normalization: str = "none",
    buffers: Mapping[str, Tensor | float] | None = None,
    dtype: torch.dtype | None = None,
    **config: Any,
) -> SparseCoder:
    """One of our coders with these weights, in eval mode. `buffers`: by the names of the coder's state."""
    dtype = dtype or torch.promote_types(weights.W_dec.dtype, torch.float32)
    W_enc, b_enc, W_dec, b_dec = (tensor.detach().double() for tensor in weights)
    d_in, d_sae = _checked(W_enc, b_enc, W_dec, b_dec, d_out=config.get("d_out"))
    if not subtracts_b_dec:
        b_enc = b_enc + b_dec @ W_enc
    coder = make_coder(architecture, d_in=d_in, d_sae=d_sae, normalization=normalization, **config).to(dtype)
    state = coder.state_dict()
    new = {"W_enc": W_enc, "b_enc": b_enc, "W_dec": W_dec, "b_dec": b_dec, "fitted": torch.tensor(True)}
    new |= {name: torch.as_tensor(value) for name, value in (buffers or {}).items()}
    with torch.no_grad():
        for name, value in new.items():
            state[name].copy_(value)
    return coder.eval()


def thresholded(
    weights: Weights,
    thresholds: Float[Tensor, " one_or_d_sae"],
    *,
    k: int | None = None,
    prefixes: Sequence[int] | None = None,
    estimator: str,
    buffers: Mapping[str, Tensor | float] | None = None,
    **same: Any,
) -> SparseCoder:
    """z = ReLU(pre) where pre > threshold: BatchTopK if one was trained (`k` is its), else JumpReLU.

    `prefixes`: where the dictionary was nested. `same`: the other arguments of `build`. A threshold of zero or less
    leaves the ReLU.
    """
    d_sae = weights.W_dec.shape[0]
    if thresholds.shape not in ((1,), (d_sae,)):
        raise ValueError(f"there are {tuple(thresholds.shape)} thresholds for d_sae={d_sae} latents.")
    limits, buffers = thresholds.detach().double().clamp_min(0), dict(buffers or {})
    if not bool(limits.any()):
        return build("relu", weights, l1=0.0, buffers=buffers, **same)
    if k is not None and len(limits) == 1:
        if prefixes:
            same |= {"prefixes": list(prefixes)}
        architecture = "matryoshka_prefix" if prefixes else "batch_topk"
        coder = build(architecture, weights, k=k, buffers={**buffers, "threshold": limits[0]}, **same)
        coder.calibration = {"estimator": estimator, "threshold": float(limits)}
        return coder
    logs = limits.clamp_min(torch.finfo(torch.float32).tiny).log().expand(d_sae)
    return build("jump_relu", weights, l0_coefficient=0.0, buffers={**buffers, "log_threshold": logs}, **same)


def gated(
    weights: Weights,
    r_mag: Float[Tensor, " d_sae"],
    b_mag: Float[Tensor, " d_sae"],
    *,
    subtracts_b_dec: bool,
    **same: Any,
) -> SparseCoder:
    """A gate beside a magnitude; `weights.b_enc` is the gate's bias. Both paths read the same shifted input."""
    b_mag = b_mag.detach().double()
    if not subtracts_b_dec:
        b_mag = b_mag + r_mag.detach().double().exp() * (weights.b_dec.double() @ weights.W_enc.double())
    magnitudes = {"r_mag": r_mag, "b_mag": b_mag}
    return build("gated", weights, subtracts_b_dec=subtracts_b_dec, l1=0.0, buffers=magnitudes, **same)


def next_below(threshold: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """The largest float32 below: `> next_below(t)` is `>= t`. Not below zero, where the ReLU decides."""
    single = threshold.detach().float()
    return torch.where(single > 0, torch.nextafter(single, torch.zeros_like(single)), single.clamp_min(0))


def transcoder(
    architecture: str,
    weights: Weights,
    b_out: Float[Tensor, " d_out"],
    W_skip: Float[Tensor, "d_in d_out"] | None,
    *,
    normalization: str,
    output_normalization: str,
    **config: Any,
) -> SparseCoder:
    """One of our transcoders; `weights.b_dec` is what the encoder subtracts."""
    if W_skip is not None and normalization != "none":
        raise ValueError(
            f"this transcoder's skip connection reads raw activations beside an encoder that reads normalised ones "
            f"({normalization}). The skip of vitrail's transcoders reads what the encoder reads, so it would differ."
        )
    return build(
        architecture,
        weights,
        subtracts_b_dec=True,
        normalization=normalization,
        output_normalization=output_normalization,
        d_out=len(b_out),
        skip=W_skip is not None,
        buffers={"b_out": b_out} | ({} if W_skip is None else {"W_skip": W_skip}),
        **config,
    )


def exactly(
    state: Mapping[str, Tensor], needed: Collection[str], path: Path, *, optional: Collection[str] = ()
) -> None:
    """Raise unless these are the tensors: one that is not understood could change the forward."""
    if missing := [name for name in needed if name not in state]:
        raise ValueError(f"{path} lacks {', '.join(missing)}; it holds {', '.join(sorted(state)) or 'nothing'}.")
    if unknown := sorted(set(state) - set(needed) - set(optional)):
        raise ValueError(
            f"{path} holds tensors that this reader does not know, so it is not opened: {', '.join(unknown)}."
        )


def state_of(value: Any, path: Path) -> dict[str, Tensor]:
    """Names to tensors, and nothing else."""
    if not isinstance(value, Mapping) or not all(isinstance(tensor, Tensor) for tensor in value.values()):
        raise ValueError(f"{path} does not hold a state dict, names to tensors.")
    return {str(name): tensor for name, tensor in value.items()}


def choice(table: Mapping[str, str], value: Any, what: str, path: Path) -> str:
    """table[value], or a sentence that names what there is."""
    if not isinstance(value, str) or value not in table:
        raise ValueError(f"{path}: {what} is {value!r}; vitrail can express {', '.join(table)}.")
    return table[value]


def positive_int(value: Any, what: str, path: Path) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{path}: {what} must be a positive whole number, got {value!r}.")
    return value


def folder_of(path: Path) -> Path:
    """A format of several files may be named by its folder or by one of them."""
    return path if path.is_dir() else path.parent


def _checked(W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, b_dec: Tensor, d_out: int | None) -> tuple[int, int]:
    if W_enc.ndim != 2:
        raise ValueError(f"the encoder's weights have shape {tuple(W_enc.shape)}, not two dimensions.")
    d_in, d_sae = W_enc.shape
    expected = {"b_enc": (d_sae,), "W_dec": (d_sae, d_out or d_in), "b_dec": (d_in,)}
    for (name, shape), tensor in zip(expected.items(), (b_enc, W_dec, b_dec), strict=True):
        if tensor.shape != shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}; an encoder of d_in={d_in}, d_sae={d_sae} needs {shape}."
            )
    if not all(bool(torch.isfinite(tensor).all()) for tensor in (W_enc, b_enc, W_dec, b_dec)):
        raise ValueError("some weights are not finite numbers.")
    return d_in, d_sae
