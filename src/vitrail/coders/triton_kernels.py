"""The sparse products as Triton kernels, for CUDA. sparse.py chooses them; the results are those of its PyTorch ops.

    bag          out[b] = sum over p in bag b of weights[p] table[indices[p]]
    entry_dots   out[p] = <per_row[row of p], per_latent[latent of p]>

Sums are made in float32, of float64 in float64. There are no atomics and nothing is tuned while running: the order of
every sum follows from the shapes and the bags alone, so the same input gives the same bits. The kernels make no
gradient: autograd is sparse.py's. Importing this file imports triton.
"""

from typing import no_type_check

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from jaxtyping import Float, Int
from torch import Tensor

from vitrail.coders.sparse import Codes

# Entries summed by one program where they all lie in one bag: a latent that fires in every row would else hold up the
# whole launch, since one program goes through its bag alone.
PART = 512
ENTRIES = 16  # read side by side
ROW_BYTES = 512  # of a row of the table, read by one program
# Said outright, so that another version's defaults change neither bits nor speed.
LAUNCH = dict(num_warps=4, enable_fp_fusion=True)


def bag(
    table: Float[Tensor, "m d"],
    indices: Int[Tensor, " nnz"],
    offsets: Int[Tensor, " n_bags_plus_1"],
    weights: Float[Tensor, " nnz"],
) -> Float[Tensor, "n_bags d"]:
    """out[b] = sum over p in bag b of weights[p] table[indices[p]], in the table's dtype. `indices` are not checked.

    Raises ValueError where weights and table differ in dtype, as embedding_bag does.
    """
    if weights.dtype != table.dtype:
        raise ValueError(f"weights must have the table's dtype {table.dtype}, got {weights.dtype}.")
    n_bags, d = len(offsets) - 1, table.shape[1]
    out = table.new_empty(n_bags, d)
    if out.numel() == 0:
        return out
    table, columns = _rows_whole(table), _columns(table)
    n_parts, n_bands = len(indices) // PART, triton.cdiv(d, columns)
    parts = torch.empty(n_parts, d, dtype=torch.promote_types(table.dtype, torch.float32), device=table.device)
    read = (table, indices.contiguous(), weights.contiguous(), offsets.contiguous(), parts)
    sizes = dict(SUMS=_accumulator(table), PART=PART, ENTRIES=ENTRIES, COLUMNS=columns)
    with torch.cuda.device_of(table):
        if n_parts:
            _parts[n_parts, n_bands](*read, n_bags, d, table.stride(0), STEPS=n_bags.bit_length(), **sizes, **LAUNCH)
        # The bags go fastest: all of them read one band of columns before the next, and the band stays in the L2 cache.
        _bags[n_bags, n_bands](*read, out, d, table.stride(0), **sizes, **LAUNCH)
    return out


def entry_dots(
    per_row: Float[Tensor, "n d"], per_latent: Float[Tensor, "d_sae d"], codes: Codes
) -> Float[Tensor, " nnz"]:
    """out[p] = <per_row[row of p], per_latent[latent of p]>, in their dtype.

    Read latent by latent where the codes' transpose is at hand: the rows, which are few, then stay in the cache. Else
    in the codes' own order, since sorting them costs more than that saves. The bits are the same.
    """
    if per_row.dtype != per_latent.dtype:
        raise ValueError(f"per_row and per_latent must have one dtype, got {per_row.dtype} and {per_latent.dtype}.")
    out = per_row.new_empty(codes.nnz)
    if codes.nnz == 0:
        return out
    transposed = codes._pattern.get("transposed")
    order, rows = (codes.indices, codes.rows()) if transposed is None else (transposed.order, transposed.rows)
    per_row, per_latent = _rows_whole(per_row), _rows_whole(per_latent)
    with torch.cuda.device_of(per_row):
        _dots[(triton.cdiv(codes.nnz, ENTRIES),)](
            per_row,
            per_latent,
            rows.contiguous(),
            codes.indices.contiguous(),
            order.contiguous(),
            out,
            codes.nnz,
            per_row.shape[1],
            per_row.stride(0),
            per_latent.stride(0),
            IN_ORDER=transposed is None,
            SUMS=_accumulator(per_row),
            ENTRIES=ENTRIES,
            COLUMNS=_columns(per_row),
            **LAUNCH,
        )
    return out


def _rows_whole(table: Tensor) -> Tensor:
    """Rows may lie anywhere, the numbers of one row side by side."""
    return table if table.stride(1) == 1 else table.contiguous()


def _accumulator(table: Tensor) -> tl.dtype:
    return tl.float64 if table.dtype == torch.float64 else tl.float32


