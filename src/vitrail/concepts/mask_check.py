"""Does a latent that is named after a class fire on that class's patches? A name against masks it has never met.

Of latent i and class c, over patches p that show c, or do not; masks.py and metrics/truth.py say which count:

    auc        P(z_pi > z_qi) + P(equal) / 2, p a patch of c, q one without it. 0..1, .5 is chance
    precision  sum of z_i on patches of c over the sum on all: share of the firing that lies on c. 0..1
    counted    the same of patches where z_i > 0, each counting one
    lift       precision over the share of patches that show c: 1 is chance, 1 / that share the most there can be
    iou        of "z_i > threshold": true positives / (true ones + false ones + missed). 0..1. The threshold is the best
               of one half of the pictures, used on the other, both ways round; c's pictures are dealt out evenly

    random     mean and middle 95 % of the AUCs of the other latents' names (classes other than c), each as many times
               as it was given: names dealt out anew
    rank       1 + number of classes that this latent detects better than c by AUC. 1: no name would have been better.
               Of classes with enough patches and pictures only

Intervals are percentile bootstraps over pictures, numbers worked out anew in each resample. Network dissection (Bau et
al. 2017, arXiv:1704.05796) asks the same by IoU at one threshold a unit, that of its top .5 %; AUC needs none. Lift and
both controls are ours: of a class that fills half of every picture any latent has a precision of .5.

Whole pictures with a class each are checked in the same way: `masks.truth_of_labels`, with one row of codes a picture.
Codes are read latent by latent; nothing of size rows x d_sae is made.
"""

import csv
import io
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from vitrail.coders.sparse import Codes
from vitrail.concepts.table import Concept
from vitrail.concepts.validation import content_words
from vitrail.files import replacing
from vitrail.metrics.entries import Entries, ratio
from vitrail.metrics.measured import resample_weights
from vitrail.metrics.truth import Truth

MIN_FIRES = 5  # patches
MIN_PATCHES = 10
MIN_PICTURES = 3


@dataclass(frozen=True, kw_only=True)
class MaskCheck:
    """One latent and its name. `n_fires`: patches where it fires; `n_patches`, `n_pictures`: that show the class."""

    latent: int
    method: str
    name: str
    concept: str
    auc: float
    low: float
    high: float
    random: float
    random_low: float
    random_high: float
    rank: int
    n_classes: int
    best: str
    best_auc: float
    precision: float
    counted: float
    lift: float
    lift_low: float
    lift_high: float
    iou: float
    iou_low: float
    iou_high: float
    n_fires: int
    n_patches: int
    n_pictures: int

    @property
    def holds(self) -> bool:
        """The interval of the AUC lies above chance, and above what 97.5 % of the other names reach."""
        return self.low > max(self.random_high, 0.5)


