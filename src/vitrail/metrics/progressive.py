"""Progressive recovery: how good a reconstruction is from the k largest latents of each row, k = 1, 2, 4, ..., d_sae.

    x_hat_k = the coder's reconstruction from each row's k largest activations
    curve "progressive": at each k the FVU (with an interval), cosine, cosine_normalized, l0, dead; CKNNA if asked for
    progressive_fvu, progressive_cosine, progressive_cosine_normalized, progressive_cknna:
        the area under the curve over log2 k, divided by log2 d_sae: the metric's mean over the octaves

Range. That of each metric: an area of FVU is good when it is low, of a cosine when it is high. l0 in 0..k, dead in
0..d_sae latents (never among the k largest of any row shown).

Moves with. How unevenly activations are spread over the latents that fire: the area is low when the first few say most.
Beyond the largest L0 nothing changes, so that of two coders of one curve the one with the larger d_sae has the lower
area. For matching pursuit the k largest latents are not the first k it chose.

Does not show. Whether the coder could do better with k latents had it chosen them for that: only the order by size is
tried. Nor what the largest latents mean.

Source. MSAE section 4.7, figures 5, 16 and 17 (k = 16, 32, ..., d_sae); SPEC row 57. `fvu` is the ratio of sums;
`cosine` is of raw rows, as in MSAE's code, `cosine_normalized` of rows in the coder's normalised space.

Tags. "area-log2-k". In the bootstrap the mean of the rows stays fixed.
"""

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from vitrail.coders.sparse import Codes, bag
from vitrail.coders.transcoder import Transcoder
from vitrail.metrics.coder_space import in_coders_space, output_scale, row_terms
from vitrail.metrics.measured import Array, Measured, over_images
from vitrail.metrics.passing import Curve, Metric, Seen, Setting
from vitrail.metrics.slabs import slabs

METRICS = ("fvu", "cosine", "cosine_normalized")

Similarity = Callable[[Tensor, Codes], float]  # such as cknna(rows, codes)


