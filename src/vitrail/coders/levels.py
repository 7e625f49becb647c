"""The error of nested levels of one dictionary, all for about the price of the largest.

Levels k_1 < ... < k_h of a row are its k largest latents, ranked once. Their differences are disjoint bands:

    forward     x_hat_i = sum_{j <= i} band_j,           band_j = z restricted to ranks k_{j-1} .. k_j, decoded
    backward    S_j = sum_{i >= j} dL/dx_hat_i           reaches band j alone
                dz[p] = <S_{j(p)}[row of p], W_dec[latent of p]>,     dW_dec = sum_j z_j^T S_j

so that no latent is decoded twice. A level that holds every positive latent of every row needs no ranking. A band that
is a small part of the dictionary is decoded entry by entry, a large one by a masked dense product; SPARSE_BELOW is
where the two cost the same. MSAE's code ranks and decodes every level by itself.

Rows go through in chunks that stay in the cache. A chunk's gradients are worked out as soon as its errors are known, so
that its pre-activations and dense bands can be let go: none of the size of the batch is ever held. On a CPU a chunk is
ranked by one sort of integers, the value's bits above and the latent's number below: a fifth of what an argsort costs.
"""

import itertools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from vitrail.coders.select import Encoder
from vitrail.coders.sparse import Codes, bag, entry_dots, positions, scatter_to_latents

# Part of the dictionary: entry by entry 64 of 6,144 latents cost 10 + 15 + 10 ms for the three products, dense in
# float32 3 x 400, in bfloat16 3 x 95 (one core, 4,096 rows of 768).
SPARSE_BELOW = {torch.float32: 1 / 4, torch.float64: 1 / 4, torch.bfloat16: 1 / 20}
SPARSE_BELOW_ON_GPU = 1 / 40
ROWS_PER_SORT = 64


@dataclass(frozen=True)
class Levels:
    """`loss` is differentiable, the rest are not.

    `loss` is sum_i alpha_i errors_i; `errors` each level's squared error, summed over dimensions, averaged over rows;
    `x_hat` the largest level's reconstruction, with b_dec; `fired` in how many rows each latent was positive and, with
    `fired_k`, among the fired_k largest.
    """

    loss: Float[Tensor, ""]
    errors: Float[Tensor, " h"]
    x_hat: Float[Tensor, "n d_in"]
    fired: Int[Tensor, " d_sae"]


def nested_levels(
    y: Float[Tensor, "n d_in"],
    b_dec: Float[Tensor, " d_in"],
    W_enc: Float[Tensor, "d_in d_sae"],
    b_enc: Float[Tensor, " d_sae"],
    W_dec: Float[Tensor, "d_sae d_in"],
    levels: tuple[int, ...],
    alphas: tuple[float, ...],
    *,
    soft_cap: float | None = None,
    dtype: torch.dtype | None = None,
    fired_k: int | None = None,
) -> Levels:
    """Every level's error, and their weighted sum, differentiable in all five tensors but y.

    `dtype`: of the dense products and what lies between them (bfloat16: sums in float32); None: the weights' own.
    """
    weights = (b_dec, W_enc, b_enc, W_dec)
    asked = _Asked(levels, alphas, soft_cap, dtype or W_dec.dtype, fired_k, torch.is_grad_enabled())
    return Levels(*_Levels.apply(y, *weights, asked))  # pyright: ignore[reportGeneralTypeIssues, reportOptionalIterable]


def count_positive(pre: Float[Tensor, "n m"], dim: int) -> Tensor:
    """Six times as fast as summing the comparison, which is first written out as 64-bit integers."""
    return (pre > 0).to(torch.float32).sum(dim).long()


@dataclass(frozen=True)
class _Asked:
    levels: tuple[int, ...]
    alphas: tuple[float, ...]
    soft_cap: float | None
    dtype: torch.dtype
    fired_k: int | None
    with_gradient: bool


