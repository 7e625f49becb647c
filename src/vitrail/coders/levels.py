"""Reconstructions of nested levels of one dictionary, all for about the price of the largest.

Levels k_1 < ... < k_h of a row are its k largest latents, ranked once. Their differences are disjoint bands:

    forward     x_hat_i = sum_{j <= i} band_j,           band_j = z restricted to ranks k_{j-1} .. k_j, decoded
    backward    S_j = sum_{i >= j} dL/dx_hat_i           reaches band j alone
                dz[p] = <S_{j(p)}[row of p], W_dec[latent of p]>,     dW_dec = sum_j z_j^T S_j

so that no latent is decoded twice. A level that holds every positive latent of every row needs no ranking. A band that
is a small part of the dictionary is decoded entry by entry, a large one by a masked dense product; SPARSE_BELOW is
where the two cost the same. MSAE's code ranks and decodes every level by itself.
"""

import itertools
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from vitrail.coders.sparse import Codes, bag, entry_dots, scatter_to_latents

# Part of the dictionary: entry by entry 64 of 6,144 latents cost 10 + 15 + 10 ms for the three products, dense in
# float32 3 x 400, in bfloat16 3 x 95 (one core, 4,096 rows of 768).
SPARSE_BELOW = {torch.float32: 1 / 4, torch.float64: 1 / 4, torch.bfloat16: 1 / 20}
SPARSE_BELOW_ON_GPU = 1 / 40
ROWS_PER_SORT = 128


@dataclass(frozen=True)
class Levels:
    """`reconstructions[i]` is z_i @ W_dec. `pre`: pre-activations, without gradient."""

    reconstructions: list[Float[Tensor, "n d"]]
    pre: Float[Tensor, "n d_sae"]


@dataclass(frozen=True)
class _Band:
    """Either `codes`, n rows of them, or `z`. Bands are decoded one by one: the gradients S_j of one fit the cache."""

    codes: Codes | None
    z: Float[Tensor, "n d_sae"] | None


def decode_levels(
    y: Float[Tensor, "n d_in"],
    b_dec: Float[Tensor, " d_in"],
    W_enc: Float[Tensor, "d_in d_sae"],
    b_enc: Float[Tensor, " d_sae"],
    W_dec: Float[Tensor, "d_sae d_out"],
    levels: tuple[int, ...],
    *,
    soft_cap: float | None = None,
    dtype: torch.dtype | None = None,
) -> Levels:
    """Every level's z_i @ W_dec, differentiable in all five tensors but y.

    `dtype`: of the dense products (bfloat16: inputs rounded, sums in float32); None: the weights' own.
    """
    with torch.no_grad():
        pre = product(y - b_dec, W_enc, dtype).add_(b_enc)
        most = int(count_positive(pre, 1).max())
    ranked = tuple(k for k in levels if k < most)
    with_all = len(ranked) < len(levels)
    stacked = _Levels.apply(y, b_dec, W_enc, b_enc, W_dec, pre, ranked, most, with_all, soft_cap, dtype or pre.dtype)
    distinct = list(stacked.unbind(0))  # pyright: ignore[reportOptionalMemberAccess]
    return Levels(distinct + [distinct[-1]] * (len(levels) - len(distinct)), pre)


def count_positive(pre: Float[Tensor, "n m"], dim: int) -> Tensor:
    """Six times as fast as summing the comparison, which is first written out as 64-bit integers."""
    return (pre > 0).to(torch.float32).sum(dim).long()


def product(a: Float[Tensor, "n m"], b: Float[Tensor, "m p"], dtype: torch.dtype | None) -> Float[Tensor, "n p"]:
    """a @ b in `dtype`, given in the dtype of `a`."""
    return a @ b if dtype is None or dtype == a.dtype else (a.to(dtype) @ b.to(dtype)).to(a.dtype)


