"""Extraction: images through a backbone, activations onto disk, resumable at any moment.

Images are permuted once, here, so that training later reads nearly in sequence. The shard is the atom: it is computed
from the same images in the same batches whether or not the run was interrupted, so a resumed store is byte for byte the
store of an uninterrupted run. Only the blocks that the points need are run.
"""

import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vitrail.backbones.base import Backbone
from vitrail.files import file_digest, read_json, write_json, write_tensors
from vitrail.images.base import ImageSource
from vitrail.images.loader import ImageBatch, load_batches
from vitrail.memory import reused_memory
from vitrail.progress import SILENT, Progress
from vitrail.provenance import peak_memory_mb, provenance
from vitrail.statistics import SLAB_VALUES, ActivationStats, Moments
from vitrail.store.manifest import DTYPES, TOKEN_KINDS, Manifest, ShardEntry, StoredPoint
from vitrail.store.read import Store, read_rows, shard_path
from vitrail.store.tokens import as_dtype, moment_slices, select_tokens, stored_kind
from vitrail.tables import write_table

SHARD_BYTES = 128 * 2**20
STATS_SAMPLE_ROWS = 16_384

IMAGE_COLUMNS = {
    "row": "BIGINT",
    "position": "BIGINT",
    "id": "VARCHAR",
    "uri": "VARCHAR",
    "label": "BIGINT",
    "class_name": "VARCHAR",
    "caption": "VARCHAR",
    "split": "VARCHAR",
    "skipped": "VARCHAR",
}


@reused_memory()
def extract(
    backbone: Backbone,
    images: ImageSource,
    points: Sequence[str],
    out: str | Path,
    *,
    tokens: str = "all",
    dtype: str = "float16",
    batch_size: int = 64,
    shard_images: int | None = None,
    limit: int | None = None,
    seed: int = 0,
    n_workers: int = 0,
    repair: bool = False,
    progress: Progress = SILENT,
) -> Store:
    """Write the activations of `images` at `points` to the folder `out`, or finish what an earlier run began there.

    `limit` takes the first so many images of the seeded permutation. `shard_images` defaults to what fills about
    128 MB per point and is rounded up to whole batches. `repair` checks every byte that is there and makes damaged
    shards anew. Raises ValueError if `out` holds a store of another request.
    """
    out = Path(out)
    check_request(backbone, points, tokens, dtype)
    order = permuted_positions(len(images), seed, limit)
    request = {
        "backbone": backbone.name,
        "backbone_digest": backbone.digest,
        "preprocess": backbone.preprocess.to_json(),
        "images": images.spec,
        "images_fingerprint": images.fingerprint(),
        "classes": list(images.classes),
        "points": list(points),
        "tokens": tokens,
        "dtype": dtype,
        "batch_size": batch_size,
        "shard_images": shard_images,
        "limit": limit,
        "seed": seed,
    }
    manifest = begin(out, request, backbone, order)
    if repair:
        # First the state, then the shards: a kill in between leaves a store that knows it is unfinished.
        manifest = replace(manifest, state="writing")
        manifest.write(out)
        remove_damaged_shards(out)
    if manifest.state == "complete":
        return Store.open(out)
    extraction = Extraction(backbone, images, out, request, order, n_workers, progress)
    extraction.write_missing_shards()
    extraction.finish(manifest)
    return Store.open(out)


def check_request(backbone: Backbone, points: Sequence[str], tokens: str, dtype: str) -> None:
    if not points:
        raise ValueError(f"name at least one hook point, for example blocks.{backbone.n_layers - 1}.hook_resid_post.")
    if len(set(points)) != len(points):
        raise ValueError(f"each hook point once, got {list(points)}.")
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}.")
    if tokens not in TOKEN_KINDS:
        raise ValueError(f"tokens must be one of {', '.join(TOKEN_KINDS)}, got {tokens!r}.")
    for point in points:
        backbone.point(point)  # raises KeyError naming the nearest
    if tokens in ("cls", "spatial"):
        backbone.grid.tokens(tokens)  # raises ValueError where the model has no CLS token
    if tokens == "cls" and "hook_embed" in points:
        raise ValueError("hook_embed has patch tokens only, no CLS token. Ask for tokens='spatial'.")


def permuted_positions(n_images: int, seed: int, limit: int | None) -> list[int]:
    if limit is not None and not 1 <= limit <= n_images:
        raise ValueError(f"limit must be in 1..{n_images} (the number of images), got {limit}.")
    return np.random.default_rng(seed).permutation(n_images)[:limit].tolist()


