"""Where in the image latents fire: L0 by patch position, its spread over images, centre against border, CLS by layer.

    l0_map           mean over images of L0 at each patch: a (height, width) table
    l0_positions     at each position: mean, minimum, 5 %, quartiles, 95 %, maximum over images
    l0_patches       mean L0 of patch tokens
    l0_cls_share     mean L0 of the CLS token / mean L0 of patch tokens
    l0_centre_border (c - b) / ((c + b) / 2),   c: mean L0 of patches that lie wholly in the middle half of rows and
                     columns,   b: of the outermost ring
    l0_centre_border_p   two-sided p of c - b over images under random signs

Range. L0 is a count in 0..d_sae. The contrast lies in -2..2: 0 is no preference, positive more in the middle, .1 a
tenth of their mean. p in 0..1, at least one in the number of sign patterns tried.

Moves with. Photographs show their object in the middle: a contrast is one of the pictures as much as of the coder.
High-norm patches and registers, where a ReLU fires more latents. A TopK coder has the same L0 everywhere, and no
contrast, by construction; the p is then 1.

Does not show. What fires there. p says whether the images agree on a sign, not how large the contrast is, nor that it
would be larger than that of another way of cutting up the grid.

Source. "Steering CLIP's vision transformer with sparse autoencoders", section 5.1, figures 4 and 8 (heat maps, box
plots and CLS by layer, without a statistic for the centre); SPEC rows 104 and 105. GPT2_L0: its section 5.2, the mean
L0 of SAEs on GPT-2's residual stream.

Tags. "count-active", "ratio-of-means", "middle-half-minus-ring", "sign-flip". Intervals are over images.
"""

import itertools
from collections.abc import Mapping

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vitrail.metrics.measured import Array, Measured, over_images
from vitrail.metrics.passing import Curve, Metric, Seen, Setting

GPT2_L0 = (20.0, 50.0)
SIGNS_AT_MOST = 20_000_000  # random signs drawn in all, images x patterns
PATTERNS_AT_MOST = 9_999
EXACT_UP_TO = 13  # images: beyond that 2^n sign patterns are too many
MOST_COUNTS = 8192  # cells of a position's histogram; above, neighbouring counts share one


