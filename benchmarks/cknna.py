"""CKNNA at n = 10,000: CPU seconds and peak memory, against the n x n arithmetic of its definition at smaller n.

    python benchmarks/cknna.py [--n 10000] [--d-in 768] [--d-sae 6144] [--l0 64]

Each measurement is a process of its own, on one thread. Rows: sparse mixtures of directions, of clusters of ten; codes:
their l0 largest projections. The memory is what the process needed beyond its inputs.
"""

import argparse
import os
import resource
import subprocess
import sys

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from vitrail.coders import TopK
from vitrail.coders.sparse import Codes
from vitrail.metrics.cknna import alignment, jackknife_error, neighbours


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=10_000)
    parser.add_argument("--d-in", type=int, default=768)
    parser.add_argument("--d-sae", type=int, default=6144)
    parser.add_argument("--l0", type=int, default=64)
    parser.add_argument("--naive-n", type=int, default=2000)
    parser.add_argument("--only", choices=("vitrail", "naive"))
    asked = parser.parse_args()
    if asked.only:
        measure(asked)
        return
    sizes = {"--d-in": asked.d_in, "--d-sae": asked.d_sae, "--l0": asked.l0}
    for which, n in (("vitrail", asked.naive_n), ("naive", asked.naive_n), ("vitrail", asked.n)):
        command = [sys.executable, __file__, "--only", which, "--n", str(n)]
        command += [part for name, value in sizes.items() for part in (name, str(value))]
        subprocess.run(command, check=True)


def measure(asked: argparse.Namespace) -> None:
    x, codes = inputs(asked.n, asked.d_in, asked.d_sae, asked.l0)
    before, cpu = _peak_mb(), _cpu()
    if asked.only == "vitrail":
        ours, theirs = neighbours(x, 10), neighbours(codes, 10)
        value, once = alignment(ours, theirs, "platonic"), _cpu() - cpu
        error = jackknife_error(ours, theirs, torch.arange(asked.n).numpy())
        told = f"CKNNA {value:.4f}, {once:.2f} s; with its error, {error:.4f}, {_cpu() - cpu:.2f} s"
    else:
        told = f"CKNNA {naive(x, codes.to_dense()):.4f}, {_cpu() - cpu:.2f} s"
    print(f"{asked.only:8} n = {asked.n:6}: {told}; {_peak_mb():.0f} MB, of which inputs {before:.0f}", flush=True)


@torch.no_grad()
def inputs(n: int, d_in: int, d_sae: int, l0: int) -> tuple[torch.Tensor, Codes]:
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(-(-n // 10), d_in, generator=generator).repeat_interleave(10, 0)[:n]
    x = centres + torch.randn(n, d_in, generator=generator)
    return x, TopK(d_in=d_in, d_sae=d_sae, k=l0, normalization="none", seed=0).eval().encode_sparse(x)


def naive(x: torch.Tensor, z: torch.Tensor, k: int = 10) -> float:
    """Huh et al.'s code: n x n kernels, masks and products."""
    K, L = x @ x.t(), z @ z.t()

    def masked(one: torch.Tensor) -> torch.Tensor:
        index = one.clone().fill_diagonal_(-torch.inf).topk(k, dim=1).indices
        return torch.zeros_like(one).scatter_(1, index, 1)

    def hsic(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        m = len(one)
        total = (one * other.t()).sum() + one.sum() * other.sum() / ((m - 1) * (m - 2))
        return total - 2 * torch.mm(one, other).sum() / (m - 2)

    def similarity(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        both = masked(one) * masked(other)
        return hsic(both * one, both * other)

    return float(similarity(K, L) / (similarity(K, K) * similarity(L, L)).sqrt())


def _cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
