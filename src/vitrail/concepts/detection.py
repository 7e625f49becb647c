"""Held-out detection: does a latent's name tell in which new pictures the latent fires?

    AUC(i, word)   P(cos(e_p, word) > cos(e_q, word)) + P(equal) / 2, p a picture in which latent i fires, q one in
                   which it does not; e unit image embeddings of pictures that were not used to find the name
    interval       percentile bootstrap over these pictures, the AUC worked out anew in each resample
    random         mean and middle 95 % of the AUCs of random words of the vocabulary, other than the name
    rival          AUC, on these pictures too, of the other word that did best on the pictures the name was found on
    class_f1       of names from labels: F1 with the class itself, the threshold from the pictures the name was found on

0.5 is chance; a name worth its latent is near 1, and above what random words reach. Latents that are dense on patches
fire somewhere in most pictures: "fires" is z > `above` x the latent's largest activation on the naming pictures.

What two attributes have in common passes for either: without a rival, "small" may hold of small crosses on grass.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

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
RIVAL = 0.01  # of AUC: room for synonyms, of which neither can be said to be better
CLASS_F1 = 0.5  # a class's name: most of what fires is of it, and most of it fires, on held-out pictures


@dataclass(frozen=True)
class Detection:
    """`random` is the mean, the other two the 2.5 and 97.5 % quantiles of random names' AUCs. `rival` None: none.
    `class_f1` None: the name is no class of pictures with labels; NaN: no held-out picture has it."""

    auc: float
    low: float
    high: float
    random: float
    random_low: float
    random_high: float
    n_fires: int
    rival: float | None = None
    class_f1: float | None = None

    def found(self, margin: float = MARGIN) -> bool:
        """The interval lies above what random names reach, and above chance, by more than `margin`, and the rival is
        no better, but for RIVAL; of a class by its label, F1 is CLASS_F1 at least."""
        beaten = self.rival is None or self.auc >= self.rival - RIVAL
        beaten = beaten and (self.class_f1 is None or self.class_f1 >= CLASS_F1)
        return beaten and self.low > max(self.random_high, 0.5) + margin


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
    rivals: Float[Tensor, "m d_embed"] | None = None,
    min_fires: int = MIN_FIRES,
    n_bootstrap: int = 500,
    seed: int = 0,
    at_once: int = 256,
) -> list[Detection | None]:
    """Detection of each latent by its name's row; None where it fires, or is silent, in fewer than `min_fires` pictures
    or its name has no direction (a row of zeros or NaN).

    `codes`: one row a held-out picture, what counts as firing only; `embeddings`: unit rows of the same pictures.
    `random`: unit rows of random words, at least one. `rivals`: a word's row a latent (`best_words`), zeros for none.
    Latents of one name share its bootstrap. Memory: n x (at_once + r + n_bootstrap).
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
    weights = np.concatenate(list(resample_weights(n, n_bootstrap, seed))).astype(float) if n_bootstrap else None
    found: list[Detection | None] = [None] * len(latents)
    for row, places in _alike(names, at_once):
        scores = (embeddings @ row).numpy()
        if not np.isfinite(scores).all() or not bool((row != 0).any()):
            continue
        same = (random @ row).numpy() > 1 - 1e-6
        others_ranks = random_ranks[:, ~same] if not same.all() else random_ranks
        fires = _marks(entries, latents[places])
        n_fires = fires.sum(0)
        kept = np.minimum(n_fires, n - n_fires) >= min_fires
        places, fires, n_fires = places[kept], fires[:, kept], n_fires[kept]
        aucs = auc_draws(scores, fires, np.ones((1, n)))[0]
        draws = np.full((1, len(places)), np.nan) if weights is None else auc_draws(scores, fires, weights)
        for column, place in enumerate(places.tolist()):
            others, mine = auc_of_ranks(others_ranks, fires[:, column]), draws[np.isfinite(draws[:, column]), column]
            low, high = np.percentile(mine, [2.5, 97.5]).tolist() if len(mine) else (np.nan, np.nan)
            bottom, top = np.percentile(others, [2.5, 97.5]).tolist()
            found[place] = Detection(
                float(aucs[column]), low, high, float(others.mean()), bottom, top, int(n_fires[column])
            )
    return found if rivals is None else _with_rivals(found, entries, embeddings, latents, rivals, at_once)


def _with_rivals(
    found: Sequence[Detection | None],
    entries: Entries,
    embeddings: Float[Tensor, "n d_embed"],
    latents: Int[np.ndarray, " m"],
    rivals: Float[Tensor, "m d_embed"],
    at_once: int,
) -> list[Detection | None]:
    out = list(found)
    for row, places in _alike(rivals, at_once):
        if not bool((row != 0).any()):
            continue
        scores = (embeddings @ row).numpy()
        aucs = auc_draws(scores, _marks(entries, latents[places]), np.ones((1, entries.n)))[0]
        for column, place in enumerate(places.tolist()):
            one = out[place]
            out[place] = None if one is None else replace(one, rival=float(aucs[column]))
    return out


