"""Training steps of coders that fire wherever pre > threshold: how many latents that is, the data decides.

    pre = (y - b_dec) @ W_enc + b_enc          made by chunks of rows
    z = pre where pre > theta, else 0          theta = 0: ReLU
    decoded = z @ W_dec,   per_latent[i] = sum_rows z[:, i], or the number of rows in which i fired

Where few fire, the pre-activations are thrown away and decode, its gradients and the encoder's touch the support alone
(sparse.py). Where many do, dense products are cheaper. Which it is, the first chunk of the batch's own rows says: a
resumed run decides as the uninterrupted one did. Both ways give the same numbers but for rounding.

`dtype=torch.bfloat16` makes the dense products in bfloat16 (inputs and results rounded, sums in float32). On the sparse
way that is the search for the support alone; values and gradients are worked out in the weights' own dtype.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vitrail.coders.select import Encoder, rows_of_chunk
from vitrail.coders.sparse import Codes, activations, decode, entries_at, positions

# Share of the entries. 4,096 rows of 768, d_sae 6,144, one core, loss and gradients of a step, CPU ms: dense in float32
# 2,250, sparse 720 at 0.05, 1,040 at 0.1, 1,960 at 0.2, 2,640 at 0.3; dense in bfloat16 600 (860 with a kernel), sparse
# 290 at 0.02, 430 at 0.04, 610 at 1/16, 930 at 0.1.
SPARSE_BELOW = {torch.float32: 1 / 5, torch.float64: 1 / 5, torch.bfloat16: 1 / 16}
SPARSE_BELOW_ON_GPU = 1 / 40
CHUNK_SHARE = 2  # of which a part is worked on at a time on the dense way, where four such arrays are about
COARSE = 2.0**-7  # bfloat16's step at a number, as its share: how far below a floor to look for what may lie above
STEPS_IN_BANDWIDTH = 4  # of bfloat16 at the thresholds; where fewer fit, it cannot tell what lies within


@dataclass(frozen=True)
class Kernel:
    """The density that estimates a threshold's derivative: 1 / bandwidth * of((pre - theta) / bandwidth), of no weight
    from `reach` bandwidths on."""

    of: Callable[[Tensor], Tensor]
    bandwidth: float
    reach: float


@dataclass(frozen=True)
class Fired:
    """`decoded` and `per_latent` carry gradient; `codes` are made when asked for."""

    decoded: Float[Tensor, "n d_out"]
    per_latent: Float[Tensor, " d_sae"]
    rows_fired: Int[Tensor, " d_sae"]
    codes: Callable[[], Codes]


def rectified(
    y: Float[Tensor, "n d_in"],
    b_dec: Float[Tensor, " d_in"],
    W_enc: Float[Tensor, "d_in d_sae"],
    b_enc: Float[Tensor, " d_sae"],
    W_dec: Float[Tensor, "d_sae d_out"],
    *,
    dtype: torch.dtype | None = None,
) -> Fired:
    """z = ReLU(pre); per_latent sums z. Differentiable in the four weights, and in y."""
    found = pre_above(y, b_dec, W_enc, b_enc, None, dtype=dtype)
    if isinstance(found, Codes):
        codes = activations(y, b_dec, W_enc, b_enc, found)
        codes = codes.with_values(codes.values.relu())  # bfloat16 takes in some that are not positive
        per_latent = W_dec.new_zeros(codes.d_sae).index_add(0, codes.indices, codes.values)
        return _fired_sparsely(codes, W_dec, per_latent)
    decoded, per_latent, rows_fired = _Dense.apply(y, b_dec, W_enc, b_enc, W_dec, None, found, None)  # pyright: ignore[reportGeneralTypeIssues]
    return Fired(decoded, per_latent, rows_fired, lambda: _positive(found, None, W_dec.dtype))


def jumped(
    y: Float[Tensor, "n d_in"],
    b_dec: Float[Tensor, " d_in"],
    W_enc: Float[Tensor, "d_in d_sae"],
    b_enc: Float[Tensor, " d_sae"],
    W_dec: Float[Tensor, "d_sae d_out"],
    theta: Float[Tensor, " d_sae"],
    kernel: Kernel,
    *,
    dtype: torch.dtype | None = None,
) -> Fired:
    """z = pre where pre > theta; per_latent counts rows. Differentiable in theta too, by the kernel's estimate.

    A bandwidth of a few of bfloat16's steps at the thresholds is too fine for it: `dtype` is then not followed.
    """
    threshold = theta.detach()
    if dtype == torch.bfloat16 and kernel.bandwidth < STEPS_IN_BANDWIDTH * COARSE * float(threshold.mean()):
        dtype = None
    found = pre_above(y, b_dec, W_enc, b_enc, threshold - kernel.reach * kernel.bandwidth, dtype=dtype)
    if isinstance(found, Codes):
        codes = activations(y, b_dec, W_enc, b_enc, found)
        values, per_latent = _JumpAt.apply(codes.values, theta, codes.indices, kernel)  # pyright: ignore[reportGeneralTypeIssues]
        return _fired_sparsely(codes.with_values(values), W_dec, per_latent)
    decoded, per_latent, rows_fired = _Dense.apply(y, b_dec, W_enc, b_enc, W_dec, theta, found, kernel)  # pyright: ignore[reportGeneralTypeIssues]
    return Fired(decoded, per_latent, rows_fired, lambda: _positive(found, threshold, W_dec.dtype))


@torch.no_grad()
def pre_above(
    y: Float[Tensor, "n d_in"],
    b_dec: Float[Tensor, " d_in"],
    W_enc: Float[Tensor, "d_in d_sae"],
    b_enc: Float[Tensor, " d_sae"],
    floor: Float[Tensor, " d_sae"] | None,
    *,
    dtype: torch.dtype | None = None,
) -> Codes | Float[Tensor, "n d_sae"]:
    """The entries above the floor (None: above 0), valued by their pre-activations in the dtype of y, if they are few;
    else all pre-activations, in `dtype`.

    In bfloat16 the entries found are those above the floor as bfloat16 sees it, some of them just below.
    """
    encoder = Encoder(y - b_dec, W_enc, b_enc, dtype)
    dtype = dtype or y.dtype
    seen = floor if encoder.exact or floor is None else (floor - COARSE * floor.abs()).to(dtype)
    parts: list[Codes] = []
    whole: Tensor | None = None
    for first, pre in encoder.chunks():
        if whole is None:
            marked = above(pre, seen)  # whether few or many fire, the first chunk says
            if first == 0 and n_marked(marked) >= sparse_below(dtype, y.device) * marked.numel():
                whole = torch.empty(len(y), len(b_enc), dtype=dtype, device=y.device)
            else:
                parts.append(entries(pre, marked))
        if whole is not None:
            whole[first : first + len(pre)] = pre
    return encoder.exact_values(Codes.cat(parts)) if whole is None else whole


def sparse_below(dtype: torch.dtype, device: torch.device) -> float:
    """The share of entries below which the sparse way is taken."""
    return SPARSE_BELOW[dtype] if device.type == "cpu" else SPARSE_BELOW_ON_GPU


def above(pre: Float[Tensor, "m d_sae"], floor: Float[Tensor, " d_sae"] | None) -> Bool[Tensor, "m d_sae"]:
    if floor is not None:
        return pre > floor
    # As integers bfloat16 are compared six times as fast, and have the same signs.
    return pre.view(torch.int16) > 0 if pre.dtype == torch.bfloat16 else pre > 0


def n_marked(marked: Bool[Tensor, "m d_sae"]) -> int:
    return int(np.count_nonzero(marked.numpy())) if marked.device.type == "cpu" else int(marked.sum())


def entries(pre: Float[Tensor, "m d_sae"], marked: Bool[Tensor, "m d_sae"]) -> Codes:
    """The marked entries."""
    return entries_at(pre, positions(marked))


def dense_activations(
    y: Float[Tensor, "n d_in"],
    b_dec: Float[Tensor, " d_in"],
    W_enc: Float[Tensor, "d_in d_sae"],
    b_enc: Float[Tensor, " d_sae"],
    pre: Float[Tensor, "n d_sae"],
) -> Float[Tensor, "n d_sae"]:
    """`pre`, as `pre_above` gave it, tied to the encoder for differentiation: products in the dtype of `pre`."""
    return _Tied.apply(y, b_dec, W_enc, b_enc, pre)  # pyright: ignore[reportReturnType]


def dense_decode(
    z: Float[Tensor, "n d_sae"], W_dec: Float[Tensor, "d_sae d_out"], dtype: torch.dtype
) -> Float[Tensor, "n d_out"]:
    """z @ W_dec, forward and backward products in `dtype`."""
    return _Product.apply(z, W_dec, dtype)  # pyright: ignore[reportReturnType]


def _fired_sparsely(codes: Codes, W_dec: Tensor, per_latent: Tensor) -> Fired:
    found = codes.detach()
    fires = found.values > 0
    rows_fired = torch.bincount(found.indices, weights=fires, minlength=found.d_sae).long()
    return Fired(decode(codes, W_dec), per_latent, rows_fired, lambda: found.keep(fires))


def _positive(pre: Tensor, theta: Tensor | None, dtype: torch.dtype) -> Codes:
    found = [
        entries(part, above(part, theta)) for part in pre.split(rows_of_chunk(len(pre), pre[0].nbytes, pre.device))
    ]
    codes = Codes.cat(found)
    return codes.with_values(codes.values.to(dtype))


def _parts(pre: Tensor) -> Iterator[slice]:
    size = rows_of_chunk(len(pre), pre.shape[1] * CHUNK_SHARE * pre.element_size(), pre.device)
    for first in range(0, len(pre), size):
        yield slice(first, first + size)


def _firing(pre: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
    """(z, pre - theta) of some rows, in theta's dtype. A difference is positive just where pre > theta."""
    pre = pre.to(theta.dtype)
    over = pre - theta
    return torch.ops.aten.threshold_backward(pre, over, 0), over


