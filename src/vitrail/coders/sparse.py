"""Sparse codes, and the products of a k-sparse coder that touch only the latents that fired.

With entry p of the codes in row r[p], latent i[p], value v[p], and g the gradient of the output:

    decode             x_hat[r] = sum_{r[p]=r} v[p] W_dec[i[p]]
    its gradients      dv[p] = <g[r[p]], W_dec[i[p]]>         dW_dec[i] = sum_{i[p]=i} v[p] g[r[p]]
    the encoder's      dW_enc[:, i] = sum_{i[p]=i} dv[p] (y - b_dec)[r[p]]
                       db_enc[i] = sum_{i[p]=i} dv[p]         db_dec = -W_enc db_enc

Each is one `embedding_bag` over the codes or over their transpose, which is sorted once and used by both weight
gradients. On a CPU at d_sae = 24,576 and k = 64 a decode costs 1/26 of the dense product (PEERS.md, section 10).
On CUDA the sums and the dots are the Triton kernels of triton_kernels.py, where triton is installed.
"""

import functools
import itertools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import embedding_bag


class Transposed(NamedTuple):
    """The codes read latent by latent: entry `order[p]` of the codes lies in row `rows[p]`."""

    order: Int[Tensor, " nnz"]
    rows: Int[Tensor, " nnz"]
    offsets: Int[Tensor, " d_sae_plus_1"]


