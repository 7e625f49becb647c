"""Steerability: how far one coordinate, turned up, moves the model's zero-shot answer.

    P, P~          softmax over the words of logit_scale x cosine, before and after; i runs over images, v over words
    delta          |mean_i (P~ - P)|, a vector over words                            Eq. 4; its largest and its sum / 2
    s              mean_i sum_v (P~ - P)^2                                                                    Eq. 5
    ipr            mean_i sum_v P~^2, exactly 1/n where P~ is uniform over n words
    distance       sum_v p(v) |v - mu|, p = mean_i P~, mu the mean of the words' unit rows              Eq. 10 and 11
    top            the word of the largest p, and that p

    layer: mean s (Eq. 6); share and count of s > gamma (Eq. 7); count of s > beta (Eq. 8); distinct tops among these

Range. s 0..2: 2 where all of one word's probability goes to another; 1/n - 1/V from uniform over V to uniform over n.
ipr 1/V..1, delta's largest 0..1, its sum / 2 (total variation of the means) 0..1.

Moves with. logit_scale: at 1 a softmax over cosines is nearly uniform, its largest at most e^2 times its smallest, and
s stays below 2 / V whatever is steered. So the scale is explicit and stored. The number of words, and near-synonyms,
which share. The dose.

Does not show. Whether the words a coordinate reaches belong together (distance, weakly); whether they are what it
fires for. s is large as well where a peaked P is merely made flat: from P to uniform it is mean_i sum_v P^2 - 1/V,
which alone can be above gamma and beta. ipr tells the two apart.

"Steering CLIP's vision transformer with sparse autoencoders", sections 6.1 and 11.2; SPEC rows 107 to 113. Eq. 5 as
printed is a vector; the property that the text claims for it, 1/n_c, is that of `ipr`, so both are given. Eq. 8 counts
latents where text and figure 7 speak of words reached, so both are given here too.
"""

from dataclasses import dataclass
from math import lgamma, sqrt
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from vitrail.metrics.measured import Measured, over_images

GAMMA, BETA = 0.10, 0.5
DEFINITION = "steering section 6.1; literal, mean over images"

Array = Float[np.ndarray, " m"]
Words = Int[np.ndarray, " m"]


@dataclass(frozen=True, eq=False)
class Steered:
    """One number a coordinate, m of them; words by their place in the vocabulary. `per_image`: s before its mean."""

    s: Array
    s_sd: Array  # over images
    ipr: Array
    delta_max: Array
    delta_word: Words
    delta_tv: Array
    top: Words
    top_probability: Array
    distance: Array
    per_image: Float[np.ndarray, "m n_images"]


class Tally:
    """Sums of m coordinates over images, whose probabilities come in parts: never more than one part at a time."""

    def __init__(self, m: int, before: Float[Tensor, "n v"]) -> None:
        """`before`: P. Raises ValueError without images."""
        if len(before) == 0:
            raise ValueError("no images are steered: there is nothing to measure.")
        self.before = before
        self._sum = torch.zeros(m, before.shape[1], dtype=torch.float64, device=before.device)
        self._ipr = torch.zeros(m, dtype=torch.float64, device=before.device)
        self._squares = torch.full((m, len(before)), torch.nan, dtype=torch.float64, device=before.device)

    def add(self, coordinates: slice, images: slice, after: Float[Tensor, "k b v"]) -> None:
        """P~ of these coordinates and images. `after` is overwritten: its differences from P are taken in place."""
        self._sum[coordinates] += after.sum(1)
        self._ipr[coordinates] += torch.linalg.vector_norm(after, dim=2).double().square().sum(1)
        # Of differences, not ipr - 2 <P~, P> + |P|^2, which loses every s below 1e-7 to rounding.
        change = torch.linalg.vector_norm(after.sub_(self.before[images]), dim=2)
        self._squares[coordinates, images] = change.double().square()

    @property
    def mean_after(self) -> Float[Tensor, "m v"]:
        """p = mean_i P~."""
        return self._sum / len(self.before)

    def result(self, distances: Float[Tensor, " v"]) -> Steered:
        """`distances`: of the words, as `word_distances`. Raises ValueError for a pair that is missing."""
        if bool(self._squares.isnan().any()):
            raise ValueError(f"{int(self._squares.isnan().sum())} pairs of coordinate and image have no probabilities.")
        n, after = len(self.before), self.mean_after
        delta = (after - self.before.mean(0, dtype=torch.float64)).abs()
        top, largest, s = after.max(1), delta.max(1), self._squares.mean(1)
        numbers = {
            "s": s,
            "s_sd": self._squares.std(1) if n > 1 else torch.full_like(s, torch.nan),
            "ipr": self._ipr / n,
            "delta_max": largest.values,
            "delta_word": largest.indices,
            "delta_tv": delta.sum(1) / 2,
            "top": top.indices,
            "top_probability": top.values,
            "distance": after @ distances.to(after),
            "per_image": self._squares,
        }
        return Steered(**{name: value.cpu().numpy() for name, value in numbers.items()})


def steerability(
    after: Float[Tensor, "m n v"], before: Float[Tensor, "n v"], words: Float[Tensor, "v d_embed"]
) -> Steered:
    """All of it at once, of few coordinates. `words`: their rows, whose length does not matter."""
    tally = Tally(len(after), before.double())
    tally.add(slice(None), slice(None), after.double().clone())
    return tally.result(word_distances(words))


def limit_steerability(
    limits: Float[Tensor, "m v"], before: Float[Tensor, "n v"]
) -> tuple[Float[Tensor, " m"], Int[Tensor, " m"]]:
    """(s, top) where every image ends at the same P~: the asymptote of a curve over strength."""
    limits, before = limits.double(), before.double()
    squares = limits.square().sum(1) - 2 * limits @ before.mean(0) + before.square().sum(1).mean()
    return squares.clamp_min(0), limits.argmax(1)


