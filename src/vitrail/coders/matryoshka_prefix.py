"""Matryoshka coder nested by dictionary prefix: its first m latents are a coder of their own, for several m.

    m_1 < ... < m_h = d_sae,   z = BatchTopK(pre), once over the whole dictionary
    loss = 1/h sum_i mean_rows ||y - (z[:m_i] @ W_dec[:m_i] + b_dec)||^2

Bussmann et al. 2025, arXiv:2503.17547, section 3. General latents come first; later ones refine them. The Matryoshka of
MSAE (matryoshka.py) nests by the number of active latents and is another architecture. The paper sums the levels; the
mean only rescales the learning rate, and keeps the loss as large as that of other coders beside the revival term.
Default prefixes are the paper's shares of d_sae: 1/32, 3/32, 7/32, 15/32, 1 (2,048 to 65,536 there). The whole
dictionary is always the last level, named or not.

Threshold, calibration and the codes in use are BatchTopK's: k latents per row over all prefixes together. A prefix in
use: `codes.keep(codes.indices < m)`, decoded as it is.

All levels cost about one decode: disjoint bands of latents, prefix sums of the bands' reconstructions; autograd turns
these into suffix sums of the output gradients.
"""

import itertools
from collections.abc import Sequence

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from vitrail.coders.base import Step, squared_error
from vitrail.coders.batch_topk import BatchTopK
from vitrail.coders.sparse import Codes, activations, decode

SHARES = (1 / 32, 3 / 32, 7 / 32, 15 / 32, 1)


class MatryoshkaPrefix(BatchTopK):
    name = "matryoshka_prefix"

    def __init__(
        self,
        *,
        d_in: int,
        d_sae: int,
        k: int = 32,
        prefixes: Sequence[int] | None = None,
        normalization: str = "mean_std",
        b_dec_init: str = "zeros",
        seed: int = 0,
    ) -> None:
        super().__init__(d_in=d_in, d_sae=d_sae, k=k, normalization=normalization, b_dec_init=b_dec_init, seed=seed)
        self.prefixes = None if prefixes is None else list(prefixes)
        widths = default_prefixes(d_sae) if prefixes is None else tuple(prefixes)
        if list(widths) != sorted({*widths}) or not all(1 <= width <= d_sae for width in widths):
            raise ValueError(f"prefixes must rise strictly within 1..d_sae={d_sae}, got {widths}.")
        self.widths = widths if widths[-1:] == (d_sae,) else (*widths, d_sae)

    def loss(self, x: Float[Tensor, "n d_in"]) -> Step:
        y = self.normalized(x)
        with torch.no_grad():
            support = self.training_codes(y)
        codes = activations(y, self.b_dec, self.W_enc, self.b_enc, support)
        reconstructions = [y_hat + self.b_dec for y_hat in self._reconstructions(codes)]
        terms = {
            f"prefix_{width}": squared_error(y, y_hat) / len(self.widths)
            for width, y_hat in zip(self.widths, reconstructions, strict=True)
        }
        loss = torch.stack(list(terms.values())).sum()
        return Step(loss, terms, codes.detach(), y=y, target=y, x_hat=reconstructions[-1])

    def _reconstructions(self, codes: Codes) -> list[Tensor]:
        """z[:m] @ W_dec[:m] of every prefix."""
        bands = [
            codes.keep((codes.indices >= start) & (codes.indices < end))
            for start, end in itertools.pairwise((0, *self.widths))
        ]
        of_bands = rearrange(decode(Codes.cat(bands), self.W_dec), "(h n) d -> h n d", h=len(bands))
        return list(of_bands.cumsum(0).unbind(0))


def default_prefixes(d_sae: int) -> tuple[int, ...]:
    """SHARES of d_sae, rounded; those that coincide in a small dictionary are one."""
    return tuple(sorted({max(1, round(share * d_sae)) for share in SHARES}))
