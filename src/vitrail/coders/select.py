"""Which latents fire, found without keeping the pre-activations: exact, and most of them never ranked.

    rows      the k largest of each row          batch     the `count` largest of the whole batch

A row's k largest entries lie in the k groups whose maxima are largest (a group is every g-th latent), and none of them
is below the least of those k maxima: one pass for the maxima, a ranking of a few hundred numbers, and some k + k/8
candidates are left per row, which are ranked. Over a batch, a guess below the answer does the same (Overcomplete and
others rank all n x d_sae numbers: 1.4 s of a step against 0.1, PEERS.md section 10). The answer does not depend on
the guess.

`dtype=torch.bfloat16` makes the product that finds the candidates in bfloat16, with some to spare, and works out their
values anew in the weights' own dtype: what is selected is what the full product would select, unless two
pre-activations at the edge differ by less than bfloat16 can tell, and the values are exact.
"""

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from vitrail.coders.sparse import Codes, entry_dots

PRE_ACTIVATION_BYTES = 2**24  # of one chunk: selection passes over it again while it is still in the cache
PRE_ACTIVATION_BYTES_ON_GPU = 2**28  # few, full products
PLAIN = 512  # fewer latents than this are simply ranked
SPARE = 8  # one candidate in so many more than k, at least so many, where bfloat16 finds them
GUESSES = (0.9, 0.6, 0.0)  # of the smallest entry picked in earlier batches


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
        room = PRE_ACTIVATION_BYTES if centred.device.type == "cpu" else PRE_ACTIVATION_BYTES_ON_GPU
        most = max(1, room // (self.d_sae * centred.element_size()))
        size = max(1, -(-self.n // -(-self.n // most)))  # chunks of one size
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
    """At least the k largest entries of each row, and few more."""
    n_groups = _n_groups(pre.shape[1], k)
    if n_groups is None:
        values, indices = pre.topk(k, dim=1, sorted=False)
        return _of_rows(indices, values, torch.ones_like(values, dtype=torch.bool), pre.shape[1])
    maxima = pre.view(len(pre), -1, n_groups).amax(1)  # group j is the latents j, j + n_groups, ...
    values, groups = _largest(maxima, k)
    members = torch.arange(0, pre.shape[1], n_groups, device=pre.device)
    indices = (groups[:, :, None] + members).flatten(1)
    in_groups = pre.gather(1, indices)
    return _of_rows(indices, in_groups, in_groups >= values.amin(1, keepdim=True), pre.shape[1])


def _largest(values: Float[Tensor, "m n"], k: int) -> tuple[Tensor, Tensor]:
    """topk, by groups where there are enough of them."""
    n_groups = _n_groups(values.shape[1], k)
    if n_groups is None:
        top = values.topk(k, dim=1, sorted=False)
        return top.values, top.indices
    maxima = values.view(len(values), -1, n_groups).amax(1)
    groups = maxima.topk(k, dim=1, sorted=False).indices
    members = torch.arange(0, values.shape[1], n_groups, device=values.device)
    indices = (groups[:, :, None] + members).flatten(1)
    top = values.gather(1, indices).topk(k, dim=1, sorted=False)
    return top.values, indices.gather(1, top.indices)


def _n_groups(n: int, k: int) -> int | None:
    """The number of groups at which ranking the maxima and ranking the chosen groups cost the same; a divisor of n."""
    if n < PLAIN or k * 4 > n:
        return None
    ideal = (k * n) ** 0.5
    divisors = [m for size in range(2, 65) if n % size == 0 and (m := n // size) > k]
    if not divisors:
        return None
    best = min(divisors, key=lambda m: m + k * (n // m))
    return best if best + k * (n // best) < max(n // 2, ideal) else None


def _above(pre: Float[Tensor, "m d_sae"], floor: float) -> Codes:
    """The entries above the floor: groups whose maximum is not above it are not looked at."""
    n, d_sae = pre.shape
    size = next((g for g in (16, 12, 8, 6, 4) if d_sae % g == 0), 1) if d_sae >= PLAIN and floor > 0 else 1
    if size == 1:
        rows, indices = (pre > floor).nonzero(as_tuple=True)
        return Codes.from_entries(rows, indices, pre[rows, indices], n=n, d_sae=d_sae)
    n_groups = d_sae // size
    rows, groups = (pre.view(n, size, n_groups).amax(1) > floor).nonzero(as_tuple=True)
    indices = groups[:, None] + torch.arange(0, d_sae, n_groups, device=pre.device)
    values = pre.view(-1)[rows[:, None] * d_sae + indices]
    above = values > floor
    counts = torch.zeros(n, dtype=torch.int64, device=pre.device).index_add_(0, rows, above.sum(1))
    offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    return Codes(offsets, indices[above], values[above], d_sae)


def _of_rows(indices: Tensor, values: Tensor, kept: Tensor, d_sae: int) -> Codes:
    offsets = torch.nn.functional.pad(kept.sum(1).cumsum(0), (1, 0))
    return Codes(offsets, indices[kept], values[kept], d_sae)
