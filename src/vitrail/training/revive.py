"""Latents that stopped firing, and what brings them back.

A latent is dead when it has not fired for `window` rows (tokens) of training. e = y - y_hat below carries no gradient.

    auxk:      e_hat = ReLU(TopK_k_aux(pre over the dead)) @ W_dec[dead],   k_aux = d_in / 2
               term = 1/32 mean_rows ||e - e_hat||^2 * (sum ||y - mean(y)||^2 / sum ||e||^2)
    ghost:     g = exp(pre over the dead) @ W_dec[dead],   e_hat = g * ||e|| / (2 ||g||) in each row
               term = mean_rows ||e - e_hat||^2 * (mean_rows ||e||^2 / the same),   both factors constants
    resample:  no term. Every `resample_every` steps each dead latent takes a row of the batch, drawn with probability
               proportional to (||e||^2)^2: W_dec[i] = the row at unit norm, W_enc[:, i] = the same direction at 0.2 of
               the living's mean norm, b_enc[i] = 0, and Adam forgets these entries.

auxk: Gao et al. 2024, arXiv:2406.04093, appendix A.2. Dead latents learn to explain what the living leave over, decoder
and encoder both (sparsify 1.3.3's fused backward never trains the encoder here). Two things decide whether it works.
The error is measured as a share of e, as the paper's code does: the last factor makes the term as large beside the loss
as it is there; without it a good coder's dead latents get hardly any gradient. And y_hat is what the *firing* latents
reconstruct, those by which deadness is judged: taken from a Matryoshka's largest level, e is next to nothing, and of
1,024 latents on the world of shapes 404 stayed dead instead of 29 (289 with no revival).

ghost: Jermyn & Templeton 2024, Anthropic's January update, and Prisma. The exponential has a gradient where the ReLU
has none. The last factor is one number for the batch, as Anthropic has it: Prisma divides element by element, which
makes each element's pull the inverse of its own error. The term's value is always the reconstruction error; its
gradient is what counts.

resample: Bricken et al. 2023, "Neuron resampling". They draw from 819,200 inputs, here from the batch of the step: it
is at hand, and a checkpoint need not hold more. A row is read as the encoder reads it (y - b_dec) and written as the
decoder writes it (target - output bias). Adam's step count belongs to the whole tensor and stays.

All products touch the dead subset only; over it they are dense, because k_aux is not small there. The pre-activations
carry gradient to W_enc, b_enc, W_dec, but b_dec is left alone: it is a matter of the living.
"""

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vitrail.coders.base import SparseCoder, Step, squared_error
from vitrail.coders.sparse import decode

AUX_WEIGHT = 1 / 32
RESAMPLED_ENCODER_NORM = 0.2  # of the living's mean


class DeadCounter:
    """Rows of training since each latent last fired."""

    def __init__(self, d_sae: int, *, window: int, device: torch.device) -> None:
        self.window = window
        self.rows_since_fired: Int[Tensor, " d_sae"] = torch.zeros(d_sae, dtype=torch.int64, device=device)

    def update(self, fired: Int[Tensor, " d_sae"], n_rows: int) -> None:
        self.rows_since_fired += n_rows
        self.rows_since_fired.masked_fill_(fired > 0, 0)

    def begin_anew(self, latents: Int[Tensor, " m"]) -> None:
        """These are other latents now: each has a whole window to fire in."""
        self.rows_since_fired[latents] = 0

    def dead(self) -> Bool[Tensor, " d_sae"]:
        return self.rows_since_fired >= self.window


class Reviver:
    """What is done about dead latents: a further term of the objective, new weights after a step, or nothing."""

    def term(self, coder: SparseCoder, step: Step, dead: Bool[Tensor, " d_sae"]) -> Float[Tensor, ""]:
        return step.loss.new_zeros(())

    def after_step(
        self,
        coder: SparseCoder,
        step: Step,
        dead: Bool[Tensor, " d_sae"],
        optimizer: torch.optim.Optimizer,
        draws: np.random.Generator,
    ) -> Int[Tensor, " m"]:
        """Called every `resample_every` steps, after the optimiser. Returns the latents that were made anew."""
        return dead.new_zeros(0, dtype=torch.int64)


