"""Many small logistic regressions at once, to their minimum: what scikit-learn's LogisticRegression finds one by one.

    min over w, b of   sum_i log(1 + exp(-s_i (<w, x_i> + b))) + ||w||^2 / (2 C),   s_i = 1 for positives, else -1

The intercept is not penalised. Up to a few latents by Newton's method, above by L-BFGS, in float64, with backtracking.
It ends where no entry of the gradient of the mean loss is above `tol`: the rule by which scikit-learn's L-BFGS ends,
whose default tol of 1e-4 ends well before the minimum.

The multinomial one is softmax over all classes, with the same penalty on the weights of each.
"""

import warnings
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

TOL = 1e-8
MAX_STEPS = 5000
NEWTON = 16  # up to so many latents the Hessian is laid out
# Of the rows of all regressions that are worked on at once: few enough for a cache.
NEWTON_VALUES, LBFGS_VALUES = 2**20, 2**18
SPARSE_UP_TO = 0.15  # share of values that are not zero, up to which products of sparse rows are the faster ones
HISTORY = 10  # steps that L-BFGS remembers


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
    minimise, values = (_newton, NEWTON_VALUES) if k <= NEWTON else (_lbfgs, LBFGS_VALUES)
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
    theta, gradient = _lbfgs(_SparseBinary(x, positive, weights, C), theta, tol, max_steps)
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


@torch.no_grad()
def fit_multinomial(
    x: Float[Tensor, "n k"],
    labels: Int[Tensor, " n"],
    n_classes: int,
    *,
    start: Probes | None = None,
    C: float = 1.0,
    tol: float = TOL,
    max_steps: int = MAX_STEPS,
) -> Probes:
    """One regression over all classes: weight (n_classes, k). Raises ValueError if fewer than two classes are there."""
    present = torch.bincount(labels, minlength=n_classes) > 0
    if int(present.sum()) < 2:
        raise ValueError("a probe needs rows of at least two classes.")
    k = x.shape[1]
    theta = torch.zeros(n_classes, k + 1, dtype=torch.float64, device=x.device)
    if start is not None:
        theta[:, : start.weight.shape[1]], theta[:, k] = start.weight, start.bias
    if not bool(present.all()):  # a class without rows is none that could be answered, as in scikit-learn
        kept = present.nonzero()[:, 0]
        number = torch.cumsum(present, 0) - 1
        few = None if start is None else Probes(start.weight[kept], start.bias[kept], start.gradient[kept])
        found = fit_multinomial(x, number[labels], len(kept), start=few, C=C, tol=tol, max_steps=max_steps)
        theta[:, k] = -torch.inf
        theta[kept] = torch.cat([found.weight, found.bias[:, None]], 1)
        return Probes(theta[:, :k], theta[:, k], found.gradient[:1].expand(n_classes))
    problem = _Multinomial(x, labels, n_classes, C)
    flat, gradient = _lbfgs(problem, theta.reshape(1, -1), tol, max_steps)
    theta = flat.reshape(n_classes, k + 1)
    return Probes(theta[:, :k], theta[:, k] - theta[:, k].mean(), gradient.expand(n_classes))


# -- the losses. Logits are linear in theta: along a direction a loss costs no product with the rows


class _Binary:
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
        p = torch.sigmoid(logits)
        share = p * (1 - p) if self.rows is None else p * (1 - p) * self.rows
        return torch.bmm((self.x * share[:, :, None]).mT, self.x)

    def diagonal(self, logits: Float[Tensor, "b n"]) -> Float[Tensor, "b p"]:
        p = torch.sigmoid(logits)
        share = p * (1 - p) if self.rows is None else p * (1 - p) * self.rows
        return torch.bmm(share[:, None], self.x**2)[:, 0]


class _SparseBinary(_Binary):
    def __init__(self, x: SparseRows, positive: Bool[Tensor, "b n"], rows: Float[Tensor, "b n"], C: float) -> None:
        self.entries = x
        self.sign = torch.where(positive, 1.0, -1.0).double()
        self.rows = rows
        self.penalty = torch.full((x.shape[2] + 1,), 1 / C, dtype=torch.float64, device=positive.device)
        self.penalty[-1] = 0
        self.n = rows.sum(1)
        self._products()

    def _products(self) -> None:
        """Block-diagonal, and transposed, so that one product serves all regressions."""
        b, m, k = self.entries.shape
        row, column = self.entries.problem * m + self.entries.row, self.entries.problem * k + self.entries.latent
        value = self.entries.value.double()
        self.by_latent = _csr(column, row, value, (b * k, b * m))
        order = torch.sort(row.to(torch.int32), stable=True).indices
        self.by_row = _csr(row[order], column[order], value[order], (b * m, b * k))

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
        return torch.mv(self.by_row, theta[:, :-1].reshape(-1)).view(b, m) + theta[:, -1:]

    def _gathered(self, matrix: Tensor, per_row: Float[Tensor, "b n"]) -> Float[Tensor, "b p"]:
        b, _, k = self.entries.shape
        return torch.cat([torch.mv(matrix, per_row.reshape(-1)).view(b, k), per_row.sum(1, keepdim=True)], 1)

    def gradient(self, logits: Float[Tensor, "b n"]) -> Float[Tensor, "b p"]:
        residual = -self.sign * torch.sigmoid(-self.sign * logits)
        return self._gathered(self.by_latent, residual if self.rows is None else residual * self.rows)

    def diagonal(self, logits: Float[Tensor, "b n"]) -> Float[Tensor, "b p"]:
        p = torch.sigmoid(logits)
        share = p * (1 - p) if self.rows is None else p * (1 - p) * self.rows
        one = self.by_latent
        squares = torch.sparse_csr_tensor(
            one.crow_indices(), one.col_indices(), one.values() ** 2, one.shape, check_invariants=False
        )
        return self._gathered(squares, share)


