"""Many coders, one pass, against as many runs of `train`: python benchmarks/sweep.py [--d-in N] [--rows N] ...

A store of random rows is written, then the contenders train the same coders of it, one after the other:

    processes   one `vitrail train` a coder, as one would type them
    train       `vitrail.train` a coder, all in this process
    swept       `vitrail.training.sweep`, in this process
    sweep       `vitrail sweep`, a process of its own

--only processes sweep: these alone. --d-in 384 --expansions 8 16 32 --ks 64 128 192 256 --batch-size 8192: ViSAEBench's
twelve coders. Wall and CPU seconds and their ratios are printed, and what one batch costs to read, to normalise and to
train on: the sweep saves what is not training. Weights are compared: all must end in the same bits.
"""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from vitrail.backbones.grid import Grid as TokenGrid
from vitrail.coders import make_coder
from vitrail.files import file_digest, write_tensors
from vitrail.statistics import ActivationStats, Moments
from vitrail.store import Store, StoreReader
from vitrail.store.manifest import Manifest, ShardEntry, StoredPoint
from vitrail.store.write import IMAGE_COLUMNS
from vitrail.tables import write_table
from vitrail.training import Grid, TrainConfig, sweep, train

POINT, TOKENS = "blocks.0.hook_resid_post", 64
CONTENDERS = ("processes", "train", "swept", "sweep")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--d-in", type=int, default=128)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--expansions", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--batch-size", type=int, default=1024)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--architecture", default="batch_topk")
    parser.add_argument("--ks", type=int, nargs="+", default=[4, 8, 12, 16, 24, 32])
    parser.add_argument("--compute-dtype", default="float32")
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, default=CONTENDERS)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        compare(Path(folder), asked)