def _columns(table: Tensor) -> int:
    return max(16, min(triton.next_power_of_2(table.shape[1]), ROW_BYTES // table.element_size()))


# no_type_check: what compiles a kernel reads its source, and cannot look through a decorator that checks shapes.


@triton.jit
@no_type_check
def _add_entries(
    total, table, indices, weights, start, end, columns, d, row_stride,
    SUMS: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    """total[j] plus the weighted rows of the entries start + j, start + j + ENTRIES, ... below end."""
    for first in range(start, end, ENTRIES):
        entries = first + tl.arange(0, ENTRIES)
        there = entries < end
        rows = tl.load(indices + entries, mask=there, other=0).to(tl.int64)
        scale = tl.load(weights + entries, mask=there, other=0.0).to(SUMS)
        inside = there[:, None] & (columns < d)[None, :]
        read = tl.load(table + rows[:, None] * row_stride + columns[None, :], mask=inside, other=0.0).to(SUMS)
        total += scale[:, None] * read
    return total


@triton.jit
@no_type_check
def _parts(
    table, indices, weights, offsets, parts, n_bags, d, row_stride,
    STEPS: tl.constexpr, SUMS: tl.constexpr, PART: tl.constexpr, ENTRIES: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """parts[t] = the sum of the entries t PART : (t + 1) PART, where they all lie in one bag; else unwritten."""
    t = tl.program_id(0).to(tl.int64)
    start = t * PART
    low = t * 0  # by bisection: the last bag that begins at or before `start`
    for step in tl.static_range(STEPS):
        at = low + (1 << (STEPS - 1 - step))
        low = tl.where(tl.load(offsets + at, mask=at < n_bags, other=start + 1) <= start, at, low)
    if tl.load(offsets + low + 1) >= start + PART:
        columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        total = tl.zeros((ENTRIES, COLUMNS), dtype=SUMS)
        total = _add_entries(
            total, table, indices, weights, start, start + PART, columns, d, row_stride, SUMS, ENTRIES
        )  # fmt: skip
        tl.store(parts + t * d + columns, tl.sum(total, axis=0), mask=columns < d)


@triton.jit
@no_type_check
def _bags(
    table, indices, weights, offsets, parts, out, d, row_stride,
    SUMS: tl.constexpr, PART: tl.constexpr, ENTRIES: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One bag, one band of columns: the entries before its first whole part, those after its last, then the parts."""
    b = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    start = tl.load(offsets + b).to(tl.int64)
    end = tl.load(offsets + b + 1).to(tl.int64)
    first, last = (start + PART - 1) // PART, end // PART
    has_parts = first < last
    head_end = tl.where(has_parts, first * PART, end)
    tail_start = tl.where(has_parts, last * PART, end)
    total = tl.zeros((ENTRIES, COLUMNS), dtype=SUMS)
    total = _add_entries(total, table, indices, weights, start, head_end, columns, d, row_stride, SUMS, ENTRIES)
    total = _add_entries(total, table, indices, weights, tail_start, end, columns, d, row_stride, SUMS, ENTRIES)
    summed = tl.sum(total, axis=0)
    for t in range(first, last):
        summed += tl.load(parts + t * d + columns, mask=columns < d, other=0.0)
    tl.store(out + b * d + columns, summed, mask=columns < d)


@triton.jit
@no_type_check
def _dots(
    per_row, per_latent, rows, indices, order, out, nnz, d, row_stride, latent_stride,
    IN_ORDER: tl.constexpr, SUMS: tl.constexpr, ENTRIES: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """ENTRIES entries that follow each other in the order of reading, over all columns."""
    entries = tl.program_id(0).to(tl.int64) * ENTRIES + tl.arange(0, ENTRIES)
    there = entries < nnz
    at = entries
    if not IN_ORDER:
        at = tl.load(order + entries, mask=there, other=0).to(tl.int64)
    of_rows = per_row + tl.load(rows + entries, mask=there, other=0).to(tl.int64) * row_stride
    of_latents = per_latent + tl.load(indices + at, mask=there, other=0).to(tl.int64) * latent_stride
    total = tl.zeros((ENTRIES, COLUMNS), dtype=SUMS)
    for first in range(0, d, COLUMNS):
        columns = first + tl.arange(0, COLUMNS)
        inside = there[:, None] & (columns < d)[None, :]
        a = tl.load(of_rows[:, None] + columns[None, :], mask=inside, other=0.0).to(SUMS)
        b = tl.load(of_latents[:, None] + columns[None, :], mask=inside, other=0.0).to(SUMS)
        total += a * b
    tl.store(out + at, tl.sum(total, axis=1), mask=there)
