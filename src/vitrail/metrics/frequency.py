"""How often latents fire: histograms of log10 firing frequency, and how much of L0 the busiest ones are.

    f_i = rows in which latent i fires / rows                    per token
    g_i = images in which it fires anywhere / images             per image
    firing_histogram           latents in bins of log10 f, a quarter of a decade wide, and those that never fire
    firing_histogram_images    the same of log10 g
    above_1, above_10, above_50          share of latents with f > .01, .1, .5
    l0_above_1, l0_above_10, l0_above_50 share of all activations (of L0) that is theirs

Range. 0..1 for shares; log10 frequencies at most 0, frequencies below the lowest edge share the first bin. No unit.

Moves with. The number of rows: the rarest frequency that can be seen is one in their number, and "never" shrinks as
rows are added. Token kinds: a latent of CLS alone fires in one of 197 rows but in every image.

Does not show. Whether a latent that fires everywhere is a bias in disguise or a common concept; which concepts.

Source. Prisma section 3.1.2 (frequency histograms); SPEC row 46.

Tags. "share-of-rows" for all numbers. The shares are of this dictionary on these rows and have no interval.
"""

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from vitrail.coders.sparse import Codes
from vitrail.metrics.measured import Measured
from vitrail.metrics.passing import Curve, Metric, Seen, Setting

BINS_PER_DECADE, LOWEST = 4, -8  # fixed, so that any two coders' histograms can be laid over each other
BUSY = {"1": 0.01, "10": 0.1, "50": 0.5}
CELLS_AT_ONCE = 1 << 24  # marks of (image, latent) held at a time


class FiringFrequency(Metric):
    """Two counts a latent."""

    def __init__(self, setting: Setting) -> None:
        self._n_tokens = setting.n_tokens
        self._rows_fired = torch.zeros(setting.d_sae, dtype=torch.long)
        self._images_fired = torch.zeros(setting.d_sae, dtype=torch.long)
        self._rows = 0

    def update(self, seen: Seen) -> None:
        self._rows_fired += seen.codes.fired().cpu()
        self._images_fired += images_fired(seen.codes, self._n_tokens).cpu()
        self._rows += seen.codes.n

    def compute(self, *, n_bootstrap: int = 1000, seed: int = 0) -> dict[str, Measured]:
        frequency, fired = self._frequency().numpy(), self._rows_fired.double().numpy()
        of = {"definition": "share-of-rows", "n": self._rows}
        out: dict[str, Measured] = {}
        for name, edge in BUSY.items():
            busy = frequency > edge
            out[f"above_{name}"] = Measured(value=float(busy.mean()), **of)
            share = float(fired[busy].sum() / fired.sum()) if fired.any() else float("nan")
            out[f"l0_above_{name}"] = Measured(value=share, **of)
        return out

    def curves(self) -> dict[str, Curve]:
        n_images = self._rows // self._n_tokens
        return {
            "firing_histogram": frequency_histogram(self._rows_fired, self._rows),
            "firing_histogram_images": frequency_histogram(self._images_fired, n_images),
        }

    def _frequency(self) -> Tensor:
        if self._rows == 0:
            raise ValueError("no images were measured: there is nothing to report.")
        return self._rows_fired.double() / self._rows


def images_fired(codes: Codes, n_tokens: int) -> Int[Tensor, " d_sae"]:
    """In how many images each latent fires anywhere. `codes`: whole images, image-major."""
    n_images, d_sae = codes.n // n_tokens, codes.d_sae
    if n_tokens == 1:
        return codes.fired()
    total = torch.zeros(d_sae, dtype=torch.long, device=codes.device)
    at_once = max(1, CELLS_AT_ONCE // d_sae)
    rows = codes.rows()
    for first in range(0, n_images, at_once):
        n = min(at_once, n_images - first)
        start, stop = codes.offsets[[first * n_tokens, (first + n) * n_tokens]].tolist()
        marked = torch.zeros(n * d_sae, dtype=torch.bool, device=codes.device)
        cells = rows[start:stop].div(n_tokens, rounding_mode="floor").sub_(first).mul_(d_sae)
        marked[cells.add_(codes.indices[start:stop])] = True
        total += marked.view(n, d_sae).sum(0)
    return total


def frequency_histogram(fired: Int[Tensor, " d_sae"], n: int) -> Curve:
    """`fired`: of n rows or images. The first row is of latents that never fire: its bin has no edges."""
    counts, d_sae = fired[fired > 0].double().numpy(), len(fired)
    n_bins = -LOWEST * BINS_PER_DECADE
    # The small lift: a frequency of exactly .1 belongs to the bin that begins at -1.
    places = np.floor((np.log10(counts / max(n, 1)) - LOWEST) * BINS_PER_DECADE + 1e-9)
    latents = np.bincount(np.clip(places, 0, n_bins - 1).astype(np.int64), minlength=n_bins)
    never = d_sae - len(counts)
    rows: Curve = [{"log10_low": None, "log10_high": None, "latents": never, "share": never / d_sae}]
    for i, number in enumerate(latents.tolist()):
        low, high = LOWEST + i / BINS_PER_DECADE, LOWEST + (i + 1) / BINS_PER_DECADE
        rows.append({"log10_low": low, "log10_high": high, "latents": number, "share": number / d_sae})
    return rows