def _count(z: Tensor) -> Tensor:
    return above(z, None).view(torch.uint8).sum(0, dtype=torch.int32)


class _JumpAt(torch.autograd.Function):
    """(z, rows in which each latent fired) at entries near or above their thresholds."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor, theta: Tensor, indices: Tensor, kernel: Kernel) -> tuple[Tensor, Tensor]:
        over = pre - theta[indices]
        ctx.save_for_backward(over, theta, indices)
        ctx.kernel = kernel
        fired = (over > 0).to(pre.dtype)
        return pre * fired, torch.zeros_like(theta).index_add_(0, indices, fired)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, for_z: Tensor, for_rows: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        over, theta, indices = ctx.saved_tensors
        near = ctx.kernel.of(over / ctx.kernel.bandwidth) / ctx.kernel.bandwidth
        with_z, alone = (torch.zeros_like(theta).index_add_(0, indices, part) for part in (near * for_z, near))
        return torch.ops.aten.threshold_backward(for_z, over, 0), -theta * with_z - for_rows * alone, None, None


class _Dense(torch.autograd.Function):
    """(z @ W_dec, per latent, rows in which each latent fired) from pre-activations; products in the dtype of `pre`.

    What comes between the products is done by parts of the rows, in the cache.
    """

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        b_dec: Tensor,
        W_enc: Tensor,
        b_enc: Tensor,
        W_dec: Tensor,
        theta: Tensor | None,
        pre: Tensor,
        kernel: Kernel | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Without theta, `pre` becomes z in place."""
        low = W_dec.to(pre.dtype)
        decoded = W_dec.new_empty(len(pre), W_dec.shape[1])
        summed, rows_fired = W_dec.new_zeros(len(W_dec)), torch.zeros_like(W_dec[:, 0], dtype=torch.int64)
        for rows in _parts(pre):
            z = pre[rows].relu_() if theta is None else _firing(pre[rows], theta)[0]
            decoded[rows] = z.to(low.dtype) @ low
            rows_fired += _count(z)
            if theta is None:
                summed += z.sum(0, dtype=summed.dtype)
        ctx.save_for_backward(y, b_dec, W_enc, theta)
        ctx.pre, ctx.low, ctx.kernel = pre, low, kernel
        ctx.mark_non_differentiable(rows_fired)
        return decoded, summed if theta is None else rows_fired.to(summed.dtype), rows_fired

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, for_decoded: Tensor, for_each: Tensor, _: Any) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (y, b_dec, W_enc, theta), pre, low = ctx.saved_tensors, ctx.pre, ctx.low
        g, memory = for_decoded.to(pre.dtype), torch.empty_like(pre)
        if theta is not None:
            for rows in _parts(pre):
                memory[rows] = _firing(pre[rows], theta)[0]
        for_W_dec = ((pre if theta is None else memory).t() @ g).to(y.dtype)
        for_pre, for_b_enc = memory, y.new_zeros(len(low))
        for_theta = None if theta is None else torch.zeros_like(theta)
        for rows in _parts(pre):
            slope = g[rows] @ low.t()
            if theta is None:
                slope += for_each.to(slope.dtype)
                torch.ops.aten.threshold_backward(slope, pre[rows], 0, grad_input=for_pre[rows])
            else:
                slope, over = slope.to(theta.dtype), _firing(pre[rows], theta)[1]
                near = ctx.kernel.of(over / ctx.kernel.bandwidth) / ctx.kernel.bandwidth
                for_theta -= for_each * near.sum(0) + theta * (near.mul_(slope)).sum(0)
                for_pre[rows] = torch.ops.aten.threshold_backward(slope, over, 0)
            for_b_enc += for_pre[rows].sum(0, dtype=for_b_enc.dtype)
        for_y, for_b_dec, for_W_enc = _to_the_encoder(ctx, for_pre, for_b_enc, y, b_dec, W_enc)
        return for_y, for_b_dec, for_W_enc, for_b_enc, for_W_dec, for_theta, None, None


