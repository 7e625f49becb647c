"""Moran's I of every latent of every image (ViSAEBench M1): sparse, against a dense `W @ x` an image.

    python benchmarks/moran.py [--images 400] [--d-sae 24576] [--l0 64] [--side 14] [--latents 1500] [--dense-images 4]

One process, one thread, CPU seconds. Each image has its own `latents` latents, out of d_sae; each of its patches fires
l0 of them, neighbours mostly the same. Dense: x (P, d_sae) and W (P, P) in single precision, as the released package
has it; its images are the first of the same, its I must be ours. Both count what comes after encoding.
"""

import argparse
import os
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch

from vitrail.backbones.grid import Grid
from vitrail.coders import TopK
from vitrail.coders.sparse import Codes
from vitrail.metrics.lattice import Lattice
from vitrail.metrics.moran import SpatialCoherence
from vitrail.metrics.passing import Seen, Setting

BATCH = 16
D_IN = 8  # of rows that are not looked at


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=400)
    parser.add_argument("--d-sae", type=int, default=24_576)
    parser.add_argument("--l0", type=int, default=64)
    parser.add_argument("--side", type=int, default=14)
    parser.add_argument("--latents", type=int, default=1500)
    parser.add_argument("--dense-images", type=int, default=4)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    side, d_sae, n = asked.side, asked.d_sae, asked.side**2
    grid = Grid(height=side, width=side, patch_px=16, image_px=(16 * side, 16 * side), n_cls=0, n_registers=0)
    coder = TopK(d_in=D_IN, d_sae=d_sae, k=1, normalization="none")
    setting = Setting(
        coder=coder,
        n_tokens=n,
        tokens="spatial",
        grid=grid,
        cls_token=None,
        patches=slice(0, n),
        n_images=asked.images,
        shift=torch.zeros(D_IN),
    )
    rng = np.random.default_rng(0)
    rows = torch.zeros(BATCH, n, D_IN)
    metric, seconds, n_entries, kept = SpatialCoherence(setting, min_images=1), 0.0, 0, []
    for _ in range(-(-asked.images // BATCH)):
        images = [codes_of_image(rng, side, d_sae, asked.l0, asked.latents) for _ in range(BATCH)]
        codes = Codes.cat(images)
        kept += images[: max(0, asked.dense_images - len(kept))]
        began = time.process_time()
        metric.update(Seen(x=rows, target=rows, codes=codes, x_hat=rows))
        seconds += time.process_time() - began
        n_entries += codes.nnz
    n_images = BATCH * -(-asked.images // BATCH)
    n_pairs = int(metric.means.n_valid().sum())
    began = time.process_time()
    moran = metric.compute()["moran"]
    at_end = time.process_time() - began
    sparse = seconds / n_images

    few = SpatialCoherence(setting, min_images=1)
    few.update(Seen(x=rows[: len(kept)], target=rows[: len(kept)], codes=Codes.cat(kept), x_hat=rows[: len(kept)]))
    lattice = Lattice((side, side))
    weights = torch.from_numpy(weight_matrix(lattice)).float()
    sums, counts, dense = torch.zeros(d_sae), torch.zeros(d_sae), 0.0
    dense_moran(kept[0].to_dense(), weights, float(weights.sum()))  # warms up
    for image in kept:
        x = image.to_dense()
        began = time.process_time()
        found, valid = dense_moran(x, weights, float(weights.sum()))
        dense += time.process_time() - began
        sums, counts = sums + torch.where(valid, found, 0.0), counts + valid
    dense /= len(kept)
    same = counts > 0
    apart = (torch.from_numpy(few.table()["moran"]).float() - sums / counts)[same].abs().max()
    print(
        f"d_sae {d_sae}, {side} x {side}, {n_images} images of {n_entries / n_images:.0f} entries and "
        f"{n_pairs / n_images:.0f} valid maps: moran {moran.value:.4f} [{moran.low:.4f}, {moran.high:.4f}]\n"
        f"sparse {1e3 * sparse:.3f} ms an image, {1e3 * at_end:.0f} ms at the end\n"
        f"dense  {1e3 * dense:.1f} ms an image; largest difference of I {float(apart):.1e}\n"
        f"ratio  {dense / sparse:.0f}",
        flush=True,
    )


def codes_of_image(rng: np.random.Generator, side: int, d_sae: int, l0: int, n_latents: int) -> Codes:
    """Each latent of the image likes one place; a patch's l0 are those that like it best, but for some noise."""
    n = side * side
    latents = rng.choice(d_sae, n_latents, replace=False)
    places = rng.random((n_latents, 2)) * side
    patches = np.stack(np.divmod(np.arange(n), side), 1) + 0.5
    apart = ((patches[:, None] - places[None]) ** 2).sum(-1)
    width = rng.exponential(4, n_latents) + 0.5
    score = -apart / (2 * width**2) + rng.exponential(0.5, (n, n_latents))
    best = np.argpartition(-score, l0, axis=1)[:, :l0]
    values = torch.from_numpy(rng.exponential(size=(n, l0))).float() + 0.01
    return Codes.from_padded(torch.from_numpy(latents[best]), values, d_sae)


def weight_matrix(lattice: Lattice) -> np.ndarray:
    places = np.stack(np.divmod(np.arange(lattice.n), lattice.shape[1]), 1)
    return np.abs(places[:, None] - places[None]).max(-1) == 1


def dense_moran(x: torch.Tensor, weights: torch.Tensor, total: float) -> tuple[torch.Tensor, torch.Tensor]:
    active = (x != 0).sum(0)
    centred = x - x.mean(0)
    square = (centred**2).sum(0)
    together = (centred * (weights @ centred)).sum(0)
    return len(x) / total * together / square.clamp_min(1e-10), (active >= 5) & (square / len(x) > 1e-8)


if __name__ == "__main__":
    main()