class _Levels(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        b_dec: Tensor,
        W_enc: Tensor,
        b_enc: Tensor,
        W_dec: Tensor,
        pre: Tensor,
        ranked: tuple[int, ...],
        most: int,
        with_all: bool,
        soft_cap: float | None,
        dtype: torch.dtype,
    ) -> Tensor:
        n, d_sae = pre.shape
        edges = [0, *ranked, *([most] if with_all else [])]
        widths = [b - a for a, b in zip(edges, edges[1:], strict=False)]
        share = SPARSE_BELOW[dtype] if pre.device.type == "cpu" else SPARSE_BELOW_ON_GPU
        sparse = [j for j, width in enumerate(widths) if width < share * d_sae]
        order = _ranking(pre, most if len(widths) > len(ranked) and len(ranked) in sparse else max(ranked, default=0))
        bands = [
            _Band(_entries(pre, order, a, b, soft_cap), None)
            if j in sparse
            else _Band(None, _capped(_masked(pre, order, a, b, is_last=j == len(ranked)), soft_cap).to(dtype))
            for j, (a, b) in enumerate(itertools.pairwise(edges))
        ]
        low = W_dec.to(dtype)
        decoded = pre.new_empty(len(widths), n, W_dec.shape[1])
        for j, band in enumerate(bands):
            if band.codes is not None:
                decoded[j] = bag(W_dec, band.codes.indices, band.codes.offsets, band.codes.values)
            elif band.z is not None:
                decoded[j] = band.z @ low
        ctx.save_for_backward(y, b_dec, W_enc, W_dec)
        ctx.bands, ctx.soft_cap, ctx.low = bands, soft_cap, low
        return decoded.cumsum_(0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        y, b_dec, W_enc, W_dec = ctx.saved_tensors
        low, dtype = ctx.low, ctx.low.dtype
        for_pre = y.new_zeros(len(y), len(W_dec))
        for_W_dec = torch.zeros_like(W_dec)
        suffix = torch.zeros_like(g[0])
        for band, of_level in zip(reversed(ctx.bands), reversed(g.unbind(0)), strict=True):
            suffix += of_level
            if band.codes is not None:
                slopes = _uncapped(entry_dots(suffix, W_dec, band.codes), band.codes.values, ctx.soft_cap)
                _put(for_pre, band.codes, slopes)
                for_W_dec += scatter_to_latents(suffix, band.codes.values, band.codes)
            else:
                slopes = _uncapped(suffix.to(dtype) @ low.t(), band.z, ctx.soft_cap)
                for_pre += slopes.mul_(band.z > 0)
                for_W_dec += band.z.t() @ suffix.to(dtype)
        for_b_enc = for_pre.sum(0)
        for_W_enc = product(for_pre.t(), y - b_dec, dtype).t()
        return None, -(W_enc @ for_b_enc), for_W_enc, for_b_enc, for_W_dec, None, None, None, None, None, None


def _put(into: Float[Tensor, "n d_sae"], codes: Codes, values: Float[Tensor, " nnz"]) -> None:
    """At the codes' entries. No entry comes twice."""
    width = codes.nnz // codes.n
    if width and codes.nnz == codes.n * width and bool((codes.l0() == width).all()):
        into.scatter_(1, codes.indices.view(-1, width), values.view(-1, width))
    else:
        into.view(-1)[codes.rows() * codes.d_sae + codes.indices] = values


def _ranking(pre: Float[Tensor, "n d_sae"], k: int) -> Tensor:
    """(n, k) latents of each row, the largest last. Only the k largest are there."""
    if k == 0:
        return torch.empty(len(pre), 0, dtype=torch.int64, device=pre.device)
    if pre.device.type == "cpu":  # numpy's sort is four times as fast as torch's here, and lets go of the GIL
        ranked = torch.empty(len(pre), k, dtype=torch.int64)

        def rank(first: int) -> None:
            rows = slice(first, first + ROWS_PER_SORT)
            ranked[rows] = torch.from_numpy(np.argsort(pre[rows].numpy(), axis=1))[:, -k:]

        with ThreadPoolExecutor(torch.get_num_threads()) as threads:
            list(threads.map(rank, range(0, len(pre), ROWS_PER_SORT)))
        return ranked
    return pre.topk(k, dim=1).indices.flip(1)


def _entries(pre: Tensor, order: Tensor, a: int, b: int, soft_cap: float | None) -> Codes:
    """The positive entries at ranks a .. b."""
    width = order.shape[1]
    indices = order[:, max(0, width - b) : width - a]
    values = pre.gather(1, indices)
    if values.numel() == 0 or not bool((values > 0).all()):
        return Codes.from_padded(indices, _capped(values, soft_cap), pre.shape[1])
    offsets = torch.arange(0, indices.numel() + 1, indices.shape[1], device=pre.device)
    return Codes(offsets, indices.flatten(), _capped(values, soft_cap).flatten(), pre.shape[1])


def _masked(pre: Tensor, order: Tensor, a: int, b: int, *, is_last: bool) -> Tensor:
    """ReLU(pre) at ranks a .. b, zero elsewhere; the last band goes down to zero. By rank, as bands must not overlap
    where values are equal: in bfloat16 many are."""
    width = order.shape[1]
    if is_last:
        return pre.relu().scatter_(1, order[:, width - a :], 0.0) if a else pre.relu()
    indices = order[:, width - b : width - a]
    return torch.zeros_like(pre).scatter_(1, indices, pre.gather(1, indices).relu())


def _capped(values: Tensor, soft_cap: float | None) -> Tensor:
    return values if soft_cap is None else soft_cap * torch.tanh(values / soft_cap)


def _uncapped(slopes: Tensor, capped: Tensor, soft_cap: float | None) -> Tensor:
    """The slopes before the cap, whose own slope is 1 - tanh^2."""
    return slopes if soft_cap is None else slopes * (1 - (capped / soft_cap).square())
