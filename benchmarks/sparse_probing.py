"""M4 and M7 against scikit-learn: ranking latents by class, probes on the few that rank first, the whole of M4.

    python benchmarks/sparse_probing.py [--d-sae 6144] [--classes 200] [--images 2400] [--loop-classes 10]

Pooled codes as a coder's: of each image 100 latents of its class's preference, 300 of any, strengths of an exponential
law. One thread, CPU seconds. scikit-learn's loops run over `--loop-classes` classes (or tasks) spread evenly and are
multiplied; it gets dense float64 columns ready made, but for f_classif on scipy's CSR, which is beside it.

    ranking    F of every latent for every class against the rest; its top 1,024
    M7 probes  every class against its nine siblings, on its best 1 and its best 4 latents
    M4 probes  every class against the rest on its best k latents, by k; each starts at the k before
"""

import argparse
import os
import time
import warnings
from collections.abc import Callable
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")

import numpy as np
import torch
from numpy.typing import NDArray

from vitrail.coders.sparse import Codes
from vitrail.metrics.class_sums import ClassSums, ranking
from vitrail.metrics.column_probes import columns, fit_columns
from vitrail.metrics.logistic_probes import Probes
from vitrail.metrics.sparse_probing import KS, sparse_probing

SIBLINGS = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--d-sae", type=int, default=6144)
    parser.add_argument("--classes", type=int, default=200)
    parser.add_argument("--images", type=int, default=2400)
    parser.add_argument("--loop-classes", type=int, default=10)
    parser.add_argument("--max-k", type=int, default=1024)
    parser.add_argument("--whole", action="store_true", help="the whole of M4 as well")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    codes, labels = inputs(asked.images, asked.d_sae, asked.classes)
    some = np.linspace(0, asked.classes - 1, asked.loop_classes).astype(int)
    print(f"{codes.n} images, {codes.nnz / codes.n:.0f} latents each of {codes.d_sae}, {asked.classes} classes")
    ranked = rank(codes, labels, asked.classes, some)
    sibling_probes(codes, labels, asked.classes, some)
    probes(codes, labels, ranked, some, asked.max_k)
    if asked.whole:
        codes.transposed()
        print(f"all of M4: {seconds(lambda: sparse_probing(codes, labels))[0]:.1f} s")


def inputs(n: int, d_sae: int, n_classes: int) -> tuple[Codes, NDArray[np.int64]]:
    rng = np.random.default_rng(0)
    labels = np.arange(n) % n_classes
    favourites = rng.integers(0, d_sae, (n_classes, 200))
    rows, latents = [], []
    for i, label in enumerate(labels):
        own = np.unique([*rng.choice(favourites[label], 100), *rng.integers(0, d_sae, 300)])
        rows.append(np.full(len(own), i))
        latents.append(own)
    row, latent = np.concatenate(rows), np.concatenate(latents)
    values = rng.exponential(1.0, len(row)).astype(np.float32)
    parts = (torch.from_numpy(part) for part in (row, latent, values))
    return Codes.from_entries(*parts, n=n, d_sae=d_sae), labels


def rank(codes: Codes, labels: NDArray[np.int64], n_classes: int, some: NDArray[np.int64]) -> NDArray[np.int64]:
    import scipy.sparse
    from sklearn.feature_selection import f_classif

    def ours() -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        f = ClassSums.of(codes, labels, n_classes).one_vs_rest(range(n_classes))
        return f, ranking(f, min(KS[-1], codes.d_sae))

    spent, (f, ranked) = seconds(ours)
    dense = codes.to_dense().double().numpy()
    loop, theirs = seconds(lambda: [f_classif(dense, labels == c)[0] for c in some])
    sparse = scipy.sparse.csr_array(dense)
    sparse_loop, _ = seconds(lambda: [f_classif(sparse, labels == c) for c in some])
    share = n_classes / len(some)
    apart = max(float(np.nanmax(np.abs(f[c] / one - 1))) for c, one in zip(some, theirs, strict=True))
    print(
        f"ranking: {spent:.2f} s; f_classif dense {loop * share:.1f} s ({loop * share / spent:.0f} times), on CSR "
        f"{sparse_loop * share:.1f} s ({sparse_loop * share / spent:.0f} times); F apart by at most {apart:.0e}"
    )
    return ranked


def sibling_probes(codes: Codes, labels: NDArray[np.int64], n_classes: int, some: NDArray[np.int64]) -> None:
    sums = ClassSums.of(codes, labels, n_classes)
    groups = [range(first, min(first + SIBLINGS, n_classes)) for first in range(0, n_classes, SIBLINGS)]
    latents = np.concatenate([ranking(sums.one_vs_rest(group, among=group), 4) for group in groups])
    group_of = np.arange(n_classes) // SIBLINGS
    counted = torch.from_numpy((labels // SIBLINGS)[None] == group_of[:, None])
    positive = torch.from_numpy(labels[None] == np.arange(n_classes)[:, None])
    codes.transposed()
    for k in (1, 4):
        top = torch.from_numpy(latents[:, :k])
        spent, found = seconds(lambda top=top: fit_columns(codes, top, positive, counted=counted))
        rows = [counted[c].numpy() for c in some]
        x = [columns(codes, top[c]).double().numpy()[row] for c, row in zip(some, rows, strict=True)]
        y = [labels[row] == c for c, row in zip(some, rows, strict=True)]
        report(f"M7 probes, k = {k}", spent, found, x, y, some, n_classes)


def probes(
    codes: Codes, labels: NDArray[np.int64], ranked: NDArray[np.int64], some: NDArray[np.int64], max_k: int
) -> None:
    n_classes, found = len(ranked), None
    positive = torch.from_numpy(labels[None] == np.arange(n_classes)[:, None])
    for k in (each for each in KS if each <= max_k):
        top = torch.from_numpy(ranked[:, :k])
        spent, found = seconds(lambda top=top, start=found: fit_columns(codes, top, positive, start=start))
        x = [columns(codes, top[c]).double().numpy() for c in some]
        report(f"M4 probes, k = {k}", spent, found, x, [labels == c for c in some], some, n_classes)


def report(name: str, spent: float, found: Probes, x: list[Any], y: list[Any], some: Any, n_classes: int) -> None:
    from sklearn.linear_model import LogisticRegression

    def loop() -> list[Any]:
        return [LogisticRegression(tol=1e-8, max_iter=10_000).fit(a, b) for a, b in zip(x, y, strict=True)]

    theirs, fits = seconds(loop)
    theirs *= n_classes / len(some)
    apart = max(float(np.abs(fit.coef_[0] - found.weight[c].numpy()).max()) for c, fit in zip(some, fits, strict=True))
    print(
        f"{name}: {spent:.2f} s; scikit-learn {theirs:.2f} s ({theirs / spent:.1f} times); weights apart by at most "
        f"{apart:.0e}",
        flush=True,
    )


def seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    start = time.process_time()
    out = work()
    return time.process_time() - start, out


if __name__ == "__main__":
    main()
