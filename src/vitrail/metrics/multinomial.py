"""Multinomial logistic regression to its minimum: what scikit-learn's LogisticRegression finds, of tensors or codes.

    min over W, b   sum_i -log softmax(W x_i + b)[y_i] + ||W||^2 / (2 C)

The bias is not penalised. It works on columns less their means, which moves b alone and halves the steps. Where rows
are fewer than columns it works on as many columns as rows, F with F F^T = X X^T: W lies in the span of the rows, and
the penalty is the same there (Schoelkopf, Herbrich and Smola 2001, the representer theorem).

Of two classes scikit-learn's is another one, with one vector of weights: it is this one with c / 2.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vitrail.coders.sparse import Codes
from vitrail.metrics.features import Features, checked, moments, narrow, product, transposed_product, width
from vitrail.metrics.minimise import MAX_STEPS, TOL, Diagonal, lbfgs

MOST_ROWS = 8192  # of which all products are taken
FLOOR = 1e-11  # added to X X^T, of its mean diagonal: it has no inverse, as rows less their mean sum to 0
FLOORS = 8  # of which each is ten times the one before
DENSE_VALUES = 2**24


@dataclass(frozen=True, eq=False)
class Logistic:
    """Scores are x @ weight.T + bias. `gradient`: the largest entry of the mean loss's gradient where it stopped."""

    weight: Float[Tensor, "n_classes d"]
    bias: Float[Tensor, " n_classes"]
    gradient: float
    converged: bool

    def scores(self, features: Features) -> Float[Tensor, "n n_classes"]:
        if width(features) != self.weight.shape[1]:
            raise ValueError(f"fitted on rows of {self.weight.shape[1]} dimensions, got {width(features)}.")
        return product(features)(self.weight.t().contiguous()) + self.bias

    def predict(self, features: Features) -> Int[Tensor, " n"]:
        return self.scores(features).argmax(1)


@torch.no_grad()
def fit_logistic(
    features: Features,
    labels: Int[Tensor, " n_labels"],
    *,
    c: float = 1.0,
    tol: float = TOL,
    max_iter: int = MAX_STEPS,
    n_classes: int | None = None,
    start: Logistic | None = None,
) -> Logistic:
    """`tol`: the gradient of the mean over rows. Latents that never fire here have weight 0, exactly. Classes that no
    row has are never predicted. `start`: of the first columns of the same, fewer or all; the others begin at zero.

    Raises ValueError for one class only.
    """
    n, labels = checked(features, labels)
    n_classes = int(labels.max()) + 1 if n_classes is None else n_classes
    if int(labels.min()) < 0 or int(labels.max()) >= n_classes:
        raise ValueError(f"labels must be in 0..{n_classes - 1}, got {int(labels.min())}..{int(labels.max())}.")
    present, own = torch.unique(labels, return_inverse=True)
    if len(present) < 2:
        raise ValueError(f"a classifier needs two classes, got {len(present)}.")
    if c <= 0:
        raise ValueError(f"c must be above 0, got {c}.")
    d = width(features)
    alive = torch.arange(d)
    if isinstance(features, Codes):
        alive = torch.nonzero(features.fired() > 0)[:, 0]
        features = narrow(features, alive)
    mean = moments(features)[0]
    before = torch.zeros(len(present), len(alive), dtype=torch.float64)
    if start is not None:
        known = alive < start.weight.shape[1]
        before[:, known] = start.weight[present[:, None], alive[known]]
    shift = torch.zeros(len(present), dtype=torch.float64) if start is None else start.bias[present] + before @ mean
    if len(alive) > n and n <= MOST_ROWS:
        weight, shift, converged = _by_rows(features, mean, own, before, shift, c, tol, max_iter)
    else:
        problem = _Softmax(features, mean, own, len(present), c)
        weight, shift, converged = _minimum(problem, before, shift, tol, max_iter)
    gradient = _gradient(features, mean, own, weight, shift, c)
    whole = torch.zeros(n_classes, d, dtype=torch.float64)
    whole[present[:, None], alive] = weight
    bias = torch.full((n_classes,), -math.inf, dtype=torch.float64)
    bias[present] = shift - shift.mean() - weight @ mean
    return Logistic(whole, bias, gradient, converged)


# Weights; bias of rows less their mean; whether it converged.
Found = tuple[Float[Tensor, "n_present d"], Float[Tensor, " n_present"], bool]


def _by_rows(
    features: Features,
    mean: Float[Tensor, " d"],
    own: Int[Tensor, " n"],
    before: Float[Tensor, "n_present d"],
    shift: Float[Tensor, " n_present"],
    c: float,
    tol: float,
    max_iter: int,
) -> Found:
    forward, backward = product(features), transposed_product(features)
    factor = _factor(_products(features, mean))
    # The same scores, of a start that lies in the span of the rows: F theta = (X - mean) W.
    scores = forward(before.t().contiguous()) - mean @ before.t()
    theta = torch.linalg.solve_triangular(factor, scores, upper=False).t()
    problem = _Softmax(factor, torch.zeros(len(factor), dtype=torch.float64), own, len(before), c)
    theta, shift, converged = _minimum(problem, theta.contiguous(), shift, tol, max_iter)
    per_row = torch.linalg.solve_triangular(factor.t(), theta.t(), upper=True)
    return (backward(per_row) - mean[:, None] * per_row.sum(0)).t().contiguous(), shift, converged


