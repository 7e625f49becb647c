"""M4, sparse probing: how well a class can be read from few latents.

    z_i          codes of image i, pooled over its patches (maximum); ranked and fitted on training rows
    ovr_auc@k    mean over classes of ROC AUC on test rows of a logistic regression on the k latents with the largest F
                 for that class against the rest
    multi_acc@k  test accuracy of one multinomial regression on the k latents with the largest F over all classes
    k_acc_area   area under multi_acc over k = 1, 5, 10, 20, 50, 100 (trapezoids), over 99

F: analysis of variance (class_sums.py). Regressions: L2 with C = 1, intercept free, to their minimum (tol 1e-8).

Range. ovr_auc 0..1, 0.5 by chance; multi_acc and k_acc_area 0..1, by chance 1 / number of classes.

Moves with. k; images per class (two test images of a class make its AUC a coin of few sides: `per_class` has how many);
the scale of the codes, since C = 1 penalises weights as they are: codes that are ten times larger are probed with a
hundredth of the penalty.

Does not show. Whether the latents mean the class: what goes along with it in these pictures serves as well. At k = 1024
a probe reads nearly whatever the codes hold, few or many latents a concept. AUC asks how images are ordered within a
class's probe, not which class is said.

Source. ViSAEBench section 4.3, table 2 and appendix I; SPEC rows 70 and 71. Table 2 ranks "once", section 4.3 for each
class: those are multi_acc and ovr_auc. The mean "AUC" it prints for DeiT (0.418) is below chance: it is no ROC AUC.

Tags. "ovr-auc", "multi-acc", "k-acc-area", each with its split and pool. Intervals over test images: of AUC after
DeLong et al. 1988, over all classes at once, so that an image counts in all of them; of accuracies a bootstrap. Those
over classes are a bootstrap of classes. Neither sees how the fit would move with other training rows.
"visaebench-0.1" (compat): the number of the released package, by its own calls of scikit-learn: latents are ranked on
all rows, the test rows among them, in float32, and each fit ends early (tol 1e-4). The first flatters.

Cost. Ranking is one pass over the codes. Fits grow with k x classes x training rows: most of the time goes to the
largest k. What is kept: pooled codes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vitrail.coders.sparse import Codes
from vitrail.metrics.class_sums import ClassSums, ranking
from vitrail.metrics.column_probes import GATHERED, column_logits, columns, fit_columns
from vitrail.metrics.measured import Measured, over_images
from vitrail.metrics.multinomial import fit_logistic
from vitrail.metrics.passing import Curve, Metric, Seen, Setting
from vitrail.metrics.truth import Firing, Pool

KS = tuple(2**i for i in range(11))
AREA_KS = (1, 5, 10, 20, 50, 100)
HEADLINE = 128
COMPAT = "visaebench-0.1"


class PooledCodes:
    """Of a pass: codes of each image and its label, as M4 and M7 need them."""

    def __init__(self, setting: Setting, pool: Pool) -> None:
        self.pool: Pool = pool
        self._patches = setting.patches
        self._codes: list[Codes] = []
        self._labels: list[Tensor] = []

    def update(self, seen: Seen) -> None:
        if seen.labels is None:
            raise ValueError("probing reads classes: these images have no labels. Use a labelled set of images.")
        self._codes.append(Firing.of_codes(seen.codes, seen.n_tokens, self._patches, pool=self.pool).images)
        self._labels.append(seen.labels.cpu())

    def all(self) -> tuple[Codes, Int[np.ndarray, " n"]]:
        if not self._codes:
            raise ValueError("no images were measured: there is nothing to report.")
        return Codes.cat(self._codes), torch.cat(self._labels).numpy().astype(np.int64)


class SparseProbing(Metric):
    """`ks` up to d_sae are used. `compat`: "visaebench-0.1" adds the released package's number."""

    def __init__(
        self,
        setting: Setting,
        *,
        pool: Pool = "max",
        ks: Sequence[int] = KS,
        headline: int = HEADLINE,
        multi_up_to: int = HEADLINE,
        test_share: float = 0.2,
        split_seed: int = 42,
        compat: str = "",
    ) -> None:
        if compat not in ("", COMPAT):
            raise ValueError(f"compat must be empty or {COMPAT!r}, got {compat!r}.")
        self._pooled = PooledCodes(setting, pool)
        self._ks = tuple(sorted({*ks, headline}))
        self.headline, self.multi_up_to = min(headline, setting.d_sae), multi_up_to
        self._split = {"test_share": test_share, "split_seed": split_seed}
        self._compat = compat
        self._found: Probed | None = None

    def update(self, seen: Seen) -> None:
        self._pooled.update(seen)
        self._found = None

    @property
    def found(self) -> "Probed":
        if self._found is None:
            codes, labels = self._pooled.all()
            ks = (*self._ks, self.headline)
            self._found = sparse_probing(codes, labels, ks=ks, multi_up_to=self.multi_up_to, **self._split)
        return self._found

    def compute(self, *, n_bootstrap: int = 1000, seed: int = 0) -> dict[str, Measured]:
        found, k = self.found, self.headline
        split = f"{1 - self._split['test_share']:.0%} train, seed {self._split['split_seed']}, {self._pooled.pool}-pool"
        given: dict[str, Any] = {"n_bootstrap": n_bootstrap, "seed": seed}
        out: dict[str, Measured] = {}
        for each in sorted({1, k}):
            out[f"ovr_auc_{each}"] = found.auc_measured(each, f"ovr-auc, k={each}, {split}, DeLong")
            auc = found.auc[each][np.isfinite(found.auc[each])]
            out[f"ovr_auc_{each}_classes"] = over_images(
                {"auc": auc, "n": auc**0},
                lambda c: c["auc"] / c["n"],
                definition=f"ovr-auc, k={each}, {split}, interval over classes",
                **given,
            )
        if k in found.right:
            columns = {"right": found.right[k].astype(float), "n": np.ones(len(found.test))}
            tag = f"multi-acc, k={k}, {split}"
            out[f"multi_acc_{k}"] = over_images(columns, lambda c: c["right"] / c["n"], definition=tag, **given)
            labels = found.labels[found.test]
            present = np.unique(labels)
            by_class = {
                name: np.bincount(labels, values)[present].astype(np.float64) for name, values in columns.items()
            }
            out[f"multi_acc_{k}_classes"] = over_images(
                by_class, lambda c: c["right"] / c["n"], definition=f"{tag}, interval over classes", **given
            )
        ks = [each for each in AREA_KS if each in found.right]
        columns = {str(each): found.right[each].astype(float) for each in ks} | {"n": np.ones(len(found.test))}
        out["k_acc_area"] = over_images(
            columns,
            lambda c: area(ks, [c[str(each)] / c["n"] for each in ks]),
            definition=f"k-acc-area, k={','.join(map(str, ks))}, {split}",
            **given,
        )
        if self._compat:
            value, _ = visaebench_area(*self._pooled.all())
            out["k_acc_area_visaebench"] = Measured(value, COMPAT, len(found.labels))
        return out

    def curves(self) -> dict[str, Curve]:
        """`sparse_probing`: by k. `sparse_probing_classes`: by class, with the latent that ranks first."""
        found = self.found
        return {"sparse_probing": found.by_k(), "sparse_probing_classes": found.by_class(self.headline)}


