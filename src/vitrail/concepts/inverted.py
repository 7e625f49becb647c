"""Sparse codes read latent by latent: exact nearest rows among millions, and the rows in which a latent fires.

    L1        |q|_1 + |x|_1 - 2 sum_i min(q_i, x_i)      what one has and the other has not; 0 for equal codes
    cosine    sum_i q_i x_i / (|q|_2 |x|_2)              0 where one of them is empty
    overlap   sum_i min(q_i, x_i) / |q|_1                how much of the query is in x, whatever else x holds

Codes are not negative, so that only latents which fire in both count in the sums, and a query reads the columns of its
own latents alone. Sums are made in fp32; whatever comes within their rounding error of the k-th place is worked out
again in fp64 from its row, so the ranking is that of exact arithmetic. Ties go to the earlier row.

    INDEX/manifest.json, INDEX/index.safetensors         docs/search.md says what is in them

MSAE (Zaigrajew et al. 2025, arXiv:2502.20578), section 5.2 and G.2, searches by Manhattan distance between codes.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, get_args

import numpy as np
import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from vitrail.coders.sparse import Codes
from vitrail.codes import CodeStore
from vitrail.files import file_digest, open_tensors, read_json, write_json, write_tensors
from vitrail.metrics.truth import pooled
from vitrail.progress import SILENT, Progress

FORMAT = "vitrail-search"
VERSION = 1
SparseMetric = Literal["l1", "cosine", "overlap"]
# A latent that fires in more rows than this is kept as a plain column of all rows: quicker to add from 0.15 on, and
# never more than a third larger than a list of rows from 0.25 on.
DENSE_SHARE = 0.25
ENTRIES_AT_ONCE = 1 << 22
WITHIN_ROUNDING = 4096  # so many rows at most are ranked again in fp64


@dataclass(frozen=True)
class Neighbours:
    """The k nearest rows of each query, nearest first. `values`: distances for "l1", else similarities."""

    metric: str
    rows: Int[Tensor, "m k"]
    values: Float64[Tensor, "m k"]

    def without(self, own: Int[Tensor, " m"]) -> "Neighbours":
        """One column less: each query without its own row, or without its last neighbour where that is not there."""
        place = (self.rows == own[:, None]).int()
        place[:, -1] += 1 - place.sum(1)
        kept = place == 0
        m, k = self.rows.shape
        return Neighbours(self.metric, self.rows[kept].reshape(m, k - 1), self.values[kept].reshape(m, k - 1))


class SparseIndex:
    """`SparseIndex.of_codes(codes)` in memory, `build_search(store, out)` on disk; then `nearest`, `column`, `rows`."""

    def __init__(self, tensors: dict[str, Tensor], d_sae: int, manifest: dict[str, Any] | None = None) -> None:
        self._tensors, self.d_sae, self.manifest = tensors, d_sae, manifest or {}
        self.n = len(tensors["row_offsets"]) - 1
        self._slot = np.full(d_sae, -1, dtype=np.int64)
        self._slot[tensors["dense_latents"].numpy()] = np.arange(len(tensors["dense_latents"]))
        self._starts = tensors["latent_offsets"].tolist()

    @classmethod
    def of_codes(cls, codes: Codes) -> Self:
        """Raises ValueError for no rows, and for an activation that is not positive and finite."""
        return cls(_transposed(codes.detach().to("cpu")), codes.d_sae)

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """The file is mapped, not read: a query touches its own latents' columns and the rows of its hits.

        Raises FileNotFoundError or ValueError where a file is missing, cut, or not a search index.
        """
        path = Path(path)
        manifest = read_json(path / "manifest.json", "search index")
        if manifest.get("format") != FORMAT or manifest.get("version") != VERSION:
            raise ValueError(f"{path} is not a {FORMAT} of version {VERSION}.")
        file = path / "index.safetensors"
        found = file.stat().st_size if file.is_file() else 0
        if found != manifest["bytes"]:
            raise ValueError(f"{file} is cut or missing: {found} bytes, not {manifest['bytes']}. Delete {path}.")
        with open_tensors(file) as stored:
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 (not a dict)
        return cls(tensors, manifest["d_sae"], manifest)

    def save(self, path: str | Path, about: dict[str, Any] | None = None) -> None:
        """`about`: what the manifest shall say of where the codes came from."""
        path = Path(path)
        file = path / "index.safetensors"
        write_tensors(file, self._tensors)
        self.manifest = {
            "format": FORMAT,
            "version": VERSION,
            **(about or {}),
            "n": self.n,
            "d_sae": self.d_sae,
            "nnz": len(self._tensors["row_latents"]),
            "bytes": file.stat().st_size,
            "sha256": file_digest(file),
        }
        write_json(path / "manifest.json", self.manifest)  # last: an index with a manifest is whole

    @property
    def n_bytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self._tensors.values())

    def rows(self, rows: Int[Tensor, " m"]) -> Codes:
        """The codes of these rows, in this order. Raises IndexError for a row outside 0..n-1."""
        outside = rows[(rows < 0) | (rows >= self.n)]
        if len(outside):
            raise IndexError(f"rows must be in 0..{self.n - 1}, got {int(outside[0])}.")
        starts = self._tensors["row_offsets"]
        first, counts = starts[rows], starts[rows + 1] - starts[rows]
        offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
        at = torch.arange(int(offsets[-1])) + (first - offsets[:-1]).repeat_interleave(counts)
        return Codes(
            offsets, self._tensors["row_latents"][at].long(), self._tensors["row_values"][at].float(), self.d_sae
        )

    def column(self, latent: int) -> tuple[Int[Tensor, " m"], Float[Tensor, " m"]]:
        """The rows in which a latent fires, ascending, and its activations there."""
        if not 0 <= latent < self.d_sae:
            raise IndexError(f"latent must be in 0..{self.d_sae - 1}, got {latent}.")
        if self._slot[latent] >= 0:
            column = self._tensors["dense_values"][self._slot[latent]].float()
            rows = column.nonzero().squeeze(1)
            return rows, column[rows]
        entries = slice(self._starts[latent], self._starts[latent + 1])
        return self._tensors["latent_rows"][entries].long(), self._tensors["latent_values"][entries].float()

    def fired(self) -> Int[Tensor, " d_sae"]:
        """In how many rows each latent fires."""
        counts = self._tensors["latent_offsets"].diff()
        dense = self._tensors["dense_latents"]
        counts[dense] = (self._tensors["dense_values"] > 0).sum(1)
        return counts

    @torch.no_grad()
    def nearest(self, queries: Codes, k: int = 10, metric: str = "l1") -> Neighbours:
        """The k nearest rows of each query, exactly. Raises ValueError for another width, metric, or k beyond n."""
        if queries.d_sae != self.d_sae:
            raise ValueError(f"the queries have d_sae={queries.d_sae}, the index {self.d_sae}: another coder's codes.")
        if metric not in get_args(SparseMetric):
            raise ValueError(f"metric must be one of {', '.join(get_args(SparseMetric))}, got {metric!r}.")
        if not 1 <= k <= self.n:
            raise ValueError(f"k must be in 1..{self.n}, the number of rows, got {k}.")
        queries = queries.detach().to("cpu")
        rows = torch.zeros(queries.n, k, dtype=torch.int64)
        values = torch.zeros(queries.n, k, dtype=torch.float64)
        for i in range(queries.n):
            rows[i], values[i] = self._nearest_of(queries.select_rows(slice(i, i + 1)), k, metric)
        return Neighbours(metric, rows, values)

    # -- one query

    def _nearest_of(self, query: Codes, k: int, metric: str) -> tuple[Tensor, Tensor]:
        values = query.values.float()
        score = self._shared_sum(query.indices.tolist(), values.tolist(), cosine=metric == "cosine")
        # Each of the query's terms rounds once, and so do the norms; `size` bounds what is added.
        rounds = (query.nnz + 8) * torch.finfo(torch.float32).eps
        l1 = float(values.sum())
        if metric == "cosine":
            score.mul_(self._tensors["inverse_l2"])
        elif metric == "l1":
            score.mul_(2).sub_(self._tensors["l1"])
        kth = score.topk(k).values[-1]
        slack = rounds * (float(values.norm()) if metric == "cosine" else 4 * l1 + abs(float(kth)))
        candidates = (score >= kth - slack).nonzero().squeeze(1)
        if len(candidates) > max(k, WITHIN_ROUNDING):  # that many ties, of which the earlier rows are as good as any
            order = torch.sort(score[candidates], descending=True, stable=True).indices
            candidates = candidates[order[: max(k, WITHIN_ROUNDING)]].sort().values
        exact = self.compare(query, candidates, metric)
        order = torch.sort(exact, descending=metric != "l1", stable=True).indices[:k]
        return candidates[order], exact[order]

    def _shared_sum(self, latents: list[int], values: list[float], *, cosine: bool) -> Float[Tensor, " n"]:
        """Over all rows, sum of q_i x_i or of min(q_i, x_i)."""
        total = torch.zeros(self.n)
        columns, lists = self._tensors["dense_values"], self._tensors
        for latent, value in zip(latents, values, strict=True):
            if self._slot[latent] >= 0:
                column = columns[self._slot[latent]].float()
                total.add_(column, alpha=value) if cosine else total.add_(column.clamp_max(value))
                continue
            entries = slice(self._starts[latent], self._starts[latent + 1])
            column = lists["latent_values"][entries].float()
            column = column * value if cosine else column.clamp_max(value)
            total.index_add_(0, lists["latent_rows"][entries], column)
        return total

    def compare(self, query: Codes, rows: Int[Tensor, " m"], metric: str) -> Float64[Tensor, " m"]:
        """The metric between one query and these rows, in fp64. Raises ValueError for more than one query."""
        if query.n != 1:
            raise ValueError(f"one query is compared with many rows, got {query.n}.")
        q = torch.zeros(self.d_sae, dtype=torch.float64)
        q[query.indices.long()] = query.values.double()
        codes = self.rows(rows)
        mine, x = q[codes.indices], codes.values.double()

        def summed(terms: Tensor) -> Tensor:
            return torch.zeros(len(rows), dtype=torch.float64).index_add_(0, codes.rows(), terms)

        if metric == "cosine":
            norms = q.norm() * summed(x * x).sqrt()
            return summed(mine * x) / norms.clamp_min(torch.finfo(torch.float64).tiny)
        shared = summed(torch.minimum(mine, x))
        if metric == "overlap":
            return shared / q.sum().clamp_min(torch.finfo(torch.float64).tiny)
        return q.sum() + summed(x) - 2 * shared


def build_search(
    codes: CodeStore, out: str | Path, *, pool: str | int = "max", progress: Progress = SILENT
) -> SparseIndex:
    """A search index of one row an image, on disk. One of the same codes that is already there is opened.

    Raises ValueError where `out` holds another, and as `pooled_codes`.
    """
    out = Path(out)
    about = {"codes": str(codes.path.resolve()), "codes_digest": codes.manifest.digest, "pool": pool}
    if (out / "manifest.json").exists():
        found = SparseIndex.open(out)
        if all(found.manifest.get(key) == about[key] for key in ("codes_digest", "pool")):
            return found
        raise ValueError(f"{out} holds a search index of other codes, or pooled otherwise. Choose another folder.")
    SparseIndex.of_codes(pooled_codes(codes, pool, progress=progress)).save(out, about)
    return SparseIndex.open(out)


def pooled_codes(codes: CodeStore, pool: str | int = "max", *, progress: Progress = SILENT) -> Codes:
    """One row per image: the "max" or "mean" of each latent over its patches, the row of "cls", or of one token.

    A number counts an image's stored rows. Where an image has one row, "max" and "mean" are that row. Raises ValueError
    for another `pool`, and for a token that is not stored.
    """
    kept, n_tokens = kept_tokens(codes, pool), codes.n_tokens
    parts = []
    with progress.task("pool codes", codes.n_images, "images") as task:
        for _, shard in codes.shards():
            shard = shard.with_row_terms(None, None)
            n_images = shard.n // n_tokens
            at_once = max(1, ENTRIES_AT_ONCE * n_images // max(1, shard.nnz))
            for first in range(0, n_images, at_once):
                images = np.arange(first, min(first + at_once, n_images))
                rows = torch.from_numpy((images[:, None] * n_tokens + kept).reshape(-1))
                parts.append(_pooled(shard.select_rows(rows), len(kept), pool))
                task.advance(len(images))
    if not parts:
        raise ValueError(f"{codes.path} holds no image.")
    return Codes.cat(parts)


def pooled_image(codes: CodeStore, tokens: Codes, pool: str | int = "max") -> Codes:
    """One row: an image's tokens (`CodeStore.image`, or a picture's that is in no store), pooled as `pooled_codes`."""
    kept = kept_tokens(codes, pool)
    return _pooled(tokens.with_row_terms(None, None).select_rows(torch.from_numpy(kept)), len(kept), pool)


def kept_tokens(codes: CodeStore, pool: str | int) -> Int[np.ndarray, " n_kept"]:
    """Which of an image's stored rows are pooled. Raises ValueError as `pooled_codes`."""
    grid, n_tokens = codes.manifest.grid, codes.n_tokens
    has_special = codes.manifest.tokens == "all" and n_tokens == grid.n_tokens
    if pool == "cls" and not (grid.n_cls and (has_special or codes.manifest.tokens == "cls")):
        raise ValueError(f"{codes.path} holds no CLS rows. Pool by 'max' or 'mean' over its {n_tokens} rows an image.")
    if isinstance(pool, int) and not 0 <= pool < n_tokens:
        raise ValueError(f"{codes.path} holds rows 0..{n_tokens - 1} of an image, asked for {pool}.")
    if not isinstance(pool, int) and pool not in ("max", "mean", "cls"):
        raise ValueError(f"pool must be 'max', 'mean', 'cls' or the number of a token, got {pool!r}.")
    kept = np.arange(n_tokens)[grid.tokens("spatial") if has_special else slice(None)]
    if isinstance(pool, int) or pool == "cls":
        kept = np.array([0 if pool == "cls" else pool])
    return kept


