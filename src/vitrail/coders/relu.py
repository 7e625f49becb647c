"""ReLU coder with an L1 penalty, the plain sparse autoencoder.

    z = ReLU((y - b_dec) @ W_enc + b_enc)
    loss = mean_rows( ||y - y_hat||^2 + l1 * ||z||_1 ),   unit-norm decoder directions

MSAE section 3.1; Bricken et al. 2023. `l1` has no meaning across data or libraries: Prisma divides the error by a norm,
MSAE's code normalises both terms. Here both are sums per row in normalised space.
"""

from jaxtyping import Float
from torch import Tensor

from vitrail.coders.base import SparseCoder, Step, squared_error
from vitrail.coders.levels import count_positive
from vitrail.coders.sparse import Codes


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
        return Codes.from_dense(pre.relu())

    def loss(self, x: Float[Tensor, "n d_in"]) -> Step:
        y = self.normalized(x)
        # Dense: half of the latents are positive at the start, and sparse products pay only below a tenth.
        z = self.pre_activations(y).relu()
        y_hat = z @ self.W_dec + self.b_dec
        terms = {"reconstruction": squared_error(y, y_hat), "l1": self.l1 * z.sum(1).mean()}
        loss, found = terms["reconstruction"] + terms["l1"], z.detach()
        fired = count_positive(found, 0)
        return Step(
            loss, terms, lambda: Codes.from_dense(found), y=y, target=y, x_hat=y_hat, penalty=("l1",), fired=fired
        )
