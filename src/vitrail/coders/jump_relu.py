"""JumpReLU coder: every latent has a threshold of its own, and learns it.

    z = pre * H(pre - theta),   theta = exp(log_threshold) > 0,   H(u) = 1 if u > 0 else 0
    loss = mean_rows( ||y - y_hat||^2 + c * ||z||_0 ),   unit-norm decoder directions

Rajamanoharan et al. 2024b, arXiv:2407.14435. z and L0 jump where theta passes a pre-activation; both get the derivative
at theta that the *expected* loss has, estimated from the pre-activations nearby:

    dz / dtheta = -theta / eps K((pre - theta) / eps),   dH(pre - theta) / dtheta = -1 / eps K((pre - theta) / eps)

K is a density (KERNELS), eps the `bandwidth`. The penalty reaches the thresholds and nothing else; the encoder gets
dz / dpre = H(pre - theta).

A bandwidth is a trade: the estimate's bias grows with eps, its variance with 1 / eps, and where no pre-activation of
the batch lies within a bandwidth of theta the gradient is zero: about n_rows * eps * (density at theta) entries per
latent and step must be well above one. It is in units of y, whose root mean square is 1 under every normalisation but
"none" and "msae_code". The paper's number, 1e-3, is for E||y||^2 = 1; here that is d_in, and 1e-3 sqrt(d_in) the same
bandwidth, 0.03 at d_in = 768. The default is what docs/coders/jump_relu.md measures.

"silverman": B. W. Silverman's (1984) equivalent kernel of spline smoothing. ViSAEBench (appendix Q) says "Silverman
kernel, bandwidth 1e-3" and no more; both are the defaults of Overcomplete's JumpSAE, where that is the kernel's
formula. It dips below zero. There kernels are not normalised (a factor of 1/2 for gaussian, of 2 for silverman) and
1 / eps comes in twice; here every kernel integrates to one, hence estimates the same gradient. As there, but for the
rectangle, eps / 2 is the kernel's scale.

`target_l0` makes c a state: after each training batch c and every theta are multiplied by exp(eta * min((L0 - target) /
target, 1)). ViSAEBench names "a multiplicative controller" and no formula. Clipped at 1, or the first batches, whose
L0 is hundreds of targets, would send c to infinity. The thresholds are moved along because under Adam log theta moves
by lr a step whatever c is: with c alone it takes 1 / lr steps to move by a factor of e, meanwhile c runs away to
25,000, and L0 ends far beyond the target on the other side. `calibrate` says whether the target was met.
"""

import math
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vitrail.coders.base import SparseCoder, Step, squared_error
from vitrail.coders.sparse import Codes
from vitrail.coders.thresholded import Kernel, above, entries, jumped
from vitrail.statistics import ActivationStats

WITHIN = 2.0  # of the target, counted in latents, counts as met: ViSAEBench, appendix Q


def rectangle(u: Float[Tensor, "*axes"]) -> Float[Tensor, "*axes"]:
    return (u.abs() < 0.5).to(u.dtype)


def triangle(u: Float[Tensor, "*axes"]) -> Float[Tensor, "*axes"]:
    return 2 * (1 - 2 * u.abs()).clamp_min(0)


def epanechnikov(u: Float[Tensor, "*axes"]) -> Float[Tensor, "*axes"]:
    return 1.5 * (1 - 4 * u.square()).clamp_min(0)


def gaussian(u: Float[Tensor, "*axes"]) -> Float[Tensor, "*axes"]:
    return math.sqrt(2 / math.pi) * torch.exp(-2 * u.square())


def silverman(u: Float[Tensor, "*axes"]) -> Float[Tensor, "*axes"]:
    v = math.sqrt(2) * u.abs()
    return torch.exp(-v) * torch.sin(v + math.pi / 4)


KERNELS: dict[str, Callable[[Tensor], Tensor]] = {
    "rectangle": rectangle,
    "triangle": triangle,
    "epanechnikov": epanechnikov,
    "gaussian": gaussian,
    "silverman": silverman,
}
# Bandwidths from theta at which a kernel has ended, or is below 1e-7 of its peak.
REACH = {"rectangle": 0.5, "triangle": 0.5, "epanechnikov": 0.5, "gaussian": 3.0, "silverman": 12.0}


