"""Matching pursuit coder: k greedy steps, each on what the steps before left over.

    r_0 = y - b_dec
    step t:  i = argmax_j  <r_{t-1}, W_dec_j> + b_enc_j,   c = ReLU of that maximum,   r_t = r_{t-1} - c W_dec_i
    z_i = sum of the c of the steps that picked i,   y_hat = z @ W_dec + b_dec = y - r_k,   loss = mean_rows ||r_k||^2

Costa et al. 2025, arXiv:2506.03093 (MP-SAE); matching pursuit: Mallat and Zhang 1993. One set of directions, of unit
norm, encodes and decodes: with b_enc = 0 every step takes c^2 from ||r||^2. A latent may be picked again: its steps add
up, so a row has at most k latents. A row in which nothing is positive any more has ended.

Where this differs: coefficients are never negative (the authors' library, Overcomplete 0.3, takes the largest signed
product even below zero), and there is an encoder bias, zero at the start, so that a latent can be shy, or be shut, as
in other coders. k steps are k products with the dictionary where another coder makes one.

Gradients are those of the unrolled steps with the picks held fixed. They are worked out backwards without storing a
step's residual, which is the next one's plus c W_dec_i: memory is one residual and k picks per row.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vitrail.coders.base import ROWS_AT_ONCE, SparseCoder, Step, squared_error
from vitrail.coders.sparse import Codes, decode


class MatchingPursuit(SparseCoder):
    name = "matching_pursuit"

    def __init__(
        self,
        *,
        d_in: int,
        d_sae: int,
        k: int = 32,
        normalization: str = "mean_std",
        b_dec_init: str = "zeros",
        seed: int = 0,
    ) -> None:
        super().__init__(d_in=d_in, d_sae=d_sae, normalization=normalization, b_dec_init=b_dec_init, seed=seed)
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}.")
        self.k = k
        del self.W_enc
        self._tied = True

    def __getattr__(self, name: str) -> Any:
        """W_enc is W_dec's transpose, for whoever reads it; it is no parameter and is not saved."""
        if name == "W_enc" and self.__dict__.get("_tied", False):
            return self.W_dec.t()
        return super().__getattr__(name)

    def encode_sparse(self, x: Float[Tensor, "n d_in"]) -> Codes:
        y, shift, scale = self.normalize(self._checked(x))
        return self._pursue(y).with_row_terms(shift, scale)

    def training_codes(self, y: Float[Tensor, "n d_in"]) -> Codes:
        return self._pursue(y).detach()

    def loss(self, x: Float[Tensor, "n d_in"]) -> Step:
        y = self.normalized(x)
        codes = self._pursue(y)
        y_hat = decode(codes, self.W_dec) + self.b_dec
        error = squared_error(y, y_hat)
        return Step(error, {"reconstruction": error}, codes.detach(), y=y, target=y, x_hat=y_hat)

    def _pursue(self, y: Float[Tensor, "n d_in"]) -> Codes:
        with torch.no_grad():
            parts = [self._picks(rows) for rows in (y - self.b_dec).split(ROWS_AT_ONCE)]
        picks, coefficients, residual = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        steps = _Steps.apply(y - self.b_dec, self.W_dec, self.b_enc, picks, coefficients, residual)
        return _summed(picks, steps, self.d_sae)  # pyright: ignore[reportArgumentType]

    def _picks(self, residual: Tensor) -> tuple[Int[Tensor, "n k"], Float[Tensor, "n k"], Float[Tensor, "n d_in"]]:
        picks, coefficients = [], []
        for _ in range(self.k):
            best, pick = torch.addmm(self.b_enc, residual, self.W_dec.t()).max(1)
            best = best.relu()
            residual = torch.addcmul(residual, best[:, None], self.W_dec[pick], value=-1)
            picks.append(pick)
            coefficients.append(best)
        return torch.stack(picks, 1), torch.stack(coefficients, 1), residual


class _Steps(torch.autograd.Function):
    """The coefficients (n, k) as a function of r_0, W_dec and b_enc, the picks held fixed.

    With h = dloss/dc from outside and s = dloss/dr_t, from the last step to the first, where c > 0:

        d = h - <s, w>,   dW_i += d r_{t-1} - c s,   db_i += d,   s += d w
    """

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, W_dec: Tensor, b_enc: Tensor, picks: Tensor, c: Tensor, residual: Tensor
    ) -> Tensor:
        ctx.save_for_backward(W_dec, b_enc, picks, c, residual)
        return c.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, h: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        W_dec, b_enc, picks, c, residual = ctx.saved_tensors
        s, for_W, for_b = torch.zeros_like(residual), torch.zeros_like(W_dec), torch.zeros_like(b_enc)
        for t in reversed(range(picks.shape[1])):
            pick, size = picks[:, t], c[:, t, None]
            w = W_dec[pick]
            before = torch.addcmul(residual, size, w)
            d = (h[:, t, None] - (s * w).sum(1, keepdim=True)) * (size > 0)
            for_W.index_add_(0, pick, d * before - size * s)
            for_b.index_add_(0, pick, d[:, 0])
            s = torch.addcmul(s, d, w)
            residual = before
        return s, for_W, for_b, None, None, None


def _summed(picks: Int[Tensor, "n k"], coefficients: Float[Tensor, "n k"], d_sae: int) -> Codes:
    """Each latent once per row, with the sum of its steps; steps that took nothing are no latents."""
    taken = coefficients > 0
    rows = torch.arange(len(picks), device=picks.device)[:, None].expand_as(picks)
    places, entries = torch.unique(rows[taken] * d_sae + picks[taken], return_inverse=True)
    values = coefficients.new_zeros(len(places)).index_add(0, entries, coefficients[taken])
    return Codes.from_entries(places // d_sae, places % d_sae, values, n=len(picks), d_sae=d_sae)