def begin(out: Path, request: dict[str, Any], backbone: Backbone, order: list[int]) -> Manifest:
    """The manifest of a new store, or of the one that is already there if it answers the same request."""
    if (out / "manifest.json").exists():
        manifest = Manifest.read(out)
        # Where pictures lie may change; what they are is in the fingerprint.
        differing = [key for key in request if key != "images" and manifest.request.get(key) != request[key]]
        if differing and manifest.state == "writing" and not any((out / "shards").glob("shard-*")):
            shutil.rmtree(out)  # an attempt that stored nothing, for example at a point without CLS: nothing is lost
            return begin(out, request, backbone, order)
        if differing:
            told = "; ".join(
                f"{k}: there {_short(manifest.request.get(k))}, asked {_short(request[k])}" for k in differing
            )
            raise ValueError(f"{out} holds a store of another request ({told}). Choose another folder, or delete it.")
        return manifest
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty and holds no store. Choose another folder.")
    manifest = Manifest(request=request, state="writing", grid=backbone.grid, n_shards=-1)
    shard_images = images_per_shard(backbone, request)
    manifest = replace(manifest, n_shards=-(-len(order) // shard_images))
    manifest.write(out)
    return manifest


def remove_damaged_shards(out: Path) -> list[str]:
    """Names of the shard folders that were removed because a file in them is missing or altered."""
    damaged = []
    for folder in sorted((out / "shards").glob("shard-*")):
        try:
            points = read_json(folder / "record.json", "shard record")["points"]
            whole = all(file_digest(folder / f"{p}.safetensors") == value["sha256"] for p, value in points.items())
        except (OSError, ValueError):
            whole = False
        if not whole:
            # Out of the way by one rename first: a kill while files are being deleted must not leave half a shard.
            doomed = folder.with_name(f".{folder.name}.damaged")
            shutil.rmtree(doomed, ignore_errors=True)
            folder.replace(doomed)
            shutil.rmtree(doomed)
            damaged.append(folder.name)
    return damaged


def images_per_shard(backbone: Backbone, request: dict[str, Any]) -> int:
    """Whole batches, so that a batch never spans two shards and its composition is the same after a resume."""
    wanted = request["shard_images"]
    if wanted is None:
        n_tokens = 1 if request["tokens"] in ("cls", "pooled") else backbone.grid.n_tokens
        bytes_each = 4 if request["dtype"] == "float32" else 2
        wanted = max(1, SHARD_BYTES // (n_tokens * backbone.d_model * bytes_each))
    batch_size = request["batch_size"]
    if wanted < 1 or batch_size < 1:
        raise ValueError(f"batch_size and shard_images must be at least 1, got {batch_size} and {wanted}.")
    return -(-wanted // batch_size) * batch_size


class Extraction:
    """One run of `extract`: which shards are missing, and how one is made."""

    def __init__(
        self,
        backbone: Backbone,
        images: ImageSource,
        out: Path,
        request: dict[str, Any],
        order: list[int],
        n_workers: int,
        progress: Progress,
    ) -> None:
        self.backbone, self.images, self.out, self.request = backbone, images, out, request
        self.n_workers, self.progress = n_workers, progress
        size = images_per_shard(backbone, request)
        self.shard_positions = [order[i : i + size] for i in range(0, len(order), size)]

    def write_missing_shards(self) -> None:
        missing = [i for i in range(len(self.shard_positions)) if not self._folder(i).is_dir()]
        positions = [p for i in missing for p in self.shard_positions[i]]
        total = sum(map(len, self.shard_positions))
        began = time.monotonic()
        batches = load_batches(
            self.images,
            positions,
            self.backbone.preprocess,
            batch_size=self.request["batch_size"],
            n_workers=self.n_workers,
        )
        with closing(batches), self.progress.task("extract", total, "images", done=total - len(positions)) as task:
            for i in missing:
                n_batches = -(-len(self.shard_positions[i]) // self.request["batch_size"])
                self._write_shard(i, islice(batches, n_batches), task)
        self.seconds = time.monotonic() - began
        self.n_done = len(positions)

    def _write_shard(self, index: int, batches: Iterator[ImageBatch], task: Any) -> None:
        rows: dict[str, list[Tensor]] = {point: [] for point in self.request["points"]}
        kept: list[int] = []
        skipped: list[tuple[int, str]] = []
        for batch in batches:
            skipped += batch.skipped
            kept += batch.positions
            if batch.positions:
                for point, x in self._activations(batch.images).items():
                    rows[point].append(x)
            task.advance(len(batch.positions) + len(batch.skipped), f"{len(skipped)} skipped" if skipped else "")
        stored = {point: torch.cat(parts) for point, parts in rows.items() if parts}
        self._commit(index, stored, kept, skipped)

    def _activations(self, pixels: Tensor) -> dict[str, Tensor]:
        device = next(self.backbone.parameters()).device
        with torch.inference_mode():
            activations = self.backbone.activations(pixels.to(device), self.request["points"])
        out = {}
        for point, x in activations.items():
            kind = stored_kind(self.request["tokens"], has_tokens=x.ndim == 3)
            selected = select_tokens(x, self.backbone.grid, kind)
            out[point] = as_dtype(selected, self.request["dtype"], point=point).cpu()
        return out

    def _commit(self, index: int, stored: dict[str, Tensor], kept: list[int], skipped: list[tuple[int, str]]) -> None:
        folder = self._folder(index)
        temporary = folder.with_name(f".{folder.name}.writing")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        record: dict[str, Any] = {"positions": kept, "skipped": skipped, "points": {}}
        for point, x in stored.items():
            path = temporary / f"{point}.safetensors"
            write_tensors(path, {"x": x})
            kind = stored_kind(self.request["tokens"], has_tokens=self.backbone.point(point).has_tokens)
            record["points"][point] = {
                "sha256": file_digest(path),
                "bytes": path.stat().st_size,
                **asdict(StoredPoint(tokens=kind, n_tokens=x.shape[1], d_in=x.shape[2])),
                "moments": self._moments(x, kind),
            }
        write_json(temporary / "record.json", record)
        temporary.replace(folder)
        _sync_folder(folder.parent)

    def _moments(self, x: Tensor, kind: str) -> dict[str, Any]:
        """Of what is stored, after the cast: a reader's rows have exactly these statistics."""
        out = {}
        for name, group in moment_slices(kind, x.shape[1], self.backbone.grid).items():
            moments = Moments()
            for part in x[:, group].split(max(1, SLAB_VALUES // (x.shape[1] * x.shape[2]))):
                moments.update(part.reshape(-1, x.shape[2]).float())
            out[name] = moments.to_json()
        return out

    def finish(self, manifest: Manifest) -> None:
        """Fold the shards' records into the image table and the complete manifest."""
        records = [read_json(self._folder(i) / "record.json", "shard record") for i in range(len(self.shard_positions))]
        n_images = sum(len(record["positions"]) for record in records)
        if n_images == 0:
            reason = records[0]["skipped"][0][1] if records and records[0]["skipped"] else "there were none"
            raise ValueError(f"none of the {sum(map(len, self.shard_positions))} images could be read ({reason}).")
        write_table(self.out / "images.parquet", image_table(self.images, records), IMAGE_COLUMNS)
        points = {
            name: StoredPoint(**{key: value[key] for key in ("tokens", "n_tokens", "d_in")})
            for record in records
            for name, value in record["points"].items()
        }
        shards = [
            ShardEntry(
                name=self._folder(i).name,
                n_images=len(record["positions"]),
                bytes={point: value["bytes"] for point, value in record["points"].items()},
                sha256={point: value["sha256"] for point, value in record["points"].items()},
            )
            for i, record in enumerate(records)
        ]
        complete = replace(
            manifest,
            state="complete",
            n_images=n_images,
            n_skipped=sum(len(record["skipped"]) for record in records),
            points=points,
            shards=shards,
        )
        complete = replace(complete, stats=merged_stats(self.out, complete, records))
        write_json(
            self.out / "cost.json",
            {
                "seconds": round(self.seconds, 3),
                "images_this_run": self.n_done,
                "images_per_s": round(self.n_done / max(self.seconds, 1e-9), 2),
                "peak_memory_mb": round(peak_memory_mb()),
                "provenance": provenance(),
            },
        )
        complete.write(self.out)

    def _folder(self, index: int) -> Path:
        return shard_path(self.out, f"shard-{index:05d}")


def image_table(images: ImageSource, records: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """Rows in store order; images that were skipped follow, with row NULL and the reason."""
    kept = [(row, position, None) for row, position in enumerate(p for r in records for p in r["positions"])]
    skipped = [(None, position, reason) for record in records for position, reason in record["skipped"]]
    columns: dict[str, list[Any]] = {name: [] for name in IMAGE_COLUMNS}
    for row, position, reason in kept + skipped:
        record = images.record(position)
        described = {name: getattr(record, name) for name in ("id", "uri", "label", "class_name", "caption", "split")}
        for name, value in {"row": row, "position": position, "skipped": reason, **described}.items():
            columns[name].append(value)
    return columns


def merged_stats(out: Path, manifest: Manifest, records: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    stats: dict[str, dict[str, Any]] = {}
    for point, stored in manifest.points.items():
        groups: dict[str, Moments] = {}
        whole = Moments()
        for record in records:
            for name, value in record["points"].get(point, {}).get("moments", {}).items():
                moments = Moments.from_json(value)
                groups.setdefault(name, Moments()).merge(moments)
                whole.merge(moments)
        wanted = {stored.tokens: whole} | {name: m for name, m in groups.items() if name in ("cls", "spatial")}
        if stored.tokens == "all" and stored.n_tokens == manifest.grid.n_patches:  # a model without special tokens
            wanted["spatial"] = whole
        stats[point] = {}
        for kind, moments in wanted.items():
            sample = sample_rows(out, manifest, point, kind)
            stats[point][kind] = ActivationStats.from_moments(moments, sample).to_json()
    return stats


def sample_rows(out: Path, manifest: Manifest, point: str, kind: str) -> Tensor:
    """Up to STATS_SAMPLE_ROWS rows, the first images of every shard alike: images are already in random order."""
    stored = manifest.points[point]
    per_image = stored.n_tokens if kind == stored.tokens else len(range(stored.n_tokens)[manifest.grid.tokens(kind)])
    share = max(1, STATS_SAMPLE_ROWS // (per_image * len(manifest.shards)))
    parts = [
        read_rows(out, manifest, point, kind, shard, 0, min(share, shard.n_images)).flatten(0, 1)
        for shard in manifest.shards
        if shard.n_images
    ]
    return torch.cat(parts)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
