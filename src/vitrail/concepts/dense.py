"""Nearest rows of dense embeddings by cosine: exact by blocks, and by a graph (usearch, HNSW) where rows are many.

    cosine   <q, x> / (|q| |x|)        0 where one of them is a row of zeros

The graph is a guess at which rows are near; its guesses are ranked by their true cosines, and `recall` measures how
many of the exact neighbours it finds (Malkov & Yashunin 2018, arXiv:1603.09320).
"""

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vitrail.concepts.inverted import Neighbours
from vitrail.files import replacing, tensors_digest

EXACT_UP_TO = 100_000
ROWS_AT_ONCE = 1 << 16
CONNECTIVITY, WHEN_BUILDING, WHEN_SEARCHING = 16, 128, 128


class EmbeddingIndex:
    """`EmbeddingIndex(rows)`; then `nearest(queries, k)`.

    `exact`: None chooses by size, exact up to 100,000 rows. A graph needs usearch (`pip install "vitrail[search]"`);
    raises ImportError without it. `cache`: a folder where the graph of the same rows is kept and found again.
    """

    def __init__(
        self, rows: Float[Tensor, "n d_embed"], *, exact: bool | None = None, cache: str | Path | None = None
    ) -> None:
        if not bool(torch.isfinite(rows).all()):
            raise ValueError("embeddings must be finite; some are not.")
        self.embeddings = rows.detach().cpu()
        self.n, self.d_embed = rows.shape
        norms = torch.linalg.vector_norm(self.embeddings.float(), dim=1)
        self._inverse = torch.where(norms > 0, 1 / norms, norms)
        self.is_exact = self.n <= EXACT_UP_TO if exact is None else exact
        self._graph: Any = None if self.is_exact else self._open_graph(cache)

    @torch.no_grad()
    def nearest(self, queries: Float[Tensor, "m d_embed"], k: int = 10) -> Neighbours:
        """The k nearest rows of each query. Raises ValueError for another width and for k beyond n."""
        if queries.shape[1] != self.d_embed:
            raise ValueError(f"queries must be {self.d_embed} wide, as the embeddings, got {queries.shape[1]}.")
        if not 1 <= k <= self.n:
            raise ValueError(f"k must be in 1..{self.n}, the number of rows, got {k}.")
        queries = torch.nn.functional.normalize(queries.detach().float().cpu(), dim=1)
        return self._exact(queries, k) if self._graph is None else self._by_graph(queries, k)

    def recall(self, k: int = 10, *, n_queries: int = 200, seed: int = 0) -> float:
        """Share, 0 to 1, of the exact k nearest that `nearest` finds, over `n_queries` of the rows as queries."""
        chosen = torch.randperm(self.n, generator=torch.Generator().manual_seed(seed))[:n_queries]
        queries = torch.nn.functional.normalize(self.embeddings[chosen].float(), dim=1)
        exact, found = self._exact(queries, k).rows, self.nearest(queries, k).rows
        return float((exact[:, :, None] == found[:, None, :]).any(2).double().mean())

    def _exact(self, queries: Tensor, k: int) -> Neighbours:
        best, rows = torch.full((len(queries), 0), -torch.inf), torch.zeros(len(queries), 0, dtype=torch.int64)
        for first in range(0, self.n, ROWS_AT_ONCE):
            block = slice(first, first + ROWS_AT_ONCE)
            cosines = queries @ self.embeddings[block].float().T * self._inverse[block]
            best = torch.cat([best, cosines], 1)
            here = torch.arange(first, first + cosines.shape[1]).expand(len(queries), -1)
            rows = torch.cat([rows, here], 1)
            top = best.topk(min(k, best.shape[1]), dim=1)
            best, rows = top.values, rows.gather(1, top.indices)
        return _ranked(best, rows, k)

    def _by_graph(self, queries: Tensor, k: int) -> Neighbours:
        keys = self._graph.search(queries.numpy(), min(self.n, 2 * k), exact=False).keys
        rows = torch.from_numpy(keys.astype("int64")).reshape(len(queries), -1)
        cosines = torch.einsum("md,mkd->mk", queries, self.embeddings[rows].float()) * self._inverse[rows]
        return _ranked(cosines, rows, k)

    def _open_graph(self, cache: str | Path | None) -> Any:
        try:
            from usearch.index import Index  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise ImportError(
                f'{self.n:,} embeddings are searched by usearch: pip install "vitrail[search]", or ask for exact=True.'
            ) from error
        graph = Index(
            ndim=self.d_embed,
            metric="cos",
            dtype="f32",
            connectivity=CONNECTIVITY,
            expansion_add=WHEN_BUILDING,
            expansion_search=WHEN_SEARCHING,
        )
        path = None if cache is None else Path(cache) / f"{tensors_digest({'rows': self.embeddings})}.usearch"
        if path is not None and path.is_file():
            graph.view(str(path))
            return graph
        for first in range(0, self.n, ROWS_AT_ONCE):
            block = self.embeddings[first : first + ROWS_AT_ONCE].float()
            graph.add(torch.arange(first, first + len(block)).numpy(), block.numpy())
        if path is not None:
            with replacing(path) as temporary:
                graph.save(str(temporary))
        return graph


def _ranked(cosines: Float[Tensor, "m c"], rows: Int[Tensor, "m c"], k: int) -> Neighbours:
    """The k largest, ties to the earlier row."""
    by_row = torch.sort(rows, dim=1, stable=True).indices
    cosines, rows = cosines.gather(1, by_row), rows.gather(1, by_row)
    order = torch.sort(cosines, dim=1, descending=True, stable=True).indices[:, :k]
    return Neighbours("cosine", rows.gather(1, order), cosines.gather(1, order).double())
