"""TopK coder: the k largest latents of each row.

    z = ReLU(TopK_k((y - b_dec) @ W_enc + b_enc)),    loss = mean_rows ||y - y_hat||^2

Gao et al. 2024, arXiv:2406.04093. Ranked before the ReLU: a row with fewer than k positive pre-activations has fewer
than k latents. `inference="relu"` drops the ranking in use, as MSAE's tables do: their TopK(64) has an L0 far above 64.
"""

from jaxtyping import Float
from torch import Tensor

from vitrail.coders.base import SparseCoder
from vitrail.coders.select import Encoder, largest_of_rows
from vitrail.coders.sparse import Codes


class TopK(SparseCoder):
    name = "topk"

    def __init__(
        self,
        *,
        d_in: int,
        d_sae: int,
        k: int = 32,
        inference: str = "topk",
        normalization: str = "mean_std",
        b_dec_init: str = "zeros",
        seed: int = 0,
    ) -> None:
        super().__init__(d_in=d_in, d_sae=d_sae, normalization=normalization, b_dec_init=b_dec_init, seed=seed)
        if not 1 <= k <= d_sae:
            raise ValueError(f"k must be in 1..d_sae={d_sae}, got {k}.")
        if inference not in ("topk", "relu"):
            raise ValueError(f"inference must be 'topk' or 'relu', got {inference!r}.")
        self.k, self.inference = k, inference

    def select(self, pre: Float[Tensor, "n d_sae"]) -> Codes:
        return Codes.from_dense(pre.relu()) if self.inference == "relu" else self._topk(pre)

    def training_codes(self, y: Float[Tensor, "n d_in"]) -> Codes:
        return largest_of_rows(Encoder(y - self.b_dec, self.W_enc, self.b_enc, self.selection_dtype), self.k)

    def _topk(self, pre: Tensor) -> Codes:
        values, indices = pre.topk(self.k, dim=1, sorted=False)
        return Codes.from_padded(indices, values, self.d_sae)
