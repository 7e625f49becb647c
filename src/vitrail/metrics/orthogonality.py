"""Decoder orthogonality: how far the decoder's directions are from being at right angles.

    w_i = W_dec[i] / ||W_dec[i]||,  C = w w^T, F x F;  means over the F (F - 1) / 2 pairs i > j
    do_mean_sq      mean of C_ij^2     = (||w^T w||^2 - F) / (F (F - 1))       w^T w is d x d
    do_mean_signed  mean of C_ij       = (||sum_i w_i||^2 - F) / (F (F - 1))
    do_mean_abs     mean of |C_ij|     block by block: there is no short form
    do_welch        (F - d) / (d (F - 1)), 0 where F <= d: no F directions in d dimensions have a smaller do_mean_sq

Range. do_mean_sq and do_mean_abs 0..1, do_mean_signed -1/(F-1)..1; 0 is orthogonal. No unit. F > d directions cannot
all be orthogonal: compare do_mean_sq with do_welch, and with 1/d, which random directions have (do_mean_abs:
sqrt(2 / (pi d))).

Moves with. F / d, by the Welch bound alone; a shared direction of all latents (do_mean_signed shows it); dead latents,
whose directions stay where they started.

Does not show. Whether directions mean anything: random ones have nearly the smallest do_mean_sq there is. Nor
duplicates: a few equal pairs among millions move no mean.

Source. MSAE section 4.1 and its code, metrics.py; Welch 1974, IEEE Trans. Inf. Theory 20(3); SPEC row 55.

Tags. "pairs": means over the pairs, as above. "msae-code": the mean of squares over all F^2 entries with a diagonal of
zeros, (F - 1) / F times do_mean_sq; it is what MSAE's tables print, where the paper's text says the mean of C_ij.
Directions of length zero have no angle: they are left out, F counts the others, and the tag says how many they were.

Costs F d^2 multiplications, and F^2 d / 2 for do_mean_abs; the memory is one copy of the decoder and one block.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from vitrail.metrics.measured import Measured
from vitrail.metrics.passing import Metric, Seen, Setting

ROWS_AT_ONCE = 1024  # a block of cosines is 4 MB


@dataclass(frozen=True)
class Orthogonality:
    """Of `n` directions in `d` dimensions; `n_zero` others have no length."""

    n: int
    d: int
    n_zero: int
    mean_sq: float
    mean_sq_all_entries: float  # MSAE's code
    mean_signed: float
    mean_abs: float

    @property
    def welch(self) -> float:
        return welch_bound(self.n, self.d)


class DecoderOrthogonality(Metric):
    """Of the coder alone: images do not matter, and there is no interval over them."""

    def __init__(self, setting: Setting) -> None:
        self._coder = setting.coder

    def update(self, seen: Seen) -> None:
        pass

    def compute(self, *, n_bootstrap: int = 1000, seed: int = 0) -> dict[str, Measured]:
        """`do_mean_sq`, `do_msae_code`, `do_mean_signed`, `do_mean_abs`, `do_welch`; n is the number of directions.
        NaN where fewer than two latents have a direction."""
        W_dec = self._coder.W_dec.detach()
        n_zero = int((W_dec.flatten(1) == 0).all(1).sum())
        n = len(W_dec) - n_zero
        left_out = f", {n_zero} of length zero left out" if n_zero else ""
        tags = {name: ("msae-code" if name == "do_msae_code" else "pairs") + left_out for name in NAMES}
        if n < 2:
            return {name: Measured(math.nan, tag, n) for name, tag in tags.items()}
        found = orthogonality(W_dec.flatten(1))
        return {name: Measured(getattr(found, NAMES[name]), tag, n) for name, tag in tags.items()}


NAMES = {
    "do_mean_sq": "mean_sq",
    "do_msae_code": "mean_sq_all_entries",
    "do_mean_signed": "mean_signed",
    "do_mean_abs": "mean_abs",
    "do_welch": "welch",
}


@torch.no_grad()
def orthogonality(W_dec: Float[Tensor, "d_sae d_in"]) -> Orthogonality:
    """Raises ValueError if fewer than two rows have a length."""
    w, n_zero = unit_rows(W_dec)
    n, d = w.shape
    if n < 2:
        raise ValueError(
            f"{n} of {len(W_dec)} directions have a length: there is no angle between them. Give two or more."
        )
    pairs = n * (n - 1)
    gram, total = w.new_zeros(d, d, dtype=torch.float64), w.new_zeros(d, dtype=torch.float64)
    for part in w.split(ROWS_AT_ONCE):
        gram += part.t() @ part
        total += part.sum(0, dtype=torch.float64)
    diagonal = sum(float(part.square().sum(1).double().square().sum()) for part in w.split(ROWS_AT_ONCE))
    squares = max(0.0, float(gram.square().sum()) - diagonal)
    return Orthogonality(
        n=n,
        d=d,
        n_zero=n_zero,
        mean_sq=squares / pairs,
        mean_sq_all_entries=squares / n**2,
        mean_signed=(float(total.square().sum()) - float(gram.trace())) / pairs,
        mean_abs=_sum_of_abs(w) / pairs,
    )


def welch_bound(n: int, d: int) -> float:
    """The smallest mean squared cosine that n directions in d dimensions can have."""
    return max(0.0, (n - d) / (d * (n - 1))) if n > 1 else 0.0


def unit_rows(directions: Float[Tensor, "n d"]) -> tuple[Float[Tensor, "m d"], int]:
    """Those rows that have a length, of length 1; and how many have none."""
    norms = torch.linalg.vector_norm(directions, dim=1)
    has_length = norms > 0
    n_zero = int((~has_length).sum())
    if n_zero:
        directions, norms = directions[has_length], norms[has_length]
    return directions.float() / norms.float()[:, None], n_zero


def _sum_of_abs(w: Float[Tensor, "n d"]) -> float:
    """Of all entries but the diagonal's: blocks on and below it."""
    total = 0.0
    memory = w.new_empty(ROWS_AT_ONCE * ROWS_AT_ONCE)
    parts = w.split(ROWS_AT_ONCE)
    for i, rows in enumerate(parts):
        for j, others in enumerate(parts[: i + 1]):
            block = memory[: len(rows) * len(others)].view(len(rows), len(others))
            torch.mm(rows, others.t(), out=block)
            if i == j:
                block.fill_diagonal_(0)
            total += (1 if i == j else 2) * float(block.abs_().sum(1).double().sum())
    return total