@dataclass(frozen=True, eq=False)
class Probed:
    """`auc`, `error` (of their mean) and `right` by k; NaN where a class has no test row, or none of another class."""

    labels: Int[np.ndarray, " n"]
    train: Int[np.ndarray, " n_train"]
    test: Int[np.ndarray, " n_test"]
    first: Int[np.ndarray, " n_classes"]  # the latent that ranks first; -1 for classes without training rows
    auc: dict[int, Float[np.ndarray, " n_classes"]]
    influence: dict[int, Float[np.ndarray, " n_test"]]  # of each test image on the mean AUC
    right: dict[int, Bool[np.ndarray, " n_test"]]

    def auc_measured(self, k: int, definition: str) -> Measured:
        value, n = float(np.nanmean(self.auc[k])), len(self.test)
        error = float(np.sqrt(np.square(self.influence[k]).mean() / n))
        low, high = (min(max(value + sign * 1.96 * error, 0.0), 1.0) for sign in (-1, 1))
        return Measured(value, definition, n, low, high)

    def by_k(self) -> Curve:
        rows: Curve = []
        for k in sorted({*self.auc, *self.right}):
            auc = self.auc_measured(k, "") if k in self.auc else None
            rows.append(
                {
                    "k": k,
                    "ovr_auc": None if auc is None else auc.value,
                    "ovr_auc_low": None if auc is None else auc.low,
                    "ovr_auc_high": None if auc is None else auc.high,
                    "multi_acc": float(self.right[k].mean()) if k in self.right else None,
                }
            )
        return rows

    def by_class(self, k: int) -> Curve:
        n_train, n_test = (
            np.bincount(self.labels[rows], minlength=len(self.first)) for rows in (self.train, self.test)
        )
        return [
            {
                "class": c,
                "n_train": int(n_train[c]),
                "n_test": int(n_test[c]),
                "latent": int(self.first[c]),
                "auc_1": float(self.auc[1][c]) if 1 in self.auc else None,
                f"auc_{k}": float(self.auc[k][c]),
            }
            for c in range(len(self.first))
            if n_train[c] + n_test[c]
        ]


