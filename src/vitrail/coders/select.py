"""Which latents fire, found without keeping the pre-activations: exact, and most of them never ranked.

    rows      the k largest of each row          batch     the `count` largest of the whole batch

None of a row's k largest entries is below the k-th largest maximum of its groups (a group is every g-th latent): one
pass for the maxima, a partition of a few thousand numbers, a look into the few groups that reach that floor, and some
k + k/8 candidates are left per row, which are ranked. Over a batch, a guess below the answer does the same, and the
answer does not depend on the guess. (Overcomplete and others rank all n x d_sae numbers: 1.4 s of a step against 0.1,
PEERS.md section 10.)

`dtype=torch.bfloat16` makes the product that finds the candidates in bfloat16, with some to spare, and works out their
values anew in the weights' own dtype: what is selected is what the full product would select, unless two
pre-activations at the edge differ by less than bfloat16 can tell, and the values are exact.
"""

import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from vitrail.coders.sparse import Codes, entries_at, entry_dots, positions

PRE_ACTIVATION_BYTES = 2**24  # of one chunk: selection passes over it again while it is still in the cache
PRE_ACTIVATION_BYTES_ON_GPU = 2**28  # few, full products
PLAIN = 512  # fewer latents than this are not grouped
CROWD = (
    4  # times as many groups as wanted may reach the floor; where more do, equal numbers are many, and all are ranked
)
SPARE = 8  # one candidate in so many more than k, at least so many, where bfloat16 finds them
GUESSES = (0.9, 0.6, 0.0)  # of the smallest entry picked in earlier batches


