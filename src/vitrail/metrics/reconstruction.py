"""How well x_hat stands for x: fraction of variance unexplained, explained variance, cosine.

    FVU = sum ||x - x_hat||^2 / sum ||x - mean(x)||^2     ratio of sums over all rows of the evaluation set; 0 is
                                                          perfect, 1 the mean predictor, no upper bound. Unit: none.
    explained variance = 1 - FVU                          ViSAEBench Eq. 4; equals torchmetrics' variance-weighted R2
    cosine = mean over rows of <x, x_hat> / ||x|| ||x_hat||, each row on its own (dim=-1)

Definitions (SPEC rows 39, 41): "ratio-of-sums" and "per-row" are vitrail's. What Prisma's code computes, the mean over
rows of 1 - ||x - x_hat||^2 / ||x - mean||^2, is dominated by rows near the mean; it has its own function here (with
the evaluation set's mean where Prisma takes the batch's).
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
