"""Naming 24,576 latents against 20,000 words: seconds and peak memory, beside the product written out whole.

    python benchmarks/naming.py [--n-latents 24576] [--n-words 20000] [--d 512] [--threads 2]

Each measurement is a process of its own. Rows are random unit vectors. "whole" makes latents x words and sorts out the
two largest with topk; it is measured at an eighth of the latents. Memory: what the process needed at most, and of it
what the imports and the rows take.
"""

import argparse
import os
import resource
import subprocess
import sys
import time

import torch
from torch.nn.functional import normalize

from vitrail.concepts.naming import top_two


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n-latents", type=int, default=24_576)
    parser.add_argument("--n-words", type=int, default=20_000)
    parser.add_argument("--d", type=int, default=512)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--only", choices=("chunks", "whole"))
    asked = parser.parse_args()
    if asked.only:
        measure(asked)
        return
    sizes = {"--n-words": asked.n_words, "--d": asked.d, "--threads": asked.threads}
    few = max(asked.n_latents // 8, 1)
    for which, n in (("chunks", few), ("whole", few), ("chunks", asked.n_latents)):
        command = [sys.executable, __file__, "--only", which, "--n-latents", str(n)]
        command += [str(part) for name, value in sizes.items() for part in (name, value)]
        subprocess.run(command, check=True)


def measure(asked: argparse.Namespace) -> None:
    torch.set_num_threads(asked.threads)
    generator = torch.Generator().manual_seed(0)
    latents, words = (
        normalize(torch.randn(n, asked.d, generator=generator), dim=1) for n in (asked.n_latents, asked.n_words)
    )
    before, began, cpu = peak_mb(), time.perf_counter(), cpu_seconds()
    if asked.only == "chunks":
        total = float(top_two(latents, words).first_score.sum())
    else:
        total = float((latents @ words.t()).topk(2, dim=1).values[:, 0].sum())
    took, used = time.perf_counter() - began, cpu_seconds() - cpu
    print(
        f"{asked.only:6} {asked.n_latents:6} latents, {asked.n_words} words, d = {asked.d}: {took:.1f} s "
        f"({used:.1f} s of CPU, {asked.threads} threads); {peak_mb():.0f} MB, of which before {before:.0f}; "
        f"scores sum to {total:.3f}",
        flush=True,
    )


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main()
