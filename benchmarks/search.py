"""Exact top-10 among a million sparse codes, by L1 and cosine; dense embeddings exactly and by a graph.

    python benchmarks/search.py [--n 1000000] [--d-sae 6144] [--k 64] [--queries 50]
    python benchmarks/search.py --dense [--n 100000] [--d-embed 512]

Codes are generated: the share of rows in which a latent fires falls as rank^-skew, as in trained coders (at 0.7 the
most frequent of 6,144 latents fires in 78 % of all rows at k = 64, of 24,576 in 39 % at k = 32), values are
exponential. Queries are rows of the collection, so they hit frequent latents as real queries do. Times are wall-clock
and CPU, one thread; a few answers are checked against all distances in fp64.
"""

import argparse
import os
import resource
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch

from vitrail.coders.sparse import Codes
from vitrail.concepts.dense import EmbeddingIndex
from vitrail.concepts.inverted import SparseIndex


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=1_000_000)
    parser.add_argument("--d-sae", type=int, default=6144)
    parser.add_argument("--k", type=int, default=64)
    parser.add_argument("--skew", type=float, default=0.7)
    parser.add_argument("--queries", type=int, default=50)
    parser.add_argument("--checked", type=int, default=2)
    parser.add_argument("--dense", action="store_true")
    parser.add_argument("--d-embed", type=int, default=512)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    dense(asked) if asked.dense else sparse(asked)


def sparse(asked: argparse.Namespace) -> None:
    codes = generated(asked.n, asked.d_sae, asked.k, asked.skew)
    share = codes.fired().max().item() / codes.n
    told = f"{codes.n:,} codes, d_sae {codes.d_sae:,}, L0 {codes.nnz / codes.n:.1f}"
    print(f"{told}, most frequent latent in {share:.0%}; inputs at {peak_mb():.0f} MB", flush=True)
    wall, cpu = time.perf_counter(), time.process_time()
    index = SparseIndex.of_codes(codes)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    size, dense_ones = index.n_bytes / 2**20, int((index.fired() > codes.n / 4).sum())
    told = f"{size:.0f} MB ({dense_ones} latents as plain columns), peak {peak_mb():.0f} MB"
    print(f"built in {wall:.1f} s ({cpu:.1f} CPU); index {told}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        begun = time.perf_counter()
        index.save(folder)
        saved, begun = time.perf_counter() - begun, time.perf_counter()
        mapped = SparseIndex.open(folder)
        print(f"saved in {saved:.1f} s, opened in {time.perf_counter() - begun:.3f} s", flush=True)
        chosen = np.random.default_rng(1).choice(codes.n, asked.queries, replace=False)
        for metric in ("l1", "cosine", "overlap"):
            told_times(mapped, codes, chosen, metric)
        for row in chosen[: asked.checked].tolist():
            check(mapped, codes, row)


def generated(n: int, d_sae: int, k: int, skew: float) -> Codes:
    """k draws a row by frequency, repeats dropped: a little below k latents fire."""
    rng = np.random.default_rng(0)
    weights = np.arange(1, d_sae + 1) ** -skew
    bounds = np.cumsum(weights / weights.sum())
    parts = []
    for first in range(0, n, 50_000):
        m = min(50_000, n - first)
        drawn = np.sort(np.searchsorted(bounds, rng.random((m, k), dtype=np.float32)).clip(0, d_sae - 1), axis=1)
        fresh = np.ones_like(drawn, dtype=bool)
        fresh[:, 1:] = drawn[:, 1:] != drawn[:, :-1]
        values = (rng.exponential(1.0, int(fresh.sum())) + 0.05).astype(np.float16).astype(np.float32)
        offsets = np.concatenate([[0], fresh.sum(1).cumsum()])
        parts.append(
            Codes(
                torch.from_numpy(offsets),
                torch.from_numpy(drawn[fresh].astype(np.int32)),
                torch.from_numpy(values),
                d_sae,
            )
        )
    return Codes.cat(parts)


def told_times(index: SparseIndex, codes: Codes, chosen: np.ndarray, metric: str) -> None:
    wall, cpu = [], []
    for row in chosen.tolist():
        query = codes.select_rows(torch.tensor([row]))
        begun, used = time.perf_counter(), time.process_time()
        index.nearest(query, 10, metric)
        wall.append(1000 * (time.perf_counter() - begun))
        cpu.append(1000 * (time.process_time() - used))
    parts = [f"{np.median(wall):.0f} ms, 95th percentile {np.percentile(wall, 95):.0f}, worst {max(wall):.0f}"]
    parts.append(f"CPU {np.median(cpu):.0f} ms, worst {max(cpu):.0f}; first {wall[0]:.0f} ms")
    print(f"{metric:8} top-10: {'; '.join(parts)}", flush=True)


def check(index: SparseIndex, codes: Codes, row: int) -> None:
    """The ten distances against all of them, in fp64 from the rows."""
    query = codes.select_rows(torch.tensor([row]))
    for metric in ("l1", "cosine"):
        exact = torch.cat([index.compare(query, rows, metric) for rows in torch.arange(codes.n).split(100_000)])
        best = exact.topk(10, largest=metric != "l1").values
        found = index.nearest(query, 10, metric).values[0]
        print(f"row {row}, {metric}: equal to the brute-force top-10: {torch.equal(best, found)}", flush=True)


def dense(asked: argparse.Namespace) -> None:
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(asked.n // 50, asked.d_embed, generator=generator)
    rows = centres.repeat_interleave(50, 0) + torch.randn(asked.n // 50 * 50, asked.d_embed, generator=generator)
    queries = rows[torch.randperm(len(rows), generator=generator)[: asked.queries]]
    with tempfile.TemporaryDirectory() as folder:
        for exact in (True, False):
            begun = time.perf_counter()
            index = EmbeddingIndex(rows, exact=exact, cache=None if exact else Path(folder))
            built, wall = time.perf_counter() - begun, []
            for query in queries:
                begun = time.perf_counter()
                index.nearest(query[None], 10)
                wall.append(1000 * (time.perf_counter() - begun))
            told = f"{np.median(wall):.1f} ms, worst {max(wall):.1f}; recall@10 {index.recall(10, n_queries=100):.3f}"
            name = "exact" if exact else "usearch"
            print(f"{name:8} {len(rows):,} x {asked.d_embed}: ready in {built:.1f} s; top-10 {told}", flush=True)


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