def compare(folder: Path, asked: argparse.Namespace) -> None:
    store = random_store(folder / "store", asked.rows // TOKENS, asked.d_in)
    grid = Grid((asked.architecture,), expansions=asked.expansions, arguments={"k": tuple(asked.ks)})
    cells = grid.cells(asked.d_in)
    shared = ["--batch-size", asked.batch_size, "--device", "cpu", "--compute-dtype", asked.compute_dtype]
    config = TrainConfig(compute_dtype=asked.compute_dtype)

    def processes() -> None:
        for cell in cells:
            own = ["--k", cell.arguments["k"], "--d-sae", cell.arguments["d_sae"]]
            vitrail("train", cell.architecture, store.path, folder / "processes" / cell.name, *own, *shared)

    def readers() -> tuple[StoreReader, StoreReader]:
        n_train = store.n_images - round(0.05 * store.n_images)
        source = store.reader(POINT, batch_size=asked.batch_size, images=(0, n_train))
        return source, store.reader(POINT, batch_size=asked.batch_size, images=(n_train, store.n_images))

    def alone() -> None:
        for cell in cells:
            source, held_out = readers()
            coder = make_coder(cell.architecture, d_in=asked.d_in, **cell.arguments)
            train(coder, source, folder / "train" / cell.name, held_out=held_out, config=config)

    def swept() -> None:
        source, held_out = readers()
        sweep(grid, source, folder / "swept", held_out=held_out, config=config, workers=asked.workers)

    def command() -> None:
        directions = ["--architecture", asked.architecture, "--expansion", *asked.expansions, "--k", *asked.ks]
        vitrail("sweep", store.path, folder / "sweep", *directions, *shared, "--workers", asked.workers)

    widths = sorted({cell.arguments["d_sae"] for cell in cells})
    print(f"{len(cells)} {asked.architecture} coders, d_in {asked.d_in}, d_sae {widths},")
    threads = f"{torch.get_num_threads()} threads, {asked.compute_dtype}"
    print(f"{asked.rows:,} rows in batches of {asked.batch_size:,}; {threads}")
    parts(store, asked, cells[-1].arguments)
    contenders = {"processes": processes, "train": alone, "swept": swept, "sweep": command}
    taken = {name: timed(contenders[name]) for name in asked.only}
    for name, (wall, cpu) in taken.items():
        print(f"  {name:<10} {wall:8.1f} s wall {cpu:8.1f} s CPU")
    for one, other, told in (("sweep", "processes", "as commands"), ("swept", "train", "within a process")):
        if one not in taken or other not in taken:
            continue
        wall, cpu = (taken[one][i] / taken[other][i] for i in (0, 1))
        print(f"  {told}: the sweep takes {wall:.2f} of the single runs' wall seconds, {cpu:.2f} of their CPU seconds")
    for cell in cells:
        weights = {(folder / name / cell.name / "weights.safetensors").read_bytes() for name in taken}
        if len(weights) > 1:
            print(f"  {cell.name}: the weights differ{' (workers share the threads)' if asked.workers > 1 else ''}")


def parts(store: Store, asked: argparse.Namespace, arguments: dict[str, int]) -> None:
    """Milliseconds of one batch: read, normalised, and the widest coder's product alone."""
    source = store.reader(POINT, batch_size=asked.batch_size, prefetch=0)
    began = time.process_time()
    sizes = [len(x) for x in source]
    reading = (time.process_time() - began) / len(sizes)
    coder = make_coder(asked.architecture, d_in=asked.d_in, **arguments)
    whole = next(iter(source))
    coder.fit(source.stats, whole)

    def per_call(call: Callable[[], object]) -> float:
        call()
        began = time.process_time()
        for _ in range(20):
            call()
        return (time.process_time() - began) / 20

    with torch.no_grad():
        normalising = per_call(lambda: coder.normalize(whole))
        y = coder.normalize(whole).y
        product = per_call(lambda: coder.pre_activations(y))
    step = per_call(lambda: coder.train().loss(whole).loss.backward())
    told = {"read": reading, "normalise": normalising, "widest encoder product": product, "its loss and gradient": step}
    print("  CPU ms a batch: " + ", ".join(f"{name} {1000 * seconds:.2f}" for name, seconds in told.items()))


def vitrail(*arguments: object) -> None:
    command = [sys.executable, "-m", "vitrail", *map(str, arguments)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=dict(os.environ))


def timed(run: Callable[[], None]) -> tuple[float, float]:
    """Wall and CPU seconds, those of child processes too."""
    wall, before = time.monotonic(), _cpu()
    run()
    return time.monotonic() - wall, _cpu() - before


def _cpu() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def random_store(path: Path, n_images: int, d_in: int) -> Store:
    """Sparse mixtures of random directions, fp16, one shard, as `extract` would leave them."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(4 * d_in, d_in, generator=generator)
    x = torch.empty(n_images, TOKENS, d_in, dtype=torch.float16)
    moments = Moments()
    for part in x.split(256):
        shape = (len(part) * TOKENS, 4 * d_in)
        z = torch.rand(shape, generator=generator) * (torch.rand(shape, generator=generator) < 0.02)
        part.copy_((z @ directions).view_as(part))
        moments.update(part.flatten(0, 1).float())
    file = path / "shards/shard-00000" / f"{POINT}.safetensors"
    write_tensors(file, {"x": x})
    table = {name: [None] * n_images for name in IMAGE_COLUMNS}
    table |= {"row": list(range(n_images)), "position": list(range(n_images)), "id": list(map(str, range(n_images)))}
    write_table(path / "images.parquet", table, IMAGE_COLUMNS)
    about = ("backbone", "backbone_digest", "images", "images_fingerprint", "preprocess")
    entry = ShardEntry("shard-00000", n_images, {POINT: file.stat().st_size}, {POINT: file_digest(file)})
    stats = ActivationStats.from_moments(moments, x[:64].flatten(0, 1).float())
    Manifest(
        request=dict.fromkeys(about, "random rows"),
        state="complete",
        grid=TokenGrid(height=8, width=8, patch_px=8, image_px=(64, 64), n_cls=0, n_registers=0),
        n_shards=1,
        n_images=n_images,
        points={POINT: StoredPoint(tokens="spatial", n_tokens=TOKENS, d_in=d_in)},
        shards=[entry],
        stats={POINT: {"spatial": stats.to_json()}},
    ).write(path)
    return Store.open(path)


if __name__ == "__main__":
    main()
