"""What extraction costs over the bare model, in one run, as ratios.

    bare      the library's own blocks called one after the other on the same images (no vitrail)
    extract   vitrail's `extract` to disk: hooks, token selection, cast, checksums, statistics, fsync
    early     stopping after a quarter of the blocks, against the whole model

    python benchmarks/extract.py                  DeiT-Tiny with random weights; --model NAME for others

Rounds of the contenders alternate and the fastest of each counts, so that what else the machine does hits all alike.
"""

import argparse
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image

from vitrail.backbones import load
from vitrail.images.base import ImageRecord, ImageSource
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
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args()

    torch.manual_seed(0)
    backbone = load(f"timm/{asked.model}", pretrained=False)
    images = Noise(asked.images, backbone.preprocess.image_px[0])
    pixels = backbone.preprocess(images.load(0)).expand(asked.batch, -1, -1, -1).contiguous()
    n, quarter = backbone.n_layers, backbone.n_layers // 4
    scratch = Path(tempfile.mkdtemp(prefix="vitrail-bench-"))

    @torch.inference_mode()
    def bare(n_blocks: int) -> None:
        for _ in range(asked.images // asked.batch):
            tokens = backbone.embed(pixels)
            for block in list(backbone.blocks)[:n_blocks]:
                tokens = block(tokens)

    @torch.inference_mode()
    def whole() -> None:
        for _ in range(asked.images // asked.batch):
            backbone.module(pixels)

    @torch.inference_mode()
    def in_memory(layer: int) -> None:
        for _ in range(asked.images // asked.batch):
            backbone.activations(pixels, [f"blocks.{layer}.hook_resid_post"])

    def to_disk(layer: int) -> None:
        shutil.rmtree(scratch, ignore_errors=True)
        # Decoding in a worker, as in use: one process reads while the other computes.
        extract(backbone, images, [f"blocks.{layer}.hook_resid_post"], scratch, batch_size=asked.batch, n_workers=1)

    contenders: dict[str, Callable[[], object]] = {
        f"bare, {n} blocks": lambda: bare(n),
        f"activations of block {n - 1}": lambda: in_memory(n - 1),
        f"extract of block {n - 1} to disk": lambda: to_disk(n - 1),
        "whole model's forward": whole,
        f"bare, {quarter} blocks": lambda: bare(quarter),
        f"activations of block {quarter - 1}": lambda: in_memory(quarter - 1),
    }
    best = dict.fromkeys(contenders, float("inf"))
    for work in contenders.values():
        work()
    for _ in range(asked.rounds):
        for name, work in contenders.items():
            best[name] = min(best[name], seconds(work))
    shutil.rmtree(scratch, ignore_errors=True)

    print(f"{asked.model}: {asked.images} images, batch {asked.batch}, {torch.get_num_threads()} threads")
    for name, value in best.items():
        print(f"  {name:<32} {value:7.3f} s  {asked.images / value:8.1f} images/s")
    names = list(best)
    print(f"ratio, activations / bare (all blocks)      {best[names[1]] / best[names[0]]:.3f}")
    print(f"ratio, extract to disk / bare (all blocks)  {best[names[2]] / best[names[0]]:.3f}")
    print(f"ratio, block {quarter - 1} / whole model's forward     {best[names[5]] / best[names[3]]:.3f}")


if __name__ == "__main__":
    main()
