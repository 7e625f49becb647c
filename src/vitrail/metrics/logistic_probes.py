"""Many small logistic regressions at once, to their minimum: what scikit-learn's LogisticRegression finds one by one.

    min over w, b of   sum_i log(1 + exp(-s_i (<w, x_i> + b))) + ||w||^2 / (2 C),   s_i = 1 for positives, else -1

The intercept is not penalised. Up to a few latents by Newton's method, above by L-BFGS, in float64, with backtracking.
It ends where no entry of the gradient of the mean loss is above `tol`: the rule by which scikit-learn's L-BFGS ends,
whose default tol of 1e-4 ends well before the minimum.
"""

import warnings
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vitrail.metrics.minimise import MAX_STEPS, TOL, FewRows, Scale, lbfgs, newton

NEWTON = 16  # up to so many latents the Hessian is laid out
# Of the rows of all regressions that are worked on at once: few enough for a cache.
NEWTON_VALUES, LBFGS_VALUES = 2**20, 2**18
CURVED_ROWS = 64  # whose part of the Hessian L-BFGS starts from
SPARSE_UP_TO = 0.15  # share of values that are not zero, up to which products of sparse rows are the faster ones


@dataclass(frozen=True, eq=False)
class Probes:
    weight: Float[Tensor, "b k"]
    bias: Float[Tensor, " b"]
    gradient: Float[Tensor, " b"]  # largest entry of the mean loss's at the end: above tol where it did not converge

    def logits(self, x: Float[Tensor, "b n k"]) -> Float[Tensor, "b n"]:
        return torch.baddbmm(self.bias[:, None, None], x.double(), self.weight[:, :, None])[..., 0]


