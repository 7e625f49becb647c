"""Minima of many convex losses at once, by Newton's method or by L-BFGS, in float64, with backtracking.

    min over theta of   loss(logits(theta)) + <penalty, theta^2> / 2,     logits linear in theta

Along a direction a loss then costs no product with the rows. It ends where no entry of the mean loss's gradient is
above `tol`: the rule by which scikit-learn's L-BFGS ends.
"""

from dataclasses import dataclass
from typing import Protocol, Self, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

TOL = 1e-8
MAX_STEPS = 5000
HISTORY = 10  # steps that L-BFGS remembers


@runtime_checkable
class Loss(Protocol):
    """b problems of p numbers each. `n`: rows of each; `penalty`: of each number."""

    penalty: Float[Tensor, " p"]
    n: Float[Tensor, " b"]
    copied_below: float  # share of the problems still going, at which the others are left behind

    def select(self, keep: Bool[Tensor, " b"]) -> Self: ...

    def logits(self, theta: Float[Tensor, "b p"]) -> Float[Tensor, "b m"]: ...

    def loss(self, logits: Float[Tensor, "b m"]) -> Float[Tensor, " b"]: ...

    def gradient(self, logits: Float[Tensor, "b m"]) -> Float[Tensor, "b p"]:
        """Of the loss alone."""
        ...

    def scale(self, logits: Float[Tensor, "b m"]) -> "Scale": ...


@runtime_checkable
class Curved(Loss, Protocol):
    def hessian(self, logits: Float[Tensor, "b m"]) -> Float[Tensor, "b p p"]: ...


@runtime_checkable
class Scale(Protocol):
    """The inverse of about the Hessian of the loss and the penalty."""

    def __call__(self, gradient: Float[Tensor, "b p"]) -> Float[Tensor, "b p"]: ...

    def select(self, keep: Bool[Tensor, " b"]) -> Self: ...


@dataclass(frozen=True, eq=False)
class Diagonal:
    inverse: Float[Tensor, "b p"]

    def __call__(self, gradient: Float[Tensor, "b p"]) -> Float[Tensor, "b p"]:
        return gradient * self.inverse

    def select(self, keep: Bool[Tensor, " b"]) -> "Diagonal":
        return Diagonal(self.inverse[keep])


@dataclass(frozen=True, eq=False)
class FewRows:
    """Of a diagonal and a few rows, H = diag(d) + R^T R, by Woodbury's identity."""

    inverse: Float[Tensor, "b p"]  # 1 / d
    rows: Float[Tensor, "b r p"]
    factor: Float[Tensor, "b r r"]  # Cholesky's, of I + R diag(1 / d) R^T

    @classmethod
    def of(cls, diagonal: Float[Tensor, "b p"], rows: Float[Tensor, "b r p"]) -> "FewRows":
        inner = (rows / diagonal[:, None]) @ rows.mT
        inner.diagonal(dim1=1, dim2=2).add_(1)
        return cls(1 / diagonal, rows, torch.linalg.cholesky(inner))

    def __call__(self, gradient: Float[Tensor, "b p"]) -> Float[Tensor, "b p"]:
        scaled = gradient * self.inverse
        inside = torch.cholesky_solve(torch.bmm(self.rows, scaled[:, :, None]), self.factor)
        return scaled - torch.bmm(self.rows.mT, inside)[..., 0] * self.inverse

    def select(self, keep: Bool[Tensor, " b"]) -> "FewRows":
        return FewRows(self.inverse[keep], self.rows[keep], self.factor[keep])


# Where each theta ends, and the largest entry of the mean loss's gradient there.
Minimum = tuple[Float[Tensor, "b p"], Float[Tensor, " b"]]


