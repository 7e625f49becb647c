"""Downstream preservation (ViSAEBench M3): the accuracy of a linear classifier on reconstructions, over that on what
they reconstruct.

    u(x) = max over patches of (x - mean) / s,     mean (d,), s: one number, sqrt of the mean variance
    preservation = acc(phi(u(x_hat))) / acc(phi(u(x)))     phi: logistic regression, fitted on u(x) of other images
    preservation_refit = acc(psi(u(x_hat))) / acc(phi(u(x)))     psi: the same, fitted on their u(x_hat)
    probe_accuracy, recon_probe_accuracy, recon_refit_accuracy   the three accuracies
    preservation_same        share of images whose answer phi leaves as it is

Range. From 0; about 1 where nothing is lost, and above it where errors happen to help. Bounded below, in effect, by
chance over probe_accuracy: read it beside the accuracies.

Moves with. The number of classes and of training images: where phi has little to lose, little is lost. The pooling: a
maximum over patches keeps outliers, which reconstructions shrink; phi then sees rows that are off in all dimensions,
where psi would not. L0 before all.

Does not show. Which images: as many answers may change for the better as for the worse (preservation_same). That a
layer's patches are what a model reads its answer from. Nor what latents mean; that needs a probe on codes.

Source. ViSAEBench section 4.2 and Table 2 (multinomial, lbfgs, C = 1, at most 1000 iterations; stratified 80 / 20 of
the evaluation images, seed 42, the same for both); section 4.3 for separate probes (M6); SPEC rows 69 and 76. Rows are
reconstructed, then pooled. lbfgs runs on to 1e-8 where scikit-learn stops at 1e-4 by itself: two coders must not differ
by where it stopped. mean and s are those of the training images' patches: C weighs a norm, and so depends on s.

Tags. "max-pool, lbfgs C=1" or "mean-pool, ..."; "refit" for psi. The interval is a bootstrap over the test images, in
pairs; the probes stay as they are. compat="visaebench-0.1", key `preservation_visaebench`: mean-pooled, as given (the
released package subtracts nothing unless told to), at lbfgs' usual tolerance, cut off at 2.

Cost. One fit an evaluation set, shared by coders that are given one `Probes`; with `refit` one more a coder. Kept: two
rows an image.
"""

import hashlib
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from vitrail.metrics.measured import Measured, over_images
from vitrail.metrics.moran import COMPAT
from vitrail.metrics.multinomial import fit_logistic
from vitrail.metrics.passing import Metric, Seen, Setting

POOLS = ("max", "mean")
TEST_SHARE, SPLIT_SEED = 0.2, 42
C, MAX_ITERATIONS, TOLERANCE = 1.0, 1000, 1e-8
MOST = 2.0  # of the released package


@dataclass(frozen=True, eq=False)
class Probe:
    """Multinomial logistic regression of pooled rows. `classes`: the label that each row of weights stands for."""

    weight: Float[Tensor, "n_classes d"]
    bias: Float[Tensor, " n_classes"]
    classes: Int[Tensor, " n_classes"]
    converged: bool
    n_rows: int

    def __call__(self, u: Float[Tensor, "n d"]) -> Int[Tensor, " n"]:
        """The labels it gives. Raises ValueError for rows of another width."""
        if u.shape[1] != self.weight.shape[1]:
            raise ValueError(f"this probe was fitted on rows of {self.weight.shape[1]} dimensions, got {u.shape[1]}.")
        return self.classes[(u.double() @ self.weight.t() + self.bias).argmax(1)]


def fit_probe(
    u: Float[Tensor, "n d"],
    labels: Int[Tensor, " n_labels"],
    *,
    c: float = C,
    max_iterations: int = MAX_ITERATIONS,
    tolerance: float = TOLERANCE,
    released: bool = False,
) -> Probe:
    """scikit-learn's regression: of two classes it has one vector of weights. `released`: fitted by itself, in the
    precision of `u`, which ends where it ends.

    Raises ValueError if there is one class, or not one label a row. Warns where it did not come to an end: its answers
    then depend on where it stopped.
    """
    if len(u) != len(labels):
        raise ValueError(f"{len(u)} rows and {len(labels)} labels: there must be one label a row.")
    classes, own = torch.unique(labels, return_inverse=True)
    if len(classes) < 2:
        raise ValueError("a probe tells classes apart: these rows are all of one class.")
    if released:
        weight, bias, converged = _by_scikit_learn(u, own, c, max_iterations, tolerance)
    else:
        of_two = c / 2 if len(classes) == 2 else c
        found = fit_logistic(u, own, c=of_two, tol=tolerance, max_iter=max_iterations)
        weight, bias, converged = found.weight, found.bias, found.converged
    if not converged:
        warnings.warn(
            f"a probe of {len(u)} rows and {len(classes)} classes did not converge in {max_iterations} iterations.",
            stacklevel=2,
        )
    return Probe(weight, bias, classes, converged, len(u))


