"""How large activations are: histograms of all of them and of each row's largest, and who is behind the largest.

    activation_histogram   non-zero activations in bins of log10 z, a tenth of a decade wide
    maximum_histogram      rows by the log10 of their largest activation; a row without any has no bin
    high_pairs             (image, latent) pairs with an activation above `threshold` (15)
    high_latents           different latents among them
    high_rows              rows with one at least, a share
    high_valid_pairs, high_valid_latents   share of the pairs, of the latents, whose latent is a valid concept
    high_of_valid          share of all valid concepts that are among the high ones

Range. Counts from 0; shares in 0..1. Activations are in the coder's own normalised space: 1 is one normalised unit of
length along a decoder direction of unit norm. 15 under one normalisation is another length under another, and raw
activations are larger by its scale.

Moves with. Normalisation, d_in (rows have a norm of about sqrt(d_in)) and L0: fewer latents have to be larger. Counts
grow with the number of images. Bins are fixed, so that two coders' curves can be laid over each other; what lies
outside shares the first or the last bin.

Does not show. That a large activation means a clear concept: that is what `high_valid_*` asks, and it needs names that
were validated elsewhere.

Source. MSAE section 4.6 and figures 4, 14, 15 (histograms); appendix C and table 4 (above 15), whose text says samples
and concepts of the same number; SPEC rows 58 and 59.

Tags. "count-above", "share-above", "msae-table-4". Only `high_rows` has an interval: over images.
"""

from collections.abc import Collection

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from vitrail.coders.sparse import Codes
from vitrail.metrics.frequency import images_fired
from vitrail.metrics.measured import Measured, over_images
from vitrail.metrics.passing import Curve, Metric, Seen, Setting

BINS_PER_DECADE, LOWEST, HIGHEST = 10, -4, 4
N_BINS = (HIGHEST - LOWEST) * BINS_PER_DECADE
HIGH = 15.0


class Magnitudes(Metric):
    """`valid`: the latents whose concepts were validated, by number; None: the shares that need them are left out."""

    def __init__(self, setting: Setting, *, threshold: float = HIGH, valid: Collection[int] | None = None) -> None:
        if not threshold > 0:
            raise ValueError(f"threshold must be positive, as activations are, got {threshold}.")
        self._n_tokens, self._threshold = setting.n_tokens, threshold
        self._valid = None if valid is None else marks_of(valid, setting.d_sae)
        self._activations = torch.zeros(N_BINS, dtype=torch.long)
        self._maxima = torch.zeros(N_BINS, dtype=torch.long)
        self._images = torch.zeros(setting.d_sae, dtype=torch.long)  # in which each latent is high
        self._high_rows: list[Tensor] = []  # per image

    @torch.no_grad()
    def update(self, seen: Seen) -> None:
        codes = seen.codes.detach()
        maxima = row_maxima(codes)
        self._activations += binned(codes.values).cpu()
        self._maxima += binned(maxima[maxima > 0]).cpu()
        high = codes.values > self._threshold
        self._images += images_fired(codes.keep(high), self._n_tokens).cpu()
        self._high_rows.append((maxima > self._threshold).view(-1, self._n_tokens).double().sum(1).cpu())

    def compute(self, *, n_bootstrap: int = 1000, seed: int = 0) -> dict[str, Measured]:
        rows = torch.cat(self._high_rows).numpy() if self._high_rows else np.zeros(0)
        n, found = len(rows), self._images > 0
        columns = {"rows": rows, "all": np.full(n, float(self._n_tokens))}
        share = over_images(
            columns, lambda c: c["rows"] / c["all"], definition="share-above", n_bootstrap=n_bootstrap, seed=seed
        )
        out = {
            "high_pairs": Measured(value=float(self._images.sum()), definition="count-above", n=n),
            "high_latents": Measured(value=float(found.sum()), definition="count-above", n=n),
            "high_rows": share,
        }
        if self._valid is not None:
            by = {"definition": "msae-table-4", "n": n}
            valid_pairs, valid_found = int(self._images[self._valid].sum()), int(found[self._valid].sum())
            out["high_valid_pairs"] = Measured(value=_share(valid_pairs, int(self._images.sum())), **by)
            out["high_valid_latents"] = Measured(value=_share(valid_found, int(found.sum())), **by)
            out["high_of_valid"] = Measured(value=_share(valid_found, int(self._valid.sum())), **by)
        return out

    def curves(self) -> dict[str, Curve]:
        return {"activation_histogram": _curve(self._activations), "maximum_histogram": _curve(self._maxima)}


def marks_of(latents: Collection[int], d_sae: int) -> Bool[Tensor, " d_sae"]:
    """Raises ValueError for a latent that the coder does not have."""
    if strangers := [latent for latent in latents if not 0 <= latent < d_sae]:
        raise ValueError(f"valid latents must be in 0..{d_sae - 1}, got {strangers[0]}.")
    marks = torch.zeros(d_sae, dtype=torch.bool)
    marks[torch.tensor(sorted(latents), dtype=torch.long)] = True
    return marks


def row_maxima(codes: Codes) -> Tensor:
    """(n,): each row's largest activation, 0 where none fired."""
    return codes.values.new_zeros(codes.n).scatter_reduce_(0, codes.rows(), codes.values, "amax")


def binned(values: Tensor) -> Int[Tensor, " n_bins"]:
    """Positive values by log10: bin i holds 10^(LOWEST + i/10) <= z < 10^(LOWEST + (i+1)/10)."""
    inner = torch.tensor([10 ** _edge(i) for i in range(1, N_BINS)], device=values.device)
    places = torch.bucketize(values.float(), inner, right=True)
    return torch.bincount(places, minlength=N_BINS)


def _edge(i: int) -> float:
    """log10, in decimals that print as they are."""
    return (LOWEST * BINS_PER_DECADE + i) / BINS_PER_DECADE


def _curve(counts: Int[Tensor, " n_bins"]) -> Curve:
    total = max(int(counts.sum()), 1)
    return [
        {
            "log10_low": _edge(i),
            "log10_high": _edge(i + 1),
            "count": count,
            "share": count / total,
        }
        for i, count in enumerate(counts.tolist())
    ]


def _share(part: int, whole: int) -> float:
    return part / whole if whole else float("nan")
