"""Crosscoders: one set of latents for several layers, or several models, read and written together.

    y_m = n_m(x_m)                                           each source by its own mean and scale
    z = select(sum_m (y_m - b_dec_m) @ W_enc_m + b_enc)
    x_hat_m = n_m^-1(z @ W_dec_m + b_dec_m)
    loss = mean_rows sum_m ||y_m - y_hat_m||^2  [+ l1 * mean_rows sum_i z_i sum_m ||W_dec_m[i]||]

Lindsey et al. 2024, "Sparse Crosscoders for Cross-Layer Features and Model Diffing". A row is [x_1 | x_2 | ...]: then
W_enc holds the sources' encoders one above another, W_dec their decoders side by side, and the sums over sources are
the products of a plain coder.

`crosscoder` has the paper's penalty, weighted by the decoders' norms, which are therefore left free: a latent that a
source has no use for loses its norm there. With one source it is an L1 coder without the unit-norm constraint. In
`topk_crosscoder` and `batch_topk_crosscoder` nothing is penalised and each latent's whole decoder row has unit norm, so
that latents are ranked by how much they write in all. Minder et al. 2025, arXiv:2504.02922, find that the L1 penalty
makes latents look exclusive that are not, and BatchTopK much less so.

To whom a latent belongs is read off the norms of its decoders in normalised space, where sources are of one size.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from vitrail.coders.base import SparseCoder, Step, geometric_median, squared_error
from vitrail.coders.batch_topk import BatchTopK
from vitrail.coders.columns import column_slices, stats_of_columns
from vitrail.coders.normalize import Normalization, Normalized, make_normalization
from vitrail.coders.relu import ReLU
from vitrail.coders.sparse import Codes, decode
from vitrail.coders.thresholded import rectified
from vitrail.coders.topk import TopK
from vitrail.statistics import ActivationStats


class PerSource(Normalization):
    """A normalisation for each of the parts of a row."""

    def __init__(self, name: str, widths: Sequence[int]) -> None:
        super().__init__(d_in=sum(widths))
        parts = [make_normalization(name, d_in=width) for width in widths]
        if any(part.per_row for part in parts):
            raise ValueError(
                f"a crosscoder cannot use normalization={name!r}: each row would need a mean and scale per source, and "
                f"codes carry one. Use mean_std or mean_norm, which have one for all rows of a source."
            )
        self.parts = nn.ModuleList(parts)
        self.columns = column_slices(widths)

    def fit_parts(self, stats: ActivationStats, sample: Float[Tensor, "n d_in"]) -> None:
        for columns, part in self._of_each():
            part.fit(stats_of_columns(stats, sample, columns))

    def fit(self, stats: ActivationStats) -> None:
        raise TypeError("sources side by side are fitted by `fit_parts`, which needs a sample of the rows as well.")

    def forward(self, x: Float[Tensor, "n d_in"]) -> Normalized:
        return Normalized(torch.cat([part(x[:, columns]).y for columns, part in self._of_each()], 1), None, None)

    def invert(
        self, y: Float[Tensor, "n d_in"], shift: Float[Tensor, "n 1"] | None, scale: Float[Tensor, "n 1"] | None
    ) -> Float[Tensor, "n d_in"]:
        return torch.cat([part.invert(y[:, columns], None, None) for columns, part in self._of_each()], 1)

    def of(self, source: int) -> Normalization:
        part = self.parts[source]
        assert isinstance(part, Normalization)
        return part

    def _of_each(self) -> list[tuple[slice, Normalization]]:
        return [(columns, self.of(source)) for source, columns in enumerate(self.columns)]


class MultiSource(SparseCoder):
    """Goes before an architecture among a class's bases; `add_sources` follows the architecture's constructor."""

    normalize: PerSource

    def add_sources(self, widths: Sequence[int] | None) -> None:
        """`widths` None: one source."""
        self.widths = None if widths is None else list(widths)
        parts = [self.d_in] if widths is None else list(widths)
        if sum(parts) != self.d_in or min(parts, default=0) < 1:
            raise ValueError(f"widths must be the sources' widths and sum to d_in={self.d_in}, got {parts}.")
        self.columns = column_slices(parts)
        self.normalize = PerSource(self.normalization, parts)

    @torch.no_grad()
    def fit(self, stats: ActivationStats, sample: Float[Tensor, "n d_in"]) -> None:
        if stats.mean.shape != (self.d_in,):
            raise ValueError(
                f"the statistics are of {len(stats.mean)} dimensions; this coder has d_in={self.d_in}, all sources "
                f"side by side."
            )
        self.normalize.fit_parts(stats, sample)
        self.fitted.fill_(True)
        if self.b_dec_init == "geometric_median":
            self.b_dec.copy_(geometric_median(self.normalized(sample)))

    # -- source by source

    @property
    def n_sources(self) -> int:
        return len(self.columns)

    def join(self, sources: Sequence[Float[Tensor, "n _"]]) -> Float[Tensor, "n d_in"]:
        """Rows as this coder takes them, from the activations of each source."""
        expected, got = [c.stop - c.start for c in self.columns], [x.shape[1] for x in sources]
        if got != expected:
            raise ValueError(f"this crosscoder joins sources of widths {expected}, in this order; got {got}.")
        return torch.cat(list(sources), 1)

    def encoder_of(self, source: int) -> Float[Tensor, "d_source d_sae"]:
        return self.W_enc[self._columns(source)]

    def decoder_of(self, source: int) -> Float[Tensor, "d_sae d_source"]:
        return self.W_dec[:, self._columns(source)]

    def decode_source(self, codes: Codes | Float[Tensor, "n d_sae"], source: int) -> Float[Tensor, "n d_source"]:
        """Raw activations of one source alone."""
        columns, W_dec = self._columns(source), self.decoder_of(source)
        y_hat = codes @ W_dec if isinstance(codes, Tensor) else decode(codes, W_dec.contiguous())
        return self.normalize.of(source).invert(y_hat + self.b_dec[columns], None, None)

    # -- to whom a latent belongs

    def source_norms(self) -> Float[Tensor, "n_sources d_sae"]:
        """||W_dec_m[i]|| in normalised space. Differentiable."""
        return torch.stack([torch.linalg.vector_norm(self.W_dec[:, c], dim=1) for c in self.columns])

    @torch.no_grad()
    def shares(self) -> Float[Tensor, "n_sources d_sae"]:
        """Each source's share of a latent's norms, 0..1; they sum to 1 over sources."""
        norms = self.source_norms()
        return norms / norms.sum(0).clamp_min(torch.finfo(norms.dtype).tiny)

    def relative_norm(self) -> Float[Tensor, " d_sae"]:
        """r = ||W_dec_1|| / (||W_dec_0|| + ||W_dec_1||): 0 belongs to source 0 alone, 1 to source 1, 1/2 is shared."""
        if self.n_sources != 2:
            raise ValueError(f"relative_norm compares two sources, this crosscoder has {self.n_sources}. Use shares().")
        return self.shares()[1]

    def exclusive_to(self, source: int, *, at_least: float = 0.9) -> Bool[Tensor, " d_sae"]:
        """Latents that write (almost) nowhere else. Of a latent that never fires this says nothing."""
        self._columns(source)
        return self.shares()[source] >= at_least

    def shared(self, *, tolerance: float = 0.2) -> Bool[Tensor, " d_sae"]:
        """Latents whose share is even: every source's within 1/n_sources times 1 +- tolerance (of two: 0.4 to 0.6)."""
        return ((self.shares() * self.n_sources - 1).abs() <= tolerance).all(0)

    def _columns(self, source: int) -> slice:
        if not 0 <= source < self.n_sources:
            raise ValueError(f"source must be in 0..{self.n_sources - 1}, got {source}.")
        return self.columns[source]