@dataclass(frozen=True, eq=False)
class MaskChecks:
    """`rows[j]` is of the j-th name, None where nothing could be measured: no class of the masks has that name, too few
    patches or pictures show it, or the latent hardly fires. `auc[i, c]` is of `latents[i]` and `classes[c]`."""

    rows: tuple[MaskCheck | None, ...]
    latents: Int[np.ndarray, " m"]
    classes: tuple[str, ...]
    auc: Float[np.ndarray, "m n_classes"]
    draws: Float[np.ndarray, "n_measured n_bootstrap"]  # AUC of the measured rows in each resample

    @property
    def measured(self) -> list[MaskCheck]:
        return [row for row in self.rows if row is not None]

    def only(self, latents: Collection[int]) -> "MaskChecks":
        """The rows of these latents, such as those whose names are valid; what they were compared with stays."""
        wanted = [row is not None and row.latent in latents for row in self.rows]
        kept = np.array([one for one, row in zip(wanted, self.rows, strict=True) if row is not None], dtype=bool)
        rows = tuple(row for row, one in zip(self.rows, wanted, strict=True) if one)
        return replace(self, rows=rows, draws=self.draws[kept])

    def summary(self, *, n_deals: int = 1000, seed: int = 0) -> dict[str, Any]:
        """Means over the measured latents, and `dealt`: the mean AUC where their names are dealt out among them at
        random, its middle 95 % over `n_deals` deals, and the share of deals that reach the true one (p, + 1 / + 1).

        `best`: share of latents whose name is the class they detect best; `best_dealt`: the same after dealing.
        `interval` is over pictures, of the mean AUC; None without resamples. Counts alone where nothing was measured.
        """
        some = self.measured
        out: dict[str, Any] = {"names": len(self.rows), "measured": len(some), "n_classes": len(self.classes)}
        if not some:
            return out
        place = {concept: at for at, concept in enumerate(self.classes)}
        line = {latent: at for at, latent in enumerate(self.latents.tolist())}
        at = np.array([line[row.latent] for row in some])
        named = np.array([place[row.concept] for row in some])
        rng = np.random.default_rng(seed)
        deals = np.stack([rng.permutation(named) for _ in range(n_deals)])
        # Of equally good classes each is the best.
        best = self.auc[at] >= self.auc[at].max(1, keepdims=True)
        scores = self.auc[at[None], deals].mean(1)
        value = float(np.mean([row.auc for row in some]))
        known = np.isfinite(self.draws)  # a resample may lack a class, or all that were named
        means = ratio(np.where(known, self.draws, 0).sum(0), known.sum(0))[known.any(0)]
        interval = tuple(float(q) for q in np.percentile(means, [2.5, 97.5])) if len(means) else None
        return {
            **out,
            "classes_named": len(set(named.tolist())),
            "auc": value,
            "interval": interval,
            "dealt": float(scores.mean()),
            "dealt_interval": tuple(float(q) for q in np.percentile(scores, [2.5, 97.5])),
            "p": float((1 + (scores >= value).sum()) / (1 + n_deals)),
            "best": float(best[np.arange(len(at)), named].mean()),
            "best_dealt": float(best[np.arange(len(at))[None], deals].mean()),
            "median_rank": float(np.median([row.rank for row in some])),
            "holds": sum(row.holds for row in some),
            "precision": float(np.mean([row.precision for row in some])),
            "counted": float(np.mean([row.counted for row in some])),
            "median_lift": float(np.median([row.lift for row in some])),
            "iou": float(np.mean([row.iou for row in some])),
        }


def check_masks(
    codes: Codes,
    truth: Truth,
    names: Sequence[Concept],
    *,
    among: Sequence[str] | None = None,
    min_fires: int = MIN_FIRES,
    min_patches: int = MIN_PATCHES,
    min_pictures: int = MIN_PICTURES,
    n_bootstrap: int = 300,
    seed: int = 0,
) -> MaskChecks:
    """Names by one method against masks. `codes`: a row a patch, picture by picture, of pictures that found no names.

    `among`: words or concepts that could have been a name; only these are ranked and dealt. None: all of the truth's.
    Raises ValueError where nothing is known of patches, or codes and truth are not of the same patches.
    """
    masked = Masked(codes, truth, among=among, min_patches=min_patches, min_pictures=min_pictures, seed=seed)
    return masked.check(names, min_fires=min_fires, n_bootstrap=n_bootstrap)