def newton(problem: Curved, theta: Float[Tensor, "b p"], tol: float, max_steps: int) -> Minimum:
    out, size = theta.clone(), torch.zeros_like(theta[:, 0])
    left, logits = torch.arange(len(theta), device=theta.device), problem.logits(theta)
    for step in range(max_steps + 1):
        gradient = problem.gradient(logits) + problem.penalty * theta
        largest = gradient.abs().amax(1) / problem.n
        out[left], size[left] = theta, largest
        going = largest > tol
        if step == max_steps or not bool(going.any()):
            break
        if not bool(going.all()):
            problem, left = problem.select(going), left[going]
            theta, logits, gradient = theta[going], logits[going], gradient[going]
        hessian = problem.hessian(logits)
        hessian.diagonal(dim1=1, dim2=2).add_(problem.penalty + 1e-12)
        direction = -torch.linalg.solve_ex(hessian, gradient)[0]
        theta, logits, stuck = _search(problem, theta, logits, gradient, direction)
        if bool(stuck.all()):
            break
    return out, size


def lbfgs(problem: Loss, theta: Float[Tensor, "b p"], tol: float, max_steps: int) -> Minimum:
    """Nocedal and Wright 2006, algorithm 7.4, scaled by what is known of the Hessian where it starts."""
    out, size = theta.clone(), torch.zeros_like(theta[:, 0])
    left, logits = torch.arange(len(theta), device=theta.device), problem.logits(theta)
    gradient = problem.gradient(logits) + problem.penalty * theta
    scale = problem.scale(logits)
    past: list[tuple[Tensor, Tensor, Tensor]] = []  # steps, changes of the gradient, 1 / their products
    for step in range(max_steps + 1):
        largest = gradient.abs().amax(1) / problem.n
        out[left], size[left] = theta, largest
        going = largest > tol
        n_going = int(going.sum())
        if step == max_steps or n_going == 0:
            break
        if n_going <= problem.copied_below * len(going):  # to leave some behind costs a copy of the others' rows
            problem, left = problem.select(going), left[going]
            theta, logits, gradient, scale = theta[going], logits[going], gradient[going], scale.select(going)
            past = [(s[going], y[going], rho[going]) for s, y, rho in past]
        direction = -_two_loops(gradient, scale, past)
        moved, logits, stuck = _search(problem, theta, logits, gradient, direction)
        if bool(stuck.all()):
            break
        new = problem.gradient(logits) + problem.penalty * moved
        s, y = moved - theta, new - gradient
        product = (s * y).sum(1, keepdim=True)
        past = [*past[1 - HISTORY :], (s, y, torch.where(product > 0, 1 / product.clamp_min(1e-300), 0.0))]
        theta, gradient = moved, new
    return out, size


def _two_loops(gradient: Tensor, inverse: Scale, past: list[tuple[Tensor, Tensor, Tensor]]) -> Float[Tensor, "b p"]:
    q, alphas = gradient, []
    for s, y, rho in reversed(past):
        alphas.append(rho * (s * q).sum(1, keepdim=True))
        q = torch.addcmul(q, alphas[-1], y, value=-1)
    if past:
        _, y, rho = past[-1]
        scale = rho * (y * inverse(y)).sum(1, keepdim=True)
        q = inverse(q) / torch.where(scale > 0, scale, 1.0)
    else:
        q = inverse(q)
    for (s, y, rho), alpha in zip(past, reversed(alphas), strict=True):
        q = torch.addcmul(q, alpha - rho * (y * q).sum(1, keepdim=True), s)
    return q


def _search(
    problem: Loss, theta: Tensor, logits: Tensor, gradient: Tensor, direction: Tensor
) -> tuple[Tensor, Tensor, Bool[Tensor, " b"]]:
    """Halve the step until the objective falls enough (Armijo). And which could not move."""

    def objective(theta: Tensor, logits: Tensor) -> Tensor:
        return problem.loss(logits) + theta**2 @ problem.penalty / 2

    change = problem.logits(direction)
    before, slope = objective(theta, logits), (gradient * direction).sum(1)
    slack = 1e-13 * before.abs()  # near the minimum a step changes the objective by less than its rounding
    length, fails = torch.ones_like(before), torch.zeros_like(before, dtype=torch.bool)
    for _ in range(40):
        moved, to = torch.addcmul(theta, length[:, None], direction), torch.addcmul(logits, length[:, None], change)
        fails = objective(moved, to) > before + 1e-4 * length * slope + slack
        if not bool(fails.any()):
            return moved, to, torch.zeros_like(fails)
        length = torch.where(fails, length / 2, length)
    length = torch.where(fails, 0.0, length)
    return theta + length[:, None] * direction, logits + length[:, None] * change, fails
