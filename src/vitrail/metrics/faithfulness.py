"""Causal faithfulness: does the model's answer hang on the latents that attribution names?

    value(S)       = x + decode(z with the latents of S alone) - decode(z)    put at the point, at all tokens at once;
                                                                             what the coder misses stays
    attribution_i  = sum over tokens of z_i d logit / d z_i                   one ranking for each image
    drop(m)        = score(all latents) - score(all but the m first)          deletion
    gain(m)        = score(the m first) - score(no latents)                   insertion
    area           = of a curve over log2(1 + m) / log2(1 + n), n: the image's active latents; trapezoids
    necessity      = area of drop in the order of attribution - in another order
    sufficiency    = area of gain in the order of attribution - in another order

The score is the head's logit (or probability) of one class: the clean prediction, or the label; the ranking is by the
logit either way. Other orders: "random", and "matched", in which each latent changes places with one of those of about
its own activation in the image (a decile of the sum over tokens): as many large latents are deleted, but others. m = 0,
1, 2, 4, 8 ... and all; each doubling weighs the same in an area.

Range. In units of the score: logits, without bounds, or probabilities, -1..1. 0: the order of attribution is no better
than the other. `latents_effect` = score(all) - score(none) is what there is to be explained; an area of drop or gain
cannot be read without it.

Moves with. L0: more active latents, longer curves. How much the coder misses: that part is never deleted, so a coder
that reconstructs nothing has an effect of 0 and a necessity of 0. The scale of logits (a zero-shot head's temperature).

Does not show. That a latent means something. Attribution is of first order: exact where the model behind the point is
linear, and a ranking that fails in a saturated model fails here too. Latents with negative attribution come last:
deletion of the last few raises the score again.

Source. SPEC row 145. Curves: Petsiuk et al. 2018, arXiv:1806.07421 (there over pixels); gradient x activation through a
coder with its error term: Marks et al. 2024, arXiv:2403.19647.

Tags. "area-log2/SCORE/OF" with SCORE logit or probability and OF prediction or label; "mean/SCORE/OF". Intervals are
over images; the two areas of a difference are of the same images.

Cost. One backward, and per order 2 runs of the blocks after the point at each m that is less than the batch's largest
n, with one decode each; `cost()` says how many there were. Two numbers are kept for each step, order and image.
"""

import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vitrail.backbones.base import Backbone
from vitrail.coders.base import SparseCoder
from vitrail.images.base import ImageSource
from vitrail.images.loader import load_batches
from vitrail.metrics.heads import Head
from vitrail.metrics.measured import Array, Measured, over_images
from vitrail.metrics.passing import Curve
from vitrail.metrics.places import Place, Tokens, check_place, decoded, place_of
from vitrail.metrics.substitution import Rerun
from vitrail.progress import SILENT, Progress
from vitrail.store.tokens import stored_kind

ORDERS = ("attribution", "random", "matched")
SCORES, OF = ("logit", "probability"), ("prediction", "label")
N_QUANTILES = 10