class Masked:
    """Codes and masks of the same patches, against which names of several methods can be held: `check_masks` in two
    steps. What does not depend on names is worked out once."""

    def __init__(
        self,
        codes: Codes,
        truth: Truth,
        *,
        among: Sequence[str] | None = None,
        min_patches: int = MIN_PATCHES,
        min_pictures: int = MIN_PICTURES,
        seed: int = 0,
    ) -> None:
        if codes.n != truth.n * truth.n_patches or not codes.n:
            raise ValueError(
                f"{codes.n} rows of codes, {truth.n} pictures of {truth.n_patches} patches: "
                "there must be a row a patch."
            )
        asked = None if among is None else {class_said(word, truth.concepts) for word in among}
        self.truth, self.seed = truth, seed
        self.entries, self.n_fires = Entries(codes), codes.fired().numpy()
        self.classes = [
            found
            for at, concept in enumerate(truth.concepts)
            if (asked is None or concept in asked)
            and (found := _Class.of(truth, at, min_patches, min_pictures, seed)) is not None
        ]
        each = [self.entries.best(one.labels)[2].astype(np.float32) for one in self.classes]
        self.auc = np.stack(each, 1) if each else np.zeros((codes.d_sae, 0), dtype=np.float32)
        self._thresholds: dict[int, Float[np.ndarray, "2 d_sae"]] = {}

    def check(self, names: Sequence[Concept], *, min_fires: int = MIN_FIRES, n_bootstrap: int = 300) -> MaskChecks:
        """Of names by one method: those of the other latents are what a name is compared with."""
        truth = self.truth
        place = {one.concept: at for at, one in enumerate(self.classes)}
        said = [class_said(row.name, truth.concepts) for row in names]
        column_of = [
            place[s] if s in place and self.n_fires[row.latent] >= min_fires else -1
            for s, row in zip(said, names, strict=True)
        ]
        given = np.array([column for column in column_of if column >= 0], dtype=int)
        drawn = list(resample_weights(truth.n, n_bootstrap, self.seed)) if n_bootstrap else []
        weights = np.concatenate(drawn) if drawn else None
        rows: list[MaskCheck | None] = []
        draws: list[Float[np.ndarray, " b"]] = []
        for row, column in zip(names, column_of, strict=True):
            if column < 0:
                rows.append(None)
                continue
            if column not in self._thresholds:
                self._thresholds[column] = self.classes[column].thresholds(self.entries)
            others = given[given != column]
            if not len(others):
                others = np.delete(np.arange(len(self.classes)), column)
            found, draw = self._row(row, column, others, weights)
            rows.append(found)
            draws.append(draw)
        latents = np.unique(np.array([row.latent for row in rows if row is not None], dtype=int))
        classes = tuple(one.concept for one in self.classes)
        stacked = np.stack(draws) if draws else np.zeros((0, 0))
        return MaskChecks(tuple(rows), latents, classes, self.auc[latents], stacked)

    def _row(
        self,
        row: Concept,
        column: int,
        others: Int[np.ndarray, " r"],
        weights: Float[np.ndarray, "b n_images"] | None,
    ) -> tuple[MaskCheck, Float[np.ndarray, " b"]]:
        one, aucs = self.classes[column], self.auc[row.latent]
        thresholds = self._thresholds[column][:, row.latent]
        numbers, draws = _measured(one, self.entries, row.latent, self.truth.n_patches, thresholds, weights)
        random = aucs[others] if len(others) else np.array([np.nan])
        bottom, top = np.percentile(random, [2.5, 97.5])
        best = int(aucs.argmax())
        return (
            MaskCheck(
                latent=row.latent,
                method=row.method,
                name=row.name,
                concept=one.concept,
                random=float(random.mean()),
                random_low=float(bottom),
                random_high=float(top),
                rank=1 + int((aucs > aucs[column]).sum()),
                n_classes=len(self.classes),
                best=self.classes[best].concept,
                best_auc=float(aucs[best]),
                n_fires=int(self.n_fires[row.latent]),
                n_patches=one.n_true,
                n_pictures=one.n_pictures,
                **numbers,
            ),
            draws,
        )


def class_said(name: str, concepts: Sequence[str]) -> str | None:
    """The concept that a name says, articles aside: "a zebra" says "zebra" and "kind:zebra". None: none."""
    content = content_words(name)
    return next((one for one in concepts if content and content_words(one.rpartition(":")[2]) == content), None)


def write_mask_checks(path: str | Path, rows: Sequence[MaskCheck]) -> None:
    """A CSV, a row a measured name, the highest AUC first."""
    out = io.StringIO()
    sheet = csv.DictWriter(out, [*(one.name for one in fields(MaskCheck)), "holds"], lineterminator="\n")
    sheet.writeheader()
    for row in sorted(rows, key=lambda row: (-row.auc, row.latent, row.method)):
        numbers = {key: f"{value:.6g}" if isinstance(value, float) else value for key, value in asdict(row).items()}
        sheet.writerow({**numbers, "holds": row.holds})
    with replacing(Path(path)) as temporary:
        temporary.write_text(out.getvalue(), encoding="utf-8")


@dataclass(frozen=True, eq=False)
class _Class:
    """A class with enough patches and pictures. `labels`: which patches show it, and which count at all."""

    concept: str
    labels: tuple[Bool[np.ndarray, " n"], Bool[np.ndarray, " n"] | None]
    true: Float[np.ndarray, " n_images"]  # of each picture, patches that show it
    counted: Float[np.ndarray, " n_images"]  # and patches that count
    second: Bool[np.ndarray, " n_images"]  # which half each picture is in

    @classmethod
    def of(cls, truth: Truth, at: int, min_patches: int, min_pictures: int, seed: int) -> "_Class | None":
        shown, counts = truth.patch_labels(at)
        shown = shown if counts is None else shown & counts
        true = shown.reshape(truth.n, -1).sum(1).astype(float)
        all_of = np.full(truth.n, float(truth.n_patches))
        counted = all_of if counts is None else counts.reshape(truth.n, -1).sum(1).astype(float)
        if true.sum() < min_patches or (true > 0).sum() < max(min_pictures, 2) or true.sum() == counted.sum():
            return None
        # Every other picture in an order at random that has the class's pictures first: half of them in each half.
        order = np.lexsort((np.random.default_rng([seed, at]).permutation(truth.n), true == 0))
        second = np.zeros(truth.n, dtype=bool)
        second[order[1::2]] = True
        return cls(truth.concepts[at], (shown, counts), true, counted, second)

    @property
    def n_true(self) -> int:
        return int(self.true.sum())

    @property
    def n_pictures(self) -> int:
        return int((self.true > 0).sum())

    def thresholds(self, entries: Entries) -> Float[np.ndarray, "2 d_sae"]:
        """The best thresholds of the second half, to be used on the first, and the other way round.

        Best by F1, and so by IoU = F1 / (2 - F1), which rises with it.
        """
        shown, counts = self.labels
        per_image = len(shown) // len(self.second)
        second = np.repeat(self.second, per_image)
        halves = (second, ~second) if counts is None else (second & counts, ~second & counts)
        return np.stack([entries.best((shown & half, half))[1] for half in halves])