def _by_scikit_learn(
    u: Float[Tensor, "n d"], own: Int[Tensor, " n"], c: float, max_iterations: int, tolerance: float
) -> tuple[Float[Tensor, "n_classes d"], Float[Tensor, " n_classes"], bool]:
    try:
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.linear_model import LogisticRegression
    except ImportError as error:
        raise ImportError("the released package's probe is scikit-learn's: pip install \"vitrail[probes]\".") from error
    model = LogisticRegression(C=c, max_iter=max_iterations, tol=tolerance)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(u.numpy(), own.numpy())
    weight, bias = (torch.from_numpy(of).double() for of in (model.coef_, model.intercept_))
    if len(model.classes_) == 2:  # it keeps one row for two classes
        weight, bias = torch.cat([-weight, weight]) / 2, torch.cat([-bias, bias]) / 2
    return weight, bias, bool(np.max(model.n_iter_) < max_iterations)


@dataclass(eq=False)
class Probes:
    """Probes that were fitted, by what they were fitted on: coders at one point share that of the raw rows."""

    _fitted: dict[str, Probe] = field(default_factory=dict)

    def fit(self, u: Float[Tensor, "n d"], labels: Int[Tensor, " n"], **how: Any) -> Probe:
        """`how`: of `fit_probe`."""
        digest = hashlib.sha256(f"{tuple(u.shape)} {u.dtype} {sorted(how.items())}".encode())
        for part in (u, labels):
            digest.update(part.contiguous().numpy().tobytes())
        if (key := digest.hexdigest()) not in self._fitted:
            self._fitted[key] = fit_probe(u, labels, **how)
        return self._fitted[key]


