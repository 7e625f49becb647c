"""Sparsity as a share of zeros, and reconstruction row by row: MSAE's columns, each with its spread over rows.

    sparsity           1 - l0 / d_sae, mean over rows                                       "share-of-zeros"
    fvu_std            std over rows of ||e||^2 / mean_rows ||x - mean||^2                  "msae-text"
    fvu_msae_loss      mean over rows of ||n(e)||^2 / ||n(x)||^2, in the coder's space      "msae-loss"
    fvu_msae_code      mean over rows of var_d(e) / var_d(x), e = x - x_hat                 "msae-code"
    cosine_normalized  mean over rows of cosine(n(x), n(x_hat)), in the coder's space       "normalized-space"
    cosine_std         std over rows of cosine(x, x_hat)                                    "msae-code"

and `sparsity_std`, `fvu_msae_loss_std`, `fvu_msae_code_std`, `cosine_normalized_std`: standard deviations over rows,
divided by the number of rows (numpy's), as in MSAE's tables. n: the coder's normalisation.

Range. sparsity in 0..1; the three FVU from 0 (perfect) without an upper bound; cosines in -1..1. No unit.

Moves with. msae-text is the ratio of sums, `fvu`: only its spread is here, that of a vector whose mean is `fvu`
itself. msae-loss divides by the row's own length and so weighs short rows up. msae-code takes each row's
variance over *coordinates*, on raw rows: an offset that all rows share counts as variance to be explained, so that the
mean predictor scores far below 1 and every number looks better. Cosines after un-normalising (`cosine`, which is what
MSAE's code calls CS) are lifted by the shared mean in the same way; `cosine_normalized` is not.

Does not show. What the model makes of the error, nor whether latents mean anything. The spread is over rows and is no
interval: it does not shrink with more images.

Source. Zaigrajew et al. 2025 (MSAE), section 4.1; its released loss.py and metrics.py; SPEC rows 48-51. MSAE prints
sparsity as "L0" and calls the function that returns msae-code "explained variance". ViSAEBench Eq. 4 for `fvu`.

Tags. "share-of-zeros", "msae-text", "msae-loss", "msae-code", "normalized-space". Rows whose denominator is 0 have no
ratio and are left out of the two means of ratios.
"""

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from vitrail.metrics.coder_space import in_coders_space, row_terms
from vitrail.metrics.measured import Array, Measured, over_images
from vitrail.metrics.passing import Metric, Seen, Setting
from vitrail.metrics.slabs import slabs
from vitrail.statistics import Moments