class Progressive(Metric):
    """All k for one decode: a row's latents are ranked once, the bands of ranks 1, 2, 3-4, 5-8, ... are decoded side by
    side and added up.

    `cknna`: a similarity of raw rows and their codes, worked out at each k at the end, over at most `sample_rows`
    rows drawn from all that will be shown; None: left out.
    """

    def __init__(self, setting: Setting, *, cknna: Similarity | None = None, sample_rows: int = 10_000) -> None:
        self._coder, self._cknna = setting.coder, cknna
        self.ks = k_grid(setting.d_sae)
        self._columns: dict[str, list[Tensor]] = {}
        self._shift = setting.shift.float().cpu()
        self._sum, self._rows = torch.zeros(len(self._shift), dtype=torch.float64), 0
        self._first_band = torch.full((setting.d_sae,), len(self.ks), dtype=torch.long)
        total = setting.n_images * setting.n_tokens
        generator = torch.Generator().manual_seed(setting.seed)
        drawn = torch.randperm(total, generator=generator)[:sample_rows] if cknna else torch.zeros(0, dtype=torch.long)
        self._drawn = drawn.sort().values
        self._sample: list[tuple[Tensor, Codes]] = []

    @torch.no_grad()
    def update(self, seen: Seen) -> None:
        codes = seen.codes.detach()
        target = seen.target.flatten(0, 1)
        ranked = ranked_by_size(codes)
        band = _band_of_rank(len(self.ks)).to(codes.device)[_ranks(ranked)]
        first = self._first_band.to(codes.device)
        self._first_band = first.scatter_reduce_(0, ranked.indices.long(), band, "amin").cpu()
        start = self._from_no_latents(codes, seen.x.flatten(0, 1))
        n_bands = sum(k < int(codes.l0().max()) for k in self.ks) + 1
        parts = [
            self._measure(target[rows], start[rows], _rows_of(ranked, rows))
            for rows in slabs(len(target), n_bands * target.shape[1], target.device)
        ]
        for name in parts[0]:
            of_rows = torch.cat([part[name] for part in parts]).reshape(seen.n_images, seen.n_tokens, -1)
            self._columns.setdefault(name, []).append(of_rows.sum(1).cpu())
        self._columns.setdefault("rows", []).append(torch.full((seen.n_images, 1), float(seen.n_tokens)).double())
        self._keep_sample(target, codes)
        self._rows += len(target)

    def _from_no_latents(self, codes: Codes, like: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_out"]:
        """What every reconstruction of these rows starts from."""
        coder, n = self._coder, codes.n
        skips = isinstance(coder, Transcoder) and coder.W_skip is not None
        if codes.shift is None and not skips and n:
            codes, like = _rows_of(codes, slice(0, 1)), like[:1]  # the same for all
        none = codes.keep(torch.zeros(codes.nnz, dtype=torch.bool, device=codes.device))
        start = coder.decode_sparse(none, like=like) if isinstance(coder, Transcoder) else coder.decode_sparse(none)
        return start.expand(n, -1)

    def _measure(
        self, target: Float[Tensor, "n d_out"], start: Float[Tensor, "n d_out"], ranked: Codes
    ) -> dict[str, Float[Tensor, "n _"]]:
        """Of each row, at each k."""
        coder, most = self._coder, int(ranked.l0().max()) if ranked.n else 0
        edges = [0, *(k for k in self.ks if k < most), most]
        steps = _bands(ranked, edges, coder.W_dec)  # (n, bands, d_out), normalised
        for j in range(1, steps.shape[1]):  # a sixth of what cumsum takes
            steps[:, j] += steps[:, j - 1]
        terms = row_terms(ranked, slice(None))
        y, y_start = (in_coders_space(coder, rows, terms) for rows in (target, start))
        _, normalized = _errors_and_cosines(y, steps + y_start[:, None])
        x_hat = steps.mul_(output_scale(coder, terms)[:, None]).add_(start[:, None])
        error, cosine = _errors_and_cosines(target.to(steps.dtype), x_hat)
        l0 = torch.minimum(ranked.l0()[:, None], torch.tensor(self.ks, device=ranked.device)).double()
        # Where k exceeds the largest L0 of these rows, all of them are whole.
        where = [min(i, len(edges) - 2) for i in range(len(self.ks))]
        centred = target.float() - self._shift.to(target.device)
        self._sum += centred.sum(0).double().cpu()
        return {
            "square": centred.square().sum(1, keepdim=True).double(),
            "fvu": error[:, where],
            "cosine": cosine[:, where],
            "cosine_normalized": normalized[:, where],
            "l0": l0,
        }

    def _keep_sample(self, target: Tensor, codes: Codes) -> None:
        low, high = torch.searchsorted(self._drawn, torch.tensor([self._rows, self._rows + len(target)])).tolist()
        if high > low:
            rows = (self._drawn[low:high] - self._rows).to(target.device)
            self._sample.append((target[rows].cpu(), codes.select_rows(rows).to("cpu")))

    # -- at the end

    def compute(self, *, n_bootstrap: int = 1000, seed: int = 0) -> dict[str, Measured]:
        columns, weights = self._gathered(), octave_weights(self.ks)
        out: dict[str, Measured] = {}
        for name in METRICS:
            areas = {"sum": columns[name] @ weights, "all": columns["total" if name == "fvu" else "rows"][:, 0]}
            out[f"progressive_{name}"] = over_images(
                areas, lambda c: c["sum"] / c["all"], definition="area-log2-k", n_bootstrap=n_bootstrap, seed=seed
            )
        if self._cknna is not None and self._sample:
            area = float(np.asarray(self._similarities()) @ weights)
            n = sum(len(rows) for rows, _ in self._sample)
            out["progressive_cknna"] = Measured(value=area, definition="area-log2-k", n=n)
        return out

    def curves(self) -> dict[str, Curve]:
        columns = self._gathered()
        similarities = self._similarities() if self._cknna is not None and self._sample else None
        n_rows = columns["rows"].sum()
        curve: Curve = []
        for i, k in enumerate(self.ks):
            means = {name: float(columns[name][:, i].sum() / n_rows) for name in ("cosine", "cosine_normalized", "l0")}
            fvu = over_images(
                {"error": columns["fvu"][:, i], "total": columns["total"][:, 0]},
                lambda c: c["error"] / c["total"],
                definition="ratio-of-sums",
                n_bootstrap=200,
            )
            dead = int((self._first_band > i).sum())
            row = {"k": k, "fvu": fvu.value, "fvu_low": fvu.low, "fvu_high": fvu.high, **means, "dead": dead}
            curve.append(row if similarities is None else {**row, "cknna": similarities[i]})
        return {"progressive": curve}

    def _gathered(self) -> dict[str, Array]:
        if not self._columns:
            raise ValueError("no images were measured: there is nothing to report.")
        columns = {name: torch.cat(parts).numpy() for name, parts in self._columns.items()}
        # Each image's share of sum ||x - mean||^2, from squares about `shift`: the sum is exact, the shares are so
        # where shift is the mean.
        offset = float((self._sum / self._rows).square().sum())
        columns["total"] = columns["square"] - columns["rows"] * offset
        if not columns["total"].sum() > 1e-12 * columns["square"].sum():
            columns["total"] = np.zeros_like(columns["total"])  # rows all the same: there is no variance to explain
        return columns

    def _similarities(self) -> list[float]:
        assert self._cknna is not None
        rows = torch.cat([rows for rows, _ in self._sample])
        ranked = ranked_by_size(Codes.cat([codes for _, codes in self._sample]))
        places, most, found = _ranks(ranked), int(ranked.l0().max()), []
        for k in self.ks:
            again = found and self.ks[len(found) - 1] >= most
            found.append(found[-1] if again else float(self._cknna(rows, ranked.keep(places < k))))
        return found


def k_grid(d_sae: int) -> list[int]:
    """1, 2, 4, ... below d_sae, then d_sae."""
    return [*(2**i for i in range(d_sae.bit_length()) if 2**i < d_sae), d_sae]


def octave_weights(ks: list[int]) -> Array:
    """The trapezoidal rule over log2 k, for a mean: weights that sum to 1."""
    if len(ks) == 1:
        return np.ones(1)
    widths = np.diff(np.log2(ks))
    return (np.append(widths, 0) + np.append(0, widths)) / (2 * widths.sum())


def ranked_by_size(codes: Codes) -> Codes:
    """The same codes, each row's entries from the largest down; equal ones stay in order, as in `Codes.top`."""
    starts = range(0, codes.n, ROWS_PER_SORT if codes.device.type == "cpu" else max(codes.n, 1))
    order = [_order(codes, slice(start, min(start + ROWS_PER_SORT, codes.n))) for start in starts]
    order = torch.cat(order) if order else codes.indices
    return Codes(codes.offsets, codes.indices[order], codes.values[order], codes.d_sae, codes.shift, codes.scale)


ROWS_PER_SORT = 256


def _order(codes: Codes, rows: slice) -> Int[Tensor, " m"]:
    """Entries of some rows, sorted. On a CPU as integers, the value's bits above and the entry's number below, row by
    row side by side: a positive float's bits rise with it, and no argsort is as fast."""
    offsets = codes.offsets[rows.start : rows.stop + 1]
    first, last = int(offsets[0]), int(offsets[-1])
    values, l0 = codes.values[first:last], offsets.diff()
    if codes.device.type != "cpu" or values.dtype != torch.float32 or last - first >= 2**32:
        largest_first = torch.sort(values, descending=True, stable=True).indices
        of_row = codes.rows()[first:last]
        return largest_first[torch.sort(of_row[largest_first], stable=True).indices] + first
    keys = (2**31 - 1 - values.numpy().view(np.int32).astype(np.int64)) << 32 | np.arange(last - first)
    filled = np.arange(int(l0.max())) < l0[:, None].numpy()
    table = np.full(filled.shape, np.iinfo(np.int64).max)
    table[filled] = keys
    table.sort(axis=1)
    return torch.from_numpy(table[filled] & (2**32 - 1)) + first


def _ranks(ranked: Codes) -> Int[Tensor, " nnz"]:
    """0 for the largest of each row."""
    return torch.arange(ranked.nnz, device=ranked.device) - ranked.offsets[:-1].long()[ranked.rows()]


def _band_of_rank(n_ks: int) -> Int[Tensor, " d_sae"]:
    """In which band of the grid a rank lies: 0 | 1 | 2 3 | 4 .. 7 | ..."""
    return torch.cat([torch.full((max(1, 2 ** (i - 1)),), i) for i in range(n_ks)])


def _bands(ranked: Codes, edges: list[int], W_dec: Float[Tensor, "d_sae d"]) -> Float[Tensor, "n bands d"]:
    """Ranks edges[j] .. edges[j + 1] of each row, decoded on their own."""
    if len(edges) == 2 and edges[1] == 0:
        return W_dec.new_zeros(ranked.n, 1, W_dec.shape[1])
    l0, starts = ranked.l0()[:, None], ranked.offsets[:-1].long()[:, None]
    begins = starts + torch.minimum(l0, torch.tensor(edges[:-1], device=ranked.device))
    offsets = torch.cat([begins.flatten(), ranked.offsets[-1:].long()])
    decoded = bag(W_dec, ranked.indices, offsets, ranked.values.to(W_dec.dtype))
    return decoded.view(ranked.n, len(edges) - 1, -1)


def _errors_and_cosines(
    x: Float[Tensor, "n d"], x_hat: Float[Tensor, "n bands d"]
) -> tuple[Float[Tensor, "n bands"], Float[Tensor, "n bands"]]:
    """||x - x_hat||^2 and cosine(x, x_hat), which the three lengths give: a product of pairs takes four times as long
    as a norm. Overwrites x_hat."""
    norm = torch.linalg.vector_norm
    own, length = norm(x, dim=1).double()[:, None], norm(x_hat, dim=2).double()
    error = norm(x_hat.sub_(x[:, None]), dim=2).double().square()
    scale = 2 * own * length
    cosine = (own.square() + length.square() - error) / scale.clamp_min(1e-30)
    return error, torch.where(scale > 0, cosine.clamp(-1, 1), 0.0)


def _rows_of(codes: Codes, rows: slice) -> Codes:
    """Neighbouring rows, without copying their entries."""
    offsets = codes.offsets[rows.start : rows.stop + 1]
    first, last = int(offsets[0]), int(offsets[-1])
    shift, scale = (None if each is None else each[rows] for each in (codes.shift, codes.scale))
    return Codes(offsets - first, codes.indices[first:last], codes.values[first:last], codes.d_sae, shift, scale)