class Crosscoder(MultiSource, ReLU):
    name = "crosscoder"

    def __init__(
        self,
        *,
        d_in: int,
        d_sae: int,
        widths: Sequence[int] | None = None,
        l1: float = 1.0,
        normalization: str = "mean_std",
        b_dec_init: str = "zeros",
        seed: int = 0,
    ) -> None:
        ReLU.__init__(
            self, d_in=d_in, d_sae=d_sae, l1=l1, normalization=normalization, b_dec_init=b_dec_init, seed=seed
        )
        self.add_sources(widths)

    def loss(self, x: Float[Tensor, "n d_in"]) -> Step:
        y = self.normalized(x)
        weights = (self.b_dec, self.W_enc, self.b_enc, self.W_dec)
        found = rectified(y, *weights, dtype=self.selection_dtype)
        y_hat = found.decoded + self.b_dec
        penalty = self.l1 * ((found.per_latent / len(y)) @ self.source_norms().sum(0))
        terms = {"reconstruction": squared_error(y, y_hat), "l1": penalty}
        loss, fired = terms["reconstruction"] + penalty, found.rows_fired
        return Step(loss, terms, found.codes, y=y, target=y, x_hat=y_hat, penalty=("l1",), fired=fired)

    def constrain_gradients(self) -> None:
        """Nothing: norms are free, the penalty is measured by them."""

    def constrain_weights(self) -> None:
        """Nothing."""


class TopKCrosscoder(MultiSource, TopK):
    name = "topk_crosscoder"

    def __init__(
        self,
        *,
        d_in: int,
        d_sae: int,
        widths: Sequence[int] | None = None,
        k: int = 32,
        inference: str = "topk",
        normalization: str = "mean_std",
        b_dec_init: str = "zeros",
        seed: int = 0,
    ) -> None:
        TopK.__init__(
            self,
            d_in=d_in,
            d_sae=d_sae,
            k=k,
            inference=inference,
            normalization=normalization,
            b_dec_init=b_dec_init,
            seed=seed,
        )
        self.add_sources(widths)


class BatchTopKCrosscoder(MultiSource, BatchTopK):
    name = "batch_topk_crosscoder"

    def __init__(
        self,
        *,
        d_in: int,
        d_sae: int,
        widths: Sequence[int] | None = None,
        k: int = 32,
        normalization: str = "mean_std",
        b_dec_init: str = "zeros",
        seed: int = 0,
    ) -> None:
        BatchTopK.__init__(
            self, d_in=d_in, d_sae=d_sae, k=k, normalization=normalization, b_dec_init=b_dec_init, seed=seed
        )
        self.add_sources(widths)
