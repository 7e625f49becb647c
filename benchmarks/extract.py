"""What extraction costs over the bare model, in one run, as ratios.

    bare      the same pictures through the same loader and the library's own blocks, one after the other: no vitrail
              after the loader, nothing kept
    extract   vitrail's `extract` to disk: hooks, token selection, cast, checksums, statistics, fsync
    early     stopping after a quarter of the blocks, against the whole model

    python benchmarks/extract.py                  DeiT-Tiny with random weights; --model NAME for others

glibc gives large buffers back to the system after every batch or keeps them, as it happens, which moves a forward by a
fifth between one run and the next: on Linux the script starts itself again with that turned off.
Every round runs all contenders in an order of its own; a ratio is the median over the rounds, printed with the lowest
and the highest of them.
"""

import argparse
import gc
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from PIL import Image

from vitrail.backbones import load
from vitrail.images.base import ImageRecord, ImageSource
from vitrail.images.loader import load_batches
from vitrail.store import extract


class Noise(ImageSource):
    """Pictures that cost nothing to read, so that the model and the store are what is measured."""

    classes = ()

    def __init__(self, n: int, px: int) -> None:
        self.n, self.image = n, Image.effect_noise((px, px), 60).convert("RGB")

    @property
    def spec(self) -> str:
        return f"noise:{self.n}"

    def __len__(self) -> int:
        return self.n

    def record(self, i: int) -> ImageRecord:
        return ImageRecord(id=str(i), uri=f"noise:{i}")

    def size_bytes(self, i: int) -> int:
        return 0

    def load(self, i: int) -> Image.Image:
        return self.image


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="deit_tiny_patch16_224")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--workers", type=int, default=1)
    asked = parser.parse_args()

    torch.manual_seed(0)
    backbone = load(f"timm/{asked.model}", pretrained=False)
    n, quarter = backbone.n_layers, backbone.n_layers // 4
    images = Noise(asked.images, backbone.preprocess.resize_px[0])
    pixels = backbone.preprocess(images.load(0)).expand(asked.batch, -1, -1, -1).contiguous()
    scratch = Path(tempfile.mkdtemp(prefix="vitrail-bench-"))

    @torch.inference_mode()
    def from_loader() -> None:
        batches = load_batches(
            images, range(asked.images), backbone.preprocess, batch_size=asked.batch, n_workers=asked.workers
        )
        for batch in batches:
            tokens = backbone.embed(batch.images)
            for block in backbone.blocks:
                tokens = block(tokens)

    def to_disk() -> None:
        shutil.rmtree(scratch, ignore_errors=True)
        point = f"blocks.{n - 1}.hook_resid_post"
        extract(backbone, images, [point], scratch, batch_size=asked.batch, n_workers=asked.workers)

    @torch.inference_mode()
    def whole() -> None:
        for _ in range(asked.images // asked.batch):
            backbone.module(pixels)

    @torch.inference_mode()
    def in_memory(layer: int) -> None:
        for _ in range(asked.images // asked.batch):
            backbone.activations(pixels, [f"blocks.{layer}.hook_resid_post"])

    bare, extracted, module = "loader and bare blocks", "extract to disk", "module's own forward"
    last, early = f"activations of block {n - 1}", f"activations of block {quarter - 1}"
    contenders: dict[str, Callable[[], object]] = {
        bare: from_loader,
        extracted: to_disk,
        module: whole,
        last: lambda: in_memory(n - 1),
        early: lambda: in_memory(quarter - 1),
    }
    took: dict[str, list[float]] = {name: [] for name in contenders}
    for work in contenders.values():
        work()
    for seed in range(asked.rounds):
        for name in random.Random(seed).sample(list(contenders), len(contenders)):
            took[name].append(seconds(contenders[name]))
            gc.collect()
    shutil.rmtree(scratch, ignore_errors=True)

    about = f"batch {asked.batch}, {torch.get_num_threads()} threads, {asked.rounds} rounds"
    print(f"{asked.model}: {asked.images} images, {about}")
    for name, values in took.items():
        value = median(values)
        print(f"  {name:<28} {value:7.3f} s  {asked.images / value:8.1f} images/s")
    for a, b in ((extracted, bare), (last, module), (early, module)):
        ratios = sorted(x / y for x, y in zip(took[a], took[b], strict=True))
        print(f"ratio  {median(ratios):.3f}  ({ratios[0]:.3f} to {ratios[-1]:.3f})  {a} / {b}")


if __name__ == "__main__":
    steady = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**33)}
    if sys.platform == "linux" and not steady.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **steady})
    main()
