"""Cross-domain (ViSAEBench M6): what a coder fitted on one domain keeps of another: drawings, birds, textures.

    u(x)   max over patches of (x - mean) / s, mean and s those of the home domain's patches
    cross_domain_preservation   acc(psi(u(x_hat))) / acc(phi(u(x)))    phi, psi: a logistic regression each, fitted on
                                the other domain's own training images, on raw and on reconstructed rows
    cross_domain_raw_accuracy, _recon_accuracy    the two
    cross_domain_codes_accuracy_k                 on codes, max-pooled: the k latents of largest F on training images
    cross_domain_fvu                              sum ||x - x_hat||^2 / sum ||x - mean(x)||^2 there

and, where the home domain was measured too (`home`):

    cross_domain_alive_kept   share of the latents alive at home that fire on any picture here
    cross_domain_jaccard      latents alive in both over latents alive in either

and, where labels mean the same classes in both (`same_classes`), which tells a shift of style from one of subject:

    cross_domain_selective_home, _selective   mean over classes of the AUC, on home's test images and here, of the
                                              latent with the best AUC for the class on home's training images
    cross_domain_selective_kept               sum (AUC here - 0.5) / sum (AUC at home - 0.5)
    cross_domain_transfer_raw, _recon, _codes accuracy here of a probe that was fitted at home

Range. Accuracies and shares 0..1, AUC 0.5 by chance; preservation about 1 where nothing is lost; selective_kept 1 where
a class's latent means the class as much here as at home, 0 where it means nothing.

Moves with. The other domain's classes and pictures before all: of 10,000 classes an accuracy is a few per cent, and any
ratio of it noise. alive_kept rises with the number of pictures, jaccard falls as the two numbers differ.

Does not show. That a coder generalises: separate probes refit to whatever is left (transfer_ does not). Preservation of
several data sets has no mean: each is a number by itself, as is each data set's chance.

Source. ViSAEBench section 4.3, appendices L and M; SPEC rows 76 and 77. The paper's two optimisers (lbfgs to 500 steps,
Adam for 50 epochs) end in different places: here the optimum, C = 1. Selective latents and transfer are no paper's.

Tags. "max-pool, logistic C=1" and so on. Intervals: a bootstrap over the other domain's test images, in pairs for
ratios; over classes for selective_. compat="visaebench-0.1", key `cross_domain_visaebench`: another thing, the mean of
1 - FVU (less squares of sums over dimensions, not of means; cut to 0..1), alive_kept, jaccard and the accuracy of 10
latents; four units that only a leaderboard adds.

Cost. A fit each for raw, recon and codes. Kept: two rows and the pooled codes of each picture.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from vitrail.coders.sparse import Codes
from vitrail.metrics.class_sums import ClassSums, ranking
from vitrail.metrics.column_probes import columns
from vitrail.metrics.entries import Entries
from vitrail.metrics.features import Features
from vitrail.metrics.measured import Measured, over_images
from vitrail.metrics.multinomial import fit_logistic
from vitrail.metrics.passing import Metric, Seen, Setting
from vitrail.metrics.sparse_probing import stratified_split
from vitrail.metrics.truth import Firing

COMPAT = "visaebench-0.1"
K, COMPAT_K = 128, 10
AT_ONCE = 4  # images


@dataclass(frozen=True, eq=False)
class Domain:
    """Pictures of one domain, pooled over their patches by maximum. Rows as they are until `standardized`."""

    raw: Float[Tensor, "n d"]
    recon: Float[Tensor, "n d"]
    codes: Codes
    labels: Int[Tensor, " n"]
    mean: Float[Tensor, " d"]  # of patches
    scale: float  # sqrt of the patches' mean variance over dimensions
    total_square: Float[Tensor, " n"]  # per picture: of patches about `mean`, and of errors
    error: Float[Tensor, " n"]
    pooled_fvu: float  # the released package's

    @property
    def n(self) -> int:
        return len(self.labels)

    def standardized(self, by: "Domain") -> "Domain":
        raw, recon = ((rows - by.mean.to(rows.dtype)) / by.scale for rows in (self.raw, self.recon))
        return replace(self, raw=raw, recon=recon)

    def features(self, rows: Int[Tensor, " m"], latents: Int[Tensor, " k"]) -> dict[str, Features]:
        picked = columns(self.codes.select_rows(rows), latents)
        return {"raw": self.raw[rows], "recon": self.recon[rows], "codes": picked}


class CrossDomain(Metric):
    """Of a pass over the other domain. A pass over the home domain with the same metric gives `home`: its `domain()`.

    `k`: latents that the probe on codes reads. `same_classes`: label 3 is the same class in both domains.
    """

    def __init__(
        self,
        setting: Setting,
        *,
        home: Domain | None = None,
        same_classes: bool = False,
        k: int = K,
        c: float = 1.0,
        test_share: float = 0.2,
        split_seed: int = 42,
        compat: str | None = None,
    ) -> None:
        if compat not in (None, COMPAT):
            raise ValueError(f"compat must be {COMPAT!r} or None, got {compat!r}.")
        if home is None and (same_classes or compat):
            raise ValueError("same_classes and compat compare with the home domain: give `home`, its domain().")
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}.")
        self._home, self._same, self._compat = home, same_classes, compat
        self._k, self._c = min(k, setting.d_sae), c
        self._split = (test_share, split_seed)
        self._n_tokens, self._patches = setting.n_tokens, setting.patches
        self._shift = setting.shift.double().cpu()
        self._raw: list[Tensor] = []
        self._recon: list[Tensor] = []
        self._codes: list[Codes] = []
        self._labels: list[Tensor] = []
        self._sums: list[Tensor] = []  # per picture, of patches about `shift`: d sums
        self._per_image: list[Tensor] = []  # squares, squared errors, sums of all values of x, x^2, error: 5
        self._n_patches = 0

    @torch.no_grad()
    def update(self, seen: Seen) -> None:
        if seen.labels is None:
            raise ValueError("cross-domain probes read classes: these images have no labels. Use a labelled folder.")
        at = slice(None) if self._patches is None else self._patches
        self._codes.append(Firing.of_codes(seen.codes, self._n_tokens, self._patches).images)
        self._labels.append(seen.labels.cpu().long())
        # A few images at a time: in double precision a batch is large, and stays in the cache so.
        for x, x_hat in zip(seen.target[:, at].split(AT_ONCE), seen.x_hat[:, at].split(AT_ONCE), strict=True):
            self._add(x.double().cpu(), x_hat.double().cpu())

    def _add(self, x: Float[Tensor, "b p d"], x_hat: Float[Tensor, "b p d"]) -> None:
        self._raw.append(x.amax(1).float())
        self._recon.append(x_hat.amax(1).float())
        centred, error = x - self._shift, x - x_hat
        self._sums.append(centred.sum(1))
        parts = (centred.square(), error.square(), x, x.square(), error)
        self._per_image.append(torch.stack([part.sum((1, 2)) for part in parts], 1))
        self._n_patches = x.shape[1]

    def domain(self) -> Domain:
        """What was seen, as a home for others or for itself."""
        if not self._labels:
            raise ValueError("no images were measured: there is nothing to report.")
        sums, per_image = torch.cat(self._sums), torch.cat(self._per_image)
        n, d, t = *sums.shape, self._n_patches
        offset = sums.sum(0) / (n * t)
        square = per_image[:, 0] - 2 * sums @ offset + t * offset.square().sum()
        variance = float(square.sum() / (n * t * d))
        _, errors, x, x2, error = (per_image.sum(0) / (n * t)).tolist()
        own, left = x2 - x**2, max(0.0, errors - error**2)  # sums over dimensions, less the square of their sum's mean
        return Domain(
            torch.cat(self._raw),
            torch.cat(self._recon),
            Codes.cat(self._codes),
            torch.cat(self._labels),
            offset + self._shift,
            math.sqrt(variance) if variance > 0 else 1.0,
            square,
            per_image[:, 1],
            left / own if own > 0 else 1.0,
        )

    def compute(self, *, n_bootstrap: int = 1000, seed: int = 0) -> dict[str, Measured]:
        given = {"n_bootstrap": n_bootstrap, "seed": seed}
        there = self.domain()
        by = there if self._home is None else self._home
        out = _probes(there.standardized(by), self._k, self._c, *self._split, **given)
        out["cross_domain_fvu"] = over_images(
            {"error": there.error.numpy(), "total": there.total_square.numpy()},
            lambda s: s["error"] / s["total"],
            definition="ratio-of-sums",
            **given,
        )
        if self._home is not None:
            out |= _alive(self._home.codes, there.codes)
            if self._same:
                home, other = self._home.standardized(self._home), there.standardized(self._home)
                out |= _selective(home, other, *self._split, **given)
                out |= _transfer(home, other, self._k, self._c, *self._split, **given)
            if self._compat:
                out["cross_domain_visaebench"] = _released(self._home, there)
        return out


def _probes(domain: Domain, k: int, c: float, test_share: float, split_seed: int, **given: int) -> dict[str, Measured]:
    train, test = _split(domain, test_share, split_seed)
    latents = best_latents(domain.codes.select_rows(train), domain.labels[train], k)
    fitted, asked = domain.features(train, latents), domain.features(test, latents)
    hits = _hits({name: fit_logistic(x, domain.labels[train], c=c) for name, x in fitted.items()}, asked, domain, test)
    tag = f"max-pool, logistic C={c:g}"
    out = {
        "cross_domain_preservation": over_images(hits, lambda s: s["recon"] / s["raw"], definition=tag, **given),
    }
    for name, key in (("raw", "raw_accuracy"), ("recon", "recon_accuracy"), ("codes", f"codes_accuracy_{k}")):
        out[f"cross_domain_{key}"] = _mean(hits, name, tag if name != "codes" else f"{tag}, {k} latents by F", **given)
    return out


def _transfer(
    home: Domain, other: Domain, k: int, c: float, test_share: float, split_seed: int, **given: int
) -> dict[str, Measured]:
    """The home domain's probes on all of the other's pictures whose class home has."""
    train, _ = _split(home, test_share, split_seed)
    known = torch.isin(other.labels, home.labels[train]).nonzero()[:, 0]
    if len(known) == 0:
        raise ValueError("same_classes: the two domains have no class in common.")
    latents = best_latents(home.codes.select_rows(train), home.labels[train], k)
    probes = {name: fit_logistic(x, home.labels[train], c=c) for name, x in home.features(train, latents).items()}
    hits = _hits(probes, other.features(known, latents), other, known)
    tag = f"max-pool, logistic C={c:g}, fitted at home"
    return {f"cross_domain_transfer_{name}": _mean(hits, name, tag, **given) for name in ("raw", "recon", "codes")}


def _selective(home: Domain, other: Domain, test_share: float, split_seed: int, **given: int) -> dict[str, Measured]:
    train, test = _split(home, test_share, split_seed)
    choose, score, there = (
        Entries(codes) for codes in (home.codes.select_rows(train), home.codes.select_rows(test), other.codes)
    )
    at_home, here = [], []
    for c in torch.unique(home.labels[train]).tolist():
        shown = [(labels == c).numpy() for labels in (home.labels[train], home.labels[test], other.labels)]
        if not all(0 < one.sum() < len(one) for one in shown):
            continue
        latent = int(choose.best((shown[0], None))[2].argmax())
        at_home.append(score.best((shown[1], None))[2][latent])
        here.append(there.best((shown[2], None))[2][latent])
    if not here:
        raise ValueError("same_classes: the two domains have no class in common.")
    sums = {"home": np.array(at_home), "here": np.array(here), "n": np.ones(len(here))}
    tag = "best AUC at home, over classes"
    return {
        "cross_domain_selective_home": over_images(sums, lambda s: s["home"] / s["n"], definition=tag, **given),
        "cross_domain_selective": over_images(sums, lambda s: s["here"] / s["n"], definition=tag, **given),
        "cross_domain_selective_kept": over_images(
            sums, lambda s: (s["here"] - 0.5 * s["n"]) / (s["home"] - 0.5 * s["n"]), definition=tag, **given
        ),
    }


def _alive(home: Codes, other: Codes) -> dict[str, Measured]:
    if home.d_sae != other.d_sae:
        raise ValueError(f"home has {home.d_sae} latents, these codes {other.d_sae}: they are of different coders.")
    a, b = home.fired() > 0, other.fired() > 0
    both, either = int((a & b).sum()), int((a | b).sum())
    tag = f"any of {home.n} and of {other.n} pictures"
    return {
        "cross_domain_alive_kept": Measured(both / int(a.sum()) if a.any() else 1.0, tag, int(a.sum())),
        "cross_domain_jaccard": Measured(both / either if either else 0.0, tag, either),
    }


def _released(home: Domain, other: Domain) -> Measured:
    """The released package's composite, by its own calls of scikit-learn."""
    try:
        from sklearn.feature_selection import f_classif
        from sklearn.linear_model import LogisticRegression
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise ImportError('compat="visaebench-0.1" calls scikit-learn: pip install "vitrail[probes]".') from error
    z, labels = other.codes.to_dense().float().numpy(), other.labels.numpy()
    counts = np.bincount(labels)
    given = {"test_size": 0.2, "stratify": labels if counts.min() >= 2 else None, "random_state": 42}
    train, test = (np.asarray(rows) for rows in train_test_split(np.arange(len(z)), **given))
    moves = z[train].std(0) > 0
    f = np.full(z.shape[1], -np.inf)  # latents that do not move have no F; the package puts them last
    f[moves] = np.nan_to_num(f_classif(z[train][:, moves], labels[train])[0], nan=-np.inf)
    chosen = np.argsort(f)[::-1][:COMPAT_K]
    probe = LogisticRegression(C=1.0, max_iter=500).fit(z[train][:, chosen], labels[train])
    accuracy = probe.score(z[test][:, chosen], labels[test])
    alive = _alive(home.codes, other.codes)
    parts = [
        min(1.0, max(0.0, 1 - other.pooled_fvu)),
        alive["cross_domain_alive_kept"].value,
        alive["cross_domain_jaccard"].value,
        float(accuracy),
    ]
    return Measured(float(np.mean(parts)), COMPAT, other.n)


# -- helpers


def best_latents(codes: Codes, labels: Int[Tensor, " n"], k: int) -> Int[Tensor, " k"]:
    """The k latents of largest F over all classes."""
    classes, own = np.unique(labels.numpy(), return_inverse=True)
    if len(classes) < 2:
        raise ValueError("a probe tells classes apart: these images are all of one class.")
    return torch.from_numpy(ranking(ClassSums.of(codes, own, len(classes)).all_classes(), k).copy())


def _split(domain: Domain, test_share: float, seed: int) -> tuple[Tensor, Tensor]:
    train, test = stratified_split(domain.labels.numpy(), test_share, seed)
    return torch.from_numpy(train), torch.from_numpy(test)


def _hits(
    probes: dict[str, Any], features: dict[str, Features], domain: Domain, rows: Int[Tensor, " m"]
) -> dict[str, np.ndarray]:
    right = {name: probes[name].predict(x) == domain.labels[rows] for name, x in features.items()}
    return {name: one.double().numpy() for name, one in right.items()} | {"n": np.ones(len(rows))}


def _mean(sums: dict[str, np.ndarray], name: str, definition: str, **given: int) -> Measured:
    return over_images(sums, lambda s: s[name] / s["n"], definition=definition, **given)
