"""Pictures per second: rendering a world with all its annotations, against a forward pass of the toy model.

    python benchmarks/render.py

One thread, best of five, both in one run: the ratio says whether rendering while training would be the slow part.
"""

import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch

from vitrail.backbones.toy import ToyViT
from vitrail.images.worlds import WORLDS, World, open_world
from vitrail.images.worlds.base import scene_coverage
from vitrail.toys import normalized

N = 480
DIALLED = (
    "shapes?clutter=4&background_bias=0.5&colour_bias=0.5&words=1&wrong_words=0.5&label_noise=0.3&occlusion=0.3&count=4"
    "&orientation=0.8"
)


def rate(work: Callable[[], object]) -> float:
    """Pictures per second: the best of five."""
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return N / min(seconds)


def main() -> None:
    torch.set_num_threads(1)
    model = ToyViT().eval()
    images = normalized(np.zeros((96, 64, 64, 3), dtype=np.uint8), (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    with torch.no_grad():
        forward = rate(lambda: [model(images) for _ in range(N // 96)])
    print(f"{'toy model, forward':<50}{forward:>8.0f} img/s")
    for name, spec in (*((name, name) for name in sorted(WORLDS)), ("shapes, all dials", DIALLED)):
        for image_px in (64, 224):
            world = open_world(spec, n=N, image_px=image_px)
            _report(f"{name}, {image_px} px, picture and masks", rate(partial(_render, world)), forward)
            _report(f"{name}, {image_px} px, and patch coverage", rate(partial(_cover, world)), forward)


def _render(world: World) -> None:
    for i in range(N):
        world.scene(i)


def _cover(world: World) -> None:
    for i in range(N):
        scene_coverage(world.scene(i), world.concepts, world.image_px // 8)


def _report(what: str, per_second: float, forward: float) -> None:
    print(f"{what:<50}{per_second:>8.0f} img/s  {per_second / forward:5.2f} x forward")


if __name__ == "__main__":
    main()
