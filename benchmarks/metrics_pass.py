"""`vitrail eval --metrics all` on real images: one pass with every metric, against the same pass that only encodes.

    python benchmarks/metrics_pass.py [--images 1000] [--d-sae 6144] [--k 64] [--point blocks.9.hook_resid_post]

CLIP ViT-B/16 and the photographs of $VITRAIL_SHARED (default ../shared), all 197 tokens, a TopK coder with its starting
weights (what it costs is what a trained one costs: the L0 is k). No linear probe.

    encoding       read and decode pictures, backbone up to the point, encode
    all metrics    the same, decode, Prisma's and MSAE's groups, and at the end every number, interval and curve
    substitution   the same, and the blocks after the point twice: with the reconstruction, and with zeros

The first two take turns batch by batch. Some metrics work at the end on a sample of bounded size, however many the
images are: with fewer than 1,000 their share is larger, and what 1,000 would take is worked out beside it.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))

import torch
from torch import Tensor

from real_first_look import CLIP_CONFIG, SHARED, dequantised  # pyright: ignore[reportMissingImports]
from vitrail.backbones import Backbone, load
from vitrail.backbones.grid import Grid
from vitrail.coders import SparseCoder, TopK
from vitrail.images import ImageSource, load_batches, open_images
from vitrail.metrics.groups import KINDS
from vitrail.metrics.heads import ZeroShotHead
from vitrail.metrics.passing import Setting
from vitrail.metrics.places import Place
from vitrail.provenance import peak_memory_mb
from vitrail.statistics import ActivationStats
from vitrail.store.tokens import patch_slice
from vitrail.studies.prisma_pass import CountsLatents, Measurement, Reconstructs
from vitrail.studies.prisma_table import prisma_table

FULL = 1000  # images
BAR = 2.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=FULL)
    parser.add_argument("--d-sae", type=int, default=6144)
    parser.add_argument("--k", type=int, default=64)
    parser.add_argument("--point", default="blocks.9.hook_resid_post")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--work", type=Path, default=Path("/tmp/metrics_pass"), help="for the dequantised weights")
    parser.add_argument("--no-substitution", action="store_true")
    asked = parser.parse_args()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    backbone, images = clip(asked.work), open_images(f"{SHARED}/imagenet_1000/labels.csv")
    n = min(asked.images, len(images))
    coder = a_coder(backbone, images, asked)
    spent = two_passes(backbone, images, coder, asked.point, n=n, batch_size=asked.batch_size)
    report(spent, n)
    if not asked.no_substitution:
        substituted(backbone, images, coder, asked, n)
    print(f"peak memory {peak_memory_mb():.0f} MB")


class Clock:
    """CPU and wall seconds by name."""

    def __init__(self) -> None:
        self.cpu: dict[str, float] = {}
        self.wall: dict[str, float] = {}

    def __call__(self, name: str, work: Callable[[], Any]) -> Any:
        cpu, wall = time.process_time(), time.perf_counter()
        result = work()
        self.cpu[name] = self.cpu.get(name, 0.0) + time.process_time() - cpu
        self.wall[name] = self.wall.get(name, 0.0) + time.perf_counter() - wall
        return result


@dataclass(frozen=True)
class Spent:
    clock: Clock
    updates: dict[str, float]  # seconds of each metric while images go by
    ends: dict[str, float]  # and at the end


ENCODING = ("pictures", "backbone", "encode")
METRICS = ("pictures", "backbone again", "encode, decode and metrics", "the end")


@torch.inference_mode()
def two_passes(
    backbone: Backbone, images: ImageSource, coder: SparseCoder, point: str, *, n: int, batch_size: int
) -> Spent:
    clock = Clock()
    setting = setting_of(coder, backbone.grid, n)
    counts = CountsLatents(d_sae=coder.d_sae, n_tokens=setting.n_tokens, cls_token=setting.cls_token)
    metrics = [Reconstructs(setting.shift), counts, *(kind.make(setting) for kind in KINDS.values())]
    measurement = Measurement(coder, Place((point,), (point,)), metrics, definition="trained-tokens")
    batches = load_batches(images, range(n), backbone.preprocess, batch_size=batch_size)
    while (batch := clock("pictures", lambda: next(batches, None))) is not None:
        pixels: Tensor = batch.images
        x = clock("backbone", lambda pixels=pixels: backbone.activations(pixels, [point])[point])
        clock("encode", lambda x=x: coder.encode_sparse(x.flatten(0, 1)))
        x = clock("backbone again", lambda pixels=pixels: backbone.activations(pixels, [point])[point])
        clock("encode, decode and metrics", lambda x=x: measurement.update(x))
    updates = dict(measurement.sums.seconds)
    clock("the end", lambda: measurement.sums.compute(n_bootstrap=1000, seed=0))
    ends = {name: seconds - updates[name] for name, seconds in measurement.sums.seconds.items()}
    return Spent(clock, updates, ends)


def report(spent: Spent, n: int) -> None:
    cpu, wall = spent.clock.cpu, spent.clock.wall
    print(f"{n} images, {torch.get_num_threads()} thread: seconds of CPU (of wall)")
    for name in cpu:
        print(f"  {name:28} {cpu[name]:8.2f} ({wall[name]:8.2f})")
    for seconds, what in ((cpu, "CPU"), (wall, "wall")):
        encoding, every = (sum(seconds[name] for name in names) for names in (ENCODING, METRICS))
        print(f"{what:5} encoding {encoding:8.2f}, all metrics {every:8.2f}: ratio {every / encoding:.3f} (bar: {BAR})")
        if n != FULL:
            grown = (every - seconds["the end"]) * FULL / n + seconds["the end"]
            print(f"      of {FULL} images, worked out: ratio {grown / (encoding * FULL / n):.3f}")
    encoding = sum(wall[name] for name in ENCODING)
    print("seconds of wall of each metric: images going by, at the end, both as a share of encoding")
    for name, update in spent.updates.items():
        end = spent.ends[name]
        print(f"  {name:28} {update:8.3f} {end:8.3f} {(update + end) / encoding:7.1%}")


def substituted(backbone: Backbone, images: ImageSource, coder: SparseCoder, asked: argparse.Namespace, n: int) -> None:
    """The table itself, whose row has the reconstruction put in: blocks after the point once more for it and once for
    the zeros."""
    words = torch.randn(len(images.classes), backbone.d_embed, generator=torch.Generator().manual_seed(0))
    head = ZeroShotHead(classes=words)  # of no meaning: it is the time that counts
    clock = Clock()
    rows = clock(
        "table",
        lambda: prisma_table(
            backbone,
            images,
            {"topk": coder},
            point=asked.point,
            tokens="all",
            head=head,
            control_sample=None,
            metrics=[kind.make for kind in KINDS.values()],
            limit=n,
            batch_size=asked.batch_size,
        ),
    )
    print(f"with substitution: {clock.cpu['table']:.2f} of CPU ({clock.wall['table']:.2f} of wall)")
    print(json.dumps(rows[0].about["cost"]))


def clip(work: Path) -> Backbone:
    folder = work / "clip-vit-base-patch16"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CLIP_CONFIG))
    dequantised("clip_vit_b16_vision", work, folder / "model.safetensors")
    return load(f"hf/{folder}")


@torch.inference_mode()
def a_coder(backbone: Backbone, images: ImageSource, asked: argparse.Namespace) -> SparseCoder:
    """With its starting weights, its normalisation fitted on eight images."""
    batch = next(load_batches(images, range(8), backbone.preprocess, batch_size=8))
    rows = backbone.activations(batch.images, [asked.point])[asked.point].flatten(0, 1).clone()
    coder = TopK(d_in=rows.shape[1], d_sae=asked.d_sae, k=asked.k, seed=0)
    coder.fit(ActivationStats.of(rows), rows)
    return coder.eval().requires_grad_(False)


def setting_of(coder: SparseCoder, grid: Grid, n_images: int) -> Setting:
    """As the table has it for all tokens."""
    return Setting(
        coder=coder,
        n_tokens=grid.n_tokens,
        tokens="all",
        grid=grid,
        cls_token=0,
        patches=patch_slice(grid, grid.n_tokens),
        n_images=n_images,
        shift=torch.zeros(coder.d_out),
    )


if __name__ == "__main__":
    main()