def rows_of_chunk(n: int, bytes_per_row: int, device: torch.device) -> int:
    """Chunks of equal size, so that no last one of a few rows is left."""
    room = PRE_ACTIVATION_BYTES if device.type == "cpu" else PRE_ACTIVATION_BYTES_ON_GPU
    most = max(1, room // bytes_per_row)
    return max(1, -(-n // -(-n // most))) if n else 1


class Encoder:
    """(y - b_dec) @ W_enc + b_enc of one batch, a chunk of rows at a time."""

    def __init__(
        self,
        centred: Float[Tensor, "n d_in"],
        W_enc: Float[Tensor, "d_in d_sae"],
        b_enc: Float[Tensor, " d_sae"],
        dtype: torch.dtype | None = None,
    ) -> None:
        self.centred, self.W_enc, self.b_enc = centred, W_enc, b_enc
        self.n, self.d_sae = len(centred), W_enc.shape[1]
        self.exact = dtype is None or dtype == W_enc.dtype
        self._in = (centred, W_enc, b_enc) if self.exact else tuple(t.to(dtype) for t in (centred, W_enc, b_enc))

    def chunks(self) -> Iterator[tuple[int, Float[Tensor, "m d_sae"]]]:
        """(first row, pre-activations). The memory is used again for the next chunk."""
        centred, W_enc, b_enc = self._in
        size = rows_of_chunk(self.n, self.d_sae * centred.element_size(), centred.device)
        memory = torch.empty(size, self.d_sae, dtype=centred.dtype, device=centred.device)
        for first in range(0, self.n, size):
            rows = centred[first : first + size]
            yield first, torch.addmm(b_enc, rows, W_enc, out=memory[: len(rows)])

    def rows(self, first: int, n: int) -> Float[Tensor, "n d_in"]:
        """What `n` rows from `first` on look like to the product."""
        return self._in[0][first : first + n]

    def exact_values(self, codes: Codes) -> Codes:
        """The same entries, valued in full precision."""
        if self.exact:
            return codes
        dots = entry_dots(self.centred, self.W_enc.t(), codes)
        return codes.with_values(dots + self.b_enc[codes.indices])


@torch.no_grad()
def largest_of_rows(encoder: Encoder, k: int) -> Codes:
    """The k largest of ReLU(pre) of each row; all positive ones where they are fewer."""
    wanted = k if encoder.exact else min(encoder.d_sae, k + max(SPARE, k // SPARE))
    codes = Codes.cat([_candidates_of_rows(pre, wanted) for _, pre in encoder.chunks()])
    codes = encoder.exact_values(codes)
    counts = codes.l0()
    most = int(counts.max()) if codes.n else 0
    if most <= k:
        return codes.keep(codes.values > 0)
    place = torch.arange(codes.nnz, device=codes.device) - codes.offsets[:-1].repeat_interleave(counts)
    at = codes.rows() * most + place
    values = codes.values.new_full((codes.n * most,), -torch.inf).index_put_((at,), codes.values)
    indices = codes.indices.new_zeros(codes.n * most).index_put_((at,), codes.indices)
    top = values.view(-1, most).topk(k, dim=1, sorted=False)
    return Codes.from_padded(indices.view(-1, most).gather(1, top.indices), top.values, codes.d_sae)


@torch.no_grad()
def largest_of_batch(encoder: Encoder, count: int, *, usual: float | None = None) -> Codes:
    """The `count` largest of ReLU(pre) over all rows; all positive ones if they are fewer.

    `usual`: the smallest of them in earlier batches. Without it, it is guessed from the first rows.
    """
    if usual is None or not usual > 0:
        usual = _guess(encoder, count)
    codes = _candidates_of_batch(encoder, GUESSES[0] * usual)
    for share in GUESSES[1:]:
        if codes.nnz >= count or usual == 0:
            break
        codes = _candidates_of_batch(encoder, share * usual)
    picked = codes.values > 0
    if int(picked.sum()) > count:
        picked = torch.zeros_like(picked)
        picked[codes.values.topk(count, sorted=False).indices] = True
    return codes.keep(picked)


def _guess(encoder: Encoder, count: int) -> float:
    """What a few rows' share of `count` goes down to; 0 where that is most of what is positive."""
    _, pre = next(encoder.chunks())
    pre = pre[:64].float().flatten()
    share = max(1, count * (len(pre) // encoder.d_sae) // encoder.n)
    return float(pre.topk(min(share, len(pre)), sorted=False).values.min().clamp_min(0))


def _candidates_of_batch(encoder: Encoder, floor: float) -> Codes:
    return encoder.exact_values(Codes.cat([_above(pre, floor) for _, pre in encoder.chunks()]))


def _candidates_of_rows(pre: Float[Tensor, "m d_sae"], k: int) -> Codes:
    """The k largest positive entries of each row (all where they are fewer), and few more."""
    (n, d_sae), keys = pre.shape, _keys(pre)
    size = _group_size(d_sae, k)
    maxima = keys if size == 1 else keys.view(n, size, -1).amax(1)
    floor = _kth_largest(maxima, k).clamp_min(_smallest_positive(keys.dtype))
    at = positions(maxima >= floor[:, None])
    if len(at) > CROWD * k * n:
        values, indices = pre.topk(k, dim=1, sorted=False)
        return Codes.from_padded(indices, values, d_sae)
    if size == 1:
        return entries_at(pre, at)
    return _of_groups(pre, keys, at, size, lambda members, rows: members >= floor[rows][:, None])


def _keys(pre: Float[Tensor, "m d_sae"]) -> Tensor:
    """Numbers that rank the positive entries, above all others. bfloat16's bits do: as integers they are compared six
    times as fast."""
    return pre.view(torch.int16) if pre.dtype == torch.bfloat16 else pre


def _smallest_positive(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).tiny if dtype.is_floating_point else 1


def _kth_largest(values: Tensor, k: int) -> Tensor:
    """(n,) of (n, m). numpy's partition is ten times as fast as torch's topk, thirty times over 16 bits."""
    if values.device.type != "cpu":
        return values.topk(k, dim=1).values[:, -1]
    place = values.shape[1] - k
    return torch.from_numpy(np.partition(values.numpy(), place, axis=1)[:, place])


def _group_size(d_sae: int, k: int) -> int:
    """About where the partition of the maxima and the look into k groups cost the same; a divisor of d_sae."""
    if d_sae < PLAIN:
        return 1
    ideal = (d_sae / (3 * k)) ** 0.5
    sizes = [size for size in range(1, 65) if d_sae % size == 0 and d_sae // size >= k]
    return min(sizes, key=lambda size: abs(math.log(size / ideal)), default=1)


def _above(pre: Float[Tensor, "m d_sae"], floor: float) -> Codes:
    """The entries above the floor, which is not negative: groups whose maximum is not above it are not looked at."""
    n, d_sae = pre.shape
    keys = _keys(pre)
    key = torch.tensor(floor, dtype=pre.dtype, device=pre.device).view(keys.dtype)
    size = next((g for g in (16, 12, 8, 6, 4) if d_sae % g == 0), 1) if d_sae >= PLAIN and floor > 0 else 1
    if size == 1:
        return entries_at(pre, positions(keys > key))
    n_groups = d_sae // size
    at = positions(keys.view(n, size, n_groups).amax(1) > key)
    return _of_groups(pre, keys, at, size, lambda members, _: members > key)


def _of_groups(
    pre: Float[Tensor, "m d_sae"],
    keys: Tensor,
    at: Int[Tensor, " n_groups_in_all"],
    size: int,
    wanted: Callable[[Tensor, Tensor], Tensor],
) -> Codes:
    """Of the groups at these ascending places of (row, group), the members that are wanted, by their keys and rows."""
    n, d_sae = pre.shape
    n_groups = d_sae // size
    rows = at // n_groups
    members = (rows * d_sae + at % n_groups)[:, None] + torch.arange(0, d_sae, n_groups, device=pre.device)
    in_groups = keys.reshape(-1).index_select(0, members.view(-1)).view(-1, size)
    kept = positions(wanted(in_groups, rows))
    found = members.view(-1).index_select(0, kept)
    offsets = torch.searchsorted(found, torch.arange(n + 1, device=pre.device) * d_sae)
    return Codes(offsets, found % d_sae, pre.reshape(-1).index_select(0, found), d_sae)
