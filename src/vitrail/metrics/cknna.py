"""CKNNA: whether rows that lie near each other as activations lie near each other as codes.

    K_ij = <x_i, x_j>,  L_ij = <z_i, z_j>         inner products of activations, of codes
    M_ij = 1 if j != i is among the k largest of row i, in both K and L
    CKNNA = H(K, L) / sqrt(H(K, K) H(L, L)),  H(K, L) = HSIC_u(M K, M L), each with its own M

    HSIC_u(A, B) = (tr A B + sum A sum B / ((n-1)(n-2)) - 2 sum A B / (n-2)) / (n (n-3)), without diagonals

Range. At most about 1: exactly 1 where the codes are the activations, scaled or rotated; near 0 where no neighbours are
shared. NaN where no row fired, or where there are no more rows than k.

Moves with. n and k (10,000 and 10 by custom; numbers at other n cannot be compared), with which rows are drawn
(neighbours are often patches of the same picture), and with whether the activations are centred: about the raw origin
every row's neighbours are those that lie farthest along the mean. Here they are centred about the sample's mean.

Does not show. Whether latents mean anything: any rotation of the activations has 1. Nor what happens beyond the k
nearest rows. A row that shares latents with fewer than k others has neighbours of kernel 0, the first of the sample.

Source. Huh et al. 2024, arXiv:2405.07987, appendix A, and their code, platonic-rep; MSAE section 4.1 and appendix E;
SPEC row 54. (The code adds 1e-6 to the denominator; this one does not.)

Tags. "platonic-rep": as above, what the code of Huh et al. computes: kernels un-centred, HSIC unbiased (Song et al.
2012, eq. 5). "centred-align": what their text says, sum of M (K - row means) (L - row means), normalised by its own
self-similarities. "msae-eq5": MSAE's equation 5, the same sum over the root of the *unmasked* self-similarities; it is
not 1 for identical representations. The interval is a jackknife over 20 groups of images: for each, the neighbours that
remain are ranked anew, from lists of 2k that were kept. The other two have none: their row means would be taken anew
for each group.

Neighbours are found in blocks of rows; what is kept is 2k numbers a row. Kernels of codes cost nnz x n multiplications,
not n x n x d_sae.
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int, Int64
from numpy.typing import NDArray
from torch import Tensor

from vitrail.coders.sparse import Codes, bag, positions
from vitrail.metrics.measured import Measured
from vitrail.metrics.passing import Metric, Seen, Setting

Variant = Literal["platonic", "centred_align", "msae_eq5"]
TAGS: dict[Variant, str] = {
    "platonic": "platonic-rep",
    "centred_align": "centred-align",
    "msae_eq5": "msae-eq5",
}
KEYS: dict[Variant, str] = {
    "platonic": "cknna",
    "centred_align": "cknna_centred",
    "msae_eq5": "cknna_eq5",
}

N_GROUPS = 20  # of the jackknife
T_QUANTILE = 2.093  # Student's, 97.5 %, N_GROUPS - 1 degrees of freedom
GROUP = 16  # columns whose maximum is looked at first
DENSE_ROWS = 256  # rows of a kernel at once
TABLE_VALUES = 2**20  # of codes laid out densely, at once: they stay in the cache
DENSE_FROM = 1 / 8  # share of active latents from which a dense product is the cheaper one


class CKNNA(Metric):
    """Over a seeded sample of at most `n` rows: one an image where there are enough images, else evenly many of each.

    Which rows does not depend on how images come in batches. What is kept: n rows of activations and of codes.
    """

    def __init__(self, setting: Setting, *, n: int = 10_000, k: int = 10) -> None:
        if k < 1 or n <= k:
            raise ValueError(f"CKNNA needs 1 <= k < n, got k={k} and n={n}.")
        self.k = k
        rng = np.random.default_rng([setting.seed, 54])
        self._n_rows = rows_of_images(setting.n_images, setting.n_tokens, n, rng)  # of each image
        self._rng = rng
        self._seen = 0
        self._x: list[Tensor] = []
        self._codes: list[Codes] = []
        self._image: list[NDArray[np.int64]] = []

    def update(self, seen: Seen) -> None:
        rows: list[int] = []
        images: list[int] = []
        for image in range(seen.n_images):
            number = self._seen + image
            count = int(self._n_rows[number]) if number < len(self._n_rows) else 0
            if count:
                tokens = np.sort(self._rng.permutation(seen.n_tokens)[:count])
                rows += (image * seen.n_tokens + tokens).tolist()
                images += [number] * count
        self._seen += seen.n_images
        if rows:
            at = torch.tensor(rows, device=seen.x.device)
            self._x.append(seen.x.flatten(0, 1)[at].float().cpu())
            self._codes.append(seen.codes.select_rows(at.to(seen.codes.device)).to("cpu"))
            self._image.append(np.array(images))

    def compute(self, *, n_bootstrap: int = 1000, seed: int = 0) -> dict[str, Measured]:
        """`cknna`, `cknna_centred`, `cknna_eq5`. The interval needs no draws: n_bootstrap < 1 leaves it out."""
        n = sum(map(len, self._x))
        most = int(self._n_rows.max(initial=0))
        drawn = "one-row-an-image" if most <= 1 else f"up-to-{most}-rows-an-image"
        tags: dict[Variant, str] = {variant: f"{tag}, k={self.k}, {drawn}" for variant, tag in TAGS.items()}
        if n <= max(self.k, 3):
            return {KEYS[variant]: Measured(math.nan, tag, n) for variant, tag in tags.items()}
        x = torch.cat(self._x)
        ours = neighbours(x - x.mean(0), self.k)
        theirs = neighbours(Codes.cat(self._codes), self.k)
        out = {KEYS[variant]: Measured(alignment(ours, theirs, variant), tag, n) for variant, tag in tags.items()}
        error = jackknife_error(ours, theirs, np.concatenate(self._image)) if n_bootstrap >= 1 else None
        if error is not None:
            value, tag = out["cknna"].value, f"{tags['platonic']}, jackknife"
            low, high = value - T_QUANTILE * error, value + T_QUANTILE * error
            out["cknna"] = Measured(value, tag, n, low, high)
        return out


def cknna(
    a: Float[Tensor, "n d_a"] | Codes, b: Float[Tensor, "n_b d_b"] | Codes, k: int = 10, variant: str = "platonic"
) -> float:
    """Of rows held in memory, as they are: centre them first where that is meant. NaN where either is all zeros.

    Raises ValueError if they have different numbers of rows, no more than k (or 3), or if there is no such variant.
    """
    if variant not in TAGS:
        raise ValueError(f"there is no variant {variant!r} of CKNNA. Known: {', '.join(TAGS)}.")
    n, n_b = (part.n if isinstance(part, Codes) else len(part) for part in (a, b))
    if n != n_b:
        raise ValueError(f"{n} rows and {n_b} rows: CKNNA compares the same rows in two representations.")
    if k < 1 or n <= max(k, 3):
        raise ValueError(f"CKNNA needs more rows than k >= 1, and at least 4; got {n} rows and k={k}.")
    return alignment(neighbours(a, k), neighbours(b, k), variant)


def rows_of_images(n_images: int, n_tokens: int, n: int, rng: np.random.Generator) -> Int64[np.ndarray, " n_images"]:
    """How many rows of each image are in the sample: n in all where there are as many, as evenly as can be."""
    if not n_images:
        return np.zeros(0, dtype=np.int64)
    each, more = divmod(min(n, n_images * n_tokens), n_images)
    counts = np.full(n_images, each)
    counts[rng.permutation(n_images)[:more]] += 1
    return counts


# -- neighbours


@dataclass(frozen=True, eq=False)
class Neighbours:
    """Of each of n rows the largest kernel values with others, falling; more than k of them, for the jackknife."""

    k: int
    index: Int64[np.ndarray, "n kept"]
    value: Float64[np.ndarray, "n kept"]
    row_mean: Float64[np.ndarray, " n"]  # over all rows, itself among them
    square: float  # sum over all pairs of (K_ij - row_mean_i)^2

    @property
    def n(self) -> int:
        return len(self.index)


@torch.no_grad()
def neighbours(rows: Float[Tensor, "n d"] | Codes, k: int) -> Neighbours:
    kernel = _CodesKernel(rows) if isinstance(rows, Codes) else _DenseKernel(rows)
    n, kept = kernel.n, min(2 * k, kernel.n - 1)
    row_mean = kernel.row_mean()
    index, value, square = [], [], 0.0
    for first in range(0, n, kernel.at_once):
        block = kernel.block(first, min(n, first + kernel.at_once))
        m = len(block)
        square += float((block[:, :n] - row_mean[first : first + m, None]).square_().sum(1).double().sum())
        block[:, n:] = -torch.inf
        block[torch.arange(m), torch.arange(first, first + m)] = -torch.inf
        found = largest(block, kept)
        index.append(found)
        value.append(block.gather(1, found))
    return Neighbours(k, torch.cat(index).numpy(), torch.cat(value).double().numpy(), row_mean.double().numpy(), square)


class _DenseKernel:
    at_once = DENSE_ROWS

    def __init__(self, x: Float[Tensor, "n d"]) -> None:
        self.n = len(x)
        self.x = torch.cat([x, x.new_zeros(-self.n % GROUP, x.shape[1])])
        self._transposed = self.x.t()

    def row_mean(self) -> Float[Tensor, " n"]:
        x = self.x[: self.n]
        return x @ x.mean(0)

    def block(self, first: int, last: int) -> Float[Tensor, "m n_padded"]:
        return self.x[first:last] @ self._transposed


class _CodesKernel:
    """Rows `first` to `last` laid out as a table (d_sae, m), of which every row of codes then sums a few lines."""

    def __init__(self, codes: Codes) -> None:
        self.n, self.codes = codes.n, codes.with_values(codes.values.float())
        self._padding = -self.n % GROUP
        self._dense = codes.nnz > DENSE_FROM * codes.n * codes.d_sae
        self.at_once = min(DENSE_ROWS, max(32, TABLE_VALUES // codes.d_sae))

    def row_mean(self) -> Float[Tensor, " n"]:
        codes = self.codes
        mean = torch.zeros(codes.d_sae).index_add_(0, codes.indices.long(), codes.values) / self.n
        return bag(mean[:, None], codes.indices, codes.offsets, codes.values)[:, 0]

    def block(self, first: int, last: int) -> Float[Tensor, "m n_padded"]:
        block = torch.zeros(last - first, self.n + self._padding)
        table = self.codes.select_rows(slice(first, last)).to_dense()
        if self._dense:
            for start in range(0, self.n, DENSE_ROWS):
                stop = min(self.n, start + DENSE_ROWS)
                block[:, start:stop] = table @ self.codes.select_rows(slice(start, stop)).to_dense().t()
        else:
            codes = self.codes
            block[:, : self.n] = bag(table.t().contiguous(), codes.indices, codes.offsets, codes.values).t()
        return block


def largest(block: Float[Tensor, "m n"], k: int) -> Int[Tensor, "m k"]:
    """The columns of each row's k largest, falling; of equal ones the first column first. n is divisible by GROUP.

    None of them is below the k-th largest maximum of groups of columns: few columns are left to be ranked.
    """
    m, n = block.shape
    floor = _kth_of_groups(block, k)
    at = positions(block >= floor[:, None])
    counts = torch.bincount(at // n, minlength=m)
    crowded = positions(counts > 8 * k)  # equal numbers, as the zeros of rows that share no latent
    if len(crowded):
        exact = torch.from_numpy(np.partition(block[crowded].numpy(), n - k, axis=1)[:, n - k])
        at = _first_of_equals(block, at, crowded, exact, k)
    order = np.lexsort((at.numpy(), -block.reshape(-1)[at].numpy(), (at // n).numpy()))
    counts = torch.bincount(at // n, minlength=m)
    starts = counts.cumsum(0) - counts
    return (at[torch.from_numpy(order)] % n)[starts[:, None] + torch.arange(k)]


def _kth_of_groups(block: Float[Tensor, "m n"], k: int) -> Float[Tensor, " m"]:
    m, n = block.shape
    size = GROUP if n // GROUP >= 2 * k else 1
    maxima = (block if size == 1 else block.view(m, size, -1).amax(1)).numpy()
    return torch.from_numpy(np.partition(maxima, maxima.shape[1] - k, axis=1)[:, maxima.shape[1] - k])


def _first_of_equals(
    block: Float[Tensor, "m n"],
    at: Int[Tensor, " n_found"],
    crowded: Int[Tensor, " c"],
    exact: Float[Tensor, " c"],
    k: int,
) -> Int[Tensor, " n_kept"]:
    """The same places, but of the crowded rows only those above their k-th largest, and the first that equal it."""
    n = block.shape[1]
    kept = [at[~torch.isin(at // n, crowded)]]
    for row, edge in zip(crowded.tolist(), exact, strict=True):
        above, equal = positions(block[row] > edge), positions(block[row] == edge)
        kept += [row * n + above, row * n + equal[: k - len(above)]]
    return torch.cat(kept)


# -- from neighbours to a number


def alignment(ours: Neighbours, theirs: Neighbours, variant: str) -> float:
    """CKNNA from the neighbours of the same rows in two representations."""
    if variant == "platonic":
        return _platonic(_Pairs.of(ours), _Pairs.of(theirs), ours.n)
    a, b = (_Pairs.of(one, centred=True) for one in (ours, theirs))
    both = _align(a, b)
    norm = _align(a, a) * _align(b, b) if variant == "centred_align" else ours.square * theirs.square
    return both / math.sqrt(norm) if norm > 0 else math.nan


@dataclass(frozen=True, eq=False)
class _Pairs:
    """Of every row its k neighbours: pair (i, j) as i * n + j, ascending, and its value."""

    key: NDArray[np.int64]
    value: NDArray[np.float64]

    @classmethod
    def of(cls, found: Neighbours, *, centred: bool = False, without: Bool[np.ndarray, " n"] | None = None) -> "_Pairs":
        """`without`: rows that are left out; of the others the k nearest that remain."""
        rows = np.arange(found.n)
        value = found.value - found.row_mean[:, None] if centred else found.value
        if without is None:
            index, value = found.index[:, : found.k], value[:, : found.k]
            key, value = (rows[:, None] * found.n + index).ravel(), value.ravel()
        else:
            stays = ~without[found.index]
            chosen = stays & (stays.cumsum(1) <= found.k) & ~without[:, None]
            key, value = (rows[:, None] * found.n + found.index)[chosen], value[chosen]
        order = np.argsort(key)
        return cls(key[order], value[order])


def _shared(a: _Pairs, b: _Pairs) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]:
    if a is b:
        return a.key, a.value, a.value
    key, in_a, in_b = np.intersect1d(a.key, b.key, assume_unique=True, return_indices=True)
    return key, a.value[in_a], b.value[in_b]


def _align(a: _Pairs, b: _Pairs) -> float:
    _, x, y = _shared(a, b)
    return float(x @ y)


def _platonic(a: _Pairs, b: _Pairs, n: int, *, left: int | None = None) -> float:
    """`left`: how many of the n rows are left, where some were left out."""
    left = n if left is None else left
    norm = _hsic(*_shared(a, a), n, left) * _hsic(*_shared(b, b), n, left)
    return _hsic(*_shared(a, b), n, left) / math.sqrt(norm) if norm > 0 else math.nan


def _hsic(key: NDArray[np.int64], a: NDArray[np.float64], b: NDArray[np.float64], n: int, left: int) -> float:
    """n (n - 3) times the unbiased HSIC of two masked kernels with the same mask, which is not symmetric."""
    if not len(key):
        return 0.0
    i, j = key // n, key % n
    mutual = np.isin(j * n + i, key, assume_unique=True)  # a_ij b_ji: kernels are symmetric, their mask is not
    trace = a[mutual] @ b[mutual]
    together = np.bincount(j, a, n) @ np.bincount(i, b, n)
    return float(trace + a.sum() * b.sum() / ((left - 1) * (left - 2)) - 2 * together / (left - 2))


def jackknife_error(ours: Neighbours, theirs: Neighbours, image: Int64[np.ndarray, " n"]) -> float | None:
    """Standard error of the platonic CKNNA: it is taken anew without each of 20 groups of images. None if they are
    fewer."""
    numbers = np.unique(image, return_inverse=True)[1]
    if numbers.max() + 1 < N_GROUPS:
        return None
    values = []
    for group in range(N_GROUPS):
        without = numbers % N_GROUPS == group
        a, b = (_Pairs.of(found, without=without) for found in (ours, theirs))
        values.append(_platonic(a, b, ours.n, left=ours.n - int(without.sum())))
    spread = np.square(np.array(values) - np.mean(values)).sum()
    error = float(np.sqrt((N_GROUPS - 1) / N_GROUPS * spread))
    return error if math.isfinite(error) else None
