"""Controls: coders that have learnt nothing sparse. A result is worth what it adds to theirs (SPEC row 141).

    random     unit random directions, encoder their transpose, k largest per row, one least-squares scale
    pca        principal directions and their opposites, k largest per row
    neurons    the coordinates and their opposites, k largest per row
    kmeans     centroids of a sample; the k nearest of those that are nearer than the mean
    untrained  the given coder's own architecture and starting weights (`untrained_like`)

`pca` with n_components = k (the default) is the rank-k projection: each component or its opposite is positive, so that
L0 is k. With n_components = d_in it is the best k-term approximation in that basis, the stronger control at equal L0.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from vitrail.coders.base import ROWS_AT_ONCE, SparseCoder
from vitrail.coders.topk import TopK
from vitrail.statistics import ActivationStats


class RandomDirections(TopK):
    """`fit_scale`: with z = g ReLU(TopK(y W_dec^T)), g minimises the sample's squared error.

    Plain transposes overshoot, because overlapping directions are counted several times: without g the control would
    lose for no good reason.
    """

    name = "random"

    def __init__(
        self,
        *,
        d_in: int,
        d_sae: int,
        k: int = 32,
        fit_scale: bool = True,
        normalization: str = "mean_std",
        seed: int = 0,
    ) -> None:
        super().__init__(d_in=d_in, d_sae=d_sae, k=k, normalization=normalization, seed=seed)
        self.fit_scale = fit_scale

    @torch.no_grad()
    def fit(self, stats: ActivationStats, sample: Float[Tensor, "n d_in"]) -> None:
        super().fit(stats, sample)
        self.W_enc.copy_(self.W_dec.t())
        if self.fit_scale:
            y = self.normalized(sample)
            y_hat = self.normalize(self(sample)).y
            energy = y_hat.square().sum()
            self.W_enc.mul_((y * y_hat).sum() / energy if energy > 0 else 1.0)


class _SignedBasis(TopK):
    """An orthonormal basis, each direction twice: +v and -v. Non-negative latents can then say any coefficient."""

    @torch.no_grad()
    def set_basis(self, basis: Float[Tensor, "m d_in"]) -> None:
        self.W_dec.copy_(torch.cat([basis, -basis]))
        self.W_enc.copy_(self.W_dec.t())


class PCA(_SignedBasis):
    name = "pca"

    def __init__(
        self, *, d_in: int, k: int = 32, n_components: int | None = None, normalization: str = "mean_std", seed: int = 0
    ) -> None:
        m = k if n_components is None else n_components
        if not 1 <= k <= m <= d_in:
            raise ValueError(f"PCA needs 1 <= k <= n_components <= d_in={d_in}, got k={k}, n_components={m}.")
        super().__init__(d_in=d_in, d_sae=2 * m, k=k, normalization=normalization, seed=seed)
        self.n_components = n_components
        self.fitted.fill_(False)

    @torch.no_grad()
    def fit(self, stats: ActivationStats, sample: Float[Tensor, "n d_in"]) -> None:
        super().fit(stats, sample)
        y = self.normalized(sample).double()
        self.b_dec.copy_(y.mean(0))
        centred = y - y.mean(0)
        principal = torch.linalg.eigh(centred.t() @ centred).eigenvectors.flip(1)  # eigh's eigenvalues rise
        self.set_basis(principal[:, : self.d_sae // 2].t().to(self.W_dec.dtype))


class Neurons(_SignedBasis):
    name = "neurons"

    def __init__(self, *, d_in: int, k: int = 32, normalization: str = "mean_std", seed: int = 0) -> None:
        if not 1 <= k <= d_in:
            raise ValueError(f"k must be in 1..d_in={d_in}, got {k}.")
        super().__init__(d_in=d_in, d_sae=2 * d_in, k=k, normalization=normalization, seed=seed)
        self.set_basis(torch.eye(d_in))


class KMeans(TopK):
    """A centroid a latent: z = g ReLU(y . c - ||c||^2 / 2), y and c from the sample's mean, the k largest per row.

    y . c - ||c||^2 / 2 = (||y||^2 - ||y - c||^2) / 2: the k largest are the k nearest centroids, and a latent fires
    where its centroid is nearer than the mean. k = 1 is the usual assignment. g as in RandomDirections.
    """

    name = "kmeans"

    def __init__(
        self,
        *,
        d_in: int,
        d_sae: int,
        k: int = 32,
        n_iterations: int = 25,
        normalization: str = "mean_std",
        seed: int = 0,
    ) -> None:
        super().__init__(d_in=d_in, d_sae=d_sae, k=k, normalization=normalization, seed=seed)
        self.n_iterations = n_iterations
        self.fitted.fill_(False)

    @torch.no_grad()
    def fit(self, stats: ActivationStats, sample: Float[Tensor, "n d_in"]) -> None:
        super().fit(stats, sample)
        y = self.normalized(sample)
        self.b_dec.copy_(y.mean(0))
        y = y - self.b_dec
        centroids = lloyd(y, kmeans_plus_plus(y, self.d_sae, seed=self.seed), n_iterations=self.n_iterations)
        self.W_dec.copy_(centroids)
        self.W_enc.copy_(centroids.t())
        self.b_enc.copy_(-centroids.square().sum(1) / 2)
        y_hat = self.normalize(self(sample)).y - self.b_dec
        energy = y_hat.square().sum()
        g = (y * y_hat).sum() / energy if energy > 0 else 1.0
        self.W_enc.mul_(g)
        self.b_enc.mul_(g)


def kmeans_plus_plus(y: Float[Tensor, "n d_in"], n_centroids: int, *, seed: int) -> Float[Tensor, "n_centroids d_in"]:
    """Rows, each drawn in proportion to its squared distance from those drawn before (Arthur and Vassilvitskii 2007).

    Raises ValueError if there are fewer different rows than centroids.
    """
    generator = torch.Generator().manual_seed(seed)
    draws = torch.rand(n_centroids, generator=generator, dtype=torch.float64).tolist()
    centroids = [y[int(draws[0] * len(y))]]
    distance = (y - centroids[0]).square().sum(1)
    for draw in draws[1:]:
        reached = distance.double().cumsum(0)
        if not reached[-1] > 0:
            raise ValueError(
                f"k-means needs at least as many different rows as centroids: {n_centroids} were asked for, the sample "
                f"has {len(centroids)} different rows among {len(y)}. Give more rows, or a smaller d_sae."
            )
        at = int(torch.searchsorted(reached, reached[-1] * draw, right=True))
        centroids.append(y[at])
        distance = torch.minimum(distance, (y - centroids[-1]).square().sum(1))
    return torch.stack(centroids)


def lloyd(
    y: Float[Tensor, "n d_in"], centroids: Float[Tensor, "m d_in"], *, n_iterations: int
) -> Float[Tensor, "m d_in"]:
    """Lloyd's iteration, until no row changes its centroid. One that lost its rows goes to the row farthest from its
    own (as in scikit-learn).
    """
    centroids, before = centroids.clone(), None
    for _ in range(n_iterations):
        half = centroids.square().sum(1) / 2
        best = [(rows @ centroids.t() - half).max(1) for rows in y.split(ROWS_AT_ONCE)]
        nearest = torch.cat([found.indices for found in best])
        if before is not None and torch.equal(nearest, before):
            break
        before = nearest
        counts = torch.bincount(nearest, minlength=len(centroids))
        sums = torch.zeros_like(centroids).index_add_(0, nearest, y)
        centroids = sums / counts.clamp_min(1)[:, None]
        empty = (counts == 0).nonzero()[:, 0]
        if len(empty):
            distance = y.square().sum(1) / 2 - torch.cat([found.values for found in best])
            centroids[empty] = y[distance.topk(len(empty)).indices]
    return centroids


def untrained_like(coder: SparseCoder, sample: Float[Tensor, "n d_in"]) -> SparseCoder:
    """The same architecture with the weights it started from; normalisation and threshold are set."""
    untrained = type(coder)(**coder.config).to(coder.W_dec)
    untrained.fit(ActivationStats.of(sample), sample)
    untrained.normalize.load_state_dict(coder.normalize.state_dict())  # the same space as the trained one
    untrained.calibrate([sample])
    return untrained.eval()


def controls(coder: SparseCoder, sample: Float[Tensor, "n d_in"], *, k: int) -> dict[str, SparseCoder]:
    """The controls of reconstruction for a coder whose L0 is k, fitted on the sample: by name.

    `untrained` keeps its own sparsity, which for ReLU is not k; cut its codes with `Codes.top(k)` to compare.
    """
    d_in, stats = coder.d_in, ActivationStats.of(sample)
    k_basis = min(k, d_in)
    fitted: dict[str, SparseCoder] = {
        "random": RandomDirections(
            d_in=d_in, d_sae=coder.d_sae, k=k, normalization=coder.normalization, seed=coder.seed
        ),
        "pca": PCA(d_in=d_in, k=k_basis, normalization=coder.normalization),
        "pca_all": PCA(d_in=d_in, k=k_basis, n_components=d_in, normalization=coder.normalization),
        "neurons": Neurons(d_in=d_in, k=k_basis, normalization=coder.normalization),
    }
    for control in fitted.values():
        control.to(coder.W_dec).fit(stats, sample)
    return {name: control.eval() for name, control in fitted.items()} | {"untrained": untrained_like(coder, sample)}
