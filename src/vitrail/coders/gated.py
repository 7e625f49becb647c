"""Gated coder: one path decides which latents fire, another how strongly.

    pre = (y - b_dec) @ W_enc + b_enc                              the gate's; b_enc is the paper's b_gate
    mag = exp(r_mag) * ((y - b_dec) @ W_enc) + b_mag               the magnitudes', same directions
    z = ReLU(mag) where pre > 0
    loss = mean_rows( ||y - y_hat||^2 + l1 * ||ReLU(pre)||_1 + ||y - (ReLU(pre) @ sg(W_dec) + sg(b_dec))||^2 )

Rajamanoharan et al. 2024a, arXiv:2404.16014, section 3; sg: no gradient, decoder directions of unit norm.
The L1 penalty shrinks the gate's values only, so z is not shrunk. The step pre > 0 has no gradient: the gate learns
from the penalty and from the third term ("auxiliary"), which must not reach the decoder, or the decoder would fit the
shrunken values (ViT-Prisma and sae-lens 6.54 leave W_dec in). b_dec still learns from it as what the encoder subtracts,
as in the paper's listing. Base and revival read b_enc, so that a dead latent's gate is what is revived.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vitrail.coders.base import SparseCoder, Step, squared_error
from vitrail.coders.sparse import Codes


class Gated(SparseCoder):
    name = "gated"

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
        self.r_mag = nn.Parameter(torch.zeros(d_sae))
        self.b_mag = nn.Parameter(torch.zeros(d_sae))

    def select(self, pre: Float[Tensor, "n d_sae"]) -> Codes:
        """The support, with the gate's pre-activations as values: `encode_sparse` makes magnitudes of them."""
        opened = Codes.from_dense(pre.relu())
        return opened.keep(self._magnitudes(opened) > 0)

    def encode_sparse(self, x: Float[Tensor, "n d_in"]) -> Codes:
        codes = super().encode_sparse(x)
        return codes.with_values(self._magnitudes(codes))

    def _magnitudes(self, gates: Codes) -> Float[Tensor, " nnz"]:
        latents = gates.indices.long()
        return self.r_mag.exp()[latents] * (gates.values - self.b_enc[latents]) + self.b_mag[latents]

    def loss(self, x: Float[Tensor, "n d_in"]) -> Step:
        y = self.normalized(x)
        # Dense, as for ReLU: half of the gates are open at the start.
        shared = (y - self.b_dec) @ self.W_enc
        pre = shared + self.b_enc
        gate = pre.relu()
        z = (self.r_mag.exp() * shared + self.b_mag).relu() * (pre > 0)
        y_hat = z @ self.W_dec + self.b_dec
        via_gate = gate @ self.W_dec.detach() + self.b_dec.detach()
        terms = {
            "reconstruction": squared_error(y, y_hat),
            "l1": self.l1 * gate.sum(1).mean(),
            "auxiliary": squared_error(y, via_gate),
        }
        loss = terms["reconstruction"] + terms["l1"] + terms["auxiliary"]
        return Step(loss, terms, Codes.from_dense(z.detach()), y=y, target=y, x_hat=y_hat, penalty=("l1",))
