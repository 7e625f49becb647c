"""ViSAEBench's metrics of one coder, from activations to the last interval, with a time for each.

    python benchmarks/visaebench.py [--images 2400] [--classes 200] [--d-in 768] [--d-sae 6144] [--k 64] [--side 14]

What is measured is drawn, batch by batch from a seed, never all at once: an image has 600 latents of its class's, its
group's and of any preference, each about a place; a patch is the sum of those that like its place best, and some noise.
The coder has its starting weights; evaluator embeddings and labels of patches follow classes and places. Ten siblings a
group. Drawing is not counted.

    going by   each batch's share: encoding, decoding, and what each metric keeps of it
    at the end numbers, intervals (1,000 resamples) and curves

Seconds of CPU and of wall (which others' work lengthens); OMP_NUM_THREADS, or 1 thread. M6 is a second set of images,
`--other-images`, encoded and measured on its own. Tasks: on raw features, reconstructions and codes; segmentation of
the patches of `--segmentation-images`, a fifth of them for the test.
"""

import argparse
import os
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", os.environ["OMP_NUM_THREADS"])

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from vitrail.backbones.grid import Grid
from vitrail.coders import SparseCoder, TopK
from vitrail.coders.sparse import Codes
from vitrail.metrics.absorption import Absorption
from vitrail.metrics.cross_domain import CrossDomain
from vitrail.metrics.dead import Dead
from vitrail.metrics.downstream import linear_accuracy, retrieval, segmentation
from vitrail.metrics.monosemanticity import Monosemanticity
from vitrail.metrics.moran import RawCoherence, SpatialCoherence
from vitrail.metrics.passing import Metric, Seen, Setting
from vitrail.metrics.preservation import Preservation
from vitrail.metrics.sparse_probing import SparseProbing, stratified_split
from vitrail.metrics.truth import Firing
from vitrail.provenance import peak_memory_mb
from vitrail.studies.prisma_pass import CountsLatents, Reconstructs
from vitrail.studies.visaebench import METRICS

BAR = 360.0
SIBLINGS = 10
OWN, OF_GROUP, OF_ANY = 250, 100, 250  # latents of an image
N_PLACES = 8  # classes of patches
D_EMBED = 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {
        "--images": 2400,
        "--classes": 200,
        "--d-in": 768,
        "--d-sae": 6144,
        "--k": 64,
        "--side": 14,
        "--batch-size": 32,
        "--other-images": 480,
        "--segmentation-images": 250,
        "--n-bootstrap": 1000,
    }.items():
        parser.add_argument(name, type=int, default=default)
    asked = parser.parse_args()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    warnings.simplefilter("ignore")
    pictures = Pictures(asked)
    clock = Clock()
    main_set = one_pass(pictures, clock, asked.images, metrics_of(pictures, asked.images), asked)
    other = Pictures(asked, seed=1)
    setting = other.setting(asked.other_images)
    one_pass(other, clock, asked.other_images, {"cross_domain (M6)": CrossDomain(setting)}, asked, prefix="M6: ")
    tasks(main_set, clock, asked)
    clock.report(asked)


class Clock:
    """Seconds of CPU and of wall, by what was done and when: going by, or at the end."""

    def __init__(self) -> None:
        self.spent: dict[str, dict[str, list[float]]] = {"going by": {}, "at the end": {}}

    def __call__(self, when: str, name: str, work: Callable[[], Any]) -> Any:
        cpu, wall = time.process_time(), time.perf_counter()
        result = work()
        for of in self.spent:
            self.spent[of].setdefault(name, [0.0, 0.0])
        kept = self.spent[when][name]
        kept[0], kept[1] = kept[0] + time.process_time() - cpu, kept[1] + time.perf_counter() - wall
        return result

    def report(self, asked: argparse.Namespace) -> None:
        going, ending = self.spent["going by"], self.spent["at the end"]
        print(
            f"{asked.images} images x {asked.side**2} tokens, d_in {asked.d_in}, d_sae {asked.d_sae}, k {asked.k}, "
            f"{asked.classes} classes, {torch.get_num_threads()} threads: seconds of CPU (of wall)"
        )
        print(f"{'':28} {'going by':>18} {'at the end':>18} {'together':>18}")
        for name in going:
            shown = (going[name], ending[name], [a + b for a, b in zip(going[name], ending[name], strict=True)])
            print(f"{name:28} " + " ".join(f"{cpu:8.2f} ({wall:7.2f})" for cpu, wall in shown))
        cpu, wall = (sum(one[i] for of in self.spent.values() for one in of.values()) for i in (0, 1))
        told = [
            f"{what} {of:.1f}, {'under' if of < BAR else 'NOT under'} {BAR:.0f}"
            for what, of in (("CPU", cpu), ("wall", wall))
        ]
        print(f"total seconds: {'; '.join(told)}; peak memory {peak_memory_mb():.0f} MB", flush=True)