class _Levels(torch.autograd.Function):
    """Gradients are made going forward and only scaled going backward: the errors are scalars of one known form."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, b_dec: Tensor, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, asked: _Asked
    ) -> tuple[Tensor, ...]:
        of_batch = _Batch(y, b_dec, W_enc, b_enc, W_dec, asked)
        for first, pre in of_batch.encoder.chunks():
            of_batch.take(first, pre)
        errors = torch.stack(of_batch.errors) / len(y)
        loss = (errors * errors.new_tensor(asked.alphas)).sum()
        if asked.with_gradient:
            ctx.save_for_backward(*of_batch.gradients())
        ctx.mark_non_differentiable(errors, of_batch.x_hat, of_batch.fired)
        return loss, errors, of_batch.x_hat, of_batch.fired

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        # Nearly always 1; asking a GPU for its value would wait for it.
        is_one = g.device.type == "cpu" and g.item() == 1
        return None, *(each if is_one else each * g for each in ctx.saved_tensors), None


class _Batch:
    """Errors and gradients of a batch, gathered chunk by chunk."""

    def __init__(self, y: Tensor, b_dec: Tensor, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, asked: _Asked) -> None:
        self.y, self.b_dec, self.W_enc, self.W_dec, self.asked = y, b_dec, W_enc, W_dec, asked
        self.low_W_dec = W_dec.to(asked.dtype)
        self.encoder = Encoder(y - b_dec, W_enc, b_enc, asked.dtype)
        self.errors = [y.new_zeros(()) for _ in asked.levels]
        self.x_hat = torch.empty_like(y)
        self.fired = torch.zeros(len(W_dec), dtype=torch.int64, device=y.device)
        if asked.with_gradient:
            self.for_W_dec, self.for_W_enc = torch.zeros_like(W_dec), torch.zeros_like(W_dec)  # latent by latent
            self.for_b_enc, self.of_output = torch.zeros_like(b_enc), torch.zeros_like(b_dec)

    def take(self, first: int, pre: Float[Tensor, "m d_sae"]) -> None:
        levels, y = self.asked.levels, self.y[first : first + len(pre)]
        most = int(count_positive(pre, 1).max())
        ranked = tuple(k for k in levels if k < most)
        edges = [0, *ranked, *([most] if len(ranked) < len(levels) else [])]
        bands = self._bands(pre, edges, len(ranked), n_fired=min(self.asked.fired_k or most, most))
        errors = self._decoded(bands, len(pre)).cumsum_(0).add_(self.b_dec - y)  # x_hat_i - y of each distinct level
        self.x_hat[first : first + len(pre)] = errors[-1] + y
        squares = [error.square().sum() for error in errors]
        weights = [0.0] * len(errors)
        for i, alpha in enumerate(self.asked.alphas):
            distinct = min(i, len(errors) - 1)
            weights[distinct] += alpha
            self.errors[i] += squares[distinct]
        if self.asked.with_gradient:
            for error, weight in zip(errors, weights, strict=True):
                error *= 2 * weight / len(self.y)
            for larger, smaller in itertools.pairwise(list(errors.unbind(0))[::-1]):
                smaller += larger  # S_j
            self._take_gradients(pre, bands, errors, first)

    def _bands(self, pre: Tensor, edges: list[int], n_ranked: int, n_fired: int) -> "_Bands":
        """One for each two neighbouring edges. Counts what fired on the way."""
        dtype, soft_cap = self.asked.dtype, self.asked.soft_cap
        share = SPARSE_BELOW[dtype] if pre.device.type == "cpu" else SPARSE_BELOW_ON_GPU
        spans = list(itertools.pairwise(edges))
        sparse = [j for j, (a, b) in enumerate(spans) if b - a < share * pre.shape[1]]
        n_sorted = edges[-1] if n_ranked in sparse else edges[n_ranked]
        if self.asked.fired_k is None:
            order = _ranking(pre, n_sorted)
            self.fired += count_positive(pre, 0)
        else:
            order = _ranking(pre, max(n_sorted, n_fired))
            self.fired += _entries(pre, order, [(0, n_fired)]).fired()
        order = order[:, order.shape[1] - n_sorted :]
        codes = _entries(pre, order, [spans[j] for j in sparse]) if sparse else None
        if codes is not None:
            codes = codes.with_values(_capped(codes.values.to(self.W_dec.dtype), soft_cap))
        z = {
            j: _capped(_masked(pre, order, a, b, is_last=j == n_ranked), soft_cap)
            for j, (a, b) in enumerate(spans)
            if j not in sparse
        }
        return _Bands(len(spans), sparse, codes, z)

    def _decoded(self, bands: "_Bands", n: int) -> Float[Tensor, "bands n d_in"]:
        decoded = self.y.new_empty(bands.count, n, self.W_dec.shape[1])
        if bands.codes is not None:
            entrywise = bag(self.W_dec, bands.codes.indices, bands.codes.offsets, bands.codes.values)
            decoded[bands.sparse] = entrywise.view(n, len(bands.sparse), -1).transpose(0, 1)
        for j, z in bands.z.items():
            decoded[j] = z @ self.low_W_dec
        return decoded

    def _take_gradients(
        self, pre: Tensor, bands: "_Bands", suffixes: Float[Tensor, "bands n d_in"], first: int
    ) -> None:
        n, soft_cap, codes = len(pre), self.asked.soft_cap, bands.codes
        for_pre = torch.zeros_like(pre)
        if codes is not None:
            of_entries = suffixes[bands.sparse].transpose(0, 1).flatten(0, 1)
            self.for_W_dec += scatter_to_latents(of_entries, codes.values, codes)
            slopes = _uncapped(entry_dots(of_entries, self.W_dec, codes), codes.values, soft_cap)
            per_row = codes.l0().view(n, -1).sum(1)
            row_starts = torch.arange(0, n * codes.d_sae, codes.d_sae, device=pre.device)
            places = row_starts.repeat_interleave(per_row, output_size=codes.nnz).add_(codes.indices)
            for_pre.view(-1)[places] = slopes.to(pre.dtype)
        for j, z in bands.z.items():
            low = suffixes[j].to(pre.dtype)
            slopes = torch.ops.aten.threshold_backward(low @ self.low_W_dec.t(), z, 0.0)
            for_pre += _uncapped(slopes, z, soft_cap)
            self.for_W_dec += z.t() @ low
        self.of_output += suffixes[0].sum(0)
        self.for_b_enc += for_pre.sum(0, dtype=self.for_b_enc.dtype)
        self.for_W_enc += for_pre.t() @ self.encoder.rows(first, n)

    def gradients(self) -> tuple[Tensor, ...]:
        """With respect to b_dec, W_enc, b_enc, W_dec."""
        for_b_dec = self.of_output - self.W_enc @ self.for_b_enc
        return for_b_dec, self.for_W_enc.t(), self.for_b_enc, self.for_W_dec


@dataclass(frozen=True)
class _Bands:
    """Of a chunk of n rows. `codes`: of bands decoded entry by entry, a row for each (row, band); `z`: the rest."""

    count: int
    sparse: list[int]
    codes: Codes | None
    z: dict[int, Float[Tensor, "n d_sae"]]


def _ranking(pre: Float[Tensor, "n d_sae"], k: int) -> Int[Tensor, "n k"]:
    """The k largest latents of each row, the largest last. Those that are not positive come in any order."""
    if k == 0:
        return torch.empty(len(pre), 0, dtype=torch.int64, device=pre.device)
    if pre.device.type != "cpu" or pre.dtype not in _BITS:
        return pre.topk(k, dim=1).indices.flip(1)
    bits, of_value, wide = _BITS[pre.dtype]
    if pre.shape[1] > 2**bits:
        bits, wide = 32, np.int64
    values = pre.view(of_value).numpy()
    latents = np.arange(pre.shape[1], dtype=wide)
    ranked = torch.empty(len(pre), k, dtype=torch.int64)

    def rank(first: int) -> None:  # numpy lets go of the GIL
        rows = slice(first, first + ROWS_PER_SORT)
        keys = values[rows].astype(wide)
        keys <<= bits
        keys |= latents  # no two are equal
        keys.sort(axis=1)
        np.bitwise_and(keys[:, -k:], 2**bits - 1, out=ranked[rows].numpy(), casting="same_kind")

    with ThreadPoolExecutor(torch.get_num_threads()) as threads:
        list(threads.map(rank, range(0, len(pre), ROWS_PER_SORT)))
    return ranked


# Bits for the latent's number; a value's bits as an integer, which rises with a positive value; the two together.
_BITS = {torch.bfloat16: (16, torch.int16, np.int32), torch.float32: (32, torch.int32, np.int64)}


def _entries(pre: Tensor, order: Tensor, spans: Sequence[tuple[int, int]]) -> Codes:
    """The positive entries at ranks a .. b of each span; a row of codes for each (row, span), spans side by side. So
    threads that share out the rows get wide and narrow spans alike."""
    width = order.shape[1]
    places = [slice(max(0, width - b), width - a) for a, b in spans]
    indices = torch.cat([order[:, place] for place in places], dim=1)
    values = pre.gather(1, indices)
    ends = list(itertools.accumulate(place.stop - place.start for place in places))
    active = values > 0
    if bool(active.all()):
        steps = torch.tensor([0, *ends[:-1]], device=pre.device)
        starts = torch.arange(len(pre), device=pre.device)[:, None] * ends[-1] + steps
        offsets = torch.nn.functional.pad(starts.flatten(), (0, 1), value=indices.numel())
        return Codes(offsets, indices.flatten(), values.flatten(), pre.shape[1])
    counts = torch.stack([active[:, a:b].sum(1) for a, b in itertools.pairwise([0, *ends])], dim=1)
    offsets = torch.nn.functional.pad(counts.flatten().cumsum(0), (1, 0))
    at = positions(active)
    indices, values = (tensor.flatten().index_select(0, at) for tensor in (indices, values))
    return Codes(offsets, indices, values, pre.shape[1])


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
