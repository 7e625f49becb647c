"""Which coordinates stand for an attribute: those that are larger where it is than where it is not.

    E_g[f_j]    mean over the images of group g and their tokens (or of each image's largest: pool="max")
    F(tau)      {j: E_in[f_j] > E_out[f_j] + tau}                                                          Eq. 9
    F*          F and every j with cos(n_j, n_m) > lambda for an m of F: one pass, no closure

tau is in units of the activations: of a coder that normalises its input, normalised ones. `balanced` takes the mean
over classes of the differences within each: where attribute and class go together, as in a biased training set, Eq. 9
also finds what stands for the class. `standardised` divides that by the coordinate's standard deviation within groups,
so that one tau means the same for every coordinate: neurons of a residual stream differ in scale by far more than
latents do.

"Steering CLIP's vision transformer with sparse autoencoders", sections 7.1 and 7.2; SPEC rows 117, 119 and 126.
"""

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from vitrail.backbones.base import Backbone
from vitrail.coders.base import SparseCoder
from vitrail.coders.sparse import Codes
from vitrail.images.base import ImageSource
from vitrail.images.loader import load_batches
from vitrail.progress import SILENT, Progress
from vitrail.steering.interventions import Basis, Latents, Neurons, marked_tokens

Pool = Literal["mean", "max"]
TAUS: tuple[float, ...] = tuple(np.logspace(-6, 0, 25).tolist())
ROWS_AT_ONCE = 4096


@dataclass(frozen=True, eq=False)
class Site:
    """Coordinates of `basis` at `point`, on `where`: "all", "cls", "spatial" (the tokens that the coder was trained
    on); at a point of one row an image, all there is."""

    point: str
    basis: Basis
    where: str = "all"

    def rows(self, backbone: Backbone, value: Float[Tensor, "b ..."]) -> Float[Tensor, "b t d"]:
        """The point's value, the tokens in use alone."""
        if value.ndim == 2:
            return value[:, None]
        return value[:, marked_tokens(backbone, self.point, self.where)[0].to(value.device)]


def latents_at(coder: SparseCoder, point: str, tokens: str) -> Site:
    """`tokens` as coders say them: "pooled" is a point of one row an image."""
    return Site(point, Latents(coder), "all" if tokens == "pooled" else tokens)


def neurons_at(backbone: Backbone, point: str, tokens: str) -> Site:
    device = next(backbone.parameters()).device
    return Site(point, Neurons(backbone.point(point).width, device=device), "all" if tokens == "pooled" else tokens)


# -------------------------------------------------------------------------------------------------------- the means


@dataclass(frozen=True, eq=False)
class Means:
    """`of` a group: each coordinate's mean, (n_basis,). `variances`: over its images. `n_images` in each group;
    `fired`: the share of all rows in which a latent was not 0 (of neurons too)."""

    groups: tuple[str, ...]
    n_images: Int[Tensor, " g"]
    values: Float[Tensor, "g n_basis"]
    variances: Float[Tensor, "g n_basis"]
    fired: Float[Tensor, " n_basis"]

    def of(self, group: str) -> Float[Tensor, " n_basis"]:
        """Raises KeyError for a group that is not there, ValueError for one without images."""
        if group not in self.groups:
            raise KeyError(f"there is no group {group!r}. Groups: {', '.join(self.groups)}.")
        at = self.groups.index(group)
        if not self.n_images[at]:
            raise ValueError(f"the group {group!r} has no images: it has no mean.")
        return self.values[at]

    def alive(self) -> Int[np.ndarray, " m"]:
        return np.flatnonzero(self.fired.cpu().numpy() > 0)


