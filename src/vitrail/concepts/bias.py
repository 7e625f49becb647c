"""What goes with a classifier's answers, and what moves them: latents beside its predictions, then turned up and down.

    auc              of a latent's activation for "the classifier says c", ties counted half
    point_biserial   Pearson's r of the activation with that answer (0 / 1)
    effect           Cohen's d: (mean where it says c - mean elsewhere) / their pooled standard deviation
    p                share of permutations of the answers whose |r| is as large, the answers themselves among them
    p_holm           over all latents that were tested (Holm 1979)
    p_family         share of permutations whose *largest* |r| over all latents is as large (Westfall and Young 1993)

With B permutations no p lies below 1 / (B + 1), so that Holm over a thousand latents needs a million of them. p_family
has no such floor, and is the one to read where there are many.

A good classifier's answers go first of all with what it is asked about. What it leans on besides shows among pictures
of the same class (`leanings`; the finest that is known: of "waterbirds" the species):

    r_given          Pearson's r of the activation with the log-odds of c, both less their mean over pictures of the
                     same true class: the partial correlation given the class
    slope            change of the log-odds for one standard deviation (within classes) of the activation
    p, p_family      by permuting the log-odds within each class, else as above

All of it is association; `intervention_curve` says whether a latent moves an answer: the latent is set to a value in
many images, all else (the coder's error too) is kept, and the classifier is asked again. `dose_response` says which way
it went.

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
from vitrail.concepts.detection import mean_ranks
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

    def log_odds(self, rows: Float[Tensor, "n d"], answer: int) -> Float[Tensor, " n"]:
        """log P(answer) - log P(any other)."""
        u = (rows.detach().cpu().double() - self.mean) / self.scale
        scores = self.logistic.scores(u)
        others = torch.cat([scores[:, :answer], scores[:, answer + 1 :]], 1).logsumexp(1)
        return scores[:, answer] - others

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


@dataclass(frozen=True)
class Leaning:
    latent: int
    fires: float  # share of images
    r_given: float
    slope: float  # log-odds per standard deviation
    p: float
    p_holm: float
    p_family: float


def leanings(
    codes: Codes,
    log_odds: Float[Tensor, " n"],
    true_class: Int[Tensor, " m"],
    *,
    n_permutations: int = PERMUTATIONS,
    min_fires: int = MIN_FIRES,
    seed: int = 0,
) -> list[Leaning]:
    """What the answer goes with among pictures of one class, the strongest |r_given| first. `codes`: a row an image.

    Of latents that fire in at least `min_fires` images and vary within a class. Raises ValueError where the three do
    not have a row an image, or the log-odds are not finite or do not vary within any class.
    """
    n, codes = codes.n, codes.detach().to("cpu")
    if len(log_odds) != n or len(true_class) != n:
        raise ValueError(f"{n} rows of codes, {len(log_odds)} log-odds and {len(true_class)} classes: one each.")
    score = log_odds.detach().cpu().double()
    if not bool(score.isfinite().all()):
        raise ValueError(f"{int((~score.isfinite()).sum())} of {n} log-odds are not finite.")
    _, stratum = true_class.detach().cpu().unique(return_inverse=True)
    members = torch.nn.functional.one_hot(stratum).double()  # (n, classes)
    sizes = members.sum(0)
    rest = score - (members @ ((score @ members) / sizes))
    spread_score = float(rest.square().sum().sqrt())
    if spread_score <= 1e-9 * max(1.0, float(score.abs().max())):
        raise ValueError("the log-odds are the same for all pictures of a class: nothing can go with them there.")
    fires = codes.fired().numpy()
    class_sums = _sums(codes, members)
    within = np.maximum(_square_sums(codes) - (class_sums**2 / sizes.numpy()).sum(1), 0)
    tested = np.flatnonzero((fires >= min_fires) & (within > 1e-9 * np.maximum(_square_sums(codes), 1e-30)))
    if len(tested) == 0:
        return []
    spread = np.sqrt(within[tested])

    def correlation(weights: Float[Tensor, "n m"]) -> np.ndarray:
        return _sums(codes, weights)[tested] / (spread[:, None] * spread_score)

    r = correlation(rest[:, None])[:, 0]
    as_large, largest = np.ones(len(tested)), np.ones(len(tested))
    generator = torch.Generator().manual_seed(seed)
    by_class = torch.argsort(stratum, stable=True)
    at_once = max(1, min(n_permutations, PERMUTED_VALUES // max(1, codes.nnz)))
    for start in range(0, n_permutations, at_once):
        count = min(at_once, n_permutations - start)
        drawn = torch.empty(n, count, dtype=torch.float64)
        for column in range(count):
            # Any order within a class: sorted by class first, then by chance.
            chance = torch.rand(n, generator=generator, dtype=torch.float64)
            drawn[by_class, column] = rest[torch.argsort(stratum + chance / 2)]
        found = np.abs(correlation(drawn))
        as_large += (found >= np.abs(r)[:, None] - 1e-12).sum(1)
        largest += (found.max(0) >= np.abs(r)[:, None] - 1e-12).sum(1)
    p, p_family = as_large / (n_permutations + 1), largest / (n_permutations + 1)
    p_holm = holm(p.tolist())
    deviation = spread_score / np.sqrt(max(1, n - len(sizes)))
    rows = [
        Leaning(
            int(latent),
            float(fires[latent] / n),
            float(r[i]),
            float(r[i] * deviation),
            float(p[i]),
            float(p_holm[i]),
            float(p_family[i]),
        )
        for i, latent in enumerate(tested)
    ]
    return sorted(rows, key=lambda one: (-abs(one.r_given), one.latent))


def by_name(codes: Codes, names: Mapping[int, str]) -> tuple[Codes, tuple[str, ...]]:
    """One column a name: the sum of its latents' activations, each divided by its largest. Latents without a name go.

    A concept is often split over several latents, of which each alone says less.
    """
    codes = codes.detach().to("cpu")
    said = tuple(sorted(set(names.values())))
    place = {name: i for i, name in enumerate(said)}
    column = torch.full((codes.d_sae,), -1, dtype=torch.long)
    for latent, name in names.items():
        column[latent] = place[name]
    top = torch.zeros(codes.d_sae).scatter_reduce_(0, codes.indices.long(), codes.values.float(), "amax")
    at = column[codes.indices.long()]
    kept = at >= 0
    keys, entry = (codes.rows()[kept] * len(said) + at[kept]).unique(return_inverse=True)
    shares = (codes.values.float() / top[codes.indices.long()].clamp_min(1e-30))[kept]
    values = torch.zeros(len(keys)).index_add_(0, entry, shares)
    rows, columns = keys // max(1, len(said)), keys % max(1, len(said))
    offsets = torch.zeros(codes.n + 1, dtype=torch.long)
    offsets[1:] = torch.bincount(rows, minlength=codes.n).cumsum(0)
    return Codes(offsets=offsets, indices=columns, values=values, d_sae=len(said)), said


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
    each: Float[np.ndarray, " n"] | None = None  # the probability of each image


@dataclass(frozen=True)
class DoseResponse:
    """`rise`: P at the largest value less P at the smallest, paired over images. `rank`: Spearman's rho of value and
    mean probability, 1 where every step goes up. `way`: "right", "wrong", or "none" where the interval of the rise
    holds 0."""

    rise: Measured
    rank: float
    way: str


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
        out.append(CurvePoint(float(value), probability, change, after))
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


def dose_response(
    curve: Sequence[CurvePoint], expected: float, *, n_bootstrap: int = 1000, seed: int = 0
) -> DoseResponse:
    """Does the answer grow likelier with the latent where the two go together, and less likely where they exclude each
    other? `expected`: a correlation, of which the sign counts. Raises ValueError for a curve of fewer than two values,
    or without the images' own probabilities."""
    if len(curve) < 2 or curve[0].each is None or curve[-1].each is None:
        raise ValueError("a dose response needs the images' probabilities at two values at least.")
    sums = {"rise": curve[-1].each - curve[0].each, "n": np.ones(len(curve[0].each))}
    rise = over_images(
        sums, lambda s: s["rise"] / s["n"], definition="mean over images, paired", n_bootstrap=n_bootstrap, seed=seed
    )
    levels = np.array([point.probability.value for point in curve])
    values = np.array([point.value for point in curve])
    ranked = mean_ranks(np.stack([values, levels], 1))
    rank = float(np.corrcoef(ranked.T)[0, 1]) if bool((np.ptp(ranked, axis=0) > 0).all()) else 0.0
    low, high = rise.low or 0.0, rise.high or 0.0
    if low <= 0 <= high:
        return DoseResponse(rise, rank, "none")
    return DoseResponse(rise, rank, "right" if rise.value * expected > 0 else "wrong")


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


def as_rows(found: Sequence[Association] | Sequence[Leaning], names: Mapping[int, str]) -> list[dict[str, Any]]:
    return [{"name": names.get(one.latent, ""), **vars(one)} for one in found]