@torch.no_grad()
def fit_binary(
    x: Float[Tensor, "b n k"],
    positive: Bool[Tensor, "b n"],
    *,
    weights: Float[Tensor, "b n"] | None = None,
    start: Probes | None = None,
    C: float = 1.0,
    tol: float = TOL,
    max_steps: int = MAX_STEPS,
) -> Probes:
    """b regressions of k latents each. `weights`: how often each row counts (None: once), 0 leaves it out.

    `start`: of the first latents of the same, fewer than k; the others begin at zero.
    Raises ValueError if a regression has no positive or no negative row.
    """
    rows = torch.ones(positive.shape, dtype=torch.float64, device=x.device) if weights is None else weights.double()
    b, n, k = x.shape
    theta = _start(positive, rows, k, start)
    gradient = torch.zeros_like(theta[:, 0])
    minimise, values = (newton, NEWTON_VALUES) if k <= NEWTON else (lbfgs, LBFGS_VALUES)
    at_once = max(1, values // max(1, n * (k + 1)))
    for first in range(0, b, at_once):
        part = slice(first, first + at_once)
        one = _Binary(x[part], positive[part], rows[part], C)
        theta[part], gradient[part] = minimise(one, theta[part], tol, max_steps)
    return Probes(theta[:, :k], theta[:, k], gradient)


@dataclass(frozen=True, eq=False)
class SparseRows:
    """The rows of b regressions, k latents each: what is not zero, regression by regression, latent by latent."""

    problem: Int[Tensor, " nnz"]
    latent: Int[Tensor, " nnz"]
    row: Int[Tensor, " nnz"]
    value: Float[Tensor, " nnz"]
    shape: tuple[int, int, int]  # b, m, k

    def dense(self) -> Float[Tensor, "b m k"]:
        x = self.value.new_zeros(self.shape)
        x[self.problem, self.row, self.latent] = self.value
        return x

    def select(self, keep: Bool[Tensor, " b"]) -> "SparseRows":
        kept, number = keep[self.problem], keep.cumsum(0) - 1
        parts = (part[kept] for part in (self.problem, self.latent, self.row, self.value))
        problem, latent, row, value = parts
        return SparseRows(number[problem], latent, row, value, (int(keep.sum()), *self.shape[1:]))


@torch.no_grad()
def fit_binary_sparse(
    x: SparseRows,
    positive: Bool[Tensor, "b m"],
    weights: Float[Tensor, "b m"],
    *,
    start: Probes | None = None,
    C: float = 1.0,
    tol: float = TOL,
    max_steps: int = MAX_STEPS,
) -> Probes:
    """`fit_binary` of `x.dense()`; above a few latents, and where they seldom fire, without laying it out."""
    b, m, k = x.shape
    if k <= NEWTON or len(x.value) > SPARSE_UP_TO * b * m * k:
        return fit_binary(x.dense(), positive, weights=weights, start=start, C=C, tol=tol, max_steps=max_steps)
    theta = _start(positive, weights, k, start)
    theta, gradient = lbfgs(_SparseBinary(x, positive, weights, C), theta, tol, max_steps)
    return Probes(theta[:, :k], theta[:, k], gradient)


def _start(
    positive: Bool[Tensor, "b n"], weights: Float[Tensor, "b n"], k: int, start: Probes | None
) -> Float[Tensor, "b k_plus_1"]:
    """No latents and the intercept that is best then, or where a regression on fewer ended."""
    n_positive, n_rows = (positive * weights).sum(1), weights.sum(1)
    if bool(((n_positive == 0) | (n_positive == n_rows)).any()):
        raise ValueError("every regression needs rows of both kinds: one has only positives or only negatives.")
    theta = torch.zeros(len(positive), k + 1, dtype=torch.float64, device=positive.device)
    if start is None:
        theta[:, k] = (n_positive / (n_rows - n_positive)).log()
    else:
        theta[:, : start.weight.shape[1]], theta[:, k] = start.weight, start.bias
    return theta


# -- the losses


class _Binary:
    copied_below = 0.75  # share of the problems still going, at which the others are left behind

    def __init__(
        self, x: Float[Tensor, "b n k"], positive: Bool[Tensor, "b n"], rows: Float[Tensor, "b n"], C: float
    ) -> None:
        one = torch.ones(*x.shape[:2], 1, dtype=torch.float64, device=x.device)
        self.x = torch.cat([x.double(), one], 2)
        self.sign = torch.where(positive, 1.0, -1.0).double()
        self.rows = None if bool((rows == 1).all()) else rows
        self.penalty = torch.full((x.shape[2] + 1,), 1 / C, dtype=torch.float64, device=x.device)
        self.penalty[-1] = 0
        self.n = rows.sum(1)

    def select(self, keep: Bool[Tensor, " b"]) -> "_Binary":
        less = object.__new__(_Binary)
        less.x, less.sign, less.n, less.penalty = self.x[keep], self.sign[keep], self.n[keep], self.penalty
        less.rows = None if self.rows is None else self.rows[keep]
        return less

    def logits(self, theta: Float[Tensor, "b p"]) -> Float[Tensor, "b n"]:
        return torch.bmm(self.x, theta[:, :, None])[..., 0]

    def loss(self, logits: Float[Tensor, "b n"]) -> Float[Tensor, " b"]:
        losses = torch.nn.functional.softplus(-self.sign * logits)
        return losses.sum(1) if self.rows is None else (losses * self.rows).sum(1)

    def gradient(self, logits: Float[Tensor, "b n"]) -> Float[Tensor, "b p"]:
        """Of the loss alone."""
        residual = -self.sign * torch.sigmoid(-self.sign * logits)
        return torch.bmm((residual if self.rows is None else residual * self.rows)[:, None], self.x)[:, 0]

    def hessian(self, logits: Float[Tensor, "b n"]) -> Float[Tensor, "b p p"]:
        return torch.bmm((self.x * self._share(logits)[:, :, None]).mT, self.x)

    def scale(self, logits: Float[Tensor, "b n"]) -> Scale:
        share = self._share(logits)
        diagonal = torch.bmm(share[:, None], self.x**2)[:, 0] + self.penalty + 1e-12
        return _scale(self, diagonal, share)

    def _share(self, logits: Float[Tensor, "b n"]) -> Float[Tensor, "b n"]:
        p = torch.sigmoid(logits)
        return p * (1 - p) if self.rows is None else p * (1 - p) * self.rows

    def _lengths(self) -> Float[Tensor, "b n"]:
        return self.x.square().sum(2)

    def _picked(self, rows: Int[Tensor, "b r"]) -> Float[Tensor, "b r p"]:
        return self.x[torch.arange(len(rows))[:, None], rows]


class _SparseBinary(_Binary):
    copied_below = 0.2

    def __init__(self, x: SparseRows, positive: Bool[Tensor, "b n"], rows: Float[Tensor, "b n"], C: float) -> None:
        self.entries = x
        self.sign = torch.where(positive, 1.0, -1.0).double()
        self.rows = rows
        self.penalty = torch.full((x.shape[2] + 1,), 1 / C, dtype=torch.float64, device=positive.device)
        self.penalty[-1] = 0
        self.n = rows.sum(1)
        self._products()

    def _products(self) -> None:
        """Block-diagonal, so that one product serves all regressions. Only one way: for the few steps that are taken,
        to sort the entries for the other costs more than it spares."""
        b, m, k = self.entries.shape
        self.row = self.entries.problem * m + self.entries.row
        self.column = self.entries.problem * k + self.entries.latent
        self.value = self.entries.value.double()
        self.by_latent = _csr(self.column, self.row, self.value, (b * k, b * m))

    def select(self, keep: Bool[Tensor, " b"]) -> "_SparseBinary":
        less = object.__new__(_SparseBinary)
        less.entries, less.sign, less.n, less.penalty = (
            self.entries.select(keep),
            self.sign[keep],
            self.n[keep],
            self.penalty,
        )
        less.rows = None if self.rows is None else self.rows[keep]
        less._products()
        return less

    def logits(self, theta: Float[Tensor, "b p"]) -> Float[Tensor, "b n"]:
        b, m, _ = self.entries.shape
        said = theta[:, :-1].reshape(-1).take(self.column).mul_(self.value)
        return said.new_zeros(b * m).index_add_(0, self.row, said).view(b, m) + theta[:, -1:]

    def _gathered(self, matrix: Tensor, per_row: Float[Tensor, "b n"]) -> Float[Tensor, "b p"]:
        b, _, k = self.entries.shape
        return torch.cat([torch.mv(matrix, per_row.reshape(-1)).view(b, k), per_row.sum(1, keepdim=True)], 1)

    def gradient(self, logits: Float[Tensor, "b n"]) -> Float[Tensor, "b p"]:
        residual = -self.sign * torch.sigmoid(-self.sign * logits)
        return self._gathered(self.by_latent, residual if self.rows is None else residual * self.rows)

    def scale(self, logits: Float[Tensor, "b n"]) -> Scale:
        share, one = self._share(logits), self.by_latent
        squares = torch.sparse_csr_tensor(
            one.crow_indices(), one.col_indices(), one.values() ** 2, one.shape, check_invariants=False
        )
        return _scale(self, self._gathered(squares, share) + self.penalty + 1e-12, share)

    def _lengths(self) -> Float[Tensor, "b n"]:
        b, m, _ = self.entries.shape
        return self.value.new_zeros(b * m).index_add_(0, self.row, self.value.square()).view(b, m) + 1

    def _picked(self, rows: Int[Tensor, "b r"]) -> Float[Tensor, "b r p"]:
        b, m, k = self.entries.shape
        place = torch.full((b, m), -1)
        place.scatter_(1, rows, torch.arange(rows.shape[1]).expand_as(rows))
        at = place.view(-1).take(self.row)
        kept = (at >= 0).nonzero()[:, 0]
        out = torch.zeros(*rows.shape, k + 1, dtype=torch.float64)
        out[self.entries.problem[kept], at[kept], self.entries.latent[kept]] = self.value[kept]
        out[:, :, k] = 1
        return out


def _scale(problem: _Binary, diagonal: Float[Tensor, "b p"], share: Float[Tensor, "b n"]) -> Scale:
    """Exact in the few rows that bend the loss most, those that are not yet told; of the others the diagonal."""
    r = min(CURVED_ROWS, share.shape[1])
    rows = (share * problem._lengths()).topk(r, 1).indices
    picked = problem._picked(rows) * share.gather(1, rows).sqrt()[:, :, None]
    # Not all of it: of the intercept, which has no penalty, next to nothing may be left.
    left = torch.maximum(diagonal - picked.square().sum(1), torch.maximum(problem.penalty, 1e-3 * diagonal))
    return FewRows.of(left, picked)


def _csr(rows: Tensor, columns: Tensor, values: Tensor, shape: tuple[int, int]) -> Tensor:
    """`rows` must ascend."""
    starts = torch.nn.functional.pad(torch.bincount(rows, minlength=shape[0]).cumsum(0), (1, 0))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse", UserWarning)  # that CSR tensors are in beta, once per process
        return torch.sparse_csr_tensor(starts, columns, values, shape, check_invariants=False)
