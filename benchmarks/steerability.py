"""Steerability of every latent of a large coder, against the forward pass it would take without the closed form.

    python benchmarks/steerability.py [--latents 2048] [--images 100] [--words 5000] [--inner 9] [--all]

A CLIP image tower of the size of ViT-B/32 with random weights, 768 -> 512; a coder of 49,152 random directions; random
words. `--latents` of the coder are run in closed form at the last layer (`--all`: every one), a few by the blocks after
an inner layer, and one by the naive way: the whole forward pass with the hook of `vitrail edit`, which encodes the
tokens, then cosines and softmax. What is extrapolated says so. FLOPs of the naive way are counted by torch while it
runs, those of the closed form by hand: the products per latent, spread over its images, and 16 operations a word and
pair.
"""

import argparse
import os
import resource
import time
from collections.abc import Callable

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from vitrail import backbones
from vitrail.backbones import Backbone
from vitrail.backbones.torchvision_shim import ensure_torchvision
from vitrail.coders import TopK
from vitrail.concepts.editing import Edit, edit_hook
from vitrail.metrics.heads import ZeroShotHead
from vitrail.statistics import ActivationStats
from vitrail.steering.interventions import Dose, Latents, Reading, marked_tokens
from vitrail.steering.routes import Route, answers, choose_route, look
from vitrail.steering.steerability import Tally