class _Tied(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, b_dec: Tensor, W_enc: Tensor, b_enc: Tensor, pre: Tensor) -> Tensor:
        ctx.save_for_backward(y, b_dec, W_enc)
        ctx.dtype = pre.dtype
        return pre.to(y.dtype, copy=True)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        y, b_dec, W_enc = ctx.saved_tensors
        for_b_enc = g.sum(0)
        return *_to_the_encoder(ctx, g.to(ctx.dtype), for_b_enc, y, b_dec, W_enc), for_b_enc, None


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, W_dec: Tensor, dtype: torch.dtype) -> Tensor:
        z_low, low = z.to(dtype), W_dec.to(dtype)
        ctx.save_for_backward(z_low, low)
        ctx.of = z.dtype
        return (z_low @ low).to(z.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        z, low = ctx.saved_tensors
        g = g.to(low.dtype)
        for_W_dec = (z.t() @ g).to(ctx.of) if ctx.needs_input_grad[1] else None
        return (g @ low.t()).to(ctx.of), for_W_dec, None


def _to_the_encoder(
    ctx: Any, for_pre: Tensor, for_b_enc: Tensor, y: Tensor, b_dec: Tensor, W_enc: Tensor
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Gradients of y, b_dec and W_enc, products in the dtype of `for_pre`. As in sparse.py, b_dec's is one product with
    a vector."""
    dtype = for_pre.dtype
    for_W_enc = (for_pre.t() @ (y - b_dec).to(dtype)).to(y.dtype).t()
    for_y = (for_pre @ W_enc.t().to(dtype)).to(y.dtype) if ctx.needs_input_grad[0] else None
    return for_y, -(W_enc @ for_b_enc), for_W_enc