def word_distances(words: Float[Tensor, "v d_embed"]) -> Float[Tensor, " v"]:
    """|v - mu| of Eq. 11: unit rows from their mean, which is not made a unit row again."""
    rows = normalize(words.double(), dim=1)
    return torch.linalg.vector_norm(rows - rows.mean(0), dim=1)


# ------------------------------------------------------------------------------------------------------- layer level


@dataclass(frozen=True)
class Layer:
    """What a layer's coordinates come to. Intervals are 95 %.

    mean_s                  Eq. 6, with its bootstrap interval over images
    mean_s_sampling         interval over coordinates, where only some of `n_all` were run
    share, count            of s > gamma (Eq. 7), among the n that were run
    share_sampling          Wilson's, shortened for the finite n_all; None where all were run
    eq8_count               s > beta
    concepts                distinct top words among those with s > beta, of the n that were run: a lower bound for
                            n_all
    concepts_of             how many there would be, on average, among so many coordinates drawn from these n
    ipr_...                 the last three with ipr > beta in the place of s > beta: not met by flattening a peaked P
    """

    n: int
    n_all: int
    gamma: float
    beta: float
    mean_s: Measured
    mean_s_sampling: tuple[float, float] | None
    share: float
    count: int
    share_sampling: tuple[float, float] | None
    eq8_count: int
    concepts: int
    concepts_of: dict[int, float]
    ipr_count: int
    ipr_concepts: int
    ipr_concepts_of: dict[int, float]

    def to_json(self) -> dict[str, Any]:
        told = {name: getattr(self, name) for name in self.__dataclass_fields__}
        for name in ("concepts_of", "ipr_concepts_of"):
            told[name] = {str(m): value for m, value in told[name].items()}
        return {**told, "mean_s": self.mean_s.to_json()}


def layer(
    s: Array,
    ipr: Array,
    top: Words,
    per_image: Float[np.ndarray, " n_images"],
    *,
    n_all: int,
    gamma: float = GAMMA,
    beta: float = BETA,
    concepts_of: tuple[int, ...] = (),
    n_bootstrap: int = 1000,
    seed: int = 0,
) -> Layer:
    """`per_image`: each image's mean of s over the coordinates. `n_all`: how many coordinates the layer has.

    Raises ValueError where none was run, more than there are, or for a threshold outside 0..2.
    """
    n = len(s)
    if not 0 < n <= n_all:
        raise ValueError(f"between 1 and all {n_all} coordinates are run, got {n}.")
    for name, value in (("gamma", gamma), ("beta", beta)):
        if not 0 <= value <= 2:
            raise ValueError(f"{name} is a threshold on s, which lies in 0..2, got {value}.")
    count, reached, peaked = int((s > gamma).sum()), s > beta, ipr > beta
    columns = {"s": np.asarray(per_image, dtype=np.float64), "n": np.ones(len(per_image))}
    mean_s = over_images(columns, lambda c: c["s"] / c["n"], definition=DEFINITION, n_bootstrap=n_bootstrap, seed=seed)
    return Layer(
        n=n,
        n_all=n_all,
        gamma=gamma,
        beta=beta,
        mean_s=mean_s,
        mean_s_sampling=_mean_interval(s, n_all),
        share=count / n,
        count=count,
        share_sampling=share_interval(count, n, n_all),
        eq8_count=int(reached.sum()),
        concepts=len(np.unique(top[reached])),
        concepts_of={m: expected_distinct(top[reached], n, m) for m in concepts_of if m <= n},
        ipr_count=int(peaked.sum()),
        ipr_concepts=len(np.unique(top[peaked])),
        ipr_concepts_of={m: expected_distinct(top[peaked], n, m) for m in concepts_of if m <= n},
    )


def share_interval(count: int, n: int, n_all: int, *, z: float = 1.959964) -> tuple[float, float] | None:
    """95 % of the share among n_all, of which n were drawn without replacement and `count` have it. None if n = n_all.

    Wilson's interval at n (N - 1) / (N - n) draws, so that it closes as the sample becomes the whole.
    """
    if n == n_all:
        return None
    p, m = count / n, n * (n_all - 1) / (n_all - n)
    middle, half = p + z * z / (2 * m), z * sqrt(p * (1 - p) / m + z * z / (4 * m * m))
    return (max(0.0, (middle - half) / (1 + z * z / m)), min(1.0, (middle + half) / (1 + z * z / m)))


def expected_distinct(labels: Int[np.ndarray, " k"], n: int, m: int) -> float:
    """Distinct labels among m of n coordinates drawn without replacement, on average; k of the n have a label.

    Rarefaction (Hurlbert 1971): sum over labels of 1 - C(n - c, m) / C(n, m), c how often the label occurs. More
    coordinates reach more words by their number alone, and 12,000 latents are not comparable with 192 neurons.
    """
    if not 0 <= m <= n:
        raise ValueError(f"m must be in 0..{n}, got {m}.")
    counts = np.unique(labels, return_counts=True)[1]
    missed = [0.0 if n - c < m else np.exp(_log_choose(n - c, m) - _log_choose(n, m)) for c in counts.tolist()]
    return float(len(counts) - sum(missed))


def _log_choose(n: int, m: int) -> float:
    return lgamma(n + 1) - lgamma(m + 1) - lgamma(n - m + 1)


def _mean_interval(s: Array, n_all: int) -> tuple[float, float] | None:
    n = len(s)
    if n == n_all or n < 2:
        return None
    half = 1.959964 * float(s.std(ddof=1)) * sqrt((n_all - n) / (n_all - 1) / n)
    return (float(s.mean()) - half, float(s.mean()) + half)
