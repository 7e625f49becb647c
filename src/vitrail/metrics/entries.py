"""How well each latent tells a concept's labels apart, at every threshold at once, from sparse codes."""

import numpy as np
from jaxtyping import Float, Int

from vitrail.coders.sparse import Codes

Labels = tuple[np.ndarray, np.ndarray | None]  # positives; which rows count (None: all)


class Entries:
    """Codes read latent by latent, strongest first; rows of equal value are one run, so that ties stay together."""

    def __init__(self, codes: Codes) -> None:
        codes = codes.detach().to("cpu")
        latents, values = codes.indices.numpy(), codes.values.float().numpy()
        order = np.lexsort((-values, latents))
        self.n, self.d_sae = codes.n, codes.d_sae
        self.rows, self.latents, self.values = codes.rows().numpy()[order], latents[order], values[order]
        new = np.ones(len(order), dtype=bool)
        new[1:] = self.latents[1:] != self.latents[:-1]
        starts = np.flatnonzero(new)  # of each latent that fires
        self.fired, self._starts = self.latents[starts], starts
        new[1:] |= self.values[1:] != self.values[:-1]
        self._ends = np.append(np.flatnonzero(new)[1:], len(order)) if len(order) else starts
        self._first = np.searchsorted(self._ends, starts, side="right")  # each latent's first run
        self._last = np.append(self._first[1:], len(self._ends)) - 1 if len(starts) else starts
        self._n_runs = self._last - self._first + 1
        # z > threshold: the threshold that lets a run in is the next smaller value, 0 after the last.
        self._thresholds = np.append(self.values[self._ends[:-1]], 0.0) if len(order) else self.values
        self._thresholds[self._last] = 0.0

    def of(self, latent: int) -> slice:
        """The entries of one latent."""
        return slice(*np.searchsorted(self.latents, [latent, latent + 1]))

    def best(self, labels: Labels) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of each latent: the largest F1 over thresholds, its threshold, and AUC; (d_sae,) each."""
        f1, threshold, auc = np.zeros(self.d_sae), np.zeros(self.d_sae), np.full(self.d_sae, 0.5)
        n_true, n_false = n_true_and_false(labels)
        if len(self.rows):
            tp, fp = self._so_far(labels)
            score = 2 * tp / np.maximum(tp + fp + n_true, 1)
            f1[self.fired] = best = np.maximum.reduceat(score, self._first)
            at = np.where(score == np.repeat(best, self._n_runs), np.arange(len(score)), len(score))
            threshold[self.fired] = self._thresholds[np.minimum.reduceat(at, self._first)]
            auc[self.fired] = self._auc(tp, fp, n_true, n_false)
        return f1, threshold, auc if n_true and n_false else np.full(self.d_sae, np.nan)

    def precise(self, labels: Labels, precision: float, min_fires: int) -> Float[np.ndarray, " d_sae"]:
        """Of each latent the lowest threshold at which so many of its fires are positives; infinite where none is."""
        threshold = np.full(self.d_sae, np.inf, dtype=np.float32)
        if len(self.rows):
            tp, fp = self._so_far(labels)
            fit = (ratio(tp, tp + fp) >= precision) & (tp + fp >= min_fires)
            last = np.maximum.reduceat(np.where(fit, np.arange(len(fit)), -1), self._first)
            threshold[self.fired] = np.where(last >= 0, self._thresholds[last], np.inf)
        return threshold

    def _so_far(self, labels: Labels) -> tuple[np.ndarray, np.ndarray]:
        """True and false positives of each latent where a run and all stronger ones are let in."""
        shown, counts = labels
        tp = self._cumulative(shown)
        if counts is None:
            passed = self._ends - np.repeat(self._starts, self._n_runs)
        else:
            passed, tp = self._cumulative(counts), self._cumulative(shown & counts)
        return tp, passed - tp

    def _cumulative(self, marked: np.ndarray) -> np.ndarray:
        total = np.zeros(len(self.rows) + 1, dtype=np.int64)
        np.cumsum(marked[self.rows], out=total[1:])
        return total[self._ends] - np.repeat(total[self._starts], self._n_runs)

    def _auc(self, tp: np.ndarray, fp: np.ndarray, n_true: int, n_false: int) -> np.ndarray:
        """Trapezoids under the ROC curve, the last of which leads to where the silent rows are let in, all at once."""
        tp_before, fp_before = np.append(0, tp[:-1]), np.append(0, fp[:-1])
        tp_before[self._first] = fp_before[self._first] = 0
        area = np.add.reduceat((fp - fp_before) * (tp + tp_before) / 2, self._first)
        area = area + (n_false - fp[self._last]) * (n_true + tp[self._last]) / 2
        return area / max(n_true * n_false, 1)

    def at(self, threshold: Float[np.ndarray, " d_sae"], labels: Labels) -> tuple[np.ndarray, np.ndarray]:
        """True and false positives of each latent at its threshold, (d_sae,) each."""
        shown, counts = labels
        on = self.values > threshold[self.latents]
        if counts is not None:
            on &= counts[self.rows]
        rows, latents = self.rows[on], self.latents[on]
        true = shown[rows]
        tp = np.bincount(latents[true], minlength=self.d_sae)
        return tp, np.bincount(latents[~true], minlength=self.d_sae)

    def rows_on(self, latent: int, threshold: float) -> Int[np.ndarray, " m"]:
        mine = self.of(latent)
        return self.rows[mine][self.values[mine] > threshold]


def n_true_and_false(labels: Labels) -> tuple[int, int]:
    shown, counts = labels
    n_true = int(shown.sum() if counts is None else (shown & counts).sum())
    return n_true, int(len(shown) if counts is None else counts.sum()) - n_true


def ratio(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a / b, 0 where b is."""
    return np.divide(a, b, out=np.zeros(np.shape(b)), where=np.asarray(b) != 0)
