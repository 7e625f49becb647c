"""Spatial coherence (ViSAEBench M1): Moran's I of each latent's map over the patches of an image.

    I = (P / W) sum_pq w_pq (f_p - m)(f_q - m) / sum_p (f_p - m)^2     w_pq = 1 where patches touch, W their sum
    moran            mean over evaluable latents of (mean over the latent's valid images of I)
    moran_median, moran_iqr, moran_latents, moran_evaluable   of the same latents; their number; their share of d_sae
    moran_weighted   latents weighted by what they activate on their valid images, in all
    moran_null       -1 / (P - 1), the mean of I over all permutations of any map
    moran_z          (moran - moran_null) / (sd over latents / sqrt(latents))
    moran_null_sized 1 if moran lies within .01 of moran_null, by two one-sided tests at 5 %; else 0
    raw_moran, ...   the same of the backbone's own dimensions (RawCoherence)

An image is valid for a latent that fires on at least 5 of its patches with a (population) variance above 1e-8; a latent
is evaluable with 50 valid images.

Range. About -.5..1.1 on a 14 x 14 grid: a checkerboard has -1/27, not -1, because queens also meet on diagonals; a
gradient along rows 311/351. Near moran_null where patches fire without regard to their neighbours.

Moves with. The grid's size (-1/(P-1), and how far neighbours lie apart in the picture), and the backbone before all: a
latent inherits the smoothness of what it reads, so put raw_moran beside it. L0 and min_active: maps with few active
patches have a lower I than large ones of the same shape. Resampling to another grid smooths, and raises I.

Does not show. Whether what fires together is an object: a latent of position, or of all of the background, has a high I
as well. moran_z says next to nothing: latents are not independent, and their number makes any difference large; this is
why moran_null_sized asks for the size, with an error over images.

Source. ViSAEBench section 4.1, Eq. 2 and 3, Table 2, appendices F and G; Moran 1950; SPEC rows 63 to 67. sd with n - 1.

Tags. "queen, active>=5, images>=50" and what else was asked for. Intervals are a jackknife over 20 groups of images,
the evaluable latents staying the same. compat="visaebench-0.1", keys `moran_visaebench...`: what the released package
computes, which is other than its paper: maps that are active on more than 90 % of the patches are left out, only a
latent's first 200 valid images count (to the end of the 64 images in which it reaches them: an order of the data set
shows), the variance threshold is 1e-10 of the *sum* of squares, and 500 evaluable latents are drawn. Its sums are fp32.

Cost. That of the entries: at d_sae 24,576 and L0 64 a fraction of a millisecond an image (benchmarks/moran.py). Kept:
20 sums a latent.
"""

import math

import numpy as np
import torch
from jaxtyping import Bool, Float64, Int64
from numpy.typing import NDArray

from vitrail.metrics.latent_means import LatentMeans, rank_correlation
from vitrail.metrics.lattice import Lattice, Pairs, SparseMorans, morans_i
from vitrail.metrics.measured import Measured
from vitrail.metrics.passing import Curve, Metric, Seen, Setting
from vitrail.metrics.patch_maps import Group, PatchMaps
from vitrail.metrics.slabs import slabs

COMPAT = "visaebench-0.1"
COMPAT_IMAGES = 64  # images between which the released package looks whether a latent has had enough
COMPAT_LOW = 0.1  # below it a latent is "non-localized"
SENSITIVITY = tuple((neighbours, least) for neighbours in ("queen", "rook") for least in (1, 5, 20))


