"""Latents that stopped firing, and what brings them back.

A latent is dead when it has not fired for `window` rows (tokens) of training.

    auxk:  e = y - y_hat (no gradient),   e_hat = ReLU(TopK_k_aux(pre over the dead)) @ W_dec[dead],   k_aux = d_in / 2
           term = 1/32 mean_rows ||e - e_hat||^2 * (sum ||y - mean(y)||^2 / sum ||e||^2)

Gao et al. 2024, arXiv:2406.04093, appendix A.2. Dead latents learn to explain what the living leave over, decoder and
encoder both (sparsify 1.3.3's fused backward never trains the encoder here). All products touch the dead subset only;
over it they are dense, because k_aux is not small there. The pre-activations carry gradient to W_enc, b_enc, W_dec, but
b_dec is left alone: it is a matter of the living.

Two things decide whether it works. The error is measured as a share of e, as the paper's code does: the last factor
makes the term as large beside the loss as it is there; without it a good coder's dead latents get hardly any gradient.
And y_hat is what the *firing* latents reconstruct, those by which deadness is judged: taken from a Matryoshka's largest
level, e is next to nothing, and of 1,024 latents on the world of shapes 404 stayed dead instead of 29 (289 with no
revival).
"""

from typing import Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vitrail.coders.base import SparseCoder, Step, squared_error
from vitrail.coders.sparse import decode

AUX_WEIGHT = 1 / 32


class DeadCounter:
    """Rows of training since each latent last fired."""

    def __init__(self, d_sae: int, *, window: int, device: torch.device) -> None:
        self.window = window
        self.rows_since_fired: Int[Tensor, " d_sae"] = torch.zeros(d_sae, dtype=torch.int64, device=device)

    def update(self, fired: Int[Tensor, " d_sae"], n_rows: int) -> None:
        self.rows_since_fired += n_rows
        self.rows_since_fired.masked_fill_(fired > 0, 0)

    def dead(self) -> Bool[Tensor, " d_sae"]:
        return self.rows_since_fired >= self.window


class Reviver(Protocol):
    """A further term of the objective, given the step and which latents are dead."""

    def __call__(self, coder: SparseCoder, step: Step, dead: Bool[Tensor, " d_sae"]) -> Float[Tensor, ""]: ...


def nothing(coder: SparseCoder, step: Step, dead: Bool[Tensor, " d_sae"]) -> Float[Tensor, ""]:
    return step.loss.new_zeros(())


def auxk(coder: SparseCoder, step: Step, dead: Bool[Tensor, " d_sae"]) -> Float[Tensor, ""]:
    numbers = dead.nonzero().squeeze(1)
    if len(numbers) == 0:
        return step.loss.new_zeros(())
    with torch.no_grad():
        left_over = step.target - decode(step.codes, coder.W_dec) - coder.output_bias()
        spread = (step.target - step.target.mean(0)).square().sum()
        scale = spread / left_over.square().sum().clamp_min(1e-12)
    pre = torch.addmm(coder.b_enc[numbers], step.y - coder.b_dec.detach(), coder.W_enc[:, numbers])
    k_aux = min(max(1, coder.d_in // 2), len(numbers))
    values, indices = pre.topk(k_aux, dim=1, sorted=False)
    z = torch.zeros_like(pre).scatter(1, indices, values.relu())
    return AUX_WEIGHT * scale * squared_error(left_over, z @ coder.W_dec[numbers])


REVIVERS: dict[str, Reviver] = {"none": nothing, "auxk": auxk}
