"""Matryoshka coder (MSAE): one dictionary, trained at several sparsities at once.

    k_1 < ... < k_h,   z_i = ReLU(TopK_{k_i}(pre)),   supports nested
    loss = sum_i alpha_i mean_rows ||y - (z_i @ W_dec + b_dec)||^2 / sum_i alpha_i
    UW: alpha_i = 1        RW: alpha_i = h - i + 1, most weight on the fewest latents

Zaigrajew et al. 2025, MSAE section 3.2, equation 2. Nested by *k*: every level draws on the whole dictionary. The
Matryoshka of Bussmann et al. 2025 (arXiv:2503.17547) nests by dictionary *prefix* and is another architecture.
Default levels: 64 * 2^i below d_sae, then d_sae, which means every positive latent. Dividing by the sum of the weights
follows the released code; it only rescales the learning rate. `soft_cap=c` decodes c tanh(z / c) (appendix D; the paper
prints no c, its code says 30).

All levels cost about one decode: one ranking, disjoint bands, prefix sums forward and suffix sums backward (levels.py).
`terms` are read, not trained: only their sum has a gradient.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from vitrail.coders.base import SparseCoder, Step
from vitrail.coders.levels import nested_levels
from vitrail.coders.sparse import Codes

WEIGHTINGS = ("uniform", "reverse")


class Matryoshka(SparseCoder):
    name = "matryoshka"

    def __init__(
        self,
        *,
        d_in: int,
        d_sae: int,
        ks: Sequence[int] | None = None,
        weighting: str = "reverse",
        inference_k: int | None = None,
        soft_cap: float | None = None,
        normalization: str = "mean_norm",
        b_dec_init: str = "zeros",
        seed: int = 0,
    ) -> None:
        super().__init__(d_in=d_in, d_sae=d_sae, normalization=normalization, b_dec_init=b_dec_init, seed=seed)
        if weighting not in WEIGHTINGS:
            raise ValueError(f"weighting must be one of {', '.join(WEIGHTINGS)}, got {weighting!r}.")
        if inference_k is not None and not 1 <= inference_k <= d_sae:
            raise ValueError(f"inference_k must be in 1..d_sae={d_sae}, or None for plain ReLU, got {inference_k}.")
        if soft_cap is not None and soft_cap <= 0:
            raise ValueError(f"soft_cap must be positive, or None for no cap, got {soft_cap}.")
        self.ks = None if ks is None else list(ks)
        self.weighting, self.inference_k, self.soft_cap = weighting, inference_k, soft_cap
        self.levels = default_levels(d_sae) if ks is None else tuple(ks)
        if (
            not self.levels
            or list(self.levels) != sorted({*self.levels})
            or not 1 <= self.levels[0] <= self.levels[-1] <= d_sae
        ):
            raise ValueError(f"ks must rise strictly within 1..d_sae={d_sae}, got {self.levels}.")

    @property
    def alphas(self) -> list[float]:
        h = len(self.levels)
        return [1.0] * h if self.weighting == "uniform" else [float(h - i) for i in range(h)]

    def select(self, pre: Float[Tensor, "n d_sae"]) -> Codes:
        if self.inference_k is None:
            return Codes.from_dense(pre.relu())
        values, indices = pre.topk(self.inference_k, dim=1, sorted=False)
        return Codes.from_padded(indices, values, self.d_sae)

    def encode_sparse(self, x: Float[Tensor, "n d_in"]) -> Codes:
        codes = super().encode_sparse(x)
        return codes.with_values(self._capped(codes.values))

    def loss(self, x: Float[Tensor, "n d_in"]) -> Step:
        y = self.normalized(x)
        alphas = tuple(alpha / sum(self.alphas) for alpha in self.alphas)
        found = nested_levels(
            y,
            self.b_dec,
            self.W_enc,
            self.b_enc,
            self.W_dec,
            self.levels,
            alphas,
            soft_cap=self.soft_cap,
            dtype=self.selection_dtype,
            fired_k=self.inference_k,
        )
        terms = {f"level_{k}": a * e for k, a, e in zip(self.levels, alphas, found.errors, strict=True)}
        return Step(
            found.loss,
            terms,
            lambda: self._codes_in_use(y),
            y=y,
            target=y,
            x_hat=found.x_hat,
            fired=found.fired,
        )

    @torch.no_grad()
    def _codes_in_use(self, y: Tensor) -> Codes:
        codes = self.by_chunks(self.select, y)
        return codes.with_values(self._capped(codes.values))

    def _capped(self, values: Tensor) -> Tensor:
        return values if self.soft_cap is None else self.soft_cap * torch.tanh(values / self.soft_cap)


def default_levels(d_sae: int) -> tuple[int, ...]:
    """64, 128, ... below d_sae, then d_sae: eight levels for d_sae = 6144."""
    levels, k = [], 64
    while k < d_sae:
        levels.append(k)
        k *= 2
    return (*levels, d_sae)
