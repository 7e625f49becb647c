"""What goes with a classifier's answers, and what moves them: latents beside its predictions, then turned up and down.

    auc              of a latent's activation for "the classifier says c", ties counted half
    point_biserial   Pearson's r of the activation with that answer (0 / 1)
    effect           Cohen's d: (mean where it says c - mean elsewhere) / their pooled standard deviation
    p                share of permutations of the answers whose |r| is as large, the answers themselves among them
    p_holm           over all latents that were tested (Holm 1979)
    p_family         share of permutations whose *largest* |r| over all latents is as large (Westfall and Young 1993)

With B permutations no p lies below 1 / (B + 1), so that Holm over a thousand latents needs a million of them. p_family
has no such floor, and is the one to read where there are many. All of it is association; `intervention_curve` says
whether a latent moves an answer: the latent is set to a value in many images, all else (the coder's error too) is kept,
and the classifier is asked again.

MSAE, section 5.3 and Appendix G.3; SPEC rows 102 and 103. The paper shows densities and single examples, no test.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vitrail.coders.sparse import Codes
from vitrail.metrics.entries import Entries
from vitrail.metrics.families import holm
from vitrail.metrics.measured import Measured, over_images
from vitrail.metrics.multinomial import Logistic, fit_logistic

PERMUTATIONS = 2000
MIN_FIRES = 5
PERMUTED_VALUES = 2**24
PLATEAU = 0.05


@dataclass(frozen=True, eq=False)
class Classifier:
    """A linear layer on embeddings: what a practitioner would put on a frozen model."""

    logistic: Logistic
    mean: Float[Tensor, " d"]
    scale: float
    classes: tuple[str, ...]

    def probabilities(self, rows: Float[Tensor, "n d"]) -> Float[Tensor, "n n_classes"]:
        u = (rows.detach().cpu().double() - self.mean) / self.scale
        return self.logistic.scores(u).softmax(1)

    def answers(self, rows: Float[Tensor, "n d"]) -> Int[Tensor, " n"]:
        return self.probabilities(rows).argmax(1)


def fit_classifier(
    rows: Float[Tensor, "n d"], labels: Int[Tensor, " n"], classes: Sequence[str], *, c: float = 1.0
) -> Classifier:
    """Logistic regression on rows less their mean, over their spread. Raises ValueError for one class only."""
    u = rows.detach().cpu().double()
    mean = u.mean(0)
    scale = float((u - mean).square().mean().sqrt()) or 1.0
    logistic = fit_logistic((u - mean) / scale, labels, c=c, tol=1e-6, n_classes=len(classes))
    return Classifier(logistic, mean, scale, tuple(classes))


# ------------------------------------------------------------------------------------------------------- association


@dataclass(frozen=True)
class Association:
    latent: int
    fires: float  # share of images
    auc: float
    point_biserial: float
    effect: float
    p: float
    p_holm: float
    p_family: float
    mean_said: float  # activation where the classifier says so, and elsewhere
    mean_other: float


def associations(
    codes: Codes,
    said: Bool[Tensor, " n"],
    *,
    n_permutations: int = PERMUTATIONS,
    min_fires: int = MIN_FIRES,
    seed: int = 0,
) -> list[Association]:
    """Of every latent that fires in at least `min_fires` images, the strongest |r| first. `codes`: a row an image.

    Raises ValueError where all answers are the same.
    """
    n, answers = codes.n, said.detach().cpu().double()
    if len(answers) != n:
        raise ValueError(f"{n} rows of codes and {len(answers)} answers: one each.")
    n_said = int(answers.sum())
    if n_said in (0, n):
        raise ValueError(
            f"the classifier says {'no' if n_said == 0 else 'yes'} of all {n} images: nothing can go with it."
        )
    codes = codes.detach().to("cpu")
    fires = codes.fired().numpy()
    tested = np.flatnonzero(fires >= min_fires)
    sums, squares = _sums(codes, torch.ones(n, 1, dtype=torch.float64))[:, 0], _square_sums(codes)
    mean, spread = sums / n, np.sqrt(np.maximum(squares / n - (sums / n) ** 2, 0))
    tested = tested[spread[tested] > 1e-12]
    if len(tested) == 0:
        return []
    with_answer = _sums(codes, answers[:, None])[:, 0]
    share = n_said / n
    noise = np.sqrt(share * (1 - share))

    def correlation(sums_said: np.ndarray) -> np.ndarray:
        return (sums_said[tested] / n - mean[tested, None] * share) / (spread[tested, None] * noise)

    r = correlation(with_answer[:, None])[:, 0]
    as_large, largest = np.ones(len(tested)), np.ones(len(tested))  # the answers as they are are one of the ways
    generator = torch.Generator().manual_seed(seed)
    at_once = max(1, min(n_permutations, PERMUTED_VALUES // max(1, codes.nnz)))
    for start in range(0, n_permutations, at_once):
        count = min(at_once, n_permutations - start)
        drawn = torch.stack([answers[torch.randperm(n, generator=generator)] for _ in range(count)], 1)
        found = np.abs(correlation(_sums(codes, drawn)))
        as_large += (found >= np.abs(r)[:, None] - 1e-12).sum(1)
        largest += (found.max(0) >= np.abs(r)[:, None] - 1e-12).sum(1)
    p, p_family = as_large / (n_permutations + 1), largest / (n_permutations + 1)
    auc = Entries(codes).best((said.cpu().numpy().astype(bool), None))[2]
    sums_other = sums - with_answer
    mean_said, mean_other = with_answer / n_said, sums_other / (n - n_said)
    within = squares - n_said * mean_said**2 - (n - n_said) * mean_other**2
    pooled = np.sqrt(np.maximum(within / max(1, n - 2), 1e-24))
    p_holm = holm(p.tolist())
    rows = [
        Association(
            int(latent),
            float(fires[latent] / n),
            float(auc[latent]),
            float(r[i]),
            float((mean_said[latent] - mean_other[latent]) / pooled[latent]),
            float(p[i]),
            float(p_holm[i]),
            float(p_family[i]),
            float(mean_said[latent]),
            float(mean_other[latent]),
        )
        for i, latent in enumerate(tested)
    ]
    return sorted(rows, key=lambda one: (-abs(one.point_biserial), one.latent))


def densities(codes: Codes, said: Bool[Tensor, " n"], latent: int, *, n_bins: int = 30) -> list[dict[str, float]]:
    """Shares of images by activation, where the classifier says so and elsewhere; the first bin is "does not fire"."""
    values = torch.zeros(codes.n)
    at = codes.indices == latent
    values[codes.rows()[at]] = codes.values[at].float()
    top = float(values.max()) or 1.0
    edges = np.linspace(0, top, n_bins + 1)
    out = []
    for low, high in [(0.0, 0.0), *zip(edges[:-1], edges[1:], strict=True)]:
        inside = values == 0 if high == 0 else (values > low) & (values <= high)
        shares = {"said": said.cpu(), "other": ~said.cpu()}
        counts = {name: float((inside & who).sum()) / max(1, int(who.sum())) for name, who in shares.items()}
        out.append({"low": float(low), "high": float(high), **counts})
    return out


# ----------------------------------------------------------------------------------------------------- intervention


@dataclass(frozen=True)
class CurvePoint:
    value: float  # what the latent is set to
    probability: Measured
    change: Measured  # of the probability, image by image, against the images as they are


Edited = Callable[[int, float], Float[Tensor, "n d"]]


def intervention_curve(
    classifier: Classifier,
    rows: Float[Tensor, "n d"],
    edited: Edited,
    latent: int,
    values: Sequence[float],
    *,
    answer: int,
    n_bootstrap: int = 1000,
    seed: int = 0,
) -> list[CurvePoint]:
    """P(answer) over all images with the latent set to each value. `edited(latent, value)` gives the embeddings then.

    Intervals are over images; those of the change are paired.
    """
    before = classifier.probabilities(rows)[:, answer].numpy()
    out = []
    for value in values:
        after = classifier.probabilities(edited(latent, float(value)))[:, answer].numpy()
        sums = {"after": after, "change": after - before, "n": np.ones(len(after))}
        given: dict[str, Any] = {"n_bootstrap": n_bootstrap, "seed": seed}
        probability = over_images(sums, lambda s: s["after"] / s["n"], definition="mean over images", **given)
        change = over_images(sums, lambda s: s["change"] / s["n"], definition="mean over images, paired", **given)
        out.append(CurvePoint(float(value), probability, change))
    return out


def plateau(curve: Sequence[CurvePoint], *, share: float = PLATEAU) -> float | None:
    """The smallest value from which on the probability stays within `share` of the curve's whole range of its last one;
    None where that is the last one: no plateau was reached."""
    levels = np.array([point.probability.value for point in curve])
    span = float(np.ptp(levels))
    if span == 0:
        return curve[0].value
    near = np.abs(levels - levels[-1]) <= share * span
    start = len(near) - int(np.argmin(near[::-1])) if not near.all() else 0
    return None if start >= len(curve) - 1 else curve[start].value


def moves_right(curve: Sequence[CurvePoint], association: Association) -> bool:
    """Does the answer grow likelier with the latent where the two go together, and less likely where they exclude
    each other? By the last value against the first."""
    rise = curve[-1].probability.value - curve[0].probability.value
    return rise * association.point_biserial > 0


def strengths_of(codes: Codes, latent: int, *, n: int = 9, beyond: float = 3.0) -> list[float]:
    """From 0 to `beyond` times the latent's largest activation here."""
    at = codes.indices == latent
    top = float(codes.values[at].max()) if bool(at.any()) else 1.0
    return np.linspace(0, beyond * top, n).tolist()


# -- helpers


def _sums(codes: Codes, weights: Float[Tensor, "n m"]) -> Float[np.ndarray, "d_sae m"]:
    """Sum over rows of activation times weight."""
    values = codes.values.double()[:, None] * weights[codes.rows()]
    out = torch.zeros(codes.d_sae, weights.shape[1], dtype=torch.float64)
    return out.index_add_(0, codes.indices.long(), values).numpy()


def _square_sums(codes: Codes) -> Float[np.ndarray, " d_sae"]:
    values = codes.values.double().square()
    return torch.zeros(codes.d_sae, dtype=torch.float64).index_add_(0, codes.indices.long(), values).numpy()


def as_rows(found: Sequence[Association], names: Mapping[int, str]) -> list[dict[str, Any]]:
    return [{"name": names.get(one.latent, ""), **vars(one)} for one in found]
