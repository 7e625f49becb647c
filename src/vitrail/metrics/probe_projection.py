"""Absorption and splitting by SAEBench's rule, and how parents' and children's latents fire together.

A parent is a group of sibling classes. Per image, means over its patches, in the coder's own space:

    y . d = sum_i z_i <W_dec_i, d> + (y - y_hat) . d + the part that no latent writes     d: unit direction of a linear
                                                                                          probe, parent against the rest
    p = sum_i z_i <W_dec_i, d> + (y - y_hat) . d                  what the latents had to say, c_i = cos(W_dec_i, d)

    main latents       the k first by F on training rows, of those that are stronger inside the parent than outside; k
                       grows from 1 as long as each adds more than 0.03 to the F1 of a k-sparse probe (10 at most)
    feature_splits     how many those are; mean over parents
    absorption_full    over test images of the parent that the probe recognises: no main latent fires, p > 0, the latent
                       with the largest z_i <W_dec_i, d> has c_i >= 0.025 and makes up 0.4 of p at least
    absorption_share   over the same: with m what the main latents say along d, a what the three that say most of the
                       others with c_i >= 0.1 do: 0 where m >= p or a < 0.4 p; else 1 where m <= 0, and otherwise
                       a' / (a' + m), a' = min(a, p - m)

Both are means over parents of means over images. And of each (parent, child class), over test images, with the parent's
first main latent and the child's own best other latent:

    absorbed    share of the child's images where the parent's latent is off and the child's is on
    missed      share where the parent's is off;   elsewhere: the same in the parent's other images
    outside     share of images outside the parent where the parent's latent is on

Range. Shares 0..1; splits from 1 to 10, or 0 where no latent is stronger inside.

Moves with. Pooling: a latent is "off" in an image only if it is silent in every patch, so dense coders have little
absorption by this rule. How well the probe reads the parent: a bad direction explains little (`probe_f1` in the curve).

Does not show. Whether the absorbing latent means the child. What M7 (absorption.py) calls absorption, which looks at no
decoder and at no parent. recovery.py asks the same as `absorbed` where a world's masks say where things are, with
thresholds of its own; here a class label and z > 0 must do.

Source. Chanin et al. 2024, arXiv:2409.14507; Karvonen et al. 2025, SAEBench, arXiv:2503.09532, whose thresholds these
are; SPEC row 147. Otherwise there: main latents come from the weights of an L1 probe, F1 of the splits from test rows,
and projections are taken from zero, with all that the bias writes in them.

Tags. "saebench-projection". Intervals over parents.

Cost. One probe of d_out dimensions a parent. What is kept: two mean rows and the mean codes of each image.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vitrail.coders.sparse import Codes, decode
from vitrail.metrics.absorption import Groups, check_groups
from vitrail.metrics.class_sums import ClassSums, ranking
from vitrail.metrics.coder_space import in_coders_space, row_terms
from vitrail.metrics.logistic_probes import fit_binary
from vitrail.metrics.measured import Measured, over_images
from vitrail.metrics.passing import Curve, Metric, Seen, Setting
from vitrail.metrics.sparse_probing import column_logits, columns, fit_columns, stratified_split
from vitrail.metrics.truth import pooled

F1_JUMP = 0.03
MAX_MAIN = 10
FULL_COSINE, SHARE_COSINE = 0.025, 0.1
PROPORTION = 0.4
N_ABSORBING = 3


class ProbeProjection(Metric):
    def __init__(
        self,
        setting: Setting,
        *,
        groups: Groups,
        test_share: float = 0.2,
        split_seed: int = 42,
        min_positives: int = 10,
    ) -> None:
        check_groups(groups)
        self._setting, self._groups, self._min_positives = setting, groups, min_positives
        self._test_share, self._split_seed = test_share, split_seed
        self._y: list[Tensor] = []
        self._error: list[Tensor] = []
        self._codes: list[Codes] = []
        self._labels: list[Tensor] = []
        self._found: tuple[Curve, Curve] | None = None

    @torch.no_grad()
    def update(self, seen: Seen) -> None:
        if seen.labels is None:
            raise ValueError("parents and children are classes: these images have no labels. Use a labelled set.")
        coder, t = self._setting.coder, seen.n_tokens
        of = np.arange(t) if self._setting.patches is None else np.arange(t)[self._setting.patches]
        rows = torch.from_numpy((np.arange(seen.n_images)[:, None] * t + of).reshape(-1)).to(seen.x.device)
        codes = seen.codes.select_rows(rows)
        terms = row_terms(codes, slice(None))
        y, y_hat = (in_coders_space(coder, each.flatten(0, 1)[rows], terms) for each in (seen.target, seen.x_hat))
        self._y.append(y.unflatten(0, (-1, len(of))).mean(1).float().cpu())
        self._error.append((y - y_hat).unflatten(0, (-1, len(of))).mean(1).float().cpu())
        self._codes.append(pooled(codes.detach().to("cpu").with_row_terms(None, None), len(of), "mean"))
        self._labels.append(seen.labels.cpu())
        self._found = None

    @property
    def found(self) -> tuple[Curve, Curve]:
        """Rows of parents, and of their children."""
        if self._found is None:
            if not self._y:
                raise ValueError("no images were measured: there is nothing to report.")
            self._found = projections(
                torch.cat(self._y),
                torch.cat(self._error),
                Codes.cat(self._codes),
                self._setting.coder.W_dec.detach().float().cpu(),
                torch.cat(self._labels).numpy().astype(np.int64),
                self._groups,
                min_positives=self._min_positives,
                test_share=self._test_share,
                split_seed=self._split_seed,
            )
        return self._found

    def compute(self, *, n_bootstrap: int = 1000, seed: int = 0) -> dict[str, Measured]:
        parents, children = self.found
        out: dict[str, Measured] = {}
        for name, rows, column in (
            ("absorption_full", parents, "full"),
            ("absorption_share", parents, "share"),
            ("feature_splits", parents, "n_main"),
            ("child_absorbed", children, "absorbed"),
            ("child_missed", children, "missed"),
            ("child_elsewhere", children, "elsewhere"),
        ):
            values = np.array([row[column] for row in rows if row[column] is not None], dtype=float)
            tag = f"saebench-projection, interval over {'parents' if rows is parents else 'children'}"
            if not len(values):
                out[name] = Measured(float("nan"), tag, 0)
                continue
            out[name] = over_images(
                {"value": values, "n": values**0},
                lambda c: c["value"] / c["n"],
                definition=tag,
                n_bootstrap=n_bootstrap,
                seed=seed,
            )
        return out

    def curves(self) -> dict[str, Curve]:
        parents, children = self.found
        return {"absorption_parents": parents, "absorption_children": children}


@torch.no_grad()
def projections(
    y: Float[Tensor, "n d"],
    error: Float[Tensor, "n d"],
    codes: Codes,
    W_dec: Float[Tensor, "d_sae d"],
    labels: Int[np.ndarray, " n"],
    groups: Groups,
    *,
    min_positives: int = 10,
    test_share: float = 0.2,
    split_seed: int = 42,
) -> tuple[Curve, Curve]:
    """Of images: mean targets, what their reconstruction lacks, mean codes. A row a parent, a row a child class."""
    if not len(y) == len(error) == codes.n == len(labels):
        raise ValueError(
            f"{len(y)} targets, {len(error)} errors, {codes.n} codes, {len(labels)} labels: not one an image."
        )
    train, test = stratified_split(labels, test_share, split_seed)
    learn, judge = (codes.select_rows(torch.from_numpy(rows)) for rows in (train, test))
    n_classes = 1 + max(int(labels.max()), *(max(group) for group in groups.values()))
    sums = ClassSums.of(learn, labels[train], n_classes)
    one_child = _Inside.of(sums, [[c] for c in range(n_classes) if 0 < sums.counts[c] < len(train)])
    child_latents = {group[0]: ranked for group, ranked in zip(one_child.groups, one_child.ranked, strict=True)}
    asked = {name: [c for c in group if sums.counts[c]] for name, group in groups.items()}
    asked = {
        name: group for name, group in asked.items() if min_positives <= sums.counts[group].sum() < len(train) and group
    }
    inside = _Inside.of(sums, list(asked.values()))
    parents: Curve = []
    children: Curve = []
    for name, group, ranked in zip(asked, inside.groups, inside.ranked, strict=True):
        mine, mine_test = np.isin(labels[train], group), np.isin(labels[test], group)
        main = main_latents(learn, ranked, mine)
        probe = fit_binary(y[train][None], torch.from_numpy(mine)[None])
        said = probe.logits(y[test][None])[0].numpy() > 0
        tp = np.flatnonzero(said & mine_test)
        direction = (probe.weight[0] / probe.weight[0].norm()).float()
        full, share = _absorbed(judge, error[test], W_dec, direction, main, tp)
        parents.append(
            {
                "parent": name,
                "n": len(tp),
                "n_main": len(main),
                "main": " ".join(map(str, main)),
                "probe_f1": float(2 * len(tp) / max(1, said.sum() + mine_test.sum())),
                "full": float(full.mean()) if len(tp) else None,
                "share": float(share.mean()) if len(tp) else None,
            }
        )
        for c in group if main else ():
            row = _firing(judge, labels[test], mine_test, c, main[0], child_latents[c])
            children += [{"parent": name, "class": int(c), **row}] if row else []
    return parents, children


def main_latents(learn: Codes, ranked: Sequence[int], positive: Bool[np.ndarray, " n"]) -> list[int]:
    """As many of the ranked as each raises F1 by more than 0.03, all on training rows."""
    main, best = 0, 0.0
    for k in range(1, min(MAX_MAIN, len(ranked)) + 1):
        top, y = torch.tensor([ranked[:k]]), torch.from_numpy(positive)[None]
        said = column_logits(learn, top, fit_columns(learn, top, y))[0].numpy() > 0
        f1 = 2 * (said & positive).sum() / max(1, said.sum() + positive.sum())
        if k > 1 and f1 <= best + F1_JUMP:
            break
        main, best = k, f1
    return [int(latent) for latent in ranked[:main]]


@dataclass(frozen=True, eq=False)
class _Inside:
    """Of each group of classes the latents that are stronger inside than outside, by F, falling."""

    groups: list[list[int]]
    ranked: list[list[int]]

    @classmethod
    def of(cls, sums: ClassSums, groups: list[list[int]]) -> "_Inside":
        ranked = []
        for group in groups:
            rest = np.setdiff1d(np.flatnonzero(sums.counts), group)
            merged = ClassSums(
                np.array([sums.counts[group].sum(), sums.counts[rest].sum()]),
                np.stack([sums.sums[group].sum(0), sums.sums[rest].sum(0)]),
                np.stack([sums.squares[group].sum(0), sums.squares[rest].sum(0)]),
            )
            f = merged.one_vs_rest([0])[0]
            means = merged.sums / np.maximum(merged.counts, 1)[:, None]
            f[~(means[0] > means[1])] = np.nan
            best = ranking(f, MAX_MAIN)
            ranked.append(best[~np.isnan(f[best])].tolist())
        return cls(groups, ranked)


def _absorbed(
    codes: Codes,
    error: Float[Tensor, "n d"],
    W_dec: Float[Tensor, "d_sae d"],
    direction: Float[Tensor, " d"],
    main: list[int],
    images: Int[np.ndarray, " m"],
) -> tuple[Bool[np.ndarray, " m"], Float[np.ndarray, " m"]]:
    """Which of the images are fully absorbed, and what share of each is."""
    along = W_dec @ direction
    cosine = along / W_dec.norm(dim=1).clamp_min(1e-12)
    some = codes.select_rows(torch.from_numpy(images))
    told = torch.zeros(codes.d_sae, dtype=torch.bool)
    told[main] = True
    p = (decode(some, along[:, None])[:, 0] + error[torch.from_numpy(images)] @ direction).numpy()
    full, share = np.zeros(len(images), dtype=bool), np.zeros(len(images))
    for i in range(len(images)):
        mine = slice(int(some.offsets[i]), int(some.offsets[i + 1]))
        latent = some.indices[mine].long()
        says = some.values[mine].float() * along[latent]
        is_main = told[latent]
        if p[i] > 0 and len(latent):
            top = int(says.argmax())
            aligned = float(cosine[latent[top]]) >= FULL_COSINE and float(says[top]) >= PROPORTION * p[i]
            full[i] = aligned and not bool(is_main.any())
            m = float(says[is_main].sum())
            others = says[~is_main & (cosine[latent] >= SHARE_COSINE) & (says > 0)]
            a = float(others.topk(min(N_ABSORBING, len(others))).values.sum())
            if m < p[i] and a >= PROPORTION * p[i]:
                taken = min(a, p[i] - m)
                share[i] = 1.0 if m <= 0 else taken / (taken + m)
    return full, share


def _firing(
    codes: Codes, labels: np.ndarray, inside: np.ndarray, c: int, parent: int, ranked: list[int]
) -> dict[str, int | float | None]:
    """Of the child `c`, where it has test images and a latent of its own."""
    own = next((latent for latent in ranked if latent != parent), None)
    here = labels == c
    if own is None or not here.any():
        return {}
    both = columns(codes, torch.tensor([parent, own])).numpy() > 0
    parent_on, child_on = both[:, 0], both[:, 1]
    rest = inside & ~here
    return {
        "n": int(here.sum()),
        "parent_latent": parent,
        "child_latent": own,
        "absorbed": float((~parent_on & child_on)[here].mean()),
        "missed": float((~parent_on)[here].mean()),
        "elsewhere": float((~parent_on)[rest].mean()) if rest.any() else None,
        "outside": float(parent_on[~inside].mean()) if (~inside).any() else None,
    }