def _measured(
    one: _Class,
    entries: Entries,
    latent: int,
    n_patches: int,
    thresholds: Float[np.ndarray, " 2"],
    weights: Float[np.ndarray, "b n_images"] | None,
) -> tuple[dict[str, Any], Float[np.ndarray, " b"]]:
    """What is measured of a latent and a class with its intervals, and the AUC in each resample."""
    mine = entries.of(latent)
    rows, values = entries.rows[mine], entries.values[mine].astype(np.float64)  # strongest first
    shown, counts = one.labels
    if counts is not None:
        rows, values = rows[counts[rows]], values[counts[rows]]
    image, true = rows // n_patches, shown[rows]
    n = len(one.true)

    def per_image(weight: np.ndarray) -> Float[np.ndarray, " n_images"]:
        return np.bincount(image, weights=weight, minlength=n)

    on = values > thresholds[one.second[image].astype(int)]
    sums = {
        "hit": per_image(values * true),
        "mass": per_image(values),
        "fires_true": per_image(true),
        "fires": per_image(np.ones(len(rows))),
        "tp": per_image(on & true),
        "fp": per_image(on & ~true),
        "true": one.true,
        "counted": one.counted,
    }
    columns = np.stack(list(sums.values()))

    def numbers(w: Float[np.ndarray, "b n_images"]) -> dict[str, Float[np.ndarray, " b"]]:
        total = dict(zip(sums, columns @ w.T, strict=True))
        precision = ratio(total["hit"], total["mass"])
        with np.errstate(divide="ignore", invalid="ignore"):
            return {
                "auc": _auc(values, true, image, w, total),
                "precision": precision,
                "counted": ratio(total["fires_true"], total["fires"]),
                "lift": precision * total["counted"] / total["true"],
                "iou": total["tp"] / (total["fp"] + total["true"]),
            }

    out: dict[str, Any] = {key: float(value[0]) for key, value in numbers(np.ones((1, n))).items()}
    if weights is None:
        limits = ("low", "high", "lift_low", "lift_high", "iou_low", "iou_high")
        return out | dict.fromkeys(limits, float("nan")), np.zeros(0)
    drawn = numbers(weights)
    for key, prefix in (("auc", ""), ("lift", "lift_"), ("iou", "iou_")):
        finite = drawn[key][np.isfinite(drawn[key])]  # a resample may lack the class
        low, high = np.percentile(finite, [2.5, 97.5]) if len(finite) else (np.nan, np.nan)
        out |= {f"{prefix}low": float(low), f"{prefix}high": float(high)}
    return out, drawn["auc"]


def _auc(
    values: Float[np.ndarray, " m"],
    true: Bool[np.ndarray, " m"],
    image: Int[np.ndarray, " m"],
    w: Float[np.ndarray, "b n_images"],
    total: dict[str, Float[np.ndarray, " b"]],
) -> Float[np.ndarray, " b"]:
    """AUC in each resample: entries in descending order, then all silent patches at once, tied at 0."""
    n_true, n_false = total["true"], total["counted"] - total["true"]
    area = np.zeros(len(w))
    passed_true, passed_false = np.zeros(len(w)), np.zeros(len(w))
    if len(values):
        starts = np.flatnonzero(np.append(True, values[1:] != values[:-1]))
        each = w[:, image]
        tp, fp = (np.add.reduceat(each * mark, starts, axis=1) for mark in (true, ~true))
        area = (fp * (np.cumsum(tp, axis=1) - tp / 2)).sum(1)
        passed_true, passed_false = tp.sum(1), fp.sum(1)
    area = area + (n_false - passed_false) * (n_true + passed_true) / 2
    return area / (n_true * n_false)
