"""ReLU coder with an L1 penalty, the plain sparse autoencoder.

    z = ReLU((y - b_dec) @ W_enc + b_enc)
    loss = mean_rows( ||y - y_hat||^2 + l1 * ||z||_1 ),   unit-norm decoder directions

MSAE section 3.1; Bricken et al. 2023. `l1` has no meaning across data or libraries: Prisma divides the error by a norm,
MSAE's code normalises both terms. Here both are sums per row in normalised space.
"""

from jaxtyping import Float
from torch import Tensor

from vitrail.coders.base import SparseCoder, Step, squared_error
from vitrail.coders.sparse import Codes
from vitrail.coders.thresholded import above, entries, rectified


class ReLU(SparseCoder):
    name = "relu"

    def __init__(
        self,
        *,
        d_in: int,
        d_sae: int,
        l1: float = 1.0,
        normalization: str = "mean_std",
        b_dec_init: str = "zeros",
        seed: int = 0,
    ) -> None:
        super().__init__(d_in=d_in, d_sae=d_sae, normalization=normalization, b_dec_init=b_dec_init, seed=seed)
        if l1 < 0:
            raise ValueError(f"l1 must not be negative, got {l1}.")
        self.l1 = l1

    def select(self, pre: Float[Tensor, "n d_sae"]) -> Codes:
        return entries(pre, above(pre, None))

    def loss(self, x: Float[Tensor, "n d_in"]) -> Step:
        y = self.normalized(x)
        weights = (self.b_dec, self.W_enc, self.b_enc, self.W_dec)
        found = rectified(y, *weights, dtype=self.selection_dtype)
        y_hat = found.decoded + self.b_dec
        terms = {"reconstruction": squared_error(y, y_hat), "l1": self.l1 * found.per_latent.sum() / len(y)}
        loss, fired = terms["reconstruction"] + terms["l1"], found.rows_fired
        return Step(loss, terms, found.codes, y=y, target=y, x_hat=y_hat, penalty=("l1",), fired=fired)