def _factor(products: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
    """F, lower triangular, with F F^T = X X^T, but for a floor: as small as rounding lets it be, which for rows that
    have a large latent in common is more than FLOOR."""
    floor = FLOOR * float(products.diagonal().mean())
    floor = floor if floor > 0 else 1e-20
    for _ in range(FLOORS):
        raised = products.clone()
        raised.diagonal().add_(floor)
        factor, failed = torch.linalg.cholesky_ex(raised)
        if int(failed) == 0:
            return factor
        floor *= 10
    raise ValueError(f"products of {len(products)} rows have no factor, not with {floor / 10:.1e} on their diagonal.")


def _products(features: Features, mean: Float[Tensor, " d"]) -> Float[Tensor, "n n"]:
    """Of all pairs of rows less their mean."""
    if not isinstance(features, Codes):
        rows = features.detach().cpu().double() - mean
        return rows @ rows.t()
    forward, at_once = product(features), max(1, DENSE_VALUES // features.d_sae)
    parts = []
    for start in range(0, features.n, at_once):
        block = features.select_rows(slice(start, min(start + at_once, features.n)))
        less = (block.to_dense().double() - mean).t().contiguous()  # before the product: a latent that all rows have
        parts.append(forward(less) - mean @ less)  # in common would drown the others' digits
    return torch.cat(parts, 1)


def _minimum(
    problem: "_Softmax",
    weight: Float[Tensor, "n_present d"],
    shift: Float[Tensor, " n_present"],
    tol: float,
    max_iter: int,
) -> Found:
    theta = torch.cat([weight, shift[:, None]], 1)
    found, gradient = lbfgs(problem, theta.reshape(1, -1), tol, max_iter)
    found = found.reshape(theta.shape)
    return found[:, :-1], found[:, -1], bool(gradient <= tol)


def _gradient(
    features: Features,
    mean: Float[Tensor, " d"],
    own: Int[Tensor, " n"],
    weight: Float[Tensor, "n_present d"],
    shift: Float[Tensor, " n_present"],
    c: float,
) -> float:
    problem = _Softmax(features, mean, own, len(weight), c)
    theta = torch.cat([weight, shift[:, None]], 1).reshape(1, -1)
    slope = problem.gradient(problem.logits(theta)) + problem.penalty * theta
    return float(slope.abs().max() / problem.n[0])


class _Softmax:
    """One problem, its weights in a row: class by class, each with its bias at the end."""

    copied_below = 0.0

    def __init__(self, rows: Features, mean: Float[Tensor, " d"], own: Int[Tensor, " n"], n_classes: int, c: float):
        if isinstance(rows, Codes):
            self.mean: Tensor | None = mean
            self._values = rows
        else:
            self.mean = None
            self._values = rows.detach().cpu().double() - mean
        self._forward, self._backward = product(self._values), transposed_product(self._values)
        self.own, self.n_classes = own, n_classes
        penalty = torch.full((len(mean) + 1,), 1 / c, dtype=torch.float64)
        penalty[-1] = 0
        self.penalty = penalty.repeat(n_classes)
        self.n = torch.tensor([float(len(own))], dtype=torch.float64)

    def select(self, keep: Bool[Tensor, " b"]) -> "_Softmax":
        return self

    def logits(self, theta: Float[Tensor, "1 p"]) -> Float[Tensor, "1 m"]:
        theta = theta.reshape(self.n_classes, -1)
        weight, bias = theta[:, :-1].t().contiguous(), theta[:, -1]
        if self.mean is not None:
            bias = bias - self.mean @ weight
        return (self._forward(weight) + bias).reshape(1, -1)

    def loss(self, logits: Float[Tensor, "1 m"]) -> Float[Tensor, " 1"]:
        scores = logits.reshape(-1, self.n_classes)
        return torch.nn.functional.cross_entropy(scores, self.own, reduction="sum")[None]

    def gradient(self, logits: Float[Tensor, "1 m"]) -> Float[Tensor, "1 p"]:
        wrong = logits.reshape(-1, self.n_classes).softmax(1)
        wrong[torch.arange(len(wrong)), self.own] -= 1
        sums = wrong.sum(0)
        slope = self._backward(wrong)
        if self.mean is not None:
            slope = slope - self.mean[:, None] * sums
        return torch.cat([slope.t(), sums[:, None]], 1).reshape(1, -1)

    def scale(self, logits: Float[Tensor, "1 m"]) -> Diagonal:
        p = logits.reshape(-1, self.n_classes).softmax(1)
        share = p * (1 - p)
        sums = share.sum(0)
        if isinstance(self._values, Codes):
            squares = self._values.with_values(self._values.values.detach().double().square())
            curved = transposed_product(squares)(share)
            assert self.mean is not None
            curved = curved - 2 * self.mean[:, None] * self._backward(share) + self.mean.square()[:, None] * sums
        else:
            curved = (share.t() @ self._values.square()).t()
        diagonal = torch.cat([curved.t().clamp_min(0), sums[:, None]], 1).reshape(1, -1)
        return Diagonal(1 / (diagonal + self.penalty + 1e-12))
