"""M7, absorption by probes: classes that one latent does not tell from their siblings, but four do.

    task         a class against the other classes of its group, images of the group alone
    F1(k)        of a logistic regression on the k latents with the largest F for the task; ranked and fitted on
                 training rows, F1 = 2 tp / (2 tp + fp + fn) on test rows (and on training rows)
    absorbed     F1(1) < alpha and F1(4) > beta,       alpha = 0.8, beta = 0.5
    absorption   share of the eligible tasks that are absorbed; eligible: 10 training images at least

    absorption_unread   share with F1(4) <= beta: what four latents do not read is never "absorbed"

Range. 0..1; the paper reads lower as better. It does not fall as alpha grows, nor rise as beta grows.

Moves with. alpha and beta, more than with the coder: the paper's own table has 0.04 to 0.80. How hard the classes are:
features that tell siblings apart badly score *low*, by way of `absorption_unread`, which is why the two are given
together. Images per class: with four test images F1 knows few values. The hierarchy.

Does not show. Absorption, in the sense of Chanin et al. 2024 (a latent of the parent that falls silent where a child's
speaks): a class that two latents describe equally well counts as absorbed here. For that see probe_projection.py, and
recovery.py where a world's truth is known: it compares a latent with masks, not with a probe.

Source. ViSAEBench section 4.4 and appendix N; SPEC rows 78 to 80. "Eligible" and the split of F1 are not said there.

Tags. "probe-absorption" with alpha, beta, the split and the hierarchy. The interval is a bootstrap over test images (of
fitted probes); `absorption_groups` has one over sibling groups. "visaebench-0.1" (compat): the released package, whose
rule is another: F1 on the rows it was fitted on, absorbed where F1(4) - F1(1) > 0.1 or where the ten latents that are
strongest in the class on average share more than half with those of its group. By that, latents that fire for
everything make a class absorbed.

`curves`: every task with its F1 pairs, from which any (alpha, beta) is had anew (`absorption_rate`), and a grid.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int

from vitrail.coders.sparse import Codes
from vitrail.metrics.class_sums import ClassSums, ranking
from vitrail.metrics.column_probes import column_logits, columns, fit_columns
from vitrail.metrics.measured import Measured, over_images, resample_weights
from vitrail.metrics.passing import Curve, Metric, Seen, Setting
from vitrail.metrics.sparse_probing import COMPAT, PooledCodes, check_labels, stratified_split
from vitrail.metrics.truth import Pool

ALPHA, BETA = 0.8, 0.5
ALPHAS, BETAS = (0.7, 0.8, 0.9), (0.3, 0.5, 0.7)
FEW, MORE = 1, 4  # latents
MIN_GROUP = 3
Groups = Mapping[str, Sequence[int]]


class Absorption(Metric):
    """`groups`: name of the parent -> labels (a world's `groups`, or hierarchies.imagenet_groups)."""

    def __init__(
        self,
        setting: Setting,
        *,
        groups: Groups,
        hierarchy: str = "",
        pool: Pool = "max",
        alpha: float = ALPHA,
        beta: float = BETA,
        min_positives: int = 10,
        test_share: float = 0.2,
        split_seed: int = 42,
        compat: str = "",
    ) -> None:
        if compat not in ("", COMPAT):
            raise ValueError(f"compat must be empty or {COMPAT!r}, got {compat!r}.")
        check_groups(groups)
        self._pooled = PooledCodes(setting, pool)
        self._groups, self._hierarchy, self._compat = groups, hierarchy, compat
        self.alpha, self.beta = alpha, beta
        self._options = {"min_positives": min_positives, "test_share": test_share, "split_seed": split_seed}
        self._found: SiblingTasks | None = None

    def update(self, seen: Seen) -> None:
        self._pooled.update(seen)
        self._found = None

    @property
    def found(self) -> "SiblingTasks":
        if self._found is None:
            self._found = sibling_tasks(*self._pooled.all(), self._groups, **self._options)
        return self._found

    def compute(self, *, n_bootstrap: int = 1000, seed: int = 0) -> dict[str, Measured]:
        found, n = self.found, len(self.found.label)
        tag = f"probe-absorption, alpha={self.alpha:g}, beta={self.beta:g}, {self._pooled.pool}-pool"
        tag += f", {self._hierarchy}" if self._hierarchy else ""
        out: dict[str, Measured] = {}
        absorbed = {split: is_absorbed(*found.f1[split], self.alpha, self.beta) for split in ("train", "test")}
        unread = found.f1["test"][1] <= self.beta
        low_high = found.resampled(self.alpha, self.beta, n_bootstrap, seed)
        for name, values, split in (
            ("absorption", absorbed["test"], "test"),
            ("absorption_unread", unread, "test"),
            ("absorption_train", absorbed["train"], "train"),
        ):
            low, high = low_high.get(name, (None, None)) if n else (None, None)
            out[name] = Measured(float(values.mean()) if n else float("nan"), f"{tag}, {split} rows", n, low, high)
        if n:
            number = np.unique(found.group, return_inverse=True)[1]
            by_group = {"absorbed": np.bincount(number, absorbed["test"]), "n": np.bincount(number).astype(float)}
            out["absorption_groups"] = over_images(
                by_group,
                lambda c: c["absorbed"] / c["n"],
                definition=f"{tag}, test rows, interval over groups",
                n_bootstrap=n_bootstrap,
                seed=seed,
            )
        if self._compat:
            value, rows = visaebench_absorption(*self._pooled.all(), self._groups)
            out["absorption_visaebench"] = Measured(value, COMPAT, len(rows))
        return out

    def curves(self) -> dict[str, Curve]:
        """`absorption_tasks`: the F1 pairs; `absorption_grid`: the rate at each alpha and beta, on both splits."""
        return {"absorption_tasks": self.found.rows(), "absorption_grid": absorption_grid(self.found.rows())}


@dataclass(frozen=True, eq=False)
class SiblingTasks:
    """A task a class and group. `f1[split]` is F1 with one latent, and with four."""

    group: list[str]
    label: Int[np.ndarray, " n_tasks"]
    latents: Int[np.ndarray, "n_tasks more"]
    n_positive: dict[str, Int[np.ndarray, " n_tasks"]]
    f1: dict[str, tuple[Float[np.ndarray, " n_tasks"], Float[np.ndarray, " n_tasks"]]]
    said: dict[int, Bool[np.ndarray, "n_tasks n_test"]]  # positives by each probe, of test rows of the group
    positive: Bool[np.ndarray, "n_tasks n_test"]

    def rows(self) -> Curve:
        return [
            {
                "group": group,
                "class": int(self.label[t]),
                "latent": int(self.latents[t, 0]),
                "n_train": int(self.n_positive["train"][t]),
                "n_test": int(self.n_positive["test"][t]),
            }
            | {f"f1_{k}_{split}": float(self.f1[split][i][t]) for split in self.f1 for i, k in enumerate((FEW, MORE))}
            for t, group in enumerate(self.group)
        ]

    def resampled(
        self, alpha: float, beta: float, n_bootstrap: int, seed: int
    ) -> dict[str, tuple[float, float] | tuple[None, None]]:
        """Percentiles over resamples of the test images; the probes stay as they are."""
        n = self.positive.shape[1]
        if n < 2 or n_bootstrap < 1 or not len(self.label):
            return {}
        positive = self.positive.astype(np.float64).T
        said = {k: self.said[k].astype(np.float64).T for k in (FEW, MORE)}
        absorbed, unread = [], []
        for weights in resample_weights(n, n_bootstrap, seed):
            few, more = (
                _f1(weights @ (said[k] * positive), weights @ said[k], weights @ positive) for k in (FEW, MORE)
            )
            absorbed.append(is_absorbed(few, more, alpha, beta).mean(1))
            unread.append((more <= beta).mean(1))
        spread = {"absorption": np.concatenate(absorbed), "absorption_unread": np.concatenate(unread)}
        return {name: (float(low), float(high)) for name, (low, high) in _percentiles(spread).items()}


@torch.no_grad()
def sibling_tasks(
    codes: Codes,
    labels: Int[np.ndarray, " n"],
    groups: Groups,
    *,
    min_positives: int = 10,
    test_share: float = 0.2,
    split_seed: int = 42,
) -> SiblingTasks:
    """Of pooled codes, a row an image. Of each group the classes that are there count, three at least."""
    check_groups(groups)
    check_labels(codes, labels)
    train, test = stratified_split(labels, test_share, split_seed)
    learn, judge = (codes.detach().to("cpu").select_rows(torch.from_numpy(rows)) for rows in (train, test))
    n_classes = 1 + max(int(labels.max()), *(max(group) for group in groups.values()))
    sums = ClassSums.of(learn, labels[train], n_classes)
    names, classes, latents, members = [], [], [], []
    for name, group in groups.items():
        there = [c for c in group if sums.counts[c]]
        some = [c for c in there if sums.counts[c] >= min_positives]
        if len(there) >= MIN_GROUP and some:
            names += [name] * len(some)
            classes += some
            latents.append(ranking(sums.one_vs_rest(some, among=there), MORE))
            members += [there] * len(some)
    classes, n = np.array(classes, dtype=np.int64), len(names)
    top = torch.from_numpy(np.concatenate(latents)) if n else torch.zeros(0, MORE, dtype=torch.long)
    counted = {"train": _inside(labels[train], members), "test": _inside(labels[test], members)}
    positive = {"train": labels[train][None] == classes[:, None], "test": labels[test][None] == classes[:, None]}
    said = {split: {k: np.zeros_like(positive[split]) for k in (FEW, MORE)} for split in positive}
    for k in (FEW, MORE) if n else ():
        probes = fit_columns(
            learn, top[:, :k], torch.from_numpy(positive["train"]), counted=torch.from_numpy(counted["train"])
        )
        for split, rows in (("train", learn), ("test", judge)):
            said[split][k] = (column_logits(rows, top[:, :k], probes).numpy() > 0) & counted[split]
    f1 = {}
    for split in ("train", "test"):
        scores = [_f1_of(said[split][k], positive[split]) for k in (FEW, MORE)]
        f1[split] = (scores[0], scores[1])
    n_positive = {split: positive[split].sum(1) for split in positive}
    return SiblingTasks(names, classes, top.numpy(), n_positive, f1, said["test"], positive["test"])


def is_absorbed(
    few: Float[np.ndarray, "*n"], more: Float[np.ndarray, "*n"], alpha: float, beta: float
) -> Bool[np.ndarray, "*n"]:
    return (few < alpha) & (more > beta)


def absorption_rate(tasks: Sequence[Mapping[str, Any]], alpha: float, beta: float, split: str = "test") -> float:
    """From saved rows of `absorption_tasks`. NaN where there are none."""
    if not tasks:
        return float("nan")
    few, more = (np.array([row[f"f1_{k}_{split}"] for row in tasks], dtype=float) for k in (FEW, MORE))
    return float(is_absorbed(few, more, alpha, beta).mean())


def absorption_grid(
    tasks: Sequence[Mapping[str, Any]], alphas: Sequence[float] = ALPHAS, betas: Sequence[float] = BETAS
) -> Curve:
    return [
        {
            "alpha": alpha,
            "beta": beta,
            "split": split,
            "rate": absorption_rate(tasks, alpha, beta, split),
            "n": len(tasks),
        }
        for split in ("test", "train")
        for alpha in alphas
        for beta in betas
    ]


def check_groups(groups: Groups) -> None:
    if not groups:
        raise ValueError("there are no sibling groups: give a mapping of a parent's name to labels of its classes.")
    for name, labels in groups.items():
        if len(labels) == 0 or min(labels) < 0 or len(set(labels)) < len(labels):
            raise ValueError(f"group {name!r} must have different labels, 0 or above, got {tuple(labels)}.")


def _inside(labels: np.ndarray, members: list[list[int]]) -> Bool[np.ndarray, "n_tasks n"]:
    return np.array([np.isin(labels, group) for group in members], dtype=bool).reshape(len(members), len(labels))


def _f1_of(said: np.ndarray, positive: np.ndarray) -> Float[np.ndarray, " n_tasks"]:
    return _f1((said & positive).sum(1), said.sum(1), positive.sum(1))


def _f1(tp: np.ndarray, said: np.ndarray, positive: np.ndarray) -> np.ndarray:
    """0 where nothing is positive and nothing was said."""
    return 2 * tp / np.maximum(said + positive, 1)


def _percentiles(spread: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: np.percentile(values, [2.5, 97.5]) for name, values in spread.items()}


# -- the released package


def visaebench_absorption(
    codes: Codes, labels: Int[np.ndarray, " n"], groups: Groups, *, seed: int = 42
) -> tuple[float, Curve]:
    """`FeatureAbsorption` of visaebench 0.1.0 on max-pooled codes: its rate, and a row for each class and group.

    One group's rows are dense at a time. 0 where there is no task, as there.
    """
    from sklearn.feature_selection import f_classif
    from sklearn.linear_model import LogisticRegression

    rows: Curve = []
    for name, group in groups.items():
        here = np.isin(labels, list(group))
        if len(group) < MIN_GROUP or here.sum() < 10:
            continue
        z = columns(codes.select_rows(torch.from_numpy(np.flatnonzero(here))), torch.arange(codes.d_sae)).numpy()
        of = labels[here]
        strongest = set(np.argsort(z.mean(axis=0))[-10:])
        for c in group:
            y = (of == c).astype(np.int64)
            if min(y.sum(), len(y) - y.sum()) < 3:
                continue
            own = set(np.argsort(z[of == c].mean(axis=0))[-10:])
            overlap = len(own & strongest) / len(own | strongest)
            f1 = []
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                ranked = np.argsort(np.nan_to_num(f_classif(z, y)[0], nan=-np.inf))[::-1]
                for k in (FEW, MORE):
                    x = z[:, ranked[:k]]
                    fitted = LogisticRegression(solver="lbfgs", max_iter=500, C=1.0, random_state=seed).fit(x, y)
                    f1.append(float(_f1_of((fitted.predict(x) == 1)[None], (y == 1)[None])[0]))
            absorbed = f1[1] - f1[0] > 0.1 or overlap > 0.5
            rows.append(
                {"group": name, "class": int(c), "overlap": overlap, "f1_1": f1[0], "f1_4": f1[1], "absorbed": absorbed}
            )
    return float(np.mean([row["absorbed"] for row in rows])) if rows else 0.0, rows
