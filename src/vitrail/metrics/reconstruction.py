"""Reconstruction: how well x_hat stands for x, as explained variance and as cosine.

    fvu                 sum ||x - x_hat||^2 / sum ||x - mean(x)||^2      over all rows of the evaluation set
    explained_variance  1 - fvu
    cosine              mean over rows of <x, x_hat> / ||x|| ||x_hat||, each row on its own (dim=-1)

Range. fvu from 0 (perfect) over 1 (the mean predictor) without an upper bound; explained_variance at most 1, cosine in
-1..1. No unit. Equals torchmetrics' variance-weighted R2.

Moves with. L0 before all: compare at equal L0. Which tokens: a few high-norm tokens can own most of the variance. The
cosine is lifted by whatever mean the rows share; fvu is not.

Does not show. What the model makes of the error: a small error along the wrong direction can cost more than a large one
elsewhere (substitution). Nor whether latents mean anything: 64 principal components do well.

Source. ViSAEBench Eq. 4 (FVU); Prisma section 9 and MSAE sections 4.1, 4.2, whose codes compute other things under the
same names (prisma_reconstruction, msae_reconstruction); SPEC rows 39, 41, 49 to 51.

Tags. "ratio-of-sums", "per-row". The mean stays fixed in the bootstrap.
"""

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from vitrail.metrics.measured import Measured, over_images


class Reconstruction:
    """Streams over images: `update` once per batch of images, `compute` at the end.

    Sums are fp64 and taken about `shift`, a rough mean of the rows: fp32 squares of activations with a large mean
    lose the variance.
    """

    def __init__(self, shift: Float[Tensor, " d_in"]) -> None:
        self._shift = shift.double().cpu()
        self._squared_error: list[Tensor] = []
        self._square: list[Tensor] = []
        self._sum: list[Tensor] = []
        self._cosine: list[Tensor] = []
        self._n_tokens: list[Tensor] = []

    def update(self, x: Float[Tensor, "n t d_in"], x_hat: Float[Tensor, "n t d_in"]) -> None:
        """Rows of whole images."""
        self._cosine.append(torch.cosine_similarity(x.float(), x_hat.float(), dim=-1).double().sum(1).cpu())
        self._squared_error.append((x - x_hat).double().square().sum((1, 2)).cpu())
        centred = x.double().cpu() - self._shift
        self._square.append(centred.square().sum((1, 2)))
        self._sum.append(centred.sum(1))
        self._n_tokens.append(torch.full((len(x),), x.shape[1], dtype=torch.float64))

    def compute(self, *, n_bootstrap: int = 1000, seed: int = 0) -> dict[str, Measured]:
        """`fvu`, `explained_variance`, `cosine`. The mean is that of all rows seen; it stays fixed in the bootstrap."""
        n_tokens, sums = torch.cat(self._n_tokens), torch.cat(self._sum)
        offset = sums.sum(0) / n_tokens.sum()  # of the mean from `shift`
        about_mean = torch.cat(self._square) - 2 * sums @ offset + n_tokens * offset.square().sum()
        columns = {
            "error": torch.cat(self._squared_error).numpy(),
            "total": about_mean.numpy(),
            "cosine": torch.cat(self._cosine).numpy(),
            "rows": n_tokens.numpy(),
        }
        drawn = {"n_bootstrap": n_bootstrap, "seed": seed}
        return {
            "fvu": over_images(columns, lambda c: c["error"] / c["total"], definition="ratio-of-sums", **drawn),
            "explained_variance": over_images(
                columns, lambda c: 1 - c["error"] / c["total"], definition="ratio-of-sums", **drawn
            ),
            "cosine": over_images(columns, lambda c: c["cosine"] / c["rows"], definition="per-row", **drawn),
        }


def fvu(x: Float[Tensor, "n d_in"], x_hat: Float[Tensor, "n d_in"]) -> float:
    """FVU of rows held in memory. NaN where x is constant: there is no variance to explain."""
    x, x_hat = x.double(), x_hat.double()
    total = (x - x.mean(0)).square().sum()
    return float((x - x_hat).square().sum() / total) if total > 0 else float(np.nan)


def explained_variance_mean_of_ratios(x: Float[Tensor, "n d_in"], x_hat: Float[Tensor, "n d_in"]) -> float:
    """Definition "prisma-mean-of-ratios": mean over rows of 1 - ||x - x_hat||^2 / ||x - mean||^2. Unbounded below."""
    x, x_hat = x.double(), x_hat.double()
    return float((1 - (x - x_hat).square().sum(1) / (x - x.mean(0)).square().sum(1)).mean())