class L0Maps(Metric):
    """A histogram of counts at each position, and three numbers an image."""

    def __init__(self, setting: Setting) -> None:
        self._n_tokens, self._cls, self._grid = setting.n_tokens, setting.cls_token, setting.grid
        patches = setting.patches
        whole = patches is not None and patches.stop - patches.start == setting.grid.n_patches
        self._patches = patches if whole else None
        self._width = -(-(setting.d_sae + 1) // MOST_COUNTS)  # counts to a cell
        n_cells = setting.d_sae // self._width + 1
        self._cells: Int[Tensor, "n_tokens n_cells"] = torch.zeros(self._n_tokens, n_cells, dtype=torch.long)
        self._sum = torch.zeros(self._n_tokens, dtype=torch.long)
        self._columns: list[Tensor] = []
        self._n_images = 0
        self._centre, self._border = centre_and_border(setting.grid.height, setting.grid.width)

    def update(self, seen: Seen) -> None:
        l0 = seen.codes.l0().cpu().view(-1, self._n_tokens)
        n_cells = self._cells.shape[1]
        cells = l0.div(self._width, rounding_mode="floor") + torch.arange(self._n_tokens) * n_cells
        self._cells += torch.bincount(cells.flatten(), minlength=self._cells.numel()).view_as(self._cells)
        self._sum += l0.sum(0)
        self._n_images += len(l0)
        if self._patches is not None:
            patches = l0[:, self._patches].double()
            parts = [patches, *(patches[:, where.flatten()] for where in (self._centre, self._border))]
            means = [part.mean(1) if part.shape[1] else part.new_full((len(l0),), torch.nan) for part in parts]
            self._columns.append(torch.stack(means))

    def compute(self, *, n_bootstrap: int = 1000, seed: int = 0) -> dict[str, Measured]:
        if self._n_images == 0:
            raise ValueError("no images were measured: there is nothing to report.")
        if self._patches is None:
            return {}
        patches, centre, border = torch.cat(self._columns, 1).numpy()
        columns = {"patches": patches, "images": np.ones(len(patches))}
        drawn = {"n_bootstrap": n_bootstrap, "seed": seed}
        out = {
            "l0_patches": over_images(columns, lambda c: c["patches"] / c["images"], definition="count-active", **drawn)
        }
        if self._cls is not None:
            # The patches' means have an interval beside them; this one's CLS is of the same images.
            cls = float(self._sum[self._cls]) / self._n_images
            mean = float(patches.mean())
            share = cls / mean if mean > 0 else float("nan")
            out["l0_cls_share"] = Measured(value=share, definition="ratio-of-means", n=len(patches))
        if np.isfinite(centre).all():
            out["l0_centre_border"] = over_images(
                {"c": centre, "b": border},
                lambda c: 2 * (c["c"] - c["b"]) / (c["c"] + c["b"]),
                definition="middle-half-minus-ring",
                **drawn,
            )
            p = sign_flip_p(centre - border, seed=seed)
            out["l0_centre_border_p"] = Measured(value=p, definition="sign-flip", n=len(centre))
        return out

    def curves(self) -> dict[str, Curve]:
        if self._n_images == 0:
            return {}
        means = (self._sum.double() / self._n_images).tolist()
        spread = quantiles_of_counts(self._cells, [0, 0.05, 0.25, 0.5, 0.75, 0.95, 1]) * self._width
        names = ("minimum", "low", "q1", "median", "q3", "high", "maximum")
        positions: Curve = []
        for token in range(self._n_tokens):
            patch = self._patch_of(token)
            kind = "patch" if patch is not None else "cls" if token == self._cls else "other"
            where = {"token": token, "kind": kind, "row": patch and patch[0], "column": patch and patch[1]}
            numbers = dict(zip(names, spread[:, token].tolist(), strict=True))
            positions.append({**where, "mean": means[token], **numbers})
        curves = {"l0_positions": positions}
        if self._patches is not None:
            kept = ("row", "column", "mean")
            curves["l0_map"] = [{key: row[key] for key in kept} for row in positions if row["kind"] == "patch"]
        return curves

    def _patch_of(self, token: int) -> tuple[int, int] | None:
        if self._patches is None or not self._patches.start <= token < self._patches.stop:
            return None
        return divmod(token - self._patches.start, self._grid.width)


def centre_and_border(height: int, width: int) -> tuple[Bool[Tensor, "h w"], Bool[Tensor, "h w"]]:
    """Patches wholly in the middle half of rows and columns; the outermost ring. Below 3 x 3 there is no centre."""

    def middle(n: int) -> Bool[Tensor, " n"]:
        place = torch.arange(n)
        return (4 * place >= n) & (4 * (place + 1) <= 3 * n)

    def edge(n: int) -> Bool[Tensor, " n"]:
        place = torch.arange(n)
        return (place == 0) | (place == n - 1)

    return middle(height)[:, None] & middle(width), edge(height)[:, None] | edge(width)


def quantiles_of_counts(cells: Int[Tensor, "m n_cells"], shares: list[float]) -> Float[Tensor, "n_shares m"]:
    """numpy's quantiles (linear between neighbours) of whole numbers that are given as histograms, all of one size."""
    below = cells.cumsum(1)
    n = int(below[0, -1])
    out = []
    for share in shares:
        place = share * (n - 1)
        lower = int(place)
        at_lower, at_upper = ((below <= rank).sum(1).double() for rank in (lower, min(lower + 1, n - 1)))
        out.append(at_lower + (place - lower) * (at_upper - at_lower))
    return torch.stack(out)


def sign_flip_p(differences: Array, *, seed: int = 0) -> float:
    """Two-sided p of a mean of 0: how often random signs give a mean as far from 0. Exact up to EXACT_UP_TO numbers."""
    n, observed = len(differences), abs(float(differences.sum()))
    enough = observed * (1 - 1e-12) - 1e-12  # rounding must not make a tie a miss
    if n <= EXACT_UP_TO:
        signs = np.array(list(itertools.product((-1.0, 1.0), repeat=n)))
        return float((np.abs(signs @ differences) >= enough).mean())
    rng = np.random.default_rng(seed)
    n_patterns = int(np.clip(SIGNS_AT_MOST // n, 199, PATTERNS_AT_MOST))
    reached, left, total = 0, n_patterns, float(differences.sum())
    while left:
        m = min(left, max(1, 2_000_000 // n))
        flipped = rng.integers(0, 2, size=(m, n), dtype=np.int8)
        reached += int((np.abs(total - 2 * (flipped @ differences)) >= enough).sum())
        left -= m
    return (1 + reached) / (1 + n_patterns)


def cls_trajectory(layers: Mapping[int, Mapping[str, Measured]]) -> Curve:
    """L0 by layer, from each layer's `l0_cls` and `l0_patches`; what a layer lacks is None."""
    rows: Curve = []
    for layer in sorted(layers):
        row: dict[str, float | int | None] = {"layer": layer}
        for key in ("l0_cls", "l0_patches"):
            measured = layers[layer].get(key)
            row |= {
                key: None if measured is None else measured.value,
                f"{key}_low": None if measured is None else measured.low,
                f"{key}_high": None if measured is None else measured.high,
            }
        rows.append(row)
    return rows
