"""Which latents are a world's concepts: chosen on one split of the pictures, scored on another.

For every (concept, latent), over pictures (`image` level) and over patches (`patch` level):

    F1         2 TP / (2 TP + FP + FN), the latent being on where z > threshold. The threshold is the one with the
               largest F1 on the choosing split (of equals the highest); 0 means: wherever it fires
    IoU        TP / (TP + FP + FN) at that threshold, summed over all pictures as in Network Dissection (Bau et al.
               2017, arXiv:1704.05796, eq. 2). It is F1 / (2 - F1), so both choose the same latent
    AUC        P(z at a positive > z at a negative) + P(equal) / 2: exact, with ties, silence included
    constant   2 p / (1 + p), p the share of positives: F1 of "always". A concept that half the pictures show is
               "recovered at F1 0.5" by a latent that never sleeps, so every share is given beside the constant's

A concept is measured where each split has positives and negatives. For a coder's controls, pass the controls' codes.

    redundancy  number of latents whose F1 is at least 0.9 of the chosen one's, itself included
    splitting   how many latents it takes to cover 90 % of the concept's rows, of those that lie in it: each on from
                the lowest threshold at which 0.9 of its fires, `min_fires` at least, are in the concept. Greedily, the
                largest gain first, on the choosing split. Too few: None, with the coverage that was reached
    absorption  over the child's pictures, the share where the parent's latent is off though the parent is there, and
                the child's best other latent is on. After Chanin et al. 2024, arXiv:2409.14507, section 3: there a
                probe's direction decides what the parent's latents should have said and what took their place; here
                the truth does. `elsewhere` is how often the parent's latent is off in its other pictures: a latent that
                misses the parent everywhere is poor, not absorbed

Cost: one pass over the entries of the codes per concept; memory d_sae x n_concepts. Nothing of size rows x d_sae.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from vitrail.metrics.entries import Entries, Labels, n_true_and_false, ratio
from vitrail.metrics.measured import Measured, resample_weights
from vitrail.metrics.truth import Firing, Truth

F1_THRESHOLDS = (0.5, 0.7, 0.9)
AUC_THRESHOLDS = (0.9, 0.95)
REDUNDANT = 0.9  # of the chosen latent's F1
PRECISE = 0.9  # share of a latent's fires that must lie in a concept for it to be a part of it
COVERED = 0.9  # share of a concept's rows that its parts must cover


@dataclass(frozen=True, eq=False)
class Pairs:
    """Every concept with every latent, at one level. Without a suffix: on the scoring split."""

    level: str
    threshold: Float[np.ndarray, "n_concepts d_sae"]
    f1_choose: Float[np.ndarray, "n_concepts d_sae"]
    auc_choose: Float[np.ndarray, "n_concepts d_sae"]
    auc: Float[np.ndarray, "n_concepts d_sae"]
    tp: Int[np.ndarray, "n_concepts d_sae"]
    fp: Int[np.ndarray, "n_concepts d_sae"]
    n_true: Int[np.ndarray, " n_concepts"]
    n_counted: Int[np.ndarray, " n_concepts"]
    measured: Bool[np.ndarray, " n_concepts"]  # positives and negatives in both splits

    @property
    def f1(self) -> Float[np.ndarray, "n_concepts d_sae"]:
        return ratio(2 * self.tp, self.tp + self.fp + self.n_true[:, None])

    @property
    def precision(self) -> Float[np.ndarray, "n_concepts d_sae"]:
        return ratio(self.tp, self.tp + self.fp)

    @property
    def recall(self) -> Float[np.ndarray, "n_concepts d_sae"]:
        return ratio(self.tp, np.broadcast_to(self.n_true[:, None], self.tp.shape))

    @property
    def iou(self) -> Float[np.ndarray, "n_concepts d_sae"]:
        return ratio(self.tp, self.fp + self.n_true[:, None])

    @property
    def constant(self) -> Float[np.ndarray, " n_concepts"]:
        """F1 of a latent that is always on."""
        return ratio(2 * self.n_true, self.n_true + self.n_counted)

    def chosen(self, by: str) -> Int[np.ndarray, "n_concepts 2"]:
        """The best latent and the runner-up by "f1" or "auc" on the choosing split; of equals the lower number."""
        if by not in ("f1", "auc"):
            raise ValueError(f"by must be 'f1' or 'auc', got {by!r}.")
        scores = self.f1_choose if by == "f1" else np.nan_to_num(self.auc_choose, nan=-1.0)
        best = scores.argmax(1)
        rest = scores.copy()
        rest[np.arange(len(rest)), best] = -np.inf
        return np.stack([best, rest.argmax(1)], axis=1)


def recovery(choose: Firing, choose_truth: Truth, score: Firing, score_truth: Truth) -> "Recovery":
    """Choose latents and thresholds on one split, score them on the other. Raises ValueError if rows do not fit."""
    return Recovery(choose, choose_truth, score, score_truth)


def halves(firing: Firing, truth: Truth) -> "Recovery":
    """The first half of the pictures chooses, the second scores. A store's pictures are in random order already."""
    if truth.n < 2:
        raise ValueError(f"one half chooses, the other scores: give at least 2 pictures, got {truth.n}.")
    rows = np.arange(truth.n)
    first, second = rows[: truth.n // 2], rows[truth.n // 2 :]
    return recovery(firing.select(first), truth.select(first), firing.select(second), truth.select(second))


class Recovery:
    """What was found. `rows()` per concept, `families()`, `summary()`, `absorption()`; `levels` holds every pair."""

    def __init__(self, choose: Firing, choose_truth: Truth, score: Firing, score_truth: Truth) -> None:
        for split, firing, truth in (("choosing", choose, choose_truth), ("scoring", score, score_truth)):
            _check(split, firing, truth)
        if choose_truth.concepts != score_truth.concepts or choose.d_sae != score.d_sae:
            raise ValueError("both splits must have the same concepts and the same latents.")
        self.truths = (choose_truth, score_truth)
        self.concepts, self.families_of = choose_truth.concepts, choose_truth.families
        self.d_sae, self.n = choose.d_sae, score.n
        self._entries = {"image": (Entries(choose.images), Entries(score.images))}
        if choose.patches is not None and score.patches is not None and choose_truth.grid and score_truth.grid:
            self._entries["patch"] = (Entries(choose.patches), Entries(score.patches))
        self.levels = {level: self._pairs(level) for level in self._entries}

    def _labels(self, level: str, split: int, concept: int) -> Labels:
        truth = self.truths[split]
        return truth.image_labels(concept) if level == "image" else truth.patch_labels(concept)

    def _pairs(self, level: str) -> Pairs:
        choosing, scoring = self._entries[level]
        n_concepts = len(self.concepts)
        scores = {name: np.zeros((n_concepts, self.d_sae), dtype=np.float32) for name in _SCORES}
        tp, fp = (np.zeros((n_concepts, self.d_sae), dtype=np.int32) for _ in range(2))
        counts = np.zeros((n_concepts, 4), dtype=np.int64)
        for c in range(n_concepts):
            chosen_on, scored_on = self._labels(level, 0, c), self._labels(level, 1, c)
            counts[c] = (*n_true_and_false(chosen_on), *n_true_and_false(scored_on))
            if counts[c].min() == 0:
                for name in ("auc_choose", "auc"):
                    scores[name][c] = np.nan
                continue
            f1, threshold, auc = choosing.best(chosen_on)
            scores["f1_choose"][c], scores["threshold"][c], scores["auc_choose"][c] = f1, threshold, auc
            tp[c], fp[c] = scoring.at(scores["threshold"][c], scored_on)
            scores["auc"][c] = scoring.best(scored_on)[2]
        n_true, n_counted = counts[:, 2], counts[:, 2] + counts[:, 3]
        measured = counts.min(1) > 0
        return Pairs(level, **scores, tp=tp, fp=fp, n_true=n_true, n_counted=n_counted, measured=measured)

    # -- tables

    def rows(self, *, by: str = "f1", n_bootstrap: int = 1000, seed: int = 0) -> list[dict[str, Any]]:
        """A row for each level and measured concept. `f1_low`, `f1_high`: 95 % bootstrap over the scoring pictures."""
        return [row for level in self.levels for row in self._rows(level, by, n_bootstrap, seed)]

    def _rows(self, level: str, by: str, n_bootstrap: int, seed: int) -> list[dict[str, Any]]:
        pairs = self.levels[level]
        chosen = pairs.chosen(by)
        measured = np.flatnonzero(pairs.measured)
        low, high = _interval(self._resampled_f1(level, by, n_bootstrap, seed))
        f1, precision, recall, iou, constant = pairs.f1, pairs.precision, pairs.recall, pairs.iou, pairs.constant
        rows = []
        for place, c in enumerate(measured):
            best, second = chosen[c]
            rows.append(
                {
                    "concept": self.concepts[c],
                    "family": self.families_of[c],
                    "level": level,
                    "by": by,
                    "n_positive": int(pairs.n_true[c]),
                    "latent": int(best),
                    "threshold": float(pairs.threshold[c, best]),
                    "f1_choose": float(pairs.f1_choose[c, best]),
                    "f1": float(f1[c, best]),
                    "f1_low": None if low is None else float(low[place]),
                    "f1_high": None if high is None else float(high[place]),
                    "constant": float(constant[c]),
                    "precision": float(precision[c, best]),
                    "recall": float(recall[c, best]),
                    "iou": float(iou[c, best]),
                    "auc_choose": float(pairs.auc_choose[c, best]),
                    "auc": float(pairs.auc[c, best]),
                    "runner_up": int(second),
                    "runner_up_f1": float(f1[c, second]),
                    "runner_up_auc": float(pairs.auc[c, second]),
                    "n_redundant": int((f1[c] >= REDUNDANT * f1[c, best]).sum()) if f1[c, best] > 0 else 0,
                }
            )
        return rows

    def families(self, *, by: str = "f1") -> list[dict[str, Any]]:
        """A row for each level and family, then "all": means and shares of concepts recovered on the scoring split."""
        out = []
        for level in self.levels:
            rows = self._rows(level, by, 0, 0)
            for family in (*dict.fromkeys(row["family"] for row in rows), "all"):
                mine = [row for row in rows if family in (row["family"], "all")]
                if mine:
                    out.append({"level": level, "family": family, "n": len(mine), **_shares(mine)})
        return out

    def summary(self, *, n_bootstrap: int = 1000, seed: int = 0) -> dict[str, Measured]:
        """`image_f1`, `image_recovered_f1_0.5`, `patch_iou`, `image_auc`, ...: means and shares over measured concepts.

        F1 and IoU are of the latent with the best F1, AUC of that with the best AUC. Intervals: over the scoring
        pictures, the choice of latents and the set of concepts held fixed; none for AUC.
        """
        out = {}
        for level in self.levels:
            rows = self._rows(level, "f1", 0, 0)
            if not rows:
                continue
            f1, resampled = _column(rows, "f1"), self._resampled_f1(level, "f1", n_bootstrap, seed)
            tag = f"{level}-chosen-on-other-split"
            out[f"{level}_f1"] = _measured(f1, resampled, f"f1-{tag}", self.n)
            iou = None if resampled is None else resampled / (2 - resampled)
            out[f"{level}_iou"] = _measured(f1 / (2 - f1), iou, f"iou-{tag}", self.n)
            for at in F1_THRESHOLDS:
                reached = None if resampled is None else np.where(np.isnan(resampled), np.nan, resampled >= at)
                out[f"{level}_recovered_f1_{at:g}"] = _measured(f1 >= at, reached, f"f1-{tag}", self.n)
                constant = float(np.mean(_column(rows, "constant") >= at))
                out[f"{level}_constant_f1_{at:g}"] = Measured(constant, "f1-of-always", self.n)
            auc = _column(self._rows(level, "auc", 0, 0), "auc")
            out[f"{level}_auc"] = Measured(float(auc.mean()), f"auc-{tag}", self.n)
            for at in AUC_THRESHOLDS:
                out[f"{level}_recovered_auc_{at:g}"] = Measured(float((auc >= at).mean()), f"auc-{tag}", self.n)
            found = [
                row["n_redundant"] for row in rows if row["f1"] >= F1_THRESHOLDS[0] and row["f1"] > row["constant"]
            ]
            if found:
                mean = float(np.mean(found))
                out[f"{level}_redundancy"] = Measured(mean, f"latents-within-{REDUNDANT:g}-of-best-f1", self.n)
        return out

    def _resampled_f1(self, level: str, by: str, n_bootstrap: int, seed: int) -> np.ndarray | None:
        """(n_bootstrap, n_measured): F1 of the chosen latents on resampled pictures; None where there is none.

        NaN where no picture of a resample shows the concept.
        """
        if n_bootstrap < 1 or self.n < 2:
            return None
        pairs, (_, scoring) = self.levels[level], self._entries[level]
        per_image = scoring.n // self.n
        chosen, measured = pairs.chosen(by)[:, 0], np.flatnonzero(pairs.measured)
        tp, sizes, there = (np.zeros((self.n, len(measured))) for _ in range(3))  # sizes: TP + FP + TP + FN
        for place, c in enumerate(measured):
            shown, counts = self._labels(level, 1, int(c))
            on = np.zeros(scoring.n, dtype=bool)
            on[scoring.rows_on(int(chosen[c]), float(pairs.threshold[c, chosen[c]]))] = True
            if counts is not None:
                on, shown = on & counts, shown & counts
            tp[:, place] = (on & shown).reshape(self.n, per_image).sum(1)
            there[:, place] = shown.reshape(self.n, per_image).sum(1)
            sizes[:, place] = there[:, place] + on.reshape(self.n, per_image).sum(1)
        weights = np.concatenate(list(resample_weights(self.n, n_bootstrap, seed)))
        return np.where(weights @ there > 0, ratio(2 * (weights @ tp), weights @ sizes), np.nan)

    # -- splitting and absorption

    def splitting(self, *, level: str = "image", min_fires: int = 10) -> list[dict[str, Any]]:
        """A row for each measured concept: `n_latents` (None: 90 % was not reached), `coverage_choose` reached, and
        what the same latents cover (`coverage`), how precisely (`precision`), on the scoring split."""
        pairs, (choosing, scoring) = self.levels[level], self._entries[level]
        out = []
        for c in np.flatnonzero(pairs.measured):
            shown, counts = self._labels(level, 0, int(c))
            threshold = choosing.precise((shown, counts), PRECISE, min_fires)
            latents, covered = _greedy_cover(choosing, threshold, shown if counts is None else shown & counts)
            coverage, precision = _union(scoring, latents, threshold, self._labels(level, 1, int(c)))
            out.append(
                {
                    "concept": self.concepts[c],
                    "family": self.families_of[c],
                    "level": level,
                    "n_latents": len(latents) if covered >= COVERED else None,
                    "latents": latents,
                    "coverage_choose": covered,
                    "coverage": coverage,
                    "precision": precision,
                }
            )
        return out

    @cached_property
    def hierarchy(self) -> list[tuple[str, str]]:
        """(parent, child): see `hierarchy_of`, over the pictures of both splits."""
        return hierarchy_of(self.concepts, np.concatenate([truth.images for truth in self.truths]))

    def absorption(self, pairs: Sequence[tuple[str, str]] | None = None) -> list[dict[str, Any]]:
        """A row for each (parent, child), by default those of `hierarchy`; over pictures of the scoring split.

        `absorbed` of the child's pictures; `missed`: there the parent's latent is off, whatever else is on;
        `elsewhere`: off in the parent's other pictures (None where there are none).
        """
        found, (_, scoring), truth = self.levels["image"], self._entries["image"], self.truths[1]
        chosen = found.chosen("f1")
        out = []
        for parent, child in self.hierarchy if pairs is None else pairs:
            p, c = (_index(self.concepts, concept) for concept in (parent, child))
            if not (found.measured[p] and found.measured[c]):
                continue
            best, runner_up = chosen[c].tolist()
            main = int(chosen[p, 0])
            other = runner_up if best == main else best
            main_on, other_on = np.zeros(self.n, dtype=bool), np.zeros(self.n, dtype=bool)
            main_on[scoring.rows_on(main, float(found.threshold[p, main]))] = True
            other_on[scoring.rows_on(other, float(found.threshold[c, other]))] = True
            here = truth.images[:, c] & truth.images[:, p]
            rest = truth.images[:, p] & ~here
            if here.any():
                out.append(
                    {
                        "parent": parent,
                        "child": child,
                        "n": int(here.sum()),
                        "parent_latent": main,
                        "child_latent": other,
                        "parent_f1": float(found.f1[p, main]),
                        "absorbed": float((~main_on & other_on)[here].mean()),
                        "missed": float((~main_on)[here].mean()),
                        "elsewhere": float((~main_on)[rest].mean()) if rest.any() else None,
                    }
                )
        return out


def hierarchy_of(
    concepts: Sequence[str], present: Bool[np.ndarray, "n n_concepts"], *, min_images: int = 5
) -> list[tuple[str, str]]:
    """(parent, child) concepts of two families of which the child's decides the parent's, in every picture.

    Each value of the child's family (those in at least `min_images` pictures) comes with one value of the parent's
    family, always, and at least two of them share it: ground > background, shape > class.
    """
    count = present.sum(0)
    together = present.T.astype(np.float32) @ present.astype(np.float32)
    inside = (together == count[:, None]) & (count[:, None] > 0)  # [c, p]: p is wherever c is
    families: dict[str, list[int]] = {}
    for i, concept in enumerate(concepts):
        if ":" in concept and count[i] >= min_images:
            families.setdefault(concept.partition(":")[0], []).append(i)
    out = []
    for upper, parents in families.items():
        for lower, children in families.items():
            if upper == lower or len(parents) < 2 or len(children) <= len(parents):
                continue
            owners = inside[np.ix_(children, parents)]
            if (owners.sum(1) == 1).all() and (owners.sum(0) != 1).all():
                out += [(concepts[parents[owners[k].argmax()]], concepts[c]) for k, c in enumerate(children)]
    return out


# -- helpers

_SCORES = ("threshold", "f1_choose", "auc_choose", "auc")


def _check(split: str, firing: Firing, truth: Truth) -> None:
    if firing.n != truth.n:
        raise ValueError(f"the {split} split has codes of {firing.n} pictures and labels of {truth.n}.")
    if firing.patches is not None and truth.grid and firing.patches.n != truth.n * truth.n_patches:
        raise ValueError(
            f"the {split} split has {firing.patches.n // firing.n} patches a picture in its codes, and labels for "
            f"{truth.grid[0]} x {truth.grid[1]}."
        )


def _column(rows: Sequence[dict[str, Any]], name: str) -> np.ndarray:
    return np.array([row[name] for row in rows], dtype=float)


def _shares(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    f1, auc = _column(rows, "f1"), _column(rows, "auc")
    out = {name: float(_column(rows, name).mean()) for name in ("f1", "constant", "precision", "recall", "iou", "auc")}
    out |= {f"recovered_f1_{at:g}": float((f1 >= at).mean()) for at in F1_THRESHOLDS}
    return out | {f"recovered_auc_{at:g}": float((auc >= at).mean()) for at in AUC_THRESHOLDS}


def _interval(resampled: np.ndarray | None) -> tuple[Any, Any]:
    if resampled is None:
        return None, None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a concept that no resample holds has no interval: NaN
        return tuple(np.nanpercentile(resampled, [2.5, 97.5], axis=0))


def _measured(values: np.ndarray, resampled: np.ndarray | None, definition: str, n: int) -> Measured:
    """The mean over concepts; of a resample, over those it holds."""
    value = float(np.mean(values))
    if resampled is None:
        return Measured(value, definition, n)
    means = ratio(np.nansum(resampled, axis=1), (~np.isnan(resampled)).sum(1))
    low, high = np.percentile(means, [2.5, 97.5])
    return Measured(value, definition, n, float(low), float(high))


def _index(concepts: Sequence[str], concept: str) -> int:
    if concept not in concepts:
        raise KeyError(f"there is no concept {concept!r}. Known: {', '.join(concepts)}.")
    return list(concepts).index(concept)


def _greedy_cover(entries: Entries, threshold: np.ndarray, shown: np.ndarray) -> tuple[list[int], float]:
    """Latents, on above their thresholds, in the order taken, and the share of `shown` that they cover."""
    mine = (entries.values > threshold[entries.latents]) & shown[entries.rows]
    rows, latents = entries.rows[mine], entries.latents[mine]
    taken, total, left = [], int(shown.sum()), int(shown.sum())
    while (total - left) / total < COVERED and len(rows):
        gains = np.bincount(latents, minlength=entries.d_sae)
        best = int(gains.argmax())
        taken.append(best)
        left -= int(gains[best])
        covered = np.zeros(entries.n, dtype=bool)
        covered[rows[latents == best]] = True
        rows, latents = rows[~covered[rows]], latents[~covered[rows]]
    return taken, (total - left) / total


def _union(
    entries: Entries, latents: Sequence[int], threshold: np.ndarray, labels: Labels
) -> tuple[float, float | None]:
    """Recall and precision of "any of these is on"; no precision where none is."""
    shown, counts = labels
    on = np.zeros(entries.n, dtype=bool)
    for latent in latents:
        on[entries.rows_on(latent, float(threshold[latent]))] = True
    if counts is not None:
        on, shown = on & counts, shown & counts
    tp = int((on & shown).sum())
    return tp / max(int(shown.sum()), 1), tp / int(on.sum()) if on.any() else None