def _csr(rows: Tensor, columns: Tensor, values: Tensor, shape: tuple[int, int]) -> Tensor:
    """`rows` must ascend."""
    starts = torch.nn.functional.pad(torch.bincount(rows, minlength=shape[0]).cumsum(0), (1, 0))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse", UserWarning)  # that CSR tensors are in beta, once per process
        return torch.sparse_csr_tensor(starts, columns, values, shape, check_invariants=False)


class _Multinomial:
    """One problem, its weights in a row: class by class."""

    def __init__(self, x: Float[Tensor, "n k"], labels: Int[Tensor, " n"], n_classes: int, C: float) -> None:
        self.x = torch.cat([x.double(), torch.ones(len(x), 1, dtype=torch.float64, device=x.device)], 1)
        self.labels, self.n_classes = labels, n_classes
        penalty = torch.full((x.shape[1] + 1,), 1 / C, dtype=torch.float64, device=x.device)
        penalty[-1] = 0
        self.penalty = penalty.repeat(n_classes)
        self.n = torch.tensor([float(len(x))], dtype=torch.float64, device=x.device)

    def select(self, keep: Bool[Tensor, " b"]) -> "_Multinomial":
        return self

    def logits(self, theta: Float[Tensor, "1 p"]) -> Float[Tensor, "1 m"]:
        return (self.x @ theta.reshape(self.n_classes, -1).t()).reshape(1, -1)

    def loss(self, logits: Float[Tensor, "1 m"]) -> Float[Tensor, " 1"]:
        scores = logits.reshape(-1, self.n_classes)
        return torch.nn.functional.cross_entropy(scores, self.labels, reduction="sum")[None]

    def gradient(self, logits: Float[Tensor, "1 m"]) -> Float[Tensor, "1 p"]:
        residual = logits.reshape(-1, self.n_classes).softmax(1)
        residual[torch.arange(len(residual), device=residual.device), self.labels] -= 1
        return (residual.t() @ self.x).reshape(1, -1)

    def diagonal(self, logits: Float[Tensor, "1 m"]) -> Float[Tensor, "1 p"]:
        p = logits.reshape(-1, self.n_classes).softmax(1)
        return ((p * (1 - p)).t() @ self.x**2).reshape(1, -1)


# -- their minima: where each theta ends, and the largest entry of the mean loss's gradient there

_Minimum = tuple[Float[Tensor, "b p"], Float[Tensor, " b"]]


def _newton(problem: _Binary, theta: Float[Tensor, "b p"], tol: float, max_steps: int) -> _Minimum:
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


def _lbfgs(problem: _Binary | _Multinomial, theta: Float[Tensor, "b p"], tol: float, max_steps: int) -> _Minimum:
    """Nocedal and Wright 2006, algorithm 7.4, scaled by the Hessian's diagonal where it starts."""
    out, size = theta.clone(), torch.zeros_like(theta[:, 0])
    left, logits = torch.arange(len(theta), device=theta.device), problem.logits(theta)
    gradient = problem.gradient(logits) + problem.penalty * theta
    inverse = 1 / (problem.diagonal(logits) + problem.penalty + 1e-12)
    past: list[tuple[Tensor, Tensor, Tensor]] = []  # steps, changes of the gradient, 1 / their products
    for step in range(max_steps + 1):
        largest = gradient.abs().amax(1) / problem.n
        out[left], size[left] = theta, largest
        going = largest > tol
        n_going = int(going.sum())
        if step == max_steps or n_going == 0:
            break
        if n_going <= 0.75 * len(going):  # to leave some behind costs a copy of the others' rows
            problem, left = problem.select(going), left[going]
            theta, logits, gradient, inverse = theta[going], logits[going], gradient[going], inverse[going]
            past = [(s[going], y[going], rho[going]) for s, y, rho in past]
        direction = -_two_loops(gradient, inverse, past)
        moved, logits, stuck = _search(problem, theta, logits, gradient, direction)
        if bool(stuck.all()):
            break
        new = problem.gradient(logits) + problem.penalty * moved
        s, y = moved - theta, new - gradient
        product = (s * y).sum(1, keepdim=True)
        past = [*past[1 - HISTORY :], (s, y, torch.where(product > 0, 1 / product.clamp_min(1e-300), 0.0))]
        theta, gradient = moved, new
    return out, size


def _two_loops(gradient: Tensor, inverse: Tensor, past: list[tuple[Tensor, Tensor, Tensor]]) -> Float[Tensor, "b p"]:
    q, alphas = gradient, []
    for s, y, rho in reversed(past):
        alphas.append(rho * (s * q).sum(1, keepdim=True))
        q = torch.addcmul(q, alphas[-1], y, value=-1)
    if past:
        _, y, rho = past[-1]
        scale = rho * (y * inverse * y).sum(1, keepdim=True)
        q = q * inverse / torch.where(scale > 0, scale, 1.0)
    else:
        q = q * inverse
    for (s, y, rho), alpha in zip(past, reversed(alphas), strict=True):
        q = torch.addcmul(q, alpha - rho * (y * q).sum(1, keepdim=True), s)
    return q


def _search(
    problem: _Binary | _Multinomial, theta: Tensor, logits: Tensor, gradient: Tensor, direction: Tensor
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
