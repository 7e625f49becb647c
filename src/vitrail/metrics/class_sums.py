"""What ranking latents by class needs, from one pass over sparse codes: per class, sums and sums of squares.

    F = (between / (G - 1)) / (within / (n - G)),   G groups of n rows in all
    between = sum_g S_g^2 / n_g - S^2 / n           S_g: a latent's sum over the rows of group g
    within  = Q - sum_g S_g^2 / n_g                 Q: the sum of its squares

This is the analysis of variance of scikit-learn's f_classif, of any partition of the classes: all of them, one against
the rest, one against its siblings. A latent that is the same in all rows (dead ones too) has F = NaN, one that differs
between groups alone infinity; rounding decides neither: what is below 1e-10 Q is zero.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from vitrail.coders.sparse import Codes

ROUNDING = 1e-10


@dataclass(frozen=True, eq=False)
class ClassSums:
    counts: Int[np.ndarray, " n_classes"]  # rows of each class
    sums: Float[np.ndarray, "n_classes d_sae"]
    squares: Float[np.ndarray, "n_classes d_sae"]

    @classmethod
    def of(cls, codes: Codes, labels: Int[np.ndarray, " n"], n_classes: int) -> "ClassSums":
        codes = codes.detach().to("cpu")
        key = labels[codes.rows().numpy()] * codes.d_sae + codes.indices.numpy()
        values = codes.values.double().numpy()
        shape, size = (n_classes, codes.d_sae), n_classes * codes.d_sae
        return cls(
            np.bincount(labels, minlength=n_classes),
            np.bincount(key, values, size).reshape(shape),
            np.bincount(key, values**2, size).reshape(shape),
        )

    def one_vs_rest(
        self, classes: Sequence[int], among: Sequence[int] | None = None
    ) -> Float[np.ndarray, "n_asked d_sae"]:
        """F of each of `classes` against the others of `among` (None: of all)."""
        own = np.asarray(classes)
        counts, sums, squares = self._of(among)
        n, S, Q = counts.sum(), sums.sum(0), squares.sum(0)
        n1, S1 = self.counts[own][:, None], self.sums[own]
        with np.errstate(divide="ignore", invalid="ignore"):
            explained = S1**2 / n1 + (S - S1) ** 2 / (n - n1)
        return _f(explained, S, Q, int(n), 2)

    def all_classes(self) -> Float[np.ndarray, " d_sae"]:
        """F of all classes that have rows."""
        counts, sums, squares = self._of(np.flatnonzero(self.counts))
        explained = (sums**2 / counts[:, None]).sum(0)
        return _f(explained[None], sums.sum(0), squares.sum(0), int(counts.sum()), len(counts))[0]

    def _of(self, classes: Sequence[int] | np.ndarray | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        if classes is None:
            return self.counts, self.sums, self.squares
        some = np.asarray(classes)
        return self.counts[some], self.sums[some], self.squares[some]


def _f(explained: np.ndarray, S: np.ndarray, Q: np.ndarray, n: int, n_groups: int) -> np.ndarray:
    total, within = Q - S**2 / n, Q - explained
    floor = ROUNDING * Q
    with np.errstate(divide="ignore", invalid="ignore"):
        f = (explained - S**2 / n) / (n_groups - 1) / (within / (n - n_groups))
    f = np.where(within <= floor, np.inf, np.maximum(f, 0))
    return np.where(total <= floor, np.nan, f)


def ranking(f: Float[np.ndarray, "*rows d_sae"], k: int) -> Int[np.ndarray, "*rows k"]:
    """The k latents of largest F, falling; of equals the lower number first, those without an F last."""
    return np.argsort(-np.nan_to_num(f, nan=-1.0, posinf=np.inf), axis=-1, kind="stable")[..., :k]
