"""Input normalisations. They are part of the coder: saved with it, and a coder always takes and gives raw activations.

    none        y = x
    mean_std    y = (x - mean) / s,              s = sqrt(mean_d Var_d), one number    ViSAEBench table 1; the default
    mean_norm   y = (x - mean) / c,              c = E||x - mean|| / sqrt(d_in)        MSAE section 3.3
    msae_code   y = (x - mean) / c,              c = E||x - mean||^2 / sqrt(d_in)      MSAE's released code
    layer_norm  y = (x - mu_row) / (sd_row + 1e-5),  sd unbiased, over the row            Prisma "layer_norm"
    row_norm    y = x sqrt(d_in) / ||x||                                                  Prisma "constant_norm_rescale"

The first four use one mean and one scale for all rows, from the statistics of the training activations. The last two
use each row's own, which travel with its codes (`Codes.shift`, `Codes.scale`).
"""

import math
from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vitrail.statistics import ActivationStats


class Normalized(NamedTuple):
    """`shift` and `scale` are None unless they belong to each row."""

    y: Float[Tensor, "n d_in"]
    shift: Float[Tensor, "n 1"] | None
    scale: Float[Tensor, "n 1"] | None


class Normalization(nn.Module):
    """y = n(x), and `invert`, its inverse. `needs_fit`: it must see the statistics first."""

    needs_fit: ClassVar[bool] = False
    per_row: ClassVar[bool] = False

    def __init__(self, *, d_in: int) -> None:
        super().__init__()
        self.d_in = d_in

    def fit(self, stats: ActivationStats) -> None:
        """Nothing to learn, unless a subclass has something."""

    def forward(self, x: Float[Tensor, "n d_in"]) -> Normalized:
        return Normalized(x, None, None)

    def invert(
        self, y: Float[Tensor, "n d_in"], shift: Float[Tensor, "n 1"] | None, scale: Float[Tensor, "n 1"] | None
    ) -> Float[Tensor, "n d_in"]:
        return y


class _Shared(Normalization):
    """One mean and one scale for all rows."""

    needs_fit = True
    mean: Tensor
    scale: Tensor

    def __init__(self, *, d_in: int) -> None:
        super().__init__(d_in=d_in)
        self.register_buffer("mean", torch.zeros(d_in))
        self.register_buffer("scale", torch.ones(()))

    def scale_from(self, stats: ActivationStats) -> float:
        raise NotImplementedError

    def fit(self, stats: ActivationStats) -> None:
        scale = self.scale_from(stats)
        if not (scale > 0 and math.isfinite(scale)):
            raise ValueError(
                f"the activations' scale is {scale} over {stats.n} rows, so they cannot be normalised: every row is "
                f"the same, or some are not finite. Check the hook point and the token kind."
            )
        self.mean.copy_(stats.mean)
        self.scale.fill_(scale)

    def forward(self, x: Float[Tensor, "n d_in"]) -> Normalized:
        return Normalized((x - self.mean) / self.scale, None, None)

    def invert(
        self, y: Float[Tensor, "n d_in"], shift: Float[Tensor, "n 1"] | None, scale: Float[Tensor, "n 1"] | None
    ) -> Float[Tensor, "n d_in"]:
        return y * self.scale + self.mean


class MeanStd(_Shared):
    def scale_from(self, stats: ActivationStats) -> float:
        return stats.scalar_std


class MeanNorm(_Shared):
    """The paper's constant: afterwards E||y|| = sqrt(d_in)."""

    def scale_from(self, stats: ActivationStats) -> float:
        return stats.centred_norm / math.sqrt(self.d_in)


class MSAECode(_Shared):
    """What the released code computes instead: it divides by the mean *squared* norm. For its published weights."""

    def scale_from(self, stats: ActivationStats) -> float:
        return float(stats.variance.double().sum()) / math.sqrt(self.d_in)


class _PerRow(Normalization):
    per_row = True

    def row_terms(self, x: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def forward(self, x: Float[Tensor, "n d_in"]) -> Normalized:
        shift, scale = self.row_terms(x)
        return Normalized((x - shift) / scale, shift, scale)

    def invert(
        self, y: Float[Tensor, "n d_in"], shift: Float[Tensor, "n 1"] | None, scale: Float[Tensor, "n 1"] | None
    ) -> Float[Tensor, "n d_in"]:
        if shift is None or scale is None:
            raise ValueError(
                "this coder normalises each row by its own mean and scale, so codes alone cannot be decoded. Use "
                "decode_sparse on codes from encode_sparse, or pass them as decode(z, like=codes)."
            )
        return y * scale + shift


class LayerNorm(_PerRow):
    """Prisma's inverse multiplies by sd without the 1e-5, so that its round trip is off by 1e-5/sd; ours is exact."""

    def row_terms(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x.mean(1, keepdim=True), x.std(1, keepdim=True) + 1e-5


class RowNorm(_PerRow):
    def row_terms(self, x: Tensor) -> tuple[Tensor, Tensor]:
        norm = torch.linalg.vector_norm(x, dim=1, keepdim=True)
        smallest = torch.finfo(x.dtype).tiny * self.d_in  # a row of zeros stays zeros
        return torch.zeros_like(norm), norm.clamp_min(smallest) / math.sqrt(self.d_in)


NORMALIZATIONS: dict[str, type[Normalization]] = {
    "none": Normalization,
    "mean_std": MeanStd,
    "mean_norm": MeanNorm,
    "msae_code": MSAECode,
    "layer_norm": LayerNorm,
    "row_norm": RowNorm,
}


def make_normalization(name: str, *, d_in: int) -> Normalization:
    if name not in NORMALIZATIONS:
        raise ValueError(f"there is no normalisation {name!r}. Known: {', '.join(NORMALIZATIONS)}.")
    return NORMALIZATIONS[name](d_in=d_in)