class SpatialCoherence(Metric):
    """Of codes, from their entries. Nothing where the coder does not see all patches of an image.

    `max_active_share`, `images_at_most`, `latents_at_most` are the released package's further rules. `frames`: of a
    video, whose patches lie frame by frame; each frame is a map of its own (and counts as an image), or with
    `through_time` the clip is one, with neighbours in the frames before and after. `resample`: to this grid, bilinear
    with anti-aliasing, before I is taken (ViSAEBench proposes 16 x 16 to 14 x 14). `n_permutations`: of each of
    `n_sampled` maps, drawn evenly from all valid ones, for `moran_p` and `moran_pairs_above` (see `permutation_test`).
    """

    def __init__(
        self,
        setting: Setting,
        *,
        neighbours: str = "queen",
        min_active: int = 5,
        min_images: int = 50,
        min_variance: float = 1e-8,
        max_active_share: float | None = None,
        images_at_most: int | None = None,
        latents_at_most: int | None = None,
        frames: int = 1,
        through_time: bool = False,
        resample: tuple[int, int] | None = None,
        n_permutations: int = 0,
        n_sampled: int = 256,
        compat: str | None = None,
    ) -> None:
        if min_active < 1 or min_images < 1:
            raise ValueError(f"min_active and min_images must be at least 1, got {min_active} and {min_images}.")
        if compat not in (None, COMPAT):
            raise ValueError(f"compat must be {COMPAT!r} or None, got {compat!r}.")
        if resample is not None and through_time:
            raise ValueError("resample is for frames on their own: leave out through_time.")
        self._maps = PatchMaps.of(setting, frames, through_time)
        if compat:
            max_active_share, images_at_most, latents_at_most = 0.9, 200, 500
            min_variance = 1e-10 / (self._maps.n_patches if self._maps else 1)
        self._compat, self._neighbours = compat, neighbours
        self._min_active, self._min_images, self._min_variance = min_active, min_images, min_variance
        self._max_share, self._images_at_most, self._latents_at_most = max_active_share, images_at_most, latents_at_most
        self._resample, self._through_time = resample, through_time
        self._n_permutations, self._n_sampled, self._d_sae = n_permutations, n_sampled, setting.d_sae
        self.prefix = "moran_visaebench" if compat else "moran"
        self.means = LatentMeans(setting.d_sae)
        self._rng = np.random.default_rng([setting.seed, 63])
        self._sample = (np.zeros(0), np.zeros((0, self._maps.n_patches if self._maps else 0)))
        self._n_images = 0
        self._enough: Bool[np.ndarray, " d_sae"] = np.zeros(setting.d_sae, dtype=bool)
        self._sparse = SparseMorans(self._maps.lattice(neighbours)) if self._maps else None

    @property
    def lattice(self) -> Lattice:
        """That on which I is taken. Raises ValueError where the coder does not see all patches."""
        if self._maps is None:
            raise ValueError("Moran's I is of patches: this coder does not see all patches of an image.")
        return Lattice(self._resample, self._neighbours) if self._resample else self._maps.lattice(self._neighbours)

    def update(self, seen: Seen) -> None:
        if self._maps is None or self._sparse is None:
            return
        every = COMPAT_IMAGES if self._images_at_most is not None else None
        most = None if self._max_share is None else int(self._max_share * self._maps.n_patches)
        for group in self._maps.groups(seen, self._n_images, every):
            if every and group.first % every == 0:
                self._enough = self.means.n_valid() >= (self._images_at_most or 0)
            pairs = self._sparse(
                *(group.map, group.latent, group.patch, group.value),
                n_maps=group.n_maps,
                d_sae=self._d_sae,
                min_active=self._min_active,
                max_active=most,
            )
            if self._resample is not None:
                pairs = self._resampled(group, pairs)
            valid = pairs.variance > self._min_variance
            if every:
                valid &= ~self._enough[pairs.latent]
            pairs = pairs.where(valid)
            self.means.add(pairs, group.first + pairs.map // self._maps.maps_an_image)
            if self._n_permutations:
                self._keep_sample(group, pairs)
        self._n_images += seen.n_images

    def _resampled(self, group: "Group", pairs: Pairs) -> Pairs:
        assert self._maps is not None
        assert self._resample is not None
        moran, variance = np.zeros(len(pairs)), np.zeros(len(pairs))
        for part in slabs(len(pairs), self._maps.n_patches, torch.device("cpu")):
            maps = torch.from_numpy(group.laid_out(pairs.where(np.arange(len(pairs))[part]), self._maps, self._d_sae))
            smaller = torch.nn.functional.interpolate(
                maps.unflatten(1, (1, *self._maps.shape)), self._resample, mode="bilinear", antialias=True
            ).flatten(1)
            moran[part], variance[part] = morans_i(smaller, self.lattice), smaller.var(1, correction=0)
        return Pairs(pairs.map, pairs.latent, pairs.active, pairs.mass, variance, moran)

    def _keep_sample(self, group: "Group", pairs: Pairs) -> None:
        """The n_sampled maps with the smallest of random numbers, one a map: an even draw, however batches come."""
        assert self._maps is not None
        drawn, maps = self._sample
        numbers = self._rng.random(len(pairs))
        least = drawn.max() if len(drawn) >= self._n_sampled else 1.0
        chosen = np.flatnonzero(numbers < least)
        found = group.laid_out(pairs.where(chosen), self._maps, self._d_sae)
        drawn, maps = np.concatenate([drawn, numbers[chosen]]), np.concatenate([maps, found])
        kept = np.sort(np.argsort(drawn)[: self._n_sampled])
        self._sample = (drawn[kept], maps[kept])

    # -- at the end

    def compute(self, *, n_bootstrap: int = 1000, seed: int = 0) -> dict[str, Measured]:
        """The interval needs no draws: n_bootstrap < 1 leaves it out."""
        if self._maps is None:
            return {}
        if not self._n_images:
            raise ValueError("no images were measured: there is nothing to report.")
        tag, n, p = self._tag(), self._n_images, self.prefix
        if self._compat:
            scores = self.scored()
            low = float((scores < COMPAT_LOW).mean()) if len(scores) else math.nan
            value = float(scores.mean()) if len(scores) else math.nan
            return {
                p: Measured(value, tag, n),
                f"{p}_median": Measured(float(np.median(scores)) if len(scores) else math.nan, tag, n),
                f"{p}_non_localized": Measured(low, f"{tag}, I < {COMPAT_LOW}", n),
                f"{p}_latents": Measured(float(len(scores)), tag, n),
            }
        out = self.means.summary(
            p, self.lattice, self._min_images, tag=tag, n=n, intervals=n_bootstrap >= 1, only=self._drawn()
        )
        if self._n_permutations and len(self._sample[1]):
            lattice = self._maps.lattice(self._neighbours)
            p_value, above = permutation_test(self._sample[1], lattice, self._n_permutations, seed=seed)
            how = f"{lattice.neighbours}, {self._n_permutations} permutations"
            out[f"{p}_p"] = Measured(p_value, f"{how}, two-sided", len(self._sample[1]))
            out[f"{p}_pairs_above"] = Measured(above, f"{how}, one-sided 5 %", len(self._sample[1]))
        return out

    def scored(self) -> Float64[np.ndarray, " n_latents"]:
        """The score of each latent that counts."""
        return self.means.moran()[self._drawn()]

    def table(self) -> dict[str, NDArray]:
        """Of every latent: `latent`, `moran` (NaN without a valid image), `n_images` valid ones, `evaluable`, `mass`
        (activation on them), `mean_active` patches."""
        return self.means.table(self._min_images)

    def curves(self) -> dict[str, Curve]:
        if self._maps is None or not self._n_images:
            return {}
        return self.means.curves(self.prefix, self._min_images, "latent")

    def _drawn(self) -> Int64[np.ndarray, " n_latents"]:
        evaluable = self.means.evaluable(self._min_images)
        if self._latents_at_most is None or len(evaluable) <= self._latents_at_most:
            return evaluable
        # The released package's own draw.
        draw = np.random.RandomState(42)
        return np.sort(draw.choice(evaluable, size=self._latents_at_most, replace=False))

    def _tag(self) -> str:
        if self._compat:
            return self._compat
        parts = [self._neighbours, f"active>={self._min_active}", f"images>={self._min_images}"]
        assert self._maps is not None
        if self._resample:
            parts.append(f"resampled to {self._resample[0]}x{self._resample[1]}")
        if self._maps.frames > 1:
            parts.append("through time" if self._through_time else "per frame")
        for name, value in (
            ("active share<", self._max_share),
            ("images<=", self._images_at_most),
            ("latents<=", self._latents_at_most),
        ):
            parts += [] if value is None else [f"{name}{value}"]
        return ", ".join(parts)


class MoranSensitivity(Metric):
    """Curve `moran_sensitivity`: M1 with queens and rooks, from 1, 5 and 20 active patches on (SPEC row 66), and with
    `resample` on another grid; `spearman`: of latents' scores with those of the usual definition."""

    def __init__(
        self, setting: Setting, *, min_images: int = 50, resample: tuple[int, int] | None = None, frames: int = 1
    ) -> None:
        made = [
            SpatialCoherence(setting, neighbours=neighbours, min_active=least, min_images=min_images, frames=frames)
            for neighbours, least in SENSITIVITY
        ]
        if resample is not None:
            made.append(SpatialCoherence(setting, min_images=min_images, resample=resample, frames=frames))
        self._metrics, self._min_images = made, min_images

    def update(self, seen: Seen) -> None:
        for metric in self._metrics:
            metric.update(seen)

    def compute(self, *, n_bootstrap: int = 1000, seed: int = 0) -> dict[str, Measured]:
        return {}

    def curves(self) -> dict[str, Curve]:
        usual = self._metrics[SENSITIVITY.index(("queen", 5))].table()
        rows: Curve = []
        for metric in self._metrics:
            if not (measured := metric.compute(n_bootstrap=1)):
                return {}
            table = metric.table()
            both = table["evaluable"] & usual["evaluable"]
            found = measured["moran"]
            rows.append(
                {
                    "definition": found.definition,
                    "moran": found.value,
                    "low": found.low,
                    "high": found.high,
                    "null": measured["moran_null"].value,
                    "latents": int(measured["moran_latents"].value),
                    "spearman": rank_correlation(table["moran"][both], usual["moran"][both]),
                }
            )
        return {"moran_sensitivity": rows}


class RawCoherence(Metric):
    """Of the dimensions that the coder reads: is what latents show already there (ViSAEBench, appendix G)?

    All patches are active there, so that the variance alone says which maps count.
    """

    def __init__(
        self,
        setting: Setting,
        *,
        neighbours: str = "queen",
        min_images: int = 50,
        min_variance: float = 1e-8,
        frames: int = 1,
        through_time: bool = False,
    ) -> None:
        self._maps = PatchMaps.of(setting, frames, through_time)
        self._neighbours, self._min_images, self._min_variance = neighbours, min_images, min_variance
        self.means: LatentMeans | None = None
        self._n_images = 0

    @torch.no_grad()
    def update(self, seen: Seen) -> None:
        if self._maps is None:
            return
        d_in, lattice = seen.x.shape[2], self._maps.lattice(self._neighbours)
        self.means = LatentMeans(d_in) if self.means is None else self.means
        for part in slabs(seen.n_images, seen.n_tokens * d_in, seen.x.device):
            patches = seen.x[part, self._maps.patches].double()
            maps = patches.unflatten(1, (-1, lattice.n)).transpose(2, 3)  # (images, maps, d_in, patches)
            moran, variance = morans_i(maps, lattice).cpu().numpy(), maps.var(-1, correction=0).cpu().numpy()
            image, _, latent = np.nonzero(valid := (variance > self._min_variance) & np.isfinite(moran))
            full = np.full(len(latent), lattice.n)
            mass = maps.abs().sum(-1).cpu().numpy()[valid]
            found = Pairs(image, latent, full, mass, variance[valid], moran[valid])
            self.means.add(found, self._n_images + part.start + image)
        self._n_images += seen.n_images

    def compute(self, *, n_bootstrap: int = 1000, seed: int = 0) -> dict[str, Measured]:
        if self._maps is None:
            return {}
        if self.means is None:
            raise ValueError("no images were measured: there is nothing to report.")
        tag = f"{self._neighbours}, images>={self._min_images}"
        lattice = self._maps.lattice(self._neighbours)
        return self.means.summary(
            "raw_moran", lattice, self._min_images, tag=tag, n=self._n_images, intervals=n_bootstrap >= 1
        )

    def curves(self) -> dict[str, Curve]:
        return {} if self.means is None else self.means.curves("raw_moran", self._min_images, "dimension")


def permutation_test(
    maps: Float64[np.ndarray, "m p"], lattice: Lattice, n_permutations: int = 999, *, seed: int = 0
) -> tuple[float, float]:
    """(p, share): p of the maps' mean I, two-sided about the null mean, with the patches of every map shuffled on its
    own; and the share of maps whose own I has a one-sided p of at most 5 %."""
    rng = np.random.default_rng(seed)
    found = morans_i(torch.from_numpy(maps), lattice).numpy()
    far = abs(found.mean() - lattice.null_mean)
    as_far, as_high = 1, np.ones(len(maps))
    for _ in range(n_permutations):
        other = morans_i(torch.from_numpy(rng.permuted(maps, axis=1)), lattice).numpy()
        as_far += abs(other.mean() - lattice.null_mean) >= far - 1e-12
        as_high += other >= found - 1e-12
    return float(as_far / (1 + n_permutations)), float((as_high / (1 + n_permutations) <= 0.05).mean())
