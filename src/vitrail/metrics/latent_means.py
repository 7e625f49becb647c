"""Scores of latents, each a mean over images, and what follows for the dictionary; errors are over groups of images."""

import math

import numpy as np
from jaxtyping import Float64, Int64
from numpy.typing import NDArray

from vitrail.metrics.cknna import N_GROUPS, T_QUANTILE
from vitrail.metrics.lattice import Lattice, Pairs
from vitrail.metrics.measured import Measured
from vitrail.metrics.passing import Curve

MARGIN = 0.01  # an I this near to its null mean is null-sized
T_ONE_SIDED = 1.729  # Student's, 95 %, N_GROUPS - 1 degrees of freedom: of each of the two one-sided tests
BINS = np.linspace(-1, 1, 41)  # of the histogram; what lies beyond is counted in the last ones
N_TOP = 20


class LatentMeans:
    """Sums of I by latent and by group of images, and what follows from them."""

    def __init__(self, d: int) -> None:
        self.d = d
        self._sum = np.zeros(N_GROUPS * d)
        self._n = np.zeros(N_GROUPS * d, dtype=np.int64)
        self._mass, self._active = np.zeros(d), np.zeros(d, dtype=np.int64)

    def add(self, pairs: Pairs, images: Int64[np.ndarray, " m"]) -> None:
        """`images`: numbers of the pairs' images, from which their groups follow."""
        group = images % N_GROUPS
        at = group * self.d + pairs.latent
        np.add.at(self._sum, at, pairs.moran)
        np.add.at(self._n, at, 1)
        np.add.at(self._mass, pairs.latent, pairs.mass)
        np.add.at(self._active, pairs.latent, pairs.active)

    def n_valid(self) -> Int64[np.ndarray, " d"]:
        return self._n.reshape(N_GROUPS, self.d).sum(0)

    def moran(self) -> Float64[np.ndarray, " d"]:
        """Of each latent. NaN where there is no valid image."""
        with np.errstate(invalid="ignore"):
            return self._sum.reshape(N_GROUPS, self.d).sum(0) / self.n_valid()

    def evaluable(self, min_images: int) -> Int64[np.ndarray, " n_latents"]:
        return np.flatnonzero(self.n_valid() >= min_images)

    def table(self, min_images: int) -> dict[str, NDArray]:
        n = self.n_valid()
        with np.errstate(invalid="ignore"):
            active = self._active / n
        found = {"latent": np.arange(self.d), "moran": self.moran(), "n_images": n, "evaluable": n >= min_images}
        return {**found, "mass": self._mass, "mean_active": active}

    def summary(
        self,
        prefix: str,
        lattice: Lattice,
        min_images: int,
        *,
        tag: str,
        n: int,
        intervals: bool,
        only: Int64[np.ndarray, " n_latents"] | None = None,
    ) -> dict[str, Measured]:
        """`n`: images shown. `only`: of the evaluable latents."""
        latents = self.evaluable(min_images) if only is None else only
        scores, null = self.moran()[latents], lattice.null_mean
        errors = self._errors(latents) if intervals and len(latents) else None
        out: dict[str, Measured] = {}
        for i, (name, value) in enumerate(_statistics(scores, self._mass[latents]).items()):
            reach = None if errors is None else T_QUANTILE * float(errors[i])
            ends = (None, None) if reach is None else (value - reach, value + reach)
            how = tag if reach is None else f"{tag}, jackknife"
            out[f"{prefix}{name}"] = Measured(value, how, n, *ends)
        spread = float(scores.std(ddof=1)) / math.sqrt(len(scores)) if len(scores) > 1 else 0.0
        above = out[prefix].value - null
        sized = math.nan if errors is None else float(abs(above) + T_ONE_SIDED * float(errors[0]) < MARGIN)
        out |= {
            f"{prefix}_latents": Measured(float(len(latents)), tag, n),
            f"{prefix}_evaluable": Measured(len(latents) / self.d, tag, n),
            f"{prefix}_null": Measured(null, f"{lattice.neighbours}, -1/(P-1)", n),
            f"{prefix}_z": Measured(above / spread if spread > 0 else math.nan, f"{tag}, sd over latents", n),
            f"{prefix}_null_sized": Measured(sized, f"{tag}, margin {MARGIN}, two one-sided tests", n),
        }
        return out

    def _errors(self, latents: Int64[np.ndarray, " n_latents"]) -> Float64[np.ndarray, " n_statistics"] | None:
        """Jackknife over groups of images. None where a group is empty."""
        if not self._n.reshape(N_GROUPS, self.d).any(1).all():
            return None
        sums, counts = (total.reshape(N_GROUPS, self.d)[:, latents] for total in (self._sum, self._n))
        values = []
        for group in range(N_GROUPS):
            n = counts.sum(0) - counts[group]
            left = n > 0
            scores = (sums.sum(0) - sums[group])[left] / n[left]
            values.append(list(_statistics(scores, self._mass[latents][left]).values()))
        errors = np.sqrt((N_GROUPS - 1) * np.var(values, axis=0))
        return errors if np.isfinite(errors).all() else None

    def curves(self, prefix: str, min_images: int, unit: str) -> dict[str, Curve]:
        """`_histogram` of the evaluable latents' scores; `_top`: those with the highest, and `representatives`."""
        latents = self.evaluable(min_images)
        scores = self.moran()
        counts = np.histogram(np.clip(scores[latents], -1, 1), BINS)[0].tolist()
        histogram: Curve = [
            {"low": float(low), "high": float(high), "latents": count, "share": count / max(len(latents), 1)}
            for low, high, count in zip(BINS, BINS[1:], counts, strict=False)
        ]
        table = self.table(min_images)
        picked = [("highest", i) for i in latents[np.argsort(-scores[latents], kind="stable")][:N_TOP].tolist()]
        picked += list(representatives(scores, latents).items())
        top: Curve = [
            {"kind": kind, unit: i, **{key: table[key][i].item() for key in ("moran", "n_images", "mean_active")}}
            for kind, i in picked
        ]
        return {f"{prefix}_histogram": histogram, f"{prefix}_top": top}


