"""vitrail extract"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import tyro

from vitrail.cli.options import Model, pick_workers
from vitrail.images import open_images
from vitrail.progress import Terminal
from vitrail.store import Store, extract


def run(arguments: Sequence[str]) -> None:
    tyro.cli(extract_verb, args=arguments, prog="vitrail extract")


def extract_verb(
    images: Annotated[
        tyro.conf.Positional[str], tyro.conf.arg(help='a folder, a .csv, a .tar, or "world:shapes?n=2000"')
    ],
    out: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(help="the store's folder")],
    model: Annotated[Model, tyro.conf.arg(name="")],
    points: Annotated[tuple[str, ...], tyro.conf.arg(help="hook points; `vitrail points BACKBONE` lists them")],
    tokens: Literal["all", "spatial", "cls", "pooled"] = "all",
    dtype: Literal["float16", "bfloat16", "float32"] = "float16",
    batch_size: int = 64,
    shard_images: int | None = None,
    limit: int | None = None,
    split: str | None = None,
    seed: int = 0,
    workers: int | None = None,
    device: str = "auto",
    repair: bool = False,
) -> None:
    """Write activations of images at hook points to a store. Run it again to go on where it was.

    Args:
        tokens: which positions: all (CLS and registers included), spatial (patches), cls, pooled (one row per image)
        dtype: how activations are stored
        shard_images: images per shard, the unit of work that a kill can lose (default: about 128 MB)
        limit: only so many images, drawn by the seed
        split: only this split, where the images have splits
        workers: processes that read images (default: cores - 1)
        repair: check every byte that is there and make damaged shards anew
    """
    store = extract(
        model.load(device),
        open_images(images, split=split),
        points,
        out,
        tokens=tokens,
        dtype=dtype,
        batch_size=batch_size,
        shard_images=shard_images,
        limit=limit,
        seed=seed,
        n_workers=pick_workers(workers),
        repair=repair,
        progress=Terminal(),
    )
    print(describe(store))


def describe(store: Store) -> str:
    manifest = store.manifest
    lines = [f"{store.path}: {manifest.n_images:,} images, {len(manifest.shards)} shards"]
    if manifest.n_skipped:
        lines[0] += f"; {manifest.n_skipped:,} images could not be read (listed in images.parquet)"
    for name, point in manifest.points.items():
        rows = manifest.n_images * point.n_tokens
        stats = store.stats(name, point.tokens)
        lines.append(
            f"  {name}: {rows:,} rows of {point.d_in} ({point.tokens} tokens); mean norm {stats.mean_norm:.3g}, "
            f"std {stats.scalar_std:.3g}"
        )
    return "\n".join(lines)