class Pictures:
    """Activations and labels of batches of images, the same whenever they are asked for."""

    def __init__(self, asked: argparse.Namespace, seed: int = 0) -> None:
        self._side, self._seed, self._k = asked.side, seed, asked.k
        self.coder: SparseCoder = TopK(d_in=asked.d_in, d_sae=asked.d_sae, k=asked.k, seed=0, normalization="none")
        self.coder.eval().requires_grad_(False)
        self.n_classes = asked.classes
        rng = np.random.default_rng([seed, 0])
        n_groups = -(-asked.classes // SIBLINGS)
        most = min(2 * OWN, asked.d_sae)
        self._of_class = np.stack([rng.choice(asked.d_sae, most, replace=False) for _ in range(asked.classes)])
        self._of_group = np.stack([rng.choice(asked.d_sae, most, replace=False) for _ in range(n_groups)])
        self._means = torch.from_numpy(rng.normal(size=(asked.classes, D_EMBED)))
        self._mean = torch.from_numpy(rng.normal(size=asked.d_in)).float()

    def labels(self, n: int) -> Int[np.ndarray, " n"]:
        return np.arange(n) % self.n_classes

    @property
    def groups(self) -> dict[str, tuple[int, ...]]:
        every = range(self.n_classes)
        return {f"group {g}": tuple(every[g : g + SIBLINGS]) for g in range(0, self.n_classes, SIBLINGS)}

    def embeddings(self, n: int) -> Float[Tensor, "n d_embed"]:
        rng = np.random.default_rng([self._seed, 1])
        return self._means[self.labels(n)] + torch.from_numpy(rng.normal(size=(n, D_EMBED)))

    def patch_labels(self, n: int) -> Int[Tensor, " n_patches"]:
        """By the latent that a patch's strongest is, of N_PLACES kinds."""
        return torch.cat([self._drawn(i)[0] for i in range(n)])

    def batch(self, first: int, n: int) -> Float[Tensor, "n t d_in"]:
        codes = Codes.cat([self._drawn(i)[1] for i in range(first, first + n)])
        rng = torch.Generator().manual_seed(1000 * self._seed + first)
        x = self.coder.decode_sparse(codes) + self._mean
        return (x + 0.02 * torch.randn(x.shape, generator=rng)).reshape(n, -1, x.shape[1])

    def _drawn(self, i: int) -> tuple[Int[Tensor, " t"], Codes]:
        rng, label, side = np.random.default_rng([self._seed, 2, i]), i % self.n_classes, self._side
        d_sae, group = self.coder.d_sae, label // SIBLINGS
        own = rng.choice(self._of_class[label], min(OWN, len(self._of_class[label])), replace=False)
        others = rng.choice(self._of_group[group], min(OF_GROUP, len(self._of_group[group])), replace=False)
        latents = np.unique([*own, *others, *rng.integers(0, d_sae, OF_ANY)])
        n = side * side
        at = rng.random((len(latents), 2)) * side
        patches = np.stack(np.divmod(np.arange(n), side), 1) + 0.5
        apart = ((patches[:, None] - at[None]) ** 2).sum(-1)
        score = -apart / (2 * (rng.exponential(4, len(latents)) + 0.5) ** 2) + rng.exponential(0.5, apart.shape)
        k = min(self._k, len(latents))
        best = np.argpartition(-score, k - 1, axis=1)[:, :k]
        strength = rng.exponential(size=len(latents))[best] * rng.uniform(0.5, 1.5, best.shape) + 0.3
        kinds = torch.from_numpy(latents[best[np.arange(n), strength.argmax(1)]] % N_PLACES)
        return kinds, Codes.from_padded(torch.from_numpy(latents[best]), torch.from_numpy(strength).float(), d_sae)

    def setting(self, n_images: int) -> Setting:
        side, n = self._side, self._side**2
        return Setting(
            coder=self.coder,
            n_tokens=n,
            tokens="spatial",
            grid=Grid(height=side, width=side, patch_px=16, image_px=(16 * side, 16 * side), n_cls=0, n_registers=0),
            cls_token=None,
            patches=slice(0, n),
            n_images=n_images,
            shift=self._mean,
        )


def metrics_of(pictures: Pictures, n: int) -> dict[str, Metric]:
    """Those of a study's cell, with their usual options, and raw coherence beside M1."""
    setting = pictures.setting(n)
    made: dict[str, Metric] = {
        "reconstruction": Reconstructs(setting.shift),
        "latents": CountsLatents(d_sae=setting.d_sae, n_tokens=setting.n_tokens, cls_token=None),
        "dead": Dead(setting),
        "preservation": Preservation(setting),
        "spatial_coherence": SpatialCoherence(setting),
        "raw_coherence": RawCoherence(setting),
        "sparse_probing": SparseProbing(setting),
        "absorption": Absorption(setting, groups=pictures.groups),
        "monosemanticity": Monosemanticity(setting, embeddings=pictures.embeddings(n)),
    }
    if left_out := sorted(set(METRICS) - set(made)):
        print(f"not timed, though a study measures them: {', '.join(left_out)}")
    return made


class Kept:
    """Of a pass, for the tasks: rows of images and of the first images' patches."""

    def __init__(self, n_patch_images: int) -> None:
        self.images: dict[str, list[Any]] = {"raw": [], "recon": [], "codes": []}
        self.patches: dict[str, list[Any]] = {"raw": [], "recon": [], "codes": []}
        self._room = n_patch_images

    def update(self, seen: Seen) -> None:
        pooled = Firing.of_codes(seen.codes, seen.n_tokens, slice(0, seen.n_tokens)).images
        for name, rows in (("raw", seen.x), ("recon", seen.x_hat)):
            self.images[name].append(rows.mean(1))
            self.patches[name].append(rows[: self._room].flatten(0, 1).clone())
        self.images["codes"].append(pooled)
        few = min(self._room, seen.n_images)
        self.patches["codes"].append(seen.codes.select_rows(slice(0, few * seen.n_tokens)))
        self._room -= few

    def of(self, name: str, *, patches: bool = False) -> Any:
        parts = (self.patches if patches else self.images)[name]
        return Codes.cat(parts) if name == "codes" else torch.cat(parts)


def one_pass(
    pictures: Pictures,
    clock: Clock,
    n: int,
    metrics: Mapping[str, Metric],
    asked: argparse.Namespace,
    prefix: str = "",
) -> tuple[Kept, Pictures]:
    kept, coder, labels = Kept(asked.segmentation_images), pictures.coder, torch.from_numpy(pictures.labels(n))
    for first in range(0, n, asked.batch_size):
        some = min(asked.batch_size, n - first)
        x = pictures.batch(first, some)
        with torch.inference_mode():
            codes = clock("going by", f"{prefix}encode", lambda x=x: coder.encode_sparse(x.flatten(0, 1)))
            x_hat = clock("going by", f"{prefix}decode", lambda codes=codes: coder.decode_sparse(codes))
            seen = Seen(x=x, target=x, codes=codes, x_hat=x_hat.reshape(x.shape), labels=labels[first : first + some])
            for name, metric in metrics.items():
                clock("going by", name, lambda metric=metric, seen=seen: metric.update(seen))
        if not prefix:
            kept.update(seen)
    for name, metric in metrics.items():
        found = clock("at the end", name, lambda m=metric: (m.compute(n_bootstrap=asked.n_bootstrap), m.curves()))[0]
        shown = [f"{key} {one.value:.3f}" for key, one in found.items()]
        print(f"{name}: {', '.join(shown[:6])}", flush=True)
    return kept, pictures


def tasks(main_set: tuple[Kept, Pictures], clock: Clock, asked: argparse.Namespace) -> None:
    kept, pictures = main_set
    labels = pictures.labels(asked.images)
    train, test = (torch.from_numpy(rows) for rows in stratified_split(labels, 0.2, 42))
    y, n_patches = torch.from_numpy(labels), asked.side**2
    places = pictures.patch_labels(asked.segmentation_images)
    few = max(1, asked.segmentation_images // 5) * n_patches
    given = {"n_bootstrap": asked.n_bootstrap}
    for name in ("raw", "recon", "codes"):
        rows, patches = kept.of(name), kept.of(name, patches=True)

        def of(rows: Any, some: Tensor | slice) -> Any:
            return rows.select_rows(some) if isinstance(rows, Codes) else rows[some]

        found = clock("at the end", f"retrieval, {name}", lambda rows=rows: retrieval(rows, y, **given))
        linear = clock(
            "at the end",
            f"linear accuracy, {name}",
            lambda rows=rows: linear_accuracy(of(rows, train), y[train], of(rows, test), y[test], **given),
        )
        segmented = clock(
            "at the end",
            f"segmentation, {name}",
            lambda patches=patches: segmentation(
                of(patches, slice(few, None)),
                places[few:],
                of(patches, slice(0, few)),
                places[:few],
                n_tokens=n_patches,
                **given,
            ),
        )
        print(
            f"{name}: r@1 {found['retrieval_r@1'].value:.3f}, linear {linear.value:.3f}, "
            f"mIoU {segmented['segmentation_miou'].value:.3f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