@torch.no_grad()
def sparse_probing(
    codes: Codes,
    labels: Int[np.ndarray, " n"],
    *,
    ks: Sequence[int] = KS,
    multi_up_to: int = HEADLINE,
    test_share: float = 0.2,
    split_seed: int = 42,
) -> Probed:
    """Of pooled codes, a row an image. Raises ValueError for labels that do not fit, or fewer than two classes."""
    labels = np.asarray(labels)
    check_labels(codes, labels)
    n_classes = int(labels.max()) + 1
    ks = sorted({k for k in ks if k <= codes.d_sae})
    if not ks or ks[0] < 1:
        raise ValueError(f"ks must be in 1..d_sae={codes.d_sae}, got {list(ks)}.")
    train, test = stratified_split(labels, test_share, split_seed)
    learn, judge = (codes.detach().to("cpu").select_rows(torch.from_numpy(rows)) for rows in (train, test))
    sums = ClassSums.of(learn, labels[train], n_classes)
    classes = np.flatnonzero((sums.counts > 0) & (sums.counts < len(train)))
    auc = {k: np.full(n_classes, np.nan) for k in ks}
    influence = {k: np.zeros(len(test)) for k in ks}
    first = np.full(n_classes, -1)
    at_once = max(1, GATHERED // (len(train) * 2 + codes.d_sae))
    for start in range(0, len(classes), at_once):
        some = classes[start : start + at_once]
        latents = torch.from_numpy(ranking(sums.one_vs_rest(some.tolist()), ks[-1]))
        first[some] = latents[:, 0].numpy()
        fitted, positive = _rows_of(labels[train], some), _rows_of(labels[test], some).numpy()
        probes = None
        for k in ks:
            probes = fit_columns(learn, latents[:, :k], fitted, start=probes)
            each, pull = roc_auc(column_logits(judge, latents[:, :k], probes).numpy(), positive)
            auc[k][some] = each
            influence[k] += np.nan_to_num(pull).sum(0)
    for k in ks:
        influence[k] /= max(1, int(np.isfinite(auc[k]).sum()))
    right = _multinomial(learn, judge, labels[train], labels[test], sums, [k for k in ks if k <= multi_up_to])
    return Probed(labels, train, test, first, auc, influence, right)


def _multinomial(
    learn: Codes, judge: Codes, y: np.ndarray, y_test: np.ndarray, sums: ClassSums, ks: Sequence[int]
) -> dict[int, np.ndarray]:
    every = sorted({*ks, *(k for k in AREA_KS if k <= learn.d_sae)})
    latents = torch.from_numpy(ranking(sums.all_classes(), every[-1]))
    x, x_test = columns(learn, latents), columns(judge, latents)
    probe, right = None, {}
    for k in every:
        probe = fit_logistic(x[:, :k], torch.from_numpy(y), n_classes=len(sums.counts), start=probe)
        right[k] = probe.predict(x_test[:, :k]).numpy() == y_test
    return right


def stratified_split(
    labels: Int[np.ndarray, " n"], test_share: float, seed: int
) -> tuple[Int[np.ndarray, " n_train"], Int[np.ndarray, " n_test"]]:
    """Of each class the same share is for the test, one row at least; a class of one row is for training."""
    if not 0 < test_share < 1:
        raise ValueError(f"test_share must be between 0 and 1, got {test_share}.")
    rng = np.random.default_rng(seed)
    for_test = np.zeros(len(labels), dtype=bool)
    for c in np.unique(labels):
        rows = rng.permutation(np.flatnonzero(labels == c))
        n_test = min(max(1, round(test_share * len(rows))), len(rows) - 1)
        for_test[rows[:n_test]] = True
    if not for_test.any():
        raise ValueError("no class has two images: there is nothing to test on.")
    return np.flatnonzero(~for_test), np.flatnonzero(for_test)


def area(ks: Sequence[int], values: Sequence[Any]) -> Any:
    """Trapezoids over k, over the range of k; the value itself where there is one k."""
    if len(ks) == 1:
        return values[0]
    parts = [(b - a) * (v + w) / 2 for a, b, v, w in zip(ks, ks[1:], values, values[1:], strict=False)]
    return sum(parts[1:], parts[0]) / (ks[-1] - ks[0])


# -- scores


def _rows_of(labels: np.ndarray, classes: np.ndarray) -> Bool[Tensor, "b n"]:
    return torch.from_numpy(labels[None] == classes[:, None])


def roc_auc(
    scores: Float[np.ndarray, "b n"], positive: Bool[np.ndarray, "b n"]
) -> tuple[Float[np.ndarray, " b"], Float[np.ndarray, "b n"]]:
    """P(positive above negative) + P(equal) / 2, and how much each row pulls on it (DeLong et al. 1988, times n).

    NaN where there are only positives or only negatives.
    """
    s, y = torch.from_numpy(scores), torch.from_numpy(positive)
    n, n1 = y.shape[1], y.sum(1, keepdim=True).double()
    n0 = n - n1
    over_negatives, over_positives = (_below(s, members) for members in (~y, y))
    share = torch.where(y, over_negatives / n0, 1 - over_positives / n1)
    auc = torch.where(y, share, 0.0).sum(1, keepdim=True) / n1
    pull = (share - auc) * torch.where(y, n / n1, n / n0)
    none = (n1 == 0) | (n0 == 0)
    return auc.masked_fill(none, torch.nan)[:, 0].numpy(), pull.masked_fill(none, torch.nan).numpy()


def _below(s: Float[Tensor, "b n"], members: Bool[Tensor, "b n"]) -> Float[Tensor, "b n"]:
    """How many members lie below each score; those that equal it count half."""
    sorted_members = s.masked_fill(~members, torch.inf).sort(1).values
    left, right = (torch.searchsorted(sorted_members, s, right=side) for side in (False, True))
    return (left + right).double() / 2


def check_labels(codes: Codes, labels: Int[np.ndarray, " n"]) -> None:
    if len(labels) != codes.n:
        raise ValueError(f"{codes.n} rows of codes and {len(labels)} labels: there must be one label a row.")
    if len(labels) == 0 or labels.min() < 0:
        raise ValueError("labels must be 0 or above, one an image; some are negative, or there are none.")
    if len(np.unique(labels)) < 2:
        raise ValueError(f"probing needs images of at least two classes, all have the label {labels[0]}.")


# -- the released package


def visaebench_area(
    codes: Codes, labels: Int[np.ndarray, " n"], *, ks: Sequence[int] = AREA_KS, seed: int = 42
) -> tuple[float, dict[int, float]]:
    """`SparseProbing` of visaebench 0.1.0 on max-pooled codes: its area and its accuracy at each k.

    Its order of operations, block by block of latents instead of on all n x d_sae numbers. Wrong in it: the ranking
    has seen the test rows.
    """
    import warnings

    from sklearn.exceptions import ConvergenceWarning
    from sklearn.feature_selection import f_classif
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import train_test_split

    check_labels(codes, labels)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        f = np.concatenate(
            [
                f_classif(columns(codes, torch.arange(first, min(first + 1024, codes.d_sae))).numpy(), labels)[0]
                for first in range(0, codes.d_sae, 1024)
            ]
        )
        ranked = np.argsort(np.nan_to_num(f, nan=-np.inf))[::-1]
        ks = [k for k in sorted(ks) if k <= codes.d_sae]
        x = columns(codes, torch.from_numpy(ranked[: ks[-1]].copy())).numpy()
        stratify = labels if np.min(np.bincount(labels)) >= 2 else None
        parts: Any = train_test_split(x, labels, test_size=0.2, stratify=stratify, random_state=seed)
        learn, judge, y, y_test = parts
        accuracy = {}
        for k in ks:
            warnings.simplefilter("ignore", ConvergenceWarning)
            fitted = LogisticRegression(solver="lbfgs", max_iter=500, C=1.0, random_state=seed).fit(learn[:, :k], y)
            accuracy[k] = float(fitted.score(judge[:, :k], y_test))
    return float(area(ks, [accuracy[k] for k in ks])), accuracy