class MeanSums:
    """Sums of one basis over images that belong to groups; an image may belong to several, or to none."""

    def __init__(self, n_basis: int, groups: Sequence[str], pool: str = "mean") -> None:
        if pool not in get_args(Pool):
            raise ValueError(f"pool must be mean or max, got {pool!r}.")
        self.groups, self.pool = tuple(groups), pool
        self._sums, self._squares = torch.zeros(2, len(self.groups), n_basis, dtype=torch.float64)
        self._n, self._fired, self._n_rows = torch.zeros(len(self.groups), dtype=torch.int64), torch.zeros(n_basis), 0

    def add_codes(self, codes: Codes, members: Bool[Tensor, "b g"]) -> None:
        """Rows image by image, as many of each: nothing of images x latents is made."""
        codes = codes.detach().to("cpu")
        per_image = self._count(codes.n, members)
        image, latents, values = codes.rows() // per_image, codes.indices.long(), codes.values.double()
        if per_image > 1:
            keys, place = (image * codes.d_sae + latents).unique(return_inverse=True)
            if self.pool == "max":
                values = values.new_zeros(len(keys)).scatter_reduce(0, place, values, "amax", include_self=False)
            else:
                values = values.new_zeros(len(keys)).index_add_(0, place, values) / per_image
            image, latents = keys // codes.d_sae, keys % codes.d_sae
        for g in range(len(self.groups)):
            own = members[:, g].cpu()[image]
            self._sums[g].index_add_(0, latents[own], values[own])
            self._squares[g].index_add_(0, latents[own], values[own].square())
        self._fired += codes.fired()

    def add_rows(self, z: Float[Tensor, "b t n_basis"], members: Bool[Tensor, "b g"]) -> None:
        """Of neurons, dense."""
        self._count(z.shape[0] * z.shape[1], members)
        z = z.detach().cpu().double()
        pooled = z.amax(1) if self.pool == "max" else z.mean(1)
        weights = members.cpu().double().T
        self._sums += weights @ pooled
        self._squares += weights @ pooled.square()
        self._fired += (z != 0).sum((0, 1))

    def _count(self, n_rows: int, members: Bool[Tensor, "b g"]) -> int:
        if members.shape[1] != len(self.groups) or len(members) == 0 or n_rows % len(members):
            raise ValueError(
                f"{n_rows} rows of {len(members)} images in {members.shape[1]} groups: as many rows of each image, and "
                f"{len(self.groups)} groups, are needed."
            )
        self._n += members.cpu().sum(0)
        self._n_rows += n_rows
        return n_rows // len(members)

    def means(self) -> Means:
        n = self._n.clamp_min(1)[:, None]
        values = self._sums / n
        variances = (self._squares / n - values.square()).clamp_min(0)
        return Means(self.groups, self._n, values, variances, self._fired / max(1, self._n_rows))


@torch.inference_mode()
def mean_activations(
    backbone: Backbone,
    images: ImageSource,
    sites: Mapping[str, Site],
    groups: Mapping[str, Bool[np.ndarray, " n"]] | None = None,
    *,
    pool: str = "mean",
    batch_size: int = 64,
    n_workers: int = 0,
    progress: Progress = SILENT,
) -> dict[str, Means]:
    """One pass over the images for all sites and groups. `groups` None: one, "all". Unreadable images are left out.

    Raises ValueError for marks of another number of images, for sites of another width than their point, or where no
    image could be read.
    """
    n = len(images)
    groups = {"all": np.ones(n, dtype=bool)} if groups is None else groups
    wrong = [name for name, marks in groups.items() if np.shape(marks) != (n,)]
    if wrong:
        raise ValueError(f"the group {wrong[0]!r} marks {np.shape(groups[wrong[0]])} images, the source has {n}.")
    for name, site in sites.items():
        if site.basis.width != backbone.point(site.point).width:
            known = backbone.point(site.point).width
            raise ValueError(f"{name} is of rows {site.basis.width} wide, {site.point} has {known}.")
    members = torch.from_numpy(np.stack([np.asarray(marks, dtype=bool) for marks in groups.values()], 1))
    sums = {name: MeanSums(site.basis.n, list(groups), pool) for name, site in sites.items()}
    points, seen = list(dict.fromkeys(site.point for site in sites.values())), 0
    device = next(backbone.parameters()).device
    wanted = np.flatnonzero(members.any(1).numpy()).tolist()
    batches = load_batches(images, wanted, backbone.preprocess, batch_size=batch_size, n_workers=n_workers)
    with closing(batches), progress.task("mean activations", len(wanted), "images") as task:
        for batch in batches:
            task.advance(len(batch.positions) + len(batch.skipped))
            if not batch.positions:
                continue
            seen += len(batch.positions)
            values = backbone.activations(batch.images.to(device), points)
            for name, site in sites.items():
                add_site(sums[name], site, site.rows(backbone, values[site.point]), members[batch.positions])
    if not seen:
        raise ValueError(f"none of the {len(wanted)} images of the groups could be read.")
    return {name: one.means() for name, one in sums.items()}


