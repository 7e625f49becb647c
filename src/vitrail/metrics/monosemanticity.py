"""Monosemanticity: how alike, to another model's eyes, the pictures are that excite a latent most. ViSAEBench's M5.

    top images of latent j     the N with the largest a_ij > 0, a_ij the maximum over the picture's patches
    w_ij                       (a_ij - min_n a_nj) / (max_n a_nj - min_n a_nj), the minimum over all pictures
    MS_j                       sum_{u<v} w_u w_v <e_u, e_v> / sum_{u<v} w_u w_v,    e unit rows of the evaluator
    monosemanticity            mean of MS_j over latents;   monosemanticity_unweighted: all w = 1
    monosemanticity_baseline   s0 = (|sum_i e_i|^2 - n) / (n (n - 1)): what random groups of any size have on average
    monosemanticity_normalized (monosemanticity - s0) / (1 - s0)
    pairs within a class       MS_j = rho_j within_j + (1 - rho_j) between_j, rho_j the share of the pairs' weight

and the means of within_j, between_j (each over the latents that have such pairs) and rho_j. The two parts that add up
to monosemanticity exactly are monosemanticity_within_part, mean of rho_j within_j, and _between_part.

Range. -1..1; 1 where a latent's pictures are all the same to the evaluator, 0 where they are orthogonal, -1/15 for 8
and 8 opposite ones. Normalised: 0 is what random pictures have, and 1 the most.

Moves with. The evaluator before all: in a narrow cone of embeddings every group is alike. The baseline takes that away,
and still leaves no unit that two evaluators share. With N and the number of pictures: the more pictures, the purer the
top. With rare latents: a pair of pictures counts as much as sixteen. With near-duplicates among the pictures.

Does not show. Whether a latent fires on anything else further down, nor whether it tells classes apart: look at the
within share and at monosemanticity_between. Nor which of the pictures' contents excites it.

Source. ViSAEBench section 4.3, Eq. 5 and appendix K; Pach et al. 2025, arXiv:2504.02821; SPEC rows 72 to 75. There: at
most 2,048 live latents, drawn at random, and 1,000 random groups for s0; here all live latents and the exact mean, over
all pictures ("all") and over those in any latent's top ("pool", as in appendix K, whose baseline is unweighted: a
weight that knows nothing of the embedding leaves the mean where it is).

Tags. "top-N", with "pairs-weighted" or "pairs-equal"; "exact-all", "exact-pool". From an index (`min-0, any-token`) CLS
counts as a patch, and the lowest activation of a latent that fires in every picture is not known: 0 is taken.
Intervals are a bootstrap over latents; the pictures and the baseline stay. compat="visaebench-0.1": at most 1,000
latents, drawn as its code draws them, weighted, not normalised; that code has no baseline, so its numbers of two
evaluators cannot be compared.

Cost. Of pooled codes what is kept is N entries a latent. At the end N^2 products of embeddings a latent.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from vitrail.coders.sparse import Codes
from vitrail.index import Candidates, Index, TopK, candidates, rank_in_run
from vitrail.metrics.measured import Array, Measured, over_images
from vitrail.metrics.passing import Curve, Metric, Seen, Setting
from vitrail.metrics.truth import Firing

N_IMAGES = 16
AT_ONCE = 256  # latents
COMPAT_LATENTS = 1000


@dataclass(frozen=True, eq=False)
class TopImages:
    """Of each latent the pictures that excite it most, strongest first; -1 and 0 where it fires in fewer."""

    images: Int[np.ndarray, "d_sae n_top"]
    values: Float[np.ndarray, "d_sae n_top"]
    lowest: Float[np.ndarray, " d_sae"]  # over all pictures: 0 but for latents that always fire
    highest: Float[np.ndarray, " d_sae"]
    n_images: int
    exact_lowest: bool = True

    @classmethod
    def of_codes(cls, pooled: Codes, n_top: int = N_IMAGES) -> "TopImages":
        """`pooled`: one row a picture (metrics/truth.py: pooled). Of equals the earlier picture stays."""
        gathering = _Gathering(pooled.d_sae, n_top)
        gathering.update(pooled)
        return gathering.finished()

    @classmethod
    def of_index(cls, index: Index, n_top: int = N_IMAGES) -> "TopImages":
        """The index ranks pictures by their strongest token, of whatever tokens the codes have, CLS included."""
        if not 2 <= n_top <= index.manifest["k"]:
            raise ValueError(f"n_top must be in 2..{index.manifest['k']}, the pictures a latent kept, got {n_top}.")
        d_sae = index.manifest["d_sae"]
        parts = [index.top_images(latent) for latent in range(d_sae)]
        latent = np.repeat(np.arange(d_sae), [len(part["image"]) for part in parts])
        joined = {name: np.concatenate([part[name] for part in parts]) for name in ("image", "value")}
        images, values = _table(latent, joined["image"], joined["value"], d_sae, n_top)
        highest = index.latents["max"].astype(np.float64)
        return cls(images, values, np.zeros(d_sae), highest, index.manifest["n_images"], exact_lowest=False)

    @property
    def n_found(self) -> Int[np.ndarray, " d_sae"]:
        return (self.images >= 0).sum(1)

    def weights(self) -> Float[np.ndarray, "d_sae n_top"]:
        """Min-max over all pictures; 0 in the places of pictures that are not there, and where all are equal."""
        spread = (self.highest - self.lowest)[:, None]
        scaled = np.divide(self.values - self.lowest[:, None], spread, out=np.zeros_like(self.values), where=spread > 0)
        return np.where(self.images >= 0, scaled, 0.0)


class _Gathering:
    """Top pictures, while pooled codes come."""

    def __init__(self, d_sae: int, n_top: int) -> None:
        if n_top < 2:
            raise ValueError(f"alike are two pictures at least: n_top must be 2 or more, got {n_top}.")
        self._top = TopK(d_sae=d_sae, k=n_top, one_per_image=True)
        self._lowest, self._highest = np.full(d_sae, np.inf), np.zeros(d_sae)
        self._n_active, self.n_images = np.zeros(d_sae, dtype=np.int64), 0

    def update(self, pooled: Codes) -> None:
        pooled = pooled.detach().to("cpu")
        pooled = pooled.with_values(pooled.values.float())
        for seen, _ in candidates(pooled, self.n_images, 1):
            self._top.update(seen)
            np.minimum.at(self._lowest, seen.latent, seen.value)
            np.maximum.at(self._highest, seen.latent, seen.value)
            self._n_active += np.bincount(seen.latent, minlength=len(self._lowest))
        self.n_images += pooled.n

    def finished(self) -> TopImages:
        self._top.flush()
        best: Candidates = self._top.best
        images, values = _table(best.latent, best.image, best.value, len(self._lowest), self._top.k)
        lowest = np.where(self._n_active == self.n_images, self._lowest, 0.0) if self.n_images else self._highest
        return TopImages(images, values, lowest, self._highest, self.n_images)


def _table(
    latent: NDArray[Any], image: NDArray[Any], value: NDArray[Any], d_sae: int, n_top: int
) -> tuple[NDArray[np.int64], Array]:
    """Runs of latents, strongest first, side by side."""
    images, values = np.full((d_sae, n_top), -1, dtype=np.int64), np.zeros((d_sae, n_top))
    latent = latent.astype(np.int64)
    rank = rank_in_run(latent)
    kept = rank < n_top
    images[latent[kept], rank[kept]] = image[kept]
    values[latent[kept], rank[kept]] = value[kept]
    return images, values


def random_group_baseline(embeddings: Float[Tensor, "n d"]) -> float:
    """The mean similarity of all pairs, which is that of random groups of any size. NaN for fewer than two rows."""
    e = unit_embeddings(embeddings)
    n = len(e)
    return float((e.sum(0).square().sum() - n) / (n * (n - 1))) if n > 1 else math.nan


def unit_embeddings(embeddings: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    """Rows of length 1, in float64. Raises ValueError for a row of zeros or one that is not finite."""
    rows = embeddings.detach().cpu().double()
    lengths = torch.linalg.vector_norm(rows, dim=1)
    wrong = int((~(lengths.isfinite() & (lengths > 0))).sum())
    if wrong:
        raise ValueError(f"{wrong} of {len(rows)} embeddings are all 0 or not finite: they have no direction.")
    return rows / lengths[:, None]


@dataclass(frozen=True, eq=False)
class Monosemantic:
    """Scores of latents, NaN where there is none: a latent that fires in fewer than `min_images` pictures."""

    weighted: Float[np.ndarray, " d_sae"]
    equal: Float[np.ndarray, " d_sae"]
    within: Float[np.ndarray, " d_sae"]  # of the weighted pairs; NaN where no pair is within a class
    between: Float[np.ndarray, " d_sae"]
    within_share: Float[np.ndarray, " d_sae"]
    top: TopImages
    baseline: float
    pool_baseline: float
    has_labels: bool

    @property
    def n_dead(self) -> int:
        return int((self.top.n_found == 0).sum())

    @property
    def n_too_few(self) -> int:
        """Latents that fire, but in too few pictures, or equally in all of them."""
        return int(np.isnan(self.weighted).sum()) - self.n_dead

    def table(self) -> dict[str, NDArray[Any]]:
        """A column each, a row per latent: for vitrail.tables.write_table with TABLE_TYPES."""
        out: dict[str, NDArray[Any]] = {
            "latent": np.arange(len(self.weighted)),
            "n_images": self.top.n_found,
            "max": self.top.highest,
            "monosemanticity": self.weighted,
            "normalized": normalized(self.weighted, self.baseline),
            "unweighted": self.equal,
        }
        if self.has_labels:
            out |= {"within": self.within, "between": self.between, "within_share": self.within_share}
        return out

    def summary(self, *, n_bootstrap: int = 1000, seed: int = 0) -> dict[str, Measured]:
        n_top = self.top.images.shape[1]
        tag = f"top-{n_top}, pairs-weighted" + ("" if self.top.exact_lowest else ", min-0, any-token")
        given = {"n_bootstrap": n_bootstrap, "seed": seed}
        out = {
            "monosemanticity": _mean(self.weighted, tag, **given),
            "monosemanticity_unweighted": _mean(self.equal, f"top-{n_top}, pairs-equal", **given),
            "monosemanticity_baseline": Measured(self.baseline, "exact-all", self.top.n_images),
            "monosemanticity_pool_baseline": Measured(
                self.pool_baseline, "exact-pool", len(np.unique(self.top.images[self.top.images >= 0]))
            ),
        }
        for name, baseline, which in (
            ("monosemanticity_normalized", self.baseline, "exact-all"),
            ("monosemanticity_normalized_pool", self.pool_baseline, "exact-pool"),
        ):
            out[name] = _mean(normalized(self.weighted, baseline), f"{tag}, {which}", **given)
        if self.has_labels:
            parts = {
                "within": self.within,
                "between": self.between,
                "within_share": self.within_share,
                "within_part": np.where(self.within_share > 0, self.within_share * self.within, 0 * self.weighted),
                "between_part": np.where(
                    self.within_share < 1, (1 - self.within_share) * self.between, 0 * self.weighted
                ),
            }
            out |= {f"monosemanticity_{name}": _mean(values, tag, **given) for name, values in parts.items()}
        d_sae = len(self.weighted)
        out["monosemanticity_dead"] = Measured(float(self.n_dead), "no-picture", d_sae)
        out["monosemanticity_too_few"] = Measured(float(self.n_too_few), "fires-but-unscored", d_sae)
        return out


TABLE_TYPES = {"latent": "INTEGER", "n_images": "INTEGER", "max": "FLOAT"} | dict.fromkeys(
    ("monosemanticity", "normalized", "unweighted", "within", "between", "within_share"), "FLOAT"
)  # those of the columns that there are


def monosemantic(
    top: TopImages,
    embeddings: Float[Tensor, "n_images d"],
    labels: Int[Tensor, " n_labels"] | None = None,
    *,
    min_images: int = 2,
) -> Monosemantic:
    """Score every latent. `embeddings[i]`, `labels[i]`: of picture i, in the order of the codes.

    `min_images`: pictures that a latent must fire in; the paper scores whoever has a pair. Raises ValueError if the
    numbers of pictures differ.
    """
    if len(embeddings) != top.n_images or (labels is not None and len(labels) != top.n_images):
        counts = f"{len(embeddings)} embeddings" + ("" if labels is None else f" and {len(labels)} labels")
        raise ValueError(f"the codes are of {top.n_images} pictures, got {counts}: one row a picture, in that order.")
    if not 2 <= min_images <= top.images.shape[1]:
        raise ValueError(f"min_images must be in 2..{top.images.shape[1]}, the pictures compared, got {min_images}.")
    e, weights = unit_embeddings(embeddings), top.weights()
    classes = None if labels is None else labels.cpu().numpy()
    scores = {name: np.full(len(weights), math.nan) for name in ("weighted", "equal", "within", "between", "share")}
    fit = np.flatnonzero(top.n_found >= min_images)
    for start in range(0, len(fit), AT_ONCE):
        rows = fit[start : start + AT_ONCE]
        images, w = top.images[rows], weights[rows]
        there = e[torch.from_numpy(np.maximum(images, 0))]
        cosines = (there @ there.transpose(1, 2)).numpy()
        pairs = np.triu(np.ones(cosines.shape[1:]), 1)
        real = (images >= 0).astype(np.float64)
        heavy, every = (a[:, :, None] * a[:, None, :] * pairs for a in (w, real))
        scores["weighted"][rows] = _ratio((heavy * cosines).sum((1, 2)), heavy.sum((1, 2)))
        scores["equal"][rows] = _ratio((every * cosines).sum((1, 2)), every.sum((1, 2)))
        if classes is not None:
            label = classes[np.maximum(images, 0)]
            same = label[:, :, None] == label[:, None, :]
            for name, part in (("within", heavy * same), ("between", heavy * ~same)):
                scores[name][rows] = _ratio((part * cosines).sum((1, 2)), part.sum((1, 2)))
            scores["share"][rows] = _ratio((heavy * same).sum((1, 2)), heavy.sum((1, 2)))
    pool = np.unique(top.images[top.images >= 0])
    return Monosemantic(
        scores["weighted"],
        scores["equal"],
        scores["within"],
        scores["between"],
        scores["share"],
        top,
        random_group_baseline(e),
        random_group_baseline(e[torch.from_numpy(pool)]),
        has_labels=labels is not None,
    )


def normalized(scores: Array, baseline: float) -> Array:
    return (scores - baseline) / (1 - baseline) if baseline < 1 else scores * math.nan


def visaebench_sample(scores: Monosemantic, *, max_latents: int = COMPAT_LATENTS, seed: int = 42) -> NDArray[np.int64]:
    """The live latents that the released package scores."""
    live = np.flatnonzero(scores.top.n_found > 0)
    if len(live) <= max_latents:
        return live
    return np.sort(np.random.RandomState(seed).choice(live, size=max_latents, replace=False))


def visaebench_scores(
    scores: Monosemantic, *, max_latents: int = COMPAT_LATENTS, seed: int = 42
) -> dict[str, Measured]:
    """What the released package prints as value, ms_std and ms_median: population deviation, 0 where none is scored."""
    found = scores.weighted[visaebench_sample(scores, max_latents=max_latents, seed=seed)]
    found = found[np.isfinite(found)]
    numbers: dict[str, Callable[[Array], Any]] = {"": np.mean, "_std": np.std, "_median": np.median}
    return {
        f"monosemanticity_visaebench{name}": Measured(
            float(how(found)) if len(found) else 0.0, "visaebench-0.1", len(found)
        )
        for name, how in numbers.items()
    }


class Monosemanticity(Metric):
    """Streams: keeps the top pictures of each latent. `embeddings[i]`: of the i-th picture shown, in any model's eyes.

    Labels are the pass's own, where it has any.
    """

    def __init__(
        self,
        setting: Setting,
        *,
        embeddings: Float[Tensor, "n_images d"],
        n_top: int = N_IMAGES,
        min_images: int = 2,
        compat: str | None = None,
    ) -> None:
        if compat not in (None, "visaebench-0.1"):
            raise ValueError(f"compat must be 'visaebench-0.1' or None, got {compat!r}.")
        self._embeddings, self._min_images, self._compat = embeddings, min_images, compat
        self._n_tokens, self._patches = setting.n_tokens, setting.patches
        self._gathering = _Gathering(setting.d_sae, n_top)
        self._labels: list[Tensor | None] = []
        self._scores: Monosemantic | None = None

    def update(self, seen: Seen) -> None:
        self._gathering.update(Firing.of_codes(seen.codes, self._n_tokens, self._patches).images)
        self._labels.append(None if seen.labels is None else seen.labels.cpu())
        self._scores = None

    def scores(self) -> Monosemantic:
        """Per latent."""
        if self._gathering.n_images == 0:
            raise ValueError("no images were measured: there is nothing to report.")
        if self._scores is None:
            given = [part for part in self._labels if part is not None]
            labels = torch.cat(given) if len(given) == len(self._labels) else None
            top = self._gathering.finished()
            self._scores = monosemantic(top, self._embeddings, labels, min_images=self._min_images)
        return self._scores

    def compute(self, *, n_bootstrap: int = 1000, seed: int = 0) -> dict[str, Measured]:
        if self._compat is not None:
            return visaebench_scores(self.scores())
        return self.scores().summary(n_bootstrap=n_bootstrap, seed=seed)

    def curves(self) -> dict[str, Curve]:
        """How many latents score what."""
        scores = self.scores()
        edges = np.linspace(-1, 1, 41)
        counts = [np.histogram(a[np.isfinite(a)], edges)[0] for a in (scores.weighted, scores.equal)]
        columns = zip(edges[:-1].tolist(), edges[1:].tolist(), *(c.tolist() for c in counts), strict=True)
        names = ("low", "high", "latents", "latents_unweighted")
        return {"monosemanticity": [dict(zip(names, row, strict=True)) for row in columns]}


def _ratio(a: Array, b: Array) -> Array:
    return np.divide(a, b, out=np.full_like(a, math.nan), where=b > 0)


def _mean(values: Array, definition: str, *, n_bootstrap: int, seed: int) -> Measured:
    found = values[np.isfinite(values)]
    if len(found) == 0:
        return Measured(math.nan, definition, 0)
    columns = {"sum": found, "n": np.ones(len(found))}
    return over_images(columns, lambda c: c["sum"] / c["n"], definition=definition, n_bootstrap=n_bootstrap, seed=seed)