@dataclass(frozen=True, eq=False)
class Codes:
    """n rows of d_sae non-negative latents, in CSR form: row r holds the entries offsets[r] : offsets[r+1].

    `indices` are latents, `values` their activations, all > 0. The order of entries within a row is free.
    `shift` and `scale` are there when the coder normalises each row by its own numbers (layer_norm), so that a
    reconstruction needs nothing but the codes.
    """

    offsets: Int[Tensor, " n_plus_1"]
    indices: Int[Tensor, " nnz"]
    values: Float[Tensor, " nnz"]
    d_sae: int
    shift: Float[Tensor, "n 1"] | None = None
    scale: Float[Tensor, "n 1"] | None = None
    # Row numbers and the transpose are worked out once and shared by copies that differ only in their values: forward
    # and both backward products of one training step use the same ones.
    _pattern: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def n(self) -> int:
        return len(self.offsets) - 1

    @property
    def nnz(self) -> int:
        return len(self.indices)

    @property
    def device(self) -> torch.device:
        return self.values.device

    def rows(self) -> Int[Tensor, " nnz"]:
        """The row of each entry."""
        if "rows" not in self._pattern:
            numbers = torch.arange(self.n, device=self.device)
            self._pattern["rows"] = numbers.repeat_interleave(self.l0(), output_size=self.nnz)
        return self._pattern["rows"]

    def l0(self) -> Int[Tensor, " n"]:
        """Active latents per row: a count in 0..d_sae."""
        return self.offsets.diff()

    def fired(self) -> Int[Tensor, " d_sae"]:
        """In how many rows each latent fired."""
        return torch.bincount(self.indices, minlength=self.d_sae)

    def transposed(self) -> Transposed:
        if "transposed" not in self._pattern:
            # int32 keys sort faster than int64. Stable: rows stay in order, so sums come out the same every time.
            order = torch.sort(self.indices.to(torch.int32), stable=True).indices
            self._pattern["transposed"] = Transposed(order, self.rows()[order], _offsets(self.fired()))
        return self._pattern["transposed"]

    # -- other forms

    def to_dense(self) -> Float[Tensor, "n d_sae"]:
        """For tests and small batches: n x d_sae numbers, nearly all of them zero."""
        z = self.values.new_zeros(self.n, self.d_sae)
        return z.index_put((self.rows(), self.indices.long()), self.values)

    @classmethod
    def from_dense(cls, z: Float[Tensor, "n d_sae"]) -> "Codes":
        rows, indices = z.nonzero(as_tuple=True)
        return cls.from_entries(rows, indices, z[rows, indices], n=z.shape[0], d_sae=z.shape[1])

    @classmethod
    def from_entries(
        cls,
        rows: Int[Tensor, " nnz"],
        indices: Int[Tensor, " nnz"],
        values: Float[Tensor, " nnz"],
        *,
        n: int,
        d_sae: int,
    ) -> "Codes":
        """`rows` must ascend."""
        return cls(_offsets(torch.bincount(rows, minlength=n)), indices, values, d_sae)

    @classmethod
    def from_padded(cls, indices: Int[Tensor, "n k"], values: Float[Tensor, "n k"], d_sae: int) -> "Codes":
        """k candidates per row; those whose value is not positive did not fire and are dropped."""
        active = values > 0
        at = positions(active)
        indices, values = (tensor.reshape(-1).index_select(0, at) for tensor in (indices, values))
        return cls(_offsets(active.sum(1)), indices, values, d_sae)

    def with_values(self, values: Float[Tensor, " nnz"]) -> "Codes":
        """The same support with other values."""
        return replace(self, values=values)

    def with_row_terms(self, shift: Float[Tensor, "n 1"] | None, scale: Float[Tensor, "n 1"] | None) -> "Codes":
        return replace(self, shift=shift, scale=scale)

    def detach(self) -> "Codes":
        shift, scale = (None if t is None else t.detach() for t in (self.shift, self.scale))
        return replace(self, values=self.values.detach(), shift=shift, scale=scale)

    def to(self, device: torch.device | str) -> "Codes":
        offsets, indices, values = (tensor.to(device) for tensor in (self.offsets, self.indices, self.values))
        shift, scale = (None if t is None else t.to(device) for t in (self.shift, self.scale))
        return type(self)(offsets, indices, values, self.d_sae, shift, scale)

    # -- parts

    def keep(self, entries: Bool[Tensor, " nnz"]) -> "Codes":
        """Only the entries that are marked; every row stays, perhaps empty."""
        kept_before = torch.nn.functional.pad(entries.cumsum(0), (1, 0))
        offsets = kept_before[self.offsets.long()]
        return type(self)(offsets, self.indices[entries], self.values[entries], self.d_sae, self.shift, self.scale)

    def top(self, k: int) -> "Codes":
        """The k largest latents of each row (all of them where fewer fired): MSAE's progressive recovery."""
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}.")
        largest_first = torch.sort(self.values, descending=True, stable=True).indices
        order = largest_first[torch.sort(self.rows()[largest_first], stable=True).indices]
        place = torch.arange(self.nnz, device=self.device) - self.offsets[:-1].long()[self.rows()]
        entries = torch.zeros(self.nnz, dtype=torch.bool, device=self.device)
        entries[order] = place < k
        return self.keep(entries)

    def select_rows(self, rows: Int[Tensor, " m"] | slice) -> "Codes":
        """The rows asked for, in the order asked for; a row may come twice."""
        if isinstance(rows, slice):
            rows = torch.arange(self.n, device=self.device)[rows]
        counts = self.l0()[rows]
        offsets = _offsets(counts)
        first = self.offsets[:-1].long()[rows] - offsets[:-1]
        entries = torch.arange(int(offsets[-1]), device=self.device) + first.repeat_interleave(counts)
        shift, scale = (None if t is None else t[rows] for t in (self.shift, self.scale))
        return type(self)(offsets, self.indices[entries], self.values[entries], self.d_sae, shift, scale)

    @classmethod
    def cat(cls, parts: Sequence["Codes"]) -> "Codes":
        """Rows of the parts, one after another."""
        if not parts:
            raise ValueError("there is nothing to join: give at least one Codes.")
        if len({part.d_sae for part in parts}) > 1:
            raise ValueError(f"codes of different widths cannot be joined: d_sae is {[part.d_sae for part in parts]}.")
        starts = itertools.accumulate((part.nnz for part in parts[:-1]), initial=0)
        offsets = [part.offsets[1:] + start for part, start in zip(parts, starts, strict=True)]
        indices, values = (torch.cat([getattr(part, name) for part in parts]) for name in ("indices", "values"))
        shift, scale = (_cat_or_none([getattr(part, name) for part in parts]) for name in ("shift", "scale"))
        return cls(torch.cat([parts[0].offsets[:1], *offsets]), indices, values, parts[0].d_sae, shift, scale)


def positions(marked: Bool[Tensor, "*axes"]) -> Int[Tensor, " n"]:
    """Where the marks are in the flattened tensor, ascending. numpy finds them four times as fast as torch."""
    flat = marked.reshape(-1)
    return torch.from_numpy(np.flatnonzero(flat.numpy())) if flat.device.type == "cpu" else flat.nonzero().squeeze(1)