D, D_EMBED, D_SAE, N_BLOCKS = 768, 512, 49_152, 12
DOSE, AT_ONCE = Dose("set", 150.0), 128
OPERATIONS = 16  # a word and pair: 5 for the logit, 5 for the softmax, 6 for the sums


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latents", type=int, default=2048)
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--words", type=int, default=5000)
    parser.add_argument("--inner", type=int, default=9, help="layer whose latents are steered by the blocks after it")
    parser.add_argument("--naive-images", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--all", action="store_true")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    with torch.inference_mode():
        run(asked)


def run(asked: argparse.Namespace) -> None:
    backbone = tower()
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(asked.images, 3, 224, 224, generator=generator)
    head = ZeroShotHead(torch.randn(asked.words, D_EMBED, generator=generator), 100.0)
    last, inner = f"blocks.{N_BLOCKS - 1}.hook_resid_post", f"blocks.{asked.inner}.hook_resid_post"
    told = f"{D_SAE:,} latents x {asked.images} images x {asked.words:,} words, {asked.threads} thread(s)"
    print(f"{told}; inputs at {peak_mb():.0f} MB", flush=True)

    routes: dict[str, Route] = {}
    for point in (last, inner):
        begun = time.perf_counter()
        seen = look(backbone, images.split(25), point, head)
        routes[point] = choose_route(backbone, point, head, seen, marked_tokens(backbone, point, "all"))
        print(
            f"{point}: images and route {routes[point].name} ready in {time.perf_counter() - begun:.1f} s", flush=True
        )
    coder = generated(routes[last].rows())

    n = D_SAE if asked.all else min(asked.latents, D_SAE)
    codes = read(routes[last], coder)
    closed = timed(lambda: measured(routes[last], coder, codes, torch.arange(n))) / (n * asked.images)
    whole, how = closed * D_SAE * asked.images, "measured" if asked.all else f"extrapolated from {n:,} latents"
    print(f"closed form: {both(1e6 * closed)} us a pair; all pairs {both(whole)} s, {how}; peak {peak_mb():.0f} MB")

    few = images[: asked.naive_images]
    with FlopCounterMode(display=False) as counter:
        naive(backbone, last, coder, 3, few, head)
    forwards = [timed(lambda: naive(backbone, last, coder, 3, few, head)) for _ in range(3)]
    slow, flops = np.min(forwards, axis=0) / len(few), counter.get_total_flops() / len(few)
    own = (2 * D * D_EMBED + 2 * D_EMBED * asked.words) / asked.images + OPERATIONS * asked.words
    days = slow * D_SAE * asked.images / 86400
    print(
        f"naive forward: {both(1e3 * slow)} ms a pair; all pairs {both(days)} days, extrapolated from {len(few)} images"
    )
    print(f"last layer: {both(slow / closed)} times the seconds, {flops / own:,.0f} times the FLOPs")
    print(f"  FLOPs a pair: naive {flops / 1e9:.2f} G, closed {own / 1e3:.0f} k", flush=True)
    agree(routes[last], backbone, last, coder, few, head)

    which = torch.tensor([3, 7])
    inner_codes = read(routes[inner], coder)
    inner_pair = timed(lambda: measured(routes[inner], coder, inner_codes, which)) / (len(which) * asked.images)
    left = N_BLOCKS - 1 - asked.inner
    told = f"{left} of {N_BLOCKS} blocks left, {left / N_BLOCKS:.2f}"
    print(f"{inner}: {both(1e3 * inner_pair)} ms a pair, {both(inner_pair / slow)} of the naive forward ({told})")
    agree(routes[inner], backbone, inner, coder, few, head)


def both(numbers: np.ndarray) -> str:
    digits = 0 if numbers[1] >= 100 else 2
    return f"{numbers[0]:,.{digits}f} ({numbers[1]:,.{digits}f} CPU)"


def tower() -> Backbone:
    """The size of CLIP's ViT-B/32, random."""
    ensure_torchvision()
    import transformers

    torch.manual_seed(0)
    config = transformers.CLIPVisionConfig(projection_dim=D_EMBED)
    model = transformers.CLIPVisionModelWithProjection(config)
    return backbones.huggingface.wrap(model, name="hf/random-b32")


def generated(rows: torch.Tensor) -> TopK:
    coder = TopK(d_in=D, d_sae=D_SAE, k=64, normalization="mean_std", seed=0)
    coder.fit(ActivationStats.of(rows), rows)
    return coder.eval()


def read(route: Route, coder: TopK) -> Reading:
    begun, found = time.perf_counter(), Latents(coder).read(route.rows())
    print(f"codes of {len(route.rows()):,} tokens, once: {time.perf_counter() - begun:.1f} s", flush=True)
    return found


def measured(route: Route, coder: TopK, reading: Reading, which: torch.Tensor) -> torch.Tensor:
    """S of these latents, with everything else that a row of the table has."""
    basis, found = Latents(coder), []
    distances = torch.ones(route.seen.probabilities.shape[1])
    for at in which.split(AT_ONCE):
        tally = Tally(len(at), route.seen.probabilities)
        for coordinates, images, after in route.probabilities(basis.directions(at), reading.steps(at, DOSE)):
            tally.add(coordinates, images, after)
        found.append(torch.from_numpy(tally.result(distances).s))
    return torch.cat(found)


def naive(
    backbone: Backbone, point: str, coder: TopK, latent: int, images: torch.Tensor, head: ZeroShotHead
) -> torch.Tensor:
    hook = edit_hook(backbone, point, coder, [Edit((latent,), "set", DOSE.value)])
    with backbone.hooks({point: hook}):
        return answers(backbone, backbone(images), head)


def agree(route: Route, backbone: Backbone, point: str, coder: TopK, images: torch.Tensor, head: ZeroShotHead) -> None:
    basis, which = Latents(coder), torch.tensor([3])
    steps = basis.read(route.rows()).steps(which, DOSE)
    parts = [after[0].clone() for _, _, after in route.probabilities(basis.directions(which), steps)]
    expected = naive(backbone, point, coder, 3, images, head)
    apart = float((torch.cat(parts)[: len(images)] - expected).abs().max())
    print(f"  largest difference of a probability from the naive forward: {apart:.1e}", flush=True)


def timed(work: Callable[[], object]) -> np.ndarray:
    """(wall, CPU) seconds. On a busy machine only the second means something, and only at one thread."""
    begun = np.array([time.perf_counter(), time.process_time()])
    work()
    return np.array([time.perf_counter(), time.process_time()]) - begun


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
