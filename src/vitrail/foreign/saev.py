"""saev: one file, a line of JSON and then torch.save's state dict.

    no schema      z = ReLU((x - b_dec) @ W_enc + b_enc)    the released coders (version 0.1.0)
    schema 2 to 5  z = act(x @ W_enc + b_enc)               x_hat = z @ W_dec + b_dec in both

Schema 1 was written by code that subtracts b_dec and by code that does not, so it opens only where b_dec is zero.
BatchTopK with `activation.threshold` is `> threshold`; a threshold of zero or less is a ReLU. TopK here keeps negative
values in rows with fewer than k positive ones, which our codes cannot say. The released coders read activations centred
and scaled to E||y|| = sqrt(d_in) (scale_mean, scale_norm): numbers that the file does not hold.
"""

import json
from pathlib import Path
from typing import Any

from vitrail.coders.base import SparseCoder
from vitrail.foreign.base import Opened, Peer, Weights, build, exactly, state_of, thresholded
from vitrail.foreign.pickles import read_pickle

FOUR = ("W_enc", "b_enc", "W_dec", "b_dec")
THRESHOLD = "activation.threshold"
LONGEST_HEADER = 1 << 20
WIDTHS = ("d_vit", "d_model")
NOTE = "takes activations centred and scaled as saev's loader does (scale_mean, scale_norm), if its training did so"


def recognises(path: Path) -> bool:
    file = weights_file(path)
    if file is None:
        return False
    with file.open("rb") as stream:
        return stream.read(1) == b"{"


def read(path: Path) -> Opened:
    file = weights_file(path)
    if file is None:
        raise ValueError(f"{path} has no sae.pt; name the file itself.")
    with file.open("rb") as stream:
        line = stream.readline(LONGEST_HEADER)
        content = stream.read()
    try:
        header = json.loads(line)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} does not begin with saev's line of JSON.") from error
    if not isinstance(header, dict):
        raise ValueError(f"{file} does not begin with saev's line of JSON settings.")
    tensors = state_of(read_pickle(file, content), file)
    exactly(tensors, FOUR, file, optional=(THRESHOLD,))
    outside = "mean_norm" if header.get("schema") is None else None
    return Opened(make(header, tensors, file), (file,), header, notes=[NOTE], outside=outside)


def make(header: dict[str, Any], tensors: dict[str, Any], path: Path) -> SparseCoder:
    schema = header.get("schema")
    if schema not in (None, 1, 2, 3, 4, 5):
        raise ValueError(f"{path} has saev's schema {schema}; this vitrail reads up to 5.")
    if schema == 1 and bool(tensors["b_dec"].any()):
        raise ValueError(
            f"{path} has saev's schema 1, which was written by code that subtracts b_dec from its input and by code "
            f"that does not. Open it with the saev that made it and save it again."
        )
    settings = header if schema is None else header.get("cfg")
    if not isinstance(settings, dict) or not any(name in settings for name in WIDTHS):
        raise ValueError(f"{path}: its first line has no {' or '.join(WIDTHS)}: it is not of saev.")
    weights = Weights(*(tensors[name] for name in FOUR))
    kind, k = activation(header, settings)
    same: dict[str, Any] = {"subtracts_b_dec": schema is None}
    if kind == "Relu":
        return build("relu", weights, l1=0.0, **same)
    if kind == "BatchTopK" and THRESHOLD in tensors:
        known = k if isinstance(k, int) and 1 <= k <= weights.W_dec.shape[0] else None
        limits = tensors[THRESHOLD].reshape(1)
        return thresholded(weights, limits, k=known, estimator="saev, running mean of batch minima", **same)
    raise ValueError(
        f"{path}: saev's {kind} keeps negative values in rows with fewer than k positive ones, and vitrail's codes are "
        f"not negative, so some rows would differ. Its Relu, and BatchTopK with a threshold, can be opened."
    )


def activation(header: dict[str, Any], settings: dict[str, Any]) -> tuple[str, Any]:
    """Its class and its k, wherever that version wrote them."""
    told = settings.get("activation")
    if isinstance(told, dict):
        return str(told.get("cls")), (told.get("params") or {}).get("top_k")
    named = str(header.get("cls", "Relu"))
    return ("Relu" if named == "SparseAutoencoderConfig" else named), settings.get("top_k")


def weights_file(path: Path) -> Path | None:
    file = path / "sae.pt" if path.is_dir() else path
    return file if file.is_file() and file.suffix == ".pt" else None


PEER = Peer("saev", "sae.pt: a line of JSON, then a state dict", recognises, read)