def entries_at(pre: Float[Tensor, "n d_sae"], at: Int[Tensor, " nnz"]) -> Codes:
    """The entries at ascending places of the flattened rows."""
    n, d_sae = pre.shape
    offsets = torch.searchsorted(at, torch.arange(n + 1, device=pre.device) * d_sae)
    return Codes(offsets, at % d_sae, pre.reshape(-1).index_select(0, at), d_sae)


def decode(codes: Codes, W_dec: Float[Tensor, "d_sae d_in"]) -> Float[Tensor, "n d_in"]:
    """z @ W_dec, from the active latents alone. Differentiable in the codes' values and in W_dec."""
    values = codes.values.to(W_dec.dtype)  # codes from disk are fp16
    return _Decode.apply(values, W_dec, codes)  # pyright: ignore[reportReturnType]


def activations(
    y: Float[Tensor, "n d_in"],
    b_dec: Float[Tensor, " d_in"],
    W_enc: Float[Tensor, "d_in d_sae"],
    b_enc: Float[Tensor, " d_sae"],
    codes: Codes,
) -> Codes:
    """The same codes, their values tied to the encoder for differentiation.

    `codes.values` must be (y - b_dec) @ W_enc + b_enc at the support, as the selection found them. Selection itself has
    no gradient, so the dense pre-activations can be thrown away once it is made.
    """
    values = _Activations.apply(y, b_dec, W_enc, b_enc, codes)
    return codes.with_values(values)  # pyright: ignore[reportArgumentType]


def dense_pre_activations(
    y: Float[Tensor, "n d_in"],
    b_dec: Float[Tensor, " d_in"],
    W_enc: Float[Tensor, "d_in d_sae"],
    b_enc: Float[Tensor, " d_sae"],
) -> Float[Tensor, "n d_sae"]:
    """(y - b_dec) @ W_enc + b_enc, for architectures whose gradient is dense."""
    return _PreActivations.apply(y, b_dec, W_enc, b_enc)  # pyright: ignore[reportReturnType]


