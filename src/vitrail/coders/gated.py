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

from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vitrail.coders.base import SparseCoder, Step, squared_error
from vitrail.coders.levels import count_positive
from vitrail.coders.sparse import Codes, activations, decode
from vitrail.coders.thresholded import above, dense_activations, dense_decode, entries, pre_above


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
        opened = entries(pre, above(pre, None))
        return opened.keep(self._magnitudes(opened) > 0)

    def encode_sparse(self, x: Float[Tensor, "n d_in"]) -> Codes:
        codes = super().encode_sparse(x)
        return codes.with_values(self._magnitudes(codes))

    def _magnitudes(self, gates: Codes) -> Float[Tensor, " nnz"]:
        # index_select: its gradient is an index_add, that of [latents] takes turns for each entry.
        scale, b_enc, b_mag = (
            of_each.index_select(0, gates.indices.long()) for of_each in (self.r_mag.exp(), self.b_enc, self.b_mag)
        )
        return scale * (gates.values - b_enc) + b_mag

    def loss(self, x: Float[Tensor, "n d_in"]) -> Step:
        y = self.normalized(x)
        encoder = (self.b_dec, self.W_enc, self.b_enc)
        found = pre_above(y, *encoder, None, dtype=self.selection_dtype)
        if isinstance(found, Codes):
            tied = activations(y, *encoder, found)
            gate = tied.values.relu()
            z = self._magnitudes(tied).relu() * (gate > 0)
            decoded, via_gate = decode(tied.with_values(z), self.W_dec), decode(tied.with_values(gate), self._frozen())
            codes = tied.with_values(z).detach()
            fired = torch.bincount(codes.indices, weights=codes.values > 0, minlength=self.d_sae).long()
        else:
            pre, dtype = dense_activations(y, *encoder, found), found.dtype
            gate = pre.relu()
            z = (self.r_mag.exp() * (pre - self.b_enc) + self.b_mag).relu() * (gate > 0)
            decoded, via_gate = dense_decode(z, self.W_dec, dtype), dense_decode(gate, self._frozen(), dtype)
            codes, fired = z.detach(), count_positive(z.detach(), 0)
        y_hat = decoded + self.b_dec
        terms = {
            "reconstruction": squared_error(y, y_hat),
            "l1": self.l1 * gate.sum() / len(y),
            "auxiliary": squared_error(y, via_gate + self.b_dec.detach()),
        }
        loss = terms["reconstruction"] + terms["l1"] + terms["auxiliary"]
        step_codes = partial(_positive, codes)
        return Step(loss, terms, step_codes, y=y, target=y, x_hat=y_hat, penalty=("l1",), fired=fired)

    def _frozen(self) -> Float[Tensor, "d_sae d_in"]:
        """What the auxiliary error must not reach."""
        return self.W_dec.detach()


def _positive(z: Codes | Tensor) -> Codes:
    return z.keep(z.values > 0) if isinstance(z, Codes) else entries(z, above(z, None))