class Faithfulness:
    """Streams over batches of images. A transcoder needs `target_point`, a crosscoder `points`."""

    def __init__(
        self,
        backbone: Backbone,
        coder: SparseCoder,
        *,
        point: str,
        tokens: str,
        head: Head,
        target_point: str | None = None,
        points: Sequence[str] = (),
        score: str = "logit",
        of: str = "prediction",
        seed: int = 0,
    ) -> None:
        if score not in SCORES or of not in OF:
            raise ValueError(
                f"score must be one of {', '.join(SCORES)} and of one of {', '.join(OF)}, got {score!r} and {of!r}."
            )
        self.backbone, self.coder, self.head, self.seed = backbone, coder.eval(), head, seed
        self.score, self.of = score, of
        self.place: Place = place_of(coder, point=point, target_point=target_point, points=points)
        check_place(backbone, coder, self.place, name=coder.name)
        self._tokens = Tokens(backbone.grid, stored_kind(tokens, has_tokens=backbone.point(point).has_tokens))
        self._steps = [0, *(2**i for i in range(coder.d_sae.bit_length()) if 2**i < coder.d_sae)]
        self._curves: dict[str, list[Array]] = {f"{way} {o}": [] for way in ("drop", "gain") for o in ORDERS}
        self._effect: list[Array] = []
        self._n_active: list[Array] = []
        self._n_seen = self._runs = self._rows_run = 0
        self._seconds = 0.0

    def update(self, images: Float[Tensor, "b 3 h w"], labels: Int[Tensor, " b"] | None = None) -> None:
        began = time.perf_counter()
        if self.of == "label" and labels is None:
            raise ValueError("the score is of the label's class, and these images have none. Use of='prediction'.")
        with torch.no_grad():
            batch = _Batch(self, images)
            classes = batch.clean.argmax(1) if self.of == "prediction" else labels
            assert classes is not None
            batch.attribute(classes)
            self._take(batch, classes)
        self._n_seen += len(images)
        self._runs += batch.n_runs
        self._rows_run += batch.n_runs * len(images)
        self._seconds += time.perf_counter() - began

    def _take(self, batch: "_Batch", classes: Int[Tensor, " b"]) -> None:
        seeds = [(self.seed, self._n_seen + i) for i in range(batch.n_images)]
        places = {"attribution": batch.order_of(batch.attribution)}
        places["random"] = batch.random_order(seeds)
        places["matched"] = batch.matched_order(places["attribution"], seeds)
        n = batch.n_active.cpu().numpy()
        everything = self._score(batch.clean, classes)
        nothing = self._score(batch.logits(batch.none()), classes)
        self._effect.append(everything - nothing)
        self._n_active.append(n.astype(np.float64))
        for order, place in places.items():
            drop, gain = [np.zeros_like(everything)], [np.zeros_like(everything)]
            for m in self._steps[1:]:
                if m >= n.max(initial=0):  # all are gone in every image
                    drop.append(everything - nothing)
                    gain.append(everything - nothing)
                    continue
                drop.append(everything - self._score(batch.logits(place >= m), classes))
                gain.append(self._score(batch.logits(place < m), classes) - nothing)
            for way, columns in (("drop", drop), ("gain", gain)):
                self._curves[f"{way} {order}"].append(np.stack([*columns, everything - nothing], 1))

    def _score(self, logits: Float[Tensor, "b c"], classes: Int[Tensor, " b"]) -> Array:
        return scores(logits, classes, self.score).numpy()

    def compute(self, *, n_bootstrap: int = 1000, seed: int = 0) -> dict[str, Measured]:
        """`necessity`, `sufficiency` (against random), the same "_matched", the areas they are differences of, and
        `latents_effect`.
        """
        if not self._effect:
            raise ValueError("no images were measured: there is nothing to report.")
        n_active = np.concatenate(self._n_active)
        columns = {name: areas(np.concatenate(curves), self._steps, n_active) for name, curves in self._curves.items()}
        columns |= {"effect": np.concatenate(self._effect), "active": n_active, "n": np.ones(len(n_active))}

        def mean(*names: str, tag: str) -> Measured:
            """Of the first column, less the second where there is one."""
            return over_images(
                columns,
                lambda c: (c[names[0]] - (c[names[1]] if len(names) > 1 else 0.0)) / c["n"],
                definition=f"{tag}/{self.score}/{self.of}",
                n_bootstrap=n_bootstrap,
                seed=seed,
            )

        out = {}
        for way, name in (("drop", "necessity"), ("gain", "sufficiency")):
            out[name] = mean(f"{way} attribution", f"{way} random", tag="area-log2")
            out[f"{name}_matched"] = mean(f"{way} attribution", f"{way} matched", tag="area-log2")
            for order in ORDERS:
                kind = "deletion" if way == "drop" else "insertion"
                out[f"{kind}_area_{order}"] = mean(f"{way} {order}", tag="area-log2")
        return out | {"latents_effect": mean("effect", tag="mean"), "latents_active": mean("active", tag="mean")}

    def curves(self) -> dict[str, Curve]:
        """`deletion` (the drop) and `insertion` (the gain): mean over images at each m, by order. `images`: how many
        have more than m active latents. The last row is of all latents, `latents` their mean number.
        """
        n_active = np.concatenate(self._n_active)
        at = [*(float(m) for m in self._steps), float(n_active.mean())]
        more = [*(int((n_active > m).sum()) for m in self._steps), 0]
        out: dict[str, Curve] = {}
        for way, name in (("drop", "deletion"), ("gain", "insertion")):
            means = {order: np.concatenate(self._curves[f"{way} {order}"]).mean(0) for order in ORDERS}
            out[name] = [
                {
                    "latents": m,
                    "all": i == len(self._steps),
                    "images": more[i],
                    **{order: float(means[order][i]) for order in ORDERS},
                }
                for i, m in enumerate(at)
            ]
        return out

    def cost(self) -> dict[str, Any]:
        """`runs` of the blocks after the point, each of a whole batch; `runs_per_image` counts images one by one."""
        return {
            "seconds": round(self._seconds, 3),
            "runs": self._runs,
            "runs_per_image": round(self._rows_run / max(self._n_seen, 1), 2),
        }