class _PreActivations(torch.autograd.Function):
    """As autograd has it, but for b_dec: its gradient is a product with a vector, not one of the size of the batch."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, b_dec: Tensor, W_enc: Tensor, b_enc: Tensor) -> Tensor:
        ctx.save_for_backward(y, b_dec, W_enc)
        return torch.addmm(b_enc, y - b_dec, W_enc)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        y, b_dec, W_enc = ctx.saved_tensors
        for_b_enc = g.sum(0)
        for_W_enc = (g.t() @ (y - b_dec)).t() if ctx.needs_input_grad[2] else None  # in W_enc's own layout
        for_y = g @ W_enc.t() if ctx.needs_input_grad[0] else None
        return for_y, -(W_enc @ for_b_enc), for_W_enc, for_b_enc


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, W_dec: Tensor, codes: Codes) -> Tensor:
        ctx.save_for_backward(values, W_dec)
        ctx.codes = codes
        return bag(W_dec, codes.indices, codes.offsets, values)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        values, W_dec = ctx.saved_tensors
        g, codes = g.contiguous(), ctx.codes
        # The weights first: a GPU's `entry_dots` reads latent by latent where the transpose is at hand.
        for_weights = scatter_to_latents(g, values, codes) if ctx.needs_input_grad[1] else None
        for_values = entry_dots(g, W_dec, codes) if ctx.needs_input_grad[0] else None
        return for_values, for_weights, None


class _Activations(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, b_dec: Tensor, W_enc: Tensor, b_enc: Tensor, codes: Codes) -> Tensor:
        ctx.save_for_backward(y, b_dec, W_enc)
        ctx.codes = codes
        return codes.values.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        y, b_dec, W_enc = ctx.saved_tensors
        g, codes = g.contiguous(), ctx.codes
        for_b_enc = scatter_to_latents(g.new_ones(codes.n, 1), g, codes)[:, 0]  # in a fixed order on GPUs too
        for_W_enc = scatter_to_latents(y - b_dec, g, codes).t() if ctx.needs_input_grad[2] else None
        # The encoder reads y - b_dec. Its gradient summed over the rows is one product with a vector, so that the
        # (n, d_in) one is worked out only for those who ask for the gradient of their input.
        for_b_dec = -(W_enc @ for_b_enc) if ctx.needs_input_grad[1] else None
        for_y = bag(W_enc.t().contiguous(), codes.indices, codes.offsets, g) if ctx.needs_input_grad[0] else None
        return for_y, for_b_dec, for_W_enc, for_b_enc, None


def bag(table: Tensor, indices: Tensor, offsets: Tensor, weights: Tensor) -> Tensor:
    """out[b] = sum over p in bag b of weights[p] table[indices[p]]."""
    if kernels := _kernels(table.device):
        return kernels.bag(table, indices, offsets, weights)
    # Detached: of a table that asks for gradients it would also note down what its own backward needs, in one thread.
    table, weights = table.detach(), weights.detach()
    return embedding_bag(
        indices.long(), table, offsets.long(), mode="sum", per_sample_weights=weights, include_last_offset=True
    )


def scatter_to_latents(per_row: Tensor, weights: Tensor, codes: Codes) -> Tensor:
    """(d_sae, d): for each latent the sum of weights[p] per_row[row of p] over its entries. z.T @ per_row, in short."""
    transposed = codes.transposed()
    return bag(per_row, transposed.rows, transposed.offsets, weights[transposed.order])


def entry_dots(per_row: Float[Tensor, "n d"], per_latent: Float[Tensor, "d_sae d"], codes: Codes) -> Tensor:
    """out[p] = <per_row[row of p], per_latent[latent of p]>.

    Read latent by latent, so that each latent's weights are fetched once and the rows, which are few, stay in the
    cache: 27 ms instead of 90 for 64 latents of 24,576 in each of 4,096 rows, 14 where MKL is.
    """
    if codes.nnz == 0:
        return per_row.new_zeros(0)
    if kernels := _kernels(per_row.device):
        return kernels.entry_dots(per_row, per_latent, codes)
    order, rows, offsets = codes.transposed()
    per_row, per_latent = per_row.contiguous(), per_latent.contiguous()
    if per_row.device.type == "cpu" and torch.backends.mkl.is_available():
        dots = _sampled_product(per_latent, per_row, rows, offsets)
    else:  # the operation behind embedding_bag's own backward
        latents = codes.indices.long()[order]
        dots = torch.ops.aten._embedding_bag_per_sample_weights_backward(
            per_latent, per_row, rows, offsets[:-1], latents, 0
        )
    return torch.empty_like(dots).index_put_((order,), dots)


@functools.cache
def _kernels(device: torch.device) -> ModuleType | None:
    """triton_kernels.py on a CUDA device, where triton is installed, knows the card (Ampere and later) and runs."""
    if device.type != "cuda" or find_spec("triton") is None or torch.cuda.get_device_capability(device) < (8, 0):
        return None
    from vitrail.coders import triton_kernels

    one = torch.ones(1, device=device)
    try:
        triton_kernels.bag(one[None], one.long() - 1, torch.arange(2, device=device), one)
    except Exception as error:  # it builds its launchers with a C compiler and Python's headers, which may not be there
        warnings.warn(f"Triton does not run here: the sparse products use PyTorch's slower ops. {error}", stacklevel=2)
        return None
    return triton_kernels


def _sampled_product(a: Tensor, b: Tensor, columns: Tensor, offsets: Tensor) -> Tensor:
    """<a[i], b[j]> at the entries (i, j) of a CSR pattern."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse", UserWarning)  # that CSR tensors are in beta, once per process
        pattern = torch.sparse_csr_tensor(
            offsets, columns, a.new_zeros(len(columns)), (len(a), len(b)), check_invariants=False
        )
        return torch.sparse.sampled_addmm(pattern, a, b.t(), beta=0.0).values()


def _offsets(counts: Tensor) -> Tensor:
    return torch.nn.functional.pad(counts.cumsum(0), (1, 0))


def _cat_or_none(tensors: Sequence[Tensor | None]) -> Tensor | None:
    present = [tensor for tensor in tensors if tensor is not None]
    if len(present) not in (0, len(tensors)):
        raise ValueError(
            "some codes carry their rows' shift and scale and some do not: they come from different coders."
        )
    return torch.cat(present) if present else None
