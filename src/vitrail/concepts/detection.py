"""Held-out detection: does a latent's name tell in which new pictures the latent fires?

    AUC(i, word)   P(cos(e_p, word) > cos(e_q, word)) + P(equal) / 2, p a picture in which latent i fires, q one in
                   which it does not; e unit image embeddings of pictures that were not used to find the name
    interval       percentile bootstrap over these pictures, the AUC worked out anew in each resample
    random         mean and middle 95 % of the AUCs of random words of the vocabulary, other than the name

0.5 is chance; a name worth its latent is near 1, and above what random words reach. Latents that are dense on patches
fire somewhere in most pictures: "fires" is z > `above` x the latent's largest activation on the naming pictures.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vitrail.coders.sparse import Codes
from vitrail.metrics.entries import Entries
from vitrail.metrics.measured import resample_weights
from vitrail.metrics.truth import Truth

MIN_FIRES = 5
MARGIN = 0.05  # at 0, a latent of large circles passes as "large" though it is one of circles


@dataclass(frozen=True)
class Detection:
    """`random` is the mean, the other two the 2.5 and 97.5 % quantiles of random names' AUCs."""

    auc: float
    low: float
    high: float
    random: float
    random_low: float
    random_high: float
    n_fires: int

    def found(self, margin: float = MARGIN) -> bool:
        """The interval lies above what random names reach, and above chance, by more than `margin`."""
        return self.low > max(self.random_high, 0.5) + margin


def firing(codes: Codes, threshold: Float[np.ndarray, " d_sae"] | float = 0.0) -> Codes:
    """Only the entries above each latent's threshold."""
    limit = torch.as_tensor(np.broadcast_to(np.asarray(threshold, dtype=np.float32), (codes.d_sae,)).copy())
    return codes.keep(codes.values > limit[codes.indices.long()])


def largest(codes: Codes) -> Float[np.ndarray, " d_sae"]:
    """Each latent's largest activation, 0 where it is silent."""
    values = torch.zeros(codes.d_sae).scatter_reduce_(0, codes.indices.long(), codes.values.float(), "amax")
    return values.numpy().astype(np.float64)


def detect(
    codes: Codes,
    embeddings: Float[Tensor, "n d_embed"],
    latents: Int[np.ndarray, " m"],
    names: Float[Tensor, "m d_embed"],
    random: Float[Tensor, "r d_embed"],
    *,
    min_fires: int = MIN_FIRES,
    n_bootstrap: int = 500,
    seed: int = 0,
    at_once: int = 256,
) -> list[Detection | None]:
    """Detection of each latent by its name's row; None where it fires, or is silent, in fewer than `min_fires` pictures
    or its name has no direction (a row of zeros or NaN).

    `codes`: one row a held-out picture, what counts as firing only; `embeddings`: unit rows of the same pictures.
    `random`: unit rows of random words, at least one. Memory: n x (at_once + r + n_bootstrap).
    """
    if codes.n != len(embeddings) or len(names) != len(latents):
        raise ValueError(
            f"{codes.n} rows of codes and {len(embeddings)} pictures, {len(latents)} latents and {len(names)} names: "
            "there must be a row a picture, and a name a latent."
        )
    if len(random) == 0:
        raise ValueError("random is empty: a name is compared with other words.")
    entries, n = Entries(codes), codes.n
    random_ranks = mean_ranks((embeddings @ random.t()).numpy())
    weights = np.concatenate(list(resample_weights(n, n_bootstrap, seed))).astype(np.float32) if n_bootstrap else None
    found: list[Detection | None] = []
    for start in range(0, len(latents), at_once):
        rows = names[start : start + at_once]
        scores = (embeddings @ rows.t()).numpy()
        same = (rows @ random.t()).numpy() > 1 - 1e-6
        for at, latent in enumerate(latents[start : start + at_once].tolist()):
            fires = np.zeros(n, dtype=bool)
            fires[entries.rows[entries.of(latent)]] = True
            n_fires = int(fires.sum())
            known = bool(np.isfinite(scores[:, at]).all()) and bool((rows[at] != 0).any())
            if min(n_fires, n - n_fires) < min_fires or not known:
                found.append(None)
                continue
            others = auc_of_ranks(random_ranks[:, ~same[at]] if not same[at].all() else random_ranks, fires)
            auc, draws = bootstrapped_auc(scores[:, at], fires, weights)
            low, high = np.percentile(draws, [2.5, 97.5]) if len(draws) else (np.nan, np.nan)
            bottom, top = np.percentile(others, [2.5, 97.5])
            found.append(
                Detection(auc, float(low), float(high), float(others.mean()), float(bottom), float(top), n_fires)
            )
    return found


def mean_ranks(scores: Float[np.ndarray, "n r"]) -> Float[np.ndarray, "n r"]:
    """Ranks from 1 within each column; equals have the mean of theirs."""
    ranks = np.empty(scores.shape, dtype=np.float64)
    for column in range(scores.shape[1]):
        ordered = np.sort(scores[:, column])
        below, to = (np.searchsorted(ordered, scores[:, column], side=side) for side in ("left", "right"))
        ranks[:, column] = (below + to + 1) / 2
    return ranks


def auc_of_ranks(ranks: Float[np.ndarray, "n r"], positive: Bool[np.ndarray, " n"]) -> Float[np.ndarray, " r"]:
    """The Mann-Whitney form: (sum of the positives' ranks - n1 (n1 + 1) / 2) / (n1 n0)."""
    n1 = int(positive.sum())
    return (ranks[positive].sum(0) - n1 * (n1 + 1) / 2) / (n1 * (len(positive) - n1))


def bootstrapped_auc(
    scores: Float[np.ndarray, " n"], positive: Bool[np.ndarray, " n"], weights: Float[np.ndarray, "b n"] | None
) -> tuple[float, Float[np.ndarray, " b_used"]]:
    """AUC, and that of each resample that has positives and negatives."""
    order = np.argsort(scores, kind="stable")
    ordered, y = scores[order], positive[order]
    starts = np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1]))  # runs of equal scores

    def areas(w: np.ndarray) -> np.ndarray:
        up, down = (np.add.reduceat(w * mark, starts, axis=1, dtype=np.float64) for mark in (y, ~y))
        below = np.cumsum(down, axis=1) - down / 2
        with np.errstate(divide="ignore", invalid="ignore"):
            return (up * below).sum(1) / (up.sum(1) * down.sum(1))

    value = float(areas(np.ones((1, len(scores))))[0])
    if weights is None:
        return value, np.zeros(0)
    draws = areas(weights[:, order])
    return value, draws[np.isfinite(draws)]


def best_concepts(codes: Codes, truth: Truth, latents: Sequence[int]) -> dict[int, str | None]:
    """The concept each latent stands for in truth: the largest (F1 - always) / (1 - always) over picture labels.

    always = 2 p / (1 + p) is the F1 of "in every picture" (metrics/recovery.py). None where no concept does better.
    """
    entries = Entries(codes)
    best, place = np.zeros(codes.d_sae), np.full(codes.d_sae, -1)
    for concept in range(len(truth.concepts)):
        shown, counts = truth.image_labels(concept)
        p = float(shown.mean())
        if not 0 < p < 1:
            continue
        always = 2 * p / (1 + p)
        lift = (entries.best((shown, counts))[0] - always) / (1 - always)
        place, best = np.where(lift > best, concept, place), np.maximum(lift, best)
    return {one: truth.concepts[place[one]] if place[one] >= 0 else None for one in latents}