def _statistics(scores: NDArray[np.float64], mass: NDArray[np.float64]) -> dict[str, float]:
    if not len(scores):
        return dict.fromkeys(("", "_median", "_iqr", "_weighted"), math.nan)
    low, middle, high = np.percentile(scores, [25, 50, 75]).tolist()
    weighted = float(scores @ mass / mass.sum()) if mass.sum() > 0 else math.nan
    return {"": float(scores.mean()), "_median": middle, "_iqr": high - low, "_weighted": weighted}


def representatives(scores: NDArray[np.float64], latents: NDArray[np.int64]) -> dict[str, int]:
    """The two latents of ViSAEBench's figure 5, always the same: `mean`, whose score is nearest the latents' mean, and
    `high`, in the middle of the top 5 %. Empty where there are no latents."""
    if not len(latents):
        return {}
    order = latents[np.argsort(-scores[latents], kind="stable")]
    nearest = np.argmin(np.abs(scores[latents] - scores[latents].mean()))
    return {"mean": int(latents[nearest]), "high": int(order[math.ceil(len(order) / 20) // 2])}


def verdict(measured: dict[str, Measured], prefix: str = "moran") -> str:
    """In words: "null-sized effect", "above the null", "below the null", or "not told apart from the null"."""
    found, null = measured[prefix], measured[f"{prefix}_null"].value
    if measured[f"{prefix}_null_sized"].value == 1:
        return "null-sized effect"
    if found.low is None or found.high is None or found.low <= null <= found.high:
        return "not told apart from the null"
    return "above the null" if found.value > null else "below the null"


def rank_correlation(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """Spearman's rho, equal numbers sharing their mean rank. NaN below two, or where all are equal."""

    def ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
        _, which, counts = np.unique(values, return_inverse=True, return_counts=True)
        return (counts.cumsum() - (counts - 1) / 2)[which]

    x, y = (ranks(values) - (len(values) + 1) / 2 for values in (a, b))
    scale = math.sqrt(float(x @ x) * float(y @ y))
    return float(x @ y) / scale if scale > 0 else math.nan