class JumpReLU(SparseCoder):
    name = "jump_relu"
    coefficient: Tensor

    def __init__(
        self,
        *,
        d_in: int,
        d_sae: int,
        l0_coefficient: float = 1.0,
        target_l0: float | None = None,
        controller_rate: float = 0.01,
        kernel: str = "rectangle",
        bandwidth: float = 0.1,
        initial_threshold: float = 0.5,
        normalization: str = "mean_std",
        b_dec_init: str = "zeros",
        seed: int = 0,
    ) -> None:
        super().__init__(d_in=d_in, d_sae=d_sae, normalization=normalization, b_dec_init=b_dec_init, seed=seed)
        if kernel not in KERNELS:
            raise ValueError(f"kernel must be one of {', '.join(KERNELS)}, got {kernel!r}.")
        if bandwidth <= 0 or initial_threshold <= 0:
            raise ValueError(
                f"bandwidth and initial_threshold must be positive, got {bandwidth} and {initial_threshold}."
            )
        if target_l0 is not None and not 0 < target_l0 <= d_sae:
            raise ValueError(f"target_l0 must be in 0..d_sae={d_sae}, or None for no target, got {target_l0}.")
        if l0_coefficient < 0 or (target_l0 is not None and l0_coefficient == 0):
            raise ValueError(
                f"l0_coefficient must not be negative, nor zero where target_l0 multiplies it, got {l0_coefficient}."
            )
        if controller_rate <= 0:
            raise ValueError(f"controller_rate must be positive, got {controller_rate}.")
        self.l0_coefficient, self.target_l0, self.controller_rate = l0_coefficient, target_l0, controller_rate
        self.kernel, self.bandwidth, self.initial_threshold = kernel, bandwidth, initial_threshold
        self.log_threshold = nn.Parameter(torch.full((d_sae,), math.log(initial_threshold)))
        self.register_buffer("coefficient", torch.tensor(float(l0_coefficient)))  # c, now

    @torch.no_grad()
    def fit(self, stats: ActivationStats, sample: Float[Tensor, "n d_in"]) -> None:
        """Thresholds start at `initial_threshold` times the root mean square of y, which is 1 under "mean_std"."""
        super().fit(stats, sample)
        rms = self.normalized(sample).square().mean().sqrt().clamp_min(1e-12)
        self.log_threshold.copy_(rms.log() + math.log(self.initial_threshold))

    def select(self, pre: Float[Tensor, "n d_sae"]) -> Codes:
        return entries(pre, above(pre, self.log_threshold.exp()))

    def loss(self, x: Float[Tensor, "n d_in"]) -> Step:
        y = self.normalized(x)
        kernel = Kernel(KERNELS[self.kernel], self.bandwidth, REACH[self.kernel])
        weights = (self.b_dec, self.W_enc, self.b_enc, self.W_dec)
        found = jumped(y, *weights, self.log_threshold.exp(), kernel, dtype=self.selection_dtype)
        y_hat, l0 = found.decoded + self.b_dec, found.per_latent.sum() / len(y)
        terms = {"reconstruction": squared_error(y, y_hat), "l0": self.coefficient.clone() * l0}
        if self.training and self.target_l0 is not None:
            self._steer(l0.detach(), self.target_l0)
        loss, fired = terms["reconstruction"] + terms["l0"], found.rows_fired
        return Step(loss, terms, found.codes, y=y, target=y, x_hat=y_hat, penalty=("l0",), fired=fired)

    @torch.no_grad()
    def _steer(self, l0: Tensor, target: float) -> None:
        excess = self.controller_rate * ((l0 - target) / target).clamp_max(1.0)
        self.coefficient.mul_(excess.exp())
        self.log_threshold.add_(excess)

    @torch.no_grad()
    def calibrate(self, batches: Iterable[Float[Tensor, "_ d_in"]]) -> dict[str, Any]:
        """Nothing is set. Says whether the mean L0 over these raw activations met the target; warns if training did
        not get there. Without a target, {}."""
        if self.target_l0 is None:
            return {}
        n_rows = entries = 0
        for batch in batches:
            n_rows, entries = n_rows + len(batch), entries + self.encode_sparse(batch).nnz
        if n_rows == 0:
            raise ValueError("calibration needs held-out activations, got no rows.")
        mean_l0 = entries / n_rows
        converged = abs(mean_l0 - self.target_l0) <= WITHIN
        self.calibration = {
            "target_l0": self.target_l0,
            "mean_l0": mean_l0,
            "converged": converged,
            "l0_coefficient": float(self.coefficient),
            "n_rows": n_rows,
        }
        was_steered = float(self.coefficient) != torch.tensor(self.l0_coefficient, dtype=self.coefficient.dtype).item()
        if not converged and was_steered:  # an untrained control has no target to miss
            warnings.warn(
                f"this jump_relu coder missed its target: mean L0 {mean_l0:.1f}, "
                f"target_l0={self.target_l0} +- {WITHIN}. Train longer, start nearer (initial_threshold, "
                f"l0_coefficient), or raise controller_rate={self.controller_rate}.",
                stacklevel=3,  # past no_grad's wrapper: the line that called calibrate
            )
        return self.calibration
