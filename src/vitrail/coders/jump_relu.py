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
latent and step must be well above one. The default is the paper's number. The paper's activations have E||y||^2 = 1;
under "mean_std" they have d_in, so that its bandwidth is 1e-3 sqrt(d_in) here, 0.03 at d_in = 768.

"silverman": B. W. Silverman's (1984) equivalent kernel of spline smoothing. ViSAEBench (appendix Q) says "Silverman
kernel, bandwidth 1e-3" and no more; both are the defaults of Overcomplete's JumpSAE, where that is the kernel's
formula. It dips below zero. There kernels are not normalised (a factor of 1/2 for gaussian, of 2 for silverman) and
1 / eps comes in twice; here every kernel integrates to one, hence estimates the same gradient. As there, but for the
rectangle, eps / 2 is the kernel's scale.

`target_l0` makes c a state: after each training batch c <- c exp(eta * min((L0 - target) / target, 1)). ViSAEBench
names "a multiplicative controller" and no formula. Clipped at 1, or the first batches, whose L0 is hundreds of
targets, would send c to infinity. `calibrate` says whether the target was met.
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
        bandwidth: float = 1e-3,
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
        return Codes.from_dense(pre * (pre > self.log_threshold.exp()))

    def loss(self, x: Float[Tensor, "n d_in"]) -> Step:
        y = self.normalized(x)
        # Dense, as for ReLU: at the start a third of the latents fire.
        pre, theta = self.pre_activations(y), self.log_threshold.exp()
        z, l0 = _Jump.apply(pre, theta, self.kernel, self.bandwidth)  # pyright: ignore[reportGeneralTypeIssues]
        y_hat = z @ self.W_dec + self.b_dec
        terms = {"reconstruction": squared_error(y, y_hat), "l0": self.coefficient.clone() * l0}
        if self.training and self.target_l0 is not None:
            self._steer(l0.detach(), self.target_l0)
        loss, codes = terms["reconstruction"] + terms["l0"], Codes.from_dense(z.detach())
        return Step(loss, terms, codes, y=y, target=y, x_hat=y_hat, penalty=("l0",))

    def _steer(self, l0: Tensor, target: float) -> None:
        excess = ((l0 - target) / target).clamp_max(1.0)
        self.coefficient.mul_(torch.exp(self.controller_rate * excess))

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
                f"l0_coefficient), or widen bandwidth={self.bandwidth}.",
                stacklevel=3,  # past no_grad's wrapper: the line that called calibrate
            )
        return self.calibration


class _Jump(torch.autograd.Function):
    """(z, mean L0) of pre-activations, with the estimated derivative at the threshold."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor, theta: Tensor, kernel: str, bandwidth: float) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(pre, theta)
        ctx.kernel, ctx.bandwidth = kernel, bandwidth
        fired = pre > theta
        return pre * fired, fired.sum().to(pre.dtype) / len(pre)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, for_z: Tensor, for_l0: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        pre, theta = ctx.saved_tensors
        near = KERNELS[ctx.kernel]((pre - theta) / ctx.bandwidth) / ctx.bandwidth
        for_theta = -theta * (near * for_z).sum(0) - near.sum(0) * (for_l0 / len(pre))
        return for_z * (pre > theta), for_theta, None, None