def class_f1s(
    codes: Codes,
    label: Int[np.ndarray, " n"],
    held_out: Codes,
    held_out_label: Int[np.ndarray, " n_held_out"],
    latents: Int[np.ndarray, " m"],
    classes: Int[np.ndarray, " m"],
) -> Float[np.ndarray, " m"]:
    """F1, 0..1, of "latent above its threshold" and its class on held-out pictures; the threshold is the best on the
    first ones. Pictures labelled -1 count for none; NaN where no held-out picture has the class.

    A latent of crescents detects "checked crescent" with AUC .9, and F1 .4 at most where there are four textures.
    """
    before, after = Entries(codes), Entries(held_out)
    known, held_out_known = label >= 0, held_out_label >= 0
    f1 = np.full(len(latents), np.nan)
    for one in np.unique(classes).tolist():
        mine, n_true = classes == one, int((held_out_label == one).sum())
        if n_true:
            threshold = before.best((label == one, known))[1]
            tp, fp = after.at(threshold, (held_out_label == one, held_out_known))
            f1[mine] = (2 * tp / np.maximum(tp + fp + n_true, 1))[latents[mine]]
    return f1


def best_words(
    codes: Codes,
    embeddings: Float[Tensor, "n d_embed"],
    latents: Int[np.ndarray, " m"],
    words: Float[Tensor, "n_words d_embed"],
    barred: Sequence[Sequence[int]],
    *,
    at_once: int = 256,
) -> Int[np.ndarray, " m"]:
    """Of each latent the word with the largest AUC on these pictures, but for those barred to it; of equals the first.

    -1 where the latent fires in none of the pictures or in all, or every word is barred. Memory: n x at_once.
    """
    entries, n = Entries(codes), codes.n
    best, place = np.full(len(latents), -np.inf), np.full(len(latents), -1)
    for start in range(0, len(words), at_once):
        ranks = mean_ranks((embeddings @ words[start : start + at_once].t()).numpy())
        for first in range(0, len(latents), at_once):
            some = slice(first, first + at_once)
            fires = _marks(entries, latents[some])
            n1 = fires.sum(0)[:, None]
            with np.errstate(divide="ignore", invalid="ignore"):
                aucs = (fires.T.astype(float) @ ranks - n1 * (n1 + 1) / 2) / (n1 * (n - n1))
            for row, columns in enumerate(barred[some]):
                aucs[row, [word - start for word in columns if start <= word < start + at_once]] = -np.inf
            aucs[np.isnan(aucs)] = -np.inf
            top = aucs.max(1)
            place[some] = np.where(top > best[some], start + aucs.argmax(1), place[some])
            best[some] = np.maximum(best[some], top)
    return place


def _alike(rows: Float[Tensor, "m d_embed"], at_once: int) -> Iterator[tuple[Tensor, Int[np.ndarray, " p"]]]:
    """Each different row, and where it stands, at most `at_once` places at a time."""
    if len(rows) == 0:
        return
    each, group = torch.unique(rows, dim=0, return_inverse=True)
    ordered, counts = np.argsort(group.numpy(), kind="stable"), np.bincount(group.numpy(), minlength=len(each))
    for row, places in zip(each, np.split(ordered, np.cumsum(counts)[:-1]), strict=True):
        for start in range(0, len(places), at_once):
            yield row, places[start : start + at_once]


def _marks(entries: Entries, latents: Int[np.ndarray, " m"]) -> Bool[np.ndarray, "n m"]:
    """In which rows each latent has an entry."""
    marks = np.zeros((entries.n, len(latents)), dtype=bool)
    for column, latent in enumerate(latents.tolist()):
        marks[entries.rows[entries.of(latent)], column] = True
    return marks


def auc_draws(
    scores: Float[np.ndarray, " n"], positive: Bool[np.ndarray, "n m"], weights: Float[np.ndarray, "b n"]
) -> Float[np.ndarray, "b m"]:
    """AUC of one score for m sets of positives, in each resample; NaN where that has no positives, or nothing else.

        (sum over positives p of w_p (W(s < s_p) + W(s = s_p) / 2) - (sum over positives of w_p)^2 / 2) / (n1 n0)

    W is of all pictures, which takes one pass for all m; the square is what the positives win among themselves.
    """
    ordered = np.sort(scores)
    below, to = (np.searchsorted(ordered, scores, side=side) for side in ("left", "right"))
    so_far = np.zeros((len(weights), len(scores) + 1))
    np.cumsum(weights[:, np.argsort(scores, kind="stable")], axis=1, out=so_far[:, 1:])
    marks = positive.astype(float)
    up = weights @ marks
    won = (weights * (so_far[:, below] + so_far[:, to]) / 2) @ marks - up**2 / 2
    with np.errstate(divide="ignore", invalid="ignore"):
        return won / (up * (so_far[:, -1:] - up))


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