def _pooled(rows: Codes, n_tokens: int, pool: str | int) -> Codes:
    return rows if n_tokens == 1 else pooled(rows, n_tokens, "mean" if pool == "mean" else "max")


def _transposed(codes: Codes) -> dict[str, Tensor]:
    """Rows, columns and norms, in blocks of rows: nothing is sorted as a whole."""
    n, d_sae = codes.n, codes.d_sae
    if n == 0:
        raise ValueError("there is nothing to search: the codes have no rows.")
    if codes.nnz and not (float(codes.values.min()) > 0 and bool(torch.isfinite(codes.values).all())):
        raise ValueError("codes must be positive and finite where they are stored; these are not. Encode again.")
    half = codes.values.half()
    values = half if bool(torch.isfinite(half).all()) and torch.equal(half.float(), codes.values) else codes.values
    offsets, latents = codes.offsets.long(), codes.indices.int()
    counts = torch.bincount(latents, minlength=d_sae).numpy()
    is_dense = counts > DENSE_SHARE * n
    dense = np.flatnonzero(is_dense)
    slot = np.full(d_sae, -1)
    slot[dense] = np.arange(len(dense))
    columns = torch.zeros(len(dense), n, dtype=values.dtype)
    starts = np.concatenate([[0], np.where(is_dense, 0, counts).cumsum()])
    listed_rows = np.empty(starts[-1], dtype=np.int32)
    listed_values = np.empty(starts[-1], dtype=values.numpy().dtype)
    sums, squares = torch.zeros(n), torch.zeros(n)
    cursor = starts[:-1].copy()
    at_once = max(1, ENTRIES_AT_ONCE * n // max(1, codes.nnz))
    key = np.uint16 if d_sae <= 1 << 16 else np.int32  # numpy sorts 16 bits by radix
    for first in range(0, n, at_once):
        last = min(first + at_once, n)
        entries = slice(int(offsets[first]), int(offsets[last]))
        mine, x = latents[entries].numpy(), values[entries].numpy()
        rows = np.repeat(np.arange(first, last, dtype=np.int32), offsets[first : last + 1].diff().numpy())
        exact = x.astype(np.float64)
        sums[first:last] = torch.from_numpy(np.bincount(rows - first, exact, last - first)).float()
        squares[first:last] = torch.from_numpy(np.bincount(rows - first, exact**2, last - first)).float()
        to_column = is_dense[mine]
        columns.numpy()[slot[mine[to_column]], rows[to_column]] = x[to_column]
        mine, x, rows = mine[~to_column], x[~to_column], rows[~to_column]
        order = np.argsort(mine.astype(key), kind="stable")
        each = np.bincount(mine, minlength=d_sae)
        to = np.repeat(cursor - (each.cumsum() - each), each) + np.arange(len(mine))
        listed_rows[to], listed_values[to] = rows[order], x[order]
        cursor += each
    inverse = torch.where(squares > 0, squares.rsqrt(), squares)
    return {
        "row_offsets": offsets,
        "row_latents": latents,
        "row_values": values,
        "latent_offsets": torch.from_numpy(starts),
        "latent_rows": torch.from_numpy(listed_rows),
        "latent_values": torch.from_numpy(listed_values),
        "dense_latents": torch.from_numpy(dense),
        "dense_values": columns,
        "l1": sums,
        "inverse_l2": inverse,
    }