class Preservation(Metric):
    """Keeps the pooled rows, raw and reconstructed, of each image. Nothing without labels.

    `pool`: "max" or "mean", over patches (over all of an image's rows where there are none). `refit`: fits psi as well.
    `standardize`: u as above; False: pooled rows as they are.
    """

    def __init__(
        self,
        setting: Setting,
        *,
        pool: str = "max",
        refit: bool = False,
        standardize: bool = True,
        test_share: float = TEST_SHARE,
        split_seed: int = SPLIT_SEED,
        probes: Probes | None = None,
        compat: str | None = None,
    ) -> None:
        if pool not in POOLS:
            raise ValueError(f"pool must be 'max' or 'mean', got {pool!r}.")
        if not 0 < test_share < 1:
            raise ValueError(f"test_share must lie between 0 and 1, got {test_share}.")
        if compat not in (None, COMPAT):
            raise ValueError(f"compat must be {COMPAT!r} or None, got {compat!r}.")
        if compat:
            pool, refit, standardize = "mean", False, False
        self._compat, self._pool, self._refit, self._standardize = compat, pool, refit, standardize
        self._test_share, self._split_seed = test_share, split_seed
        self._probes = Probes() if probes is None else probes
        self._patches = setting.patches or slice(0, setting.n_tokens)
        self._raw: list[Tensor] = []
        self._recon: list[Tensor] = []
        self._labels: list[Tensor] = []
        self._unlabelled = 0
        # Of the patches, image by image, so that those of the training images can be told from the others.
        self._sum: list[Tensor] = []
        self._square: list[Tensor] = []
        self._shift = setting.shift.double().cpu()

    @torch.no_grad()
    def update(self, seen: Seen) -> None:
        if seen.labels is None:
            self._unlabelled += seen.n_images
            return
        rows, x_hat = (of[:, self._patches] for of in (seen.target, seen.x_hat))
        self._raw.append(pooled_rows(rows, self._pool).float().cpu())
        self._recon.append(pooled_rows(x_hat, self._pool).float().cpu())
        self._labels.append(seen.labels.cpu().long())
        if self._standardize:
            centred = rows.double() - self._shift.to(rows.device)
            self._sum.append(centred.mean(1).cpu())
            self._square.append(centred.square().mean((1, 2)).cpu())

    def compute(self, *, n_bootstrap: int = 1000, seed: int = 0) -> dict[str, Measured]:
        """Warns and gives nothing where the images cannot be divided, as with a class of a single one."""
        if not self._raw:
            if not self._unlabelled:
                raise ValueError("no images were measured: there is nothing to report.")
            return {}
        labels = torch.cat(self._labels)
        parts = split(labels, self._test_share, self._split_seed)
        if isinstance(parts, str):
            warnings.warn(f"preservation is left out: {parts}", stacklevel=2)
            return {}
        train, test = parts
        raw, recon = self._standardized(torch.cat(self._raw), torch.cat(self._recon), train)
        how: dict[str, Any] = {"tolerance": 1e-4, "released": True} if self._compat else {}
        probe = self._probes.fit(raw[train], labels[train], **how)
        before, after, y = probe(raw[test]), probe(recon[test]), labels[test]
        columns = {"raw": before == y, "recon": after == y, "same": before == after}
        if self._refit:
            columns["refit"] = fit_probe(recon[train], labels[train])(recon[test]) == y
        as_numbers = {name: of.double().numpy() for name, of in columns.items()}
        tag = COMPAT if self._compat else f"{self._pool}-pool, lbfgs C={C:g}"
        tag += "" if self._standardize or self._compat else ", as given"
        return self._measured(as_numbers, tag, n_bootstrap=n_bootstrap, seed=seed)

    def _measured(self, columns: Mapping[str, NDArray[np.float64]], tag: str, **drawn: int) -> dict[str, Measured]:
        columns = {**columns, "n": np.ones(len(columns["raw"]))}

        def ratio(of: str, over: str, definition: str = tag) -> Measured:
            return over_images(columns, lambda sums: sums[of] / sums[over], definition=definition, **drawn)

        if self._compat:
            found = ratio("recon", "raw")
            low, high = (None if end is None else min(end, MOST) for end in (found.low, found.high))
            value = 0.0 if math.isnan(found.value) or not columns["raw"].any() else min(found.value, MOST)
            return {"preservation_visaebench": Measured(value, tag, found.n, low, high)}
        out = {
            "preservation": ratio("recon", "raw"),
            "preservation_same": ratio("same", "n"),
            "probe_accuracy": ratio("raw", "n"),
            "recon_probe_accuracy": ratio("recon", "n"),
        }
        if "refit" in columns:
            out["preservation_refit"] = ratio("refit", "raw", f"{tag}, refit")
            out["recon_refit_accuracy"] = ratio("refit", "n", f"{tag}, refit")
        return out

    def _standardized(
        self, raw: Float[Tensor, "n d"], recon: Float[Tensor, "n d"], train: Int[Tensor, " m"]
    ) -> tuple[Float[Tensor, "n d"], Float[Tensor, "n d"]]:
        if not self._standardize:
            return raw, recon
        offset = torch.cat(self._sum)[train].mean(0)
        variance = float(torch.cat(self._square)[train].mean() - offset.square().mean())
        mean, s = offset + self._shift, math.sqrt(variance) if variance > 0 else 1.0
        # A maximum commutes with a shift and a positive scale.
        return (raw.double() - mean) / s, (recon.double() - mean) / s


def pooled_rows(rows: Float[Tensor, "b t d"], pool: str) -> Float[Tensor, "b d"]:
    return rows.amax(1) if pool == "max" else rows.mean(1)


def split(labels: Int[Tensor, " n"], test_share: float, seed: int) -> tuple[Tensor, Tensor] | str:
    """(training images, test images), each class divided alike: scikit-learn's stratified split. In words, why not."""
    try:
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise ImportError('images are divided by scikit-learn: pip install "vitrail[probes]".') from error
    counts = labels.unique(return_counts=True)[1]
    if len(counts) < 2:
        return "all labelled images are of one class."
    if int(counts.min()) < 2:
        return f"{int((counts < 2).sum())} of {len(counts)} classes have a single image; two of each are needed."
    n_test = math.ceil(test_share * len(labels))
    if min(n_test, len(labels) - n_test) < len(counts):
        return f"{len(labels)} images do not divide into {len(counts)} classes on both sides."
    train, test = train_test_split(np.arange(len(labels)), test_size=test_share, stratify=labels, random_state=seed)
    return torch.from_numpy(train), torch.from_numpy(test)