def fvu_msae_loss(y: Float[Tensor, "n d"], y_hat: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
    """||y - y_hat||^2 / ||y||^2 of each row, uncentred; NaN for rows of zeros."""
    return (y - y_hat).square().sum(1) / _or_nan(y.square().sum(1))


def fvu_msae_code(x: Float[Tensor, "n d"], x_hat: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
    """var(x - x_hat) / var(x) of each row, over its coordinates; NaN for rows of one value."""
    return _variance(x - x_hat) / _or_nan(_variance(x))


def row_cosine(a: Float[Tensor, "n d"], b: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
    """0 where either is zero. The same as torch.cosine_similarity in a third of its time, worked out in fp64 from
    fp32 sums."""
    dot, a_square, b_square = ((p * q).sum(1).double() for p, q in ((a, b), (a, a), (b, b)))
    return dot / (a_square * b_square).sqrt().clamp_min(1e-30)


def _variance(x: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
    """torch.var reads rows far more slowly."""
    return (x - x.mean(1, keepdim=True)).square().mean(1)


def _or_nan(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, torch.nan)


class MSAEReconstruction(Metric):
    """Keeps a few numbers an image, and one running sum a dimension."""

    def __init__(self, setting: Setting) -> None:
        self._coder = setting.coder
        self._moments = Moments()
        self._columns: dict[str, list[Tensor]] = {}

    @torch.no_grad()
    def update(self, seen: Seen) -> None:
        target, reconstructed, codes = seen.target.flatten(0, 1), seen.x_hat.flatten(0, 1), seen.codes
        parts: dict[str, list[Tensor]] = {"sparsity": [1 - codes.l0().double() / codes.d_sae]}
        for rows in slabs(len(target), target.shape[1], target.device):
            x, x_hat = target[rows].float(), reconstructed[rows].float()
            y, y_hat = (in_coders_space(self._coder, each, row_terms(codes, rows)).float() for each in (x, x_hat))
            of_rows = {
                "error": (x - x_hat).square().sum(1),
                "loss": fvu_msae_loss(y, y_hat),
                "code": fvu_msae_code(x, x_hat),
                # From 1, so that the spread of cosines near 1 keeps its digits.
                "cosine": 1 - row_cosine(x, x_hat),
                "normalized": 1 - row_cosine(y, y_hat),
            }
            for name, values in of_rows.items():
                parts.setdefault(name, []).append(values)
        for name, values in parts.items():
            self._add(name, torch.cat(values), seen)
        self._moments.update(target.float().cpu())

    def _add(self, name: str, of_rows: Float[Tensor, " n"], seen: Seen) -> None:
        """Per image: how many rows have a value, its sum, its square's sum."""
        of_rows = of_rows.double().reshape(seen.n_images, seen.n_tokens)
        has = of_rows.isfinite()
        of_rows = torch.where(has, of_rows, 0.0)
        sums = torch.stack([has.double().sum(1), of_rows.sum(1), of_rows.square().sum(1)])
        self._columns.setdefault(name, []).append(sums.cpu())

    def compute(self, *, n_bootstrap: int = 1000, seed: int = 0) -> dict[str, Measured]:
        drawn = {"n_bootstrap": n_bootstrap, "seed": seed}
        columns = {name: torch.cat(parts, 1).numpy() for name, parts in self._columns.items()}
        if not columns:
            raise ValueError("no images were measured: there is nothing to report.")
        out: dict[str, Measured] = {}
        for name, key, tag in (
            ("sparsity", "sparsity", "share-of-zeros"),
            ("loss", "fvu_msae_loss", "msae-loss"),
            ("code", "fvu_msae_code", "msae-code"),
        ):
            out[key] = _mean(columns[name], tag, **drawn)
            out[f"{key}_std"] = _std(columns[name], tag, **drawn)
        distance = columns["normalized"]
        named: dict[str, Array] = dict(zip(("n", "sum", "square"), distance, strict=True))
        out["cosine_normalized"] = over_images(
            named, lambda c: 1 - c["sum"] / c["n"], definition="normalized-space", **drawn
        )
        out["cosine_normalized_std"] = _std(distance, "normalized-space", **drawn)
        out["cosine_std"] = _std(columns["cosine"], "msae-code", **drawn)
        total = float(self._moments.variance().sum())  # mean over rows of ||x - mean||^2
        n, error, square = columns["error"]
        scaled = np.stack([n, error / total, square / total**2]) if total > 0 else np.full((3, len(n)), np.nan)
        out["fvu_std"] = _std(scaled, "msae-text", **drawn)
        return out


def _mean(column: Array, definition: str, *, n_bootstrap: int, seed: int) -> Measured:
    named: dict[str, Array] = dict(zip(("n", "sum"), column[:2], strict=True))
    return over_images(named, lambda c: c["sum"] / c["n"], definition=definition, n_bootstrap=n_bootstrap, seed=seed)


def _std(column: Array, definition: str, *, n_bootstrap: int, seed: int) -> Measured:
    """Of the rows' values, with an interval over images."""

    def std(c: dict[str, Array]) -> Array:
        mean = c["sum"] / c["n"]
        return np.sqrt(np.maximum(c["square"] / c["n"] - mean**2, 0))

    named: dict[str, Array] = dict(zip(("n", "sum", "square"), column, strict=True))
    return over_images(named, std, definition=definition, n_bootstrap=n_bootstrap, seed=seed)
