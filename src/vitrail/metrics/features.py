"""Rows of numbers that a linear head reads: tensors, or the same from the entries of sparse codes. All in float64."""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vitrail.coders.sparse import Codes, bag, scatter_to_latents

Features = Float[Tensor, "_ _"] | Codes  # a row a picture, or a patch


def checked(features: Features, labels: Tensor) -> tuple[int, Int[Tensor, " n"]]:
    n = n_rows(features)
    if n != len(labels):
        raise ValueError(f"{n} rows and {len(labels)} labels: there must be one label a row.")
    if n == 0:
        raise ValueError("there are no rows.")
    if not isinstance(features, Codes) and not bool(features.isfinite().all()):
        raise ValueError("features hold values that are not finite.")
    return n, labels.cpu().long()


def n_rows(features: Features) -> int:
    return features.n if isinstance(features, Codes) else len(features)


def width(features: Features) -> int:
    return features.d_sae if isinstance(features, Codes) else features.shape[1]


def select(features: Features, rows: Int[Tensor, " m"]) -> Features:
    return features.select_rows(rows) if isinstance(features, Codes) else features[rows]


def unit_rows(features: Features) -> Features:
    """Rows of length 1; those of length 0 stay."""
    if isinstance(features, Codes):
        values = features.values.detach().double()
        square = torch.zeros(features.n, dtype=torch.float64).index_add_(0, features.rows(), values.square())
        return features.with_values(values / square.sqrt().clamp_min(1e-300)[features.rows()])
    rows = features.detach().cpu().double()
    return rows / torch.linalg.vector_norm(rows, dim=1, keepdim=True).clamp_min(1e-300)


def narrow(codes: Codes, latents: Int[Tensor, " m"]) -> Codes:
    """Only these latents, which are all that fire."""
    place = torch.zeros(codes.d_sae, dtype=torch.long)
    place[latents] = torch.arange(len(latents))
    return Codes(codes.offsets, place[codes.indices.long()], codes.values, len(latents))


def product(features: Features) -> Callable[[Tensor], Tensor]:
    """w -> features @ w, in float64."""
    if isinstance(features, Codes):
        values = features.values.detach().double()
        return lambda w: bag(w, features.indices, features.offsets, values)
    rows = features.detach().cpu().double()
    return lambda w: rows @ w


def moments(features: Features) -> tuple[Float[Tensor, " d"], Float[Tensor, " d"]]:
    """Means of columns, and of their squares."""
    if isinstance(features, Codes):
        values, at = features.values.detach().double(), features.indices.long()
        sums = torch.zeros(2, features.d_sae, dtype=torch.float64)
        sums.index_add_(1, at, torch.stack([values, values.square()]))
        return sums[0] / features.n, sums[1] / features.n
    rows = features.detach().cpu().double()
    return rows.mean(0), rows.square().mean(0)


def transposed_product(features: Features) -> Callable[[Tensor], Tensor]:
    """g -> features.T @ g."""
    if isinstance(features, Codes):
        values = features.values.detach().double()
        return lambda g: scatter_to_latents(g, values, features)
    rows = features.detach().cpu().double()
    return lambda g: rows.t() @ g