class AuxK(Reviver):
    def term(self, coder: SparseCoder, step: Step, dead: Bool[Tensor, " d_sae"]) -> Float[Tensor, ""]:
        numbers = dead.nonzero().squeeze(1)
        if len(numbers) == 0:
            return step.loss.new_zeros(())
        left_over = _left_over(coder, step)
        spread = (step.target - step.target.mean(0)).square().sum()
        scale = (spread / left_over.square().sum().clamp_min(1e-12)).detach()
        pre = _pre_of(coder, step, numbers)
        k_aux = min(max(1, coder.d_in // 2), len(numbers))
        values, indices = pre.topk(k_aux, dim=1, sorted=False)
        z = torch.zeros_like(pre).scatter(1, indices, values.relu())
        return AUX_WEIGHT * scale * squared_error(left_over, z @ coder.W_dec[numbers])


class Ghost(Reviver):
    def term(self, coder: SparseCoder, step: Step, dead: Bool[Tensor, " d_sae"]) -> Float[Tensor, ""]:
        numbers = dead.nonzero().squeeze(1)
        if len(numbers) == 0:
            return step.loss.new_zeros(())
        left_over = _left_over(coder, step)
        pre = _pre_of(coder, step, numbers)
        # The row's largest exponent is taken out: scaling to ||e|| / 2 puts it back, and exp cannot overflow.
        ghosts = (pre - pre.detach().amax(1, keepdim=True)).exp() @ coder.W_dec[numbers]
        norms = torch.linalg.vector_norm(ghosts.detach(), dim=1, keepdim=True).clamp_min(1e-6)
        ghosts = ghosts * (torch.linalg.vector_norm(left_over, dim=1, keepdim=True) / (2 * norms))
        unscaled = squared_error(left_over, ghosts)
        return unscaled * (left_over.square().sum(1).mean() / unscaled.detach().clamp_min(1e-12))


class Resample(Reviver):
    @torch.no_grad()
    def after_step(
        self,
        coder: SparseCoder,
        step: Step,
        dead: Bool[Tensor, " d_sae"],
        optimizer: torch.optim.Optimizer,
        draws: np.random.Generator,
    ) -> Int[Tensor, " m"]:
        numbers = dead.nonzero().squeeze(1)
        weights = _left_over(coder, step).double().square().sum(1).square().cpu()
        if len(numbers) == 0 or not weights.sum() > 0:
            return numbers[:0]
        drawn = draws.choice(len(weights), size=len(numbers), p=(weights / weights.sum()).numpy())
        rows = torch.from_numpy(drawn).to(step.y.device)
        norms = torch.linalg.vector_norm(coder.W_enc, dim=0)
        living = norms if bool(dead.all()) else norms[~dead]
        read = _unit(step.y[rows] - coder.b_dec)
        coder.W_enc[:, numbers] = (RESAMPLED_ENCODER_NORM * living.mean() * read).t()
        coder.W_dec[numbers] = _unit(step.target[rows] - coder.output_bias())
        coder.b_enc[numbers] = 0
        coder.constrain_weights()  # a decoder that is not free (archetypal) stays what it has to be
        for moment in ("exp_avg", "exp_avg_sq"):
            _moment(optimizer, coder.W_enc, moment)[:, numbers] = 0
            _moment(optimizer, coder.W_dec, moment)[numbers] = 0
            _moment(optimizer, coder.b_enc, moment)[numbers] = 0
        return numbers


REVIVERS: dict[str, Reviver] = {"none": Reviver(), "auxk": AuxK(), "ghost": Ghost(), "resample": Resample()}


@torch.no_grad()
def _left_over(coder: SparseCoder, step: Step) -> Float[Tensor, "n d_out"]:
    """e: what the latents that fire do not reconstruct."""
    return step.target - decode(step.codes, coder.W_dec) - coder.output_bias()


def _pre_of(coder: SparseCoder, step: Step, numbers: Int[Tensor, " m"]) -> Float[Tensor, "n m"]:
    """Pre-activations of these latents."""
    return torch.addmm(coder.b_enc[numbers], step.y - coder.b_dec.detach(), coder.W_enc[:, numbers])


def _moment(optimizer: torch.optim.Optimizer, parameter: Tensor, name: str) -> Tensor:
    """Adam's, to be written to; one that nobody reads where the parameter was never trained."""
    return optimizer.state[parameter][name] if parameter in optimizer.state else torch.zeros_like(parameter)


def _unit(x: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    return x / torch.linalg.vector_norm(x, dim=1, keepdim=True).clamp_min(1e-12)