class _Batch:
    """One batch: its codes, and what the model makes of some of them."""

    def __init__(self, asked: Faithfulness, images: Float[Tensor, "b 3 h w"]) -> None:
        self.coder, self.head, self._tokens, self._place = asked.coder, asked.head, asked._tokens, asked.place
        self.run = Rerun(asked.backbone, (*self._place.reads, *self._place.writes), images)
        self.n_images, self.n_runs = len(images), 0
        self.clean = self._logits_of(self.run.output)
        x = self._tokens.rows(self.run.activations, self._place.reads)
        self.n_tokens = x.shape[1]
        self.x = x.flatten(0, 1)
        self.target = self._tokens.rows(self.run.activations, self._place.writes).flatten(0, 1)
        if len(self.target) != len(self.x):
            raise ValueError(f"{self._place.reads[0]} and {self._place.writes[0]} have not the same rows per image.")
        self.codes = self.coder.encode_sparse(self.x).detach()
        self.x_hat = decoded(self.coder, self.codes, self.x)
        # Pairs: the latents active anywhere in an image, by image and then latent; `pair` of each entry of the codes.
        keys = self.codes.rows() // self.n_tokens * self.codes.d_sae + self.codes.indices
        found, self.pair = torch.unique(keys, return_inverse=True)
        self.image = found // self.codes.d_sae
        self.n_active = torch.bincount(self.image, minlength=self.n_images)
        self.attribution = self.x.new_zeros(len(found))

    def attribute(self, classes: Int[Tensor, " b"]) -> None:
        """Gradient x activation of each pair, of the logit: images do not see each other, so that one backward of the
        sum is each image's own.
        """
        if self.codes.nnz == 0:
            return
        with torch.enable_grad():
            values = self.codes.values.clone().requires_grad_()
            edited = decoded(self.coder, self.codes.with_values(values), self.x)
            logits = self._rerun(self.target + (edited - self.x_hat).to(self.target))
            total = logits.gather(1, classes.to(logits.device)[:, None]).sum()
            gradient = torch.autograd.grad(total, values)[0]
        each = gradient * self.codes.values
        self.attribution = self.attribution.index_add(0, self.pair, each.to(self.attribution))

    def none(self) -> Bool[Tensor, " pairs"]:
        return torch.zeros(len(self.image), dtype=torch.bool, device=self.image.device)

    def logits(self, kept: Bool[Tensor, " pairs"]) -> Float[Tensor, "b c"]:
        """With only these latents decoded, and what the coder misses as it was. All: the clean run, bit for bit."""
        edited = decoded(self.coder, self.codes.keep(kept[self.pair]), self.x)
        return self._rerun(self.target + (edited - self.x_hat).to(self.target))

    def order_of(self, weight: Float[Tensor, " pairs"]) -> Int[Tensor, " pairs"]:
        """Each pair's place in its image, the largest weight first."""
        by_weight = torch.sort(weight, descending=True, stable=True).indices
        order = by_weight[torch.sort(self.image[by_weight], stable=True).indices]
        first = self.n_active.cumsum(0) - self.n_active
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order), device=order.device) - first[self.image[order]]
        return place

    def random_order(self, seeds: Sequence[tuple[int, int]]) -> Int[Tensor, " pairs"]:
        counts = self.n_active.tolist()
        drawn = [np.random.default_rng((*s, 0)).permutation(n) for s, n in zip(seeds, counts, strict=True)]
        return torch.from_numpy(np.concatenate([*drawn, np.zeros(0)]).astype(np.int64)).to(self.image.device)

    def matched_order(self, place: Int[Tensor, " pairs"], seeds: Sequence[tuple[int, int]]) -> Int[Tensor, " pairs"]:
        """The places of `place`, exchanged among latents of one quantile of activation."""
        activation = torch.zeros(len(self.image), dtype=torch.float64)
        activation.index_add_(0, self.pair.cpu(), self.codes.values.double().cpu())
        by_activation = self.order_of(activation.to(place.device)).cpu().numpy()
        places, start, out = place.cpu().numpy(), 0, np.zeros(len(place), dtype=np.int64)
        for s, n in zip(seeds, self.n_active.tolist(), strict=True):
            own = slice(start, start + n)
            quantile = by_activation[own] * min(N_QUANTILES, max(n // 2, 1)) // max(n, 1)
            rng = np.random.default_rng((*s, 1))
            before, after = np.lexsort((np.arange(n), quantile)), np.lexsort((rng.random(n), quantile))
            out[own][before] = places[own][after]
            start += n
        return torch.from_numpy(out).to(place.device)

    def _rerun(self, rows: Float[Tensor, "n d_out"]) -> Float[Tensor, "b c"]:
        self.n_runs += 1
        rows = rows.reshape(self.n_images, self.n_tokens, -1)
        return self._logits_of(self.run.replaced_at(self._put(rows))[0])

    def _put(self, rows: Float[Tensor, "b t d_out"]) -> Mapping[str, Tensor]:
        return self._tokens.put_all(self.run.activations, self._place.writes, rows)

    def _logits_of(self, output: Float[Tensor, "b d"]) -> Float[Tensor, "b c"]:
        return self.head(output.double().cpu())


def scores(logits: Float[Tensor, "b c"], classes: Int[Tensor, " b"], score: str) -> Float[Tensor, " b"]:
    of = logits if score == "logit" else logits.softmax(1)
    return of.gather(1, classes.to(of.device)[:, None])[:, 0].detach()


def areas(curves: Array, steps: Sequence[int], n_active: Array) -> Array:
    """Per image, over log2(1 + m) / log2(1 + n) by trapezoids; 0 where no latent is active.

    `curves` (n_images, len(steps) + 1): at each step, and of all n latents.
    """
    m = np.minimum(np.asarray([*steps, np.inf])[None], n_active[:, None])
    at = np.log2(1 + m) / np.log2(1 + np.maximum(n_active, 1))[:, None]
    return (np.diff(at, axis=1) * (curves[:, 1:] + curves[:, :-1]) / 2).sum(1)


def causal_faithfulness(
    backbone: Backbone,
    images: ImageSource,
    coder: SparseCoder,
    *,
    limit: int | None = 64,
    batch_size: int = 16,
    n_workers: int = 0,
    n_bootstrap: int = 1000,
    seed: int = 0,
    progress: Progress = SILENT,
    **options: Any,
) -> tuple[dict[str, Measured], dict[str, Curve], dict[str, Any]]:
    """Numbers, curves and cost over a seeded sample of `limit` images. `options`: those of `Faithfulness`."""
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}.")
    positions = list(range(len(images)))
    if limit is not None and limit < len(positions):
        positions = sorted(np.random.default_rng(seed).permutation(len(positions))[:limit].tolist())
    measure = Faithfulness(backbone, coder, seed=seed, **options)
    device = next(backbone.parameters()).device
    batches = load_batches(images, positions, backbone.preprocess, batch_size=batch_size, n_workers=n_workers)
    with closing(batches), progress.task("faithfulness", len(positions), "images") as task:
        for batch in batches:
            if batch.positions:
                labels = [images.record(position).label for position in batch.positions]
                known = None if None in labels else torch.tensor(labels)
                measure.update(batch.images.to(device), known)
            task.advance(len(batch.positions) + len(batch.skipped))
    return measure.compute(n_bootstrap=n_bootstrap, seed=seed), measure.curves(), measure.cost()