def add_site(sums: MeanSums, site: Site, rows: Float[Tensor, "b t d"], members: Bool[Tensor, "b g"]) -> None:
    """The images' rows (Site.rows) into the sums of that site."""
    if isinstance(site.basis, Latents):
        sums.add_codes(site.basis.coder.encode_sparse(rows.flatten(0, 1)), members)
    else:
        everything = torch.arange(site.basis.n, device=rows.device)
        z = site.basis.read(rows.flatten(0, 1)).columns(everything)
        sums.add_rows(z.unflatten(0, rows.shape[:2]), members)


# -------------------------------------------------------------------------------------------------------- the choice


def select(
    mean_in: Float[Tensor, " n_basis"], mean_out: Float[Tensor, " n_basis"], tau: float
) -> Int[np.ndarray, " m"]:
    """F(tau) of Eq. 9, ascending. Raises ValueError for a tau that is not finite or means that do not match."""
    if not np.isfinite(tau):
        raise ValueError(f"tau must be a finite number, got {tau}.")
    if mean_in.shape != mean_out.shape or mean_in.ndim != 1:
        raise ValueError(f"two rows of means of one length are compared, got {mean_in.shape} and {mean_out.shape}.")
    return np.flatnonzero((mean_in > mean_out + tau).cpu().numpy())


def balanced(
    means: Means, pairs: Sequence[tuple[str, str]]
) -> tuple[Float[Tensor, " n_basis"], Float[Tensor, " n_basis"]]:
    """(mean_in, mean_out) for `select`, each class weighing the same. `pairs`: of each class, (its images with the
    attribute, those without). Raises as `Means.of`: every class is needed in both ways."""
    if not pairs:
        raise ValueError("there is no class to balance over: give at least one pair of groups.")
    inside, outside = (torch.stack([means.of(pair[i]) for pair in pairs]).mean(0) for i in (0, 1))
    return inside, outside


def standardised(
    means: Means, pairs: Sequence[tuple[str, str]]
) -> tuple[Float[Tensor, " n_basis"], Float[Tensor, " n_basis"]]:
    """`balanced`, in units of each coordinate's standard deviation within these groups (Cohen's d is their difference).
    A coordinate that never varies there counts as 0 on both sides."""
    inside, outside = balanced(means, pairs)
    rows = [means.groups.index(name) for pair in pairs for name in pair]
    spread = means.variances[rows].mean(0).sqrt()
    varies = spread > 1e-9 * inside.abs().maximum(outside.abs()).clamp_min(1e-30)
    inside, outside = (torch.where(varies, one / spread.clamp_min(1e-30), 0.0) for one in (inside, outside))
    return inside, outside


def expanded(
    features: Sequence[int] | Int[np.ndarray, " m"], W_dec: Float[Tensor, "d_sae d_in"], lam: float
) -> Int[np.ndarray, " k"]:
    """F*: the features and all whose direction has a cosine above `lam` with one of theirs, ascending. One pass.

    Raises ValueError for a lambda outside -1..1, IndexError for a feature that is not there.
    """
    if not -1 <= lam <= 1:
        raise ValueError(f"lambda is a cosine, in -1..1, got {lam}.")
    chosen = np.unique(np.asarray(features, dtype=np.int64))
    outside = chosen[(chosen < 0) | (chosen >= len(W_dec))]
    if len(outside):
        raise IndexError(f"features are 0..{len(W_dec) - 1}, got {outside[0]}.")
    if len(chosen) == 0:
        return chosen
    rows = W_dec.detach().float()
    targets = normalize(rows[torch.from_numpy(chosen).to(rows.device)], dim=1).T
    near = [(normalize(some, dim=1) @ targets).amax(1) > lam for some in rows.split(ROWS_AT_ONCE)]
    return np.union1d(chosen, np.flatnonzero(torch.cat(near).cpu().numpy()))
