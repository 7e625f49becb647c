"""Reading a store: ordered image batches, and shuffled rows that resume exactly.

Shards are memory-mapped safetensors; rows are cast to fp32 once, on the way in. A reader takes runs of neighbouring
images (chunks) in a random order that depends only on (seed, epoch), holds a window of many chunks, and mixes the rows
of the window: nearly sequential reading, well-mixed batches.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Self

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from torch import Tensor

from vitrail.files import file_digest, json_digest, open_tensors
from vitrail.statistics import ActivationStats
from vitrail.store.manifest import Manifest, ShardEntry
from vitrail.store.tokens import view_slice
from vitrail.store.windows import WindowedSource, generator
from vitrail.tables import Columns, read_table

WINDOW_BYTES = 256 * 2**20
REPAIR = "Run the same extract again with --repair: it makes the damaged shards anew and keeps the others."


def shard_path(store: Path, name: str) -> Path:
    return store / "shards" / name


def point_path(store: Path, shard: str, point: str) -> Path:
    return shard_path(store, shard) / f"{point}.safetensors"


def read_rows(
    store: Path, manifest: Manifest, point: str, kind: str, shard: ShardEntry, start: int, stop: int
) -> Float[Tensor, "n t d_in"]:
    """fp32 rows of images start..stop of one shard."""
    stored = manifest.points[point]
    tokens = view_slice(stored.tokens, stored.n_tokens, kind, manifest.grid, name=point)
    path = point_path(store, shard.name, point)
    with open_tensors(path) as opened:
        try:
            return opened.get_slice("x")[start:stop, tokens].float()
        except SafetensorError as error:
            raise ValueError(f"{path} does not hold what the manifest says ({error}). {REPAIR}") from error


class Store:
    """A complete store. `Store.open(path)` checks that every file is there in full; `verify()` reads every byte."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path, self.manifest = path, manifest

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Raises FileNotFoundError or ValueError naming the file that is missing, unfinished or cut."""
        path = Path(path)
        manifest = Manifest.read(path)
        if manifest.state != "complete":
            done = len(list((path / "shards").glob("shard-*"))) if (path / "shards").is_dir() else 0
            raise ValueError(
                f"{path} is unfinished: {done} of {manifest.n_shards} shards are there. "
                "Run the same extract again; it goes on where it was."
            )
        store = cls(path, manifest)
        store._check_sizes()
        return store

    @property
    def digest(self) -> str:
        return self.manifest.digest

    @property
    def points(self) -> tuple[str, ...]:
        return tuple(self.manifest.points)

    @property
    def n_images(self) -> int:
        return self.manifest.n_images

    def images(self) -> Columns:
        """The image table: stored images in row order, then the skipped ones (`skipped` says why)."""
        return read_table(self.path / "images.parquet", order_by='"row" NULLS LAST, "position"')

    def default_point(self, point: str | None) -> str:
        """`point` if the store holds it, or the only point there is."""
        if point is None and len(self.points) == 1:
            return self.points[0]
        if point not in self.points:
            raise KeyError(f"{self.path} holds {', '.join(self.points)}; asked for {point!r}.")
        return point

    def kind(self, point: str, tokens: str | None) -> str:
        """The token kind to read: as stored unless another is asked for. Raises ValueError if it cannot be had."""
        stored = self.manifest.points[point]
        if tokens is None:
            return stored.tokens
        view_slice(stored.tokens, stored.n_tokens, tokens, self.manifest.grid, name=point)
        return tokens

    def tokens_per_image(self, point: str, tokens: str) -> int:
        stored = self.manifest.points[point]
        kept = view_slice(stored.tokens, stored.n_tokens, tokens, self.manifest.grid, name=point)
        return len(range(stored.n_tokens)[kept])

    def stats(self, point: str, tokens: str) -> ActivationStats:
        return ActivationStats.from_json(self.manifest.stats[point][tokens])

    def reader(
        self,
        point: str | None = None,
        *,
        tokens: str | None = None,
        batch_size: int = 4096,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = False,
        window_bytes: int = WINDOW_BYTES,
        prefetch: int = 2,
        images: tuple[int, int] | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> "StoreReader":
        """Batches of rows for training.

        `images=(a, b)` reads only image rows a..b-1, so that others stay held out; images lie in random order. The
        statistics are the whole store's. Each rank of `world_size` reads its own share of every epoch's chunks.
        """
        point = self.default_point(point)
        return StoreReader(
            store=self,
            point=point,
            tokens=self.kind(point, tokens),
            batch_size=batch_size,
            shuffle=shuffle,
            seed=seed,
            drop_last=drop_last,
            window_bytes=window_bytes,
            prefetch=prefetch,
            images=(0, self.n_images) if images is None else images,
            rank=rank,
            world_size=world_size,
        )

    def image_batches(
        self, point: str, tokens: str, *, n_images: int = 256, start: int = 0
    ) -> Iterator[tuple[int, Float[Tensor, "n t d_in"]]]:
        """(first row of the image table, activations) in store order, from image `start` on."""
        first = 0
        for shard in self.manifest.shards:
            for at in range(max(0, start - first), shard.n_images, n_images):
                stop = min(at + n_images, shard.n_images)
                yield first + at, read_rows(self.path, self.manifest, point, tokens, shard, at, stop)
            first += shard.n_images

    def verify(self) -> None:
        """Compare every shard's sha256 with the manifest. Raises ValueError naming the first file that differs."""
        for shard in self.manifest.shards:
            for point, expected in shard.sha256.items():
                path = point_path(self.path, shard.name, point)
                if file_digest(path) != expected:
                    raise ValueError(f"{path} was altered: its sha256 is not the manifest's. {REPAIR}")

    def _check_sizes(self) -> None:
        for shard in self.manifest.shards:
            for point, expected in shard.bytes.items():
                path = point_path(self.path, shard.name, point)
                found = path.stat().st_size if path.is_file() else None
                if found != expected:
                    state = "is missing" if found is None else f"is cut or altered: {found} bytes, not {expected}"
                    raise ValueError(f"{path} {state}. {REPAIR}")


class StoreReader(WindowedSource):
    """Rows of one point of a store, (batch_size, d_in) fp32. See `Store.reader`."""

    def __init__(
        self,
        *,
        store: Store,
        point: str,
        tokens: str,
        batch_size: int,
        shuffle: bool,
        seed: int,
        drop_last: bool,
        window_bytes: int,
        prefetch: int,
        images: tuple[int, int],
        rank: int,
        world_size: int,
    ) -> None:
        super().__init__(batch_size=batch_size, shuffle=shuffle, seed=seed, drop_last=drop_last, prefetch=prefetch)
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be in 0..world_size-1={world_size - 1}, got {rank}.")
        if not 0 <= images[0] < images[1] <= store.n_images:
            raise ValueError(f"images must be a range within 0..{store.n_images}, got {images}.")
        self.store, self.point, self.tokens = store, point, tokens
        self.d_in = store.manifest.points[point].d_in
        self.stats = store.stats(point, tokens)
        self.n_tokens = store.tokens_per_image(point, tokens)
        self._rank, self._world_size, self._images = rank, world_size, images
        self._chunks, self._chunks_per_window = self._plan(window_bytes)
        self.n_rows: int | None = (images[1] - images[0]) * self.n_tokens // world_size
        order = {"seed": seed, "shuffle": shuffle, "batch_size": batch_size, "rank": [rank, world_size, *images]}
        self.identity = json_digest([store.digest, point, tokens, order, self._chunks_per_window, len(self._chunks)])

    def _plan(self, window_bytes: int) -> tuple[list[tuple[int, int, int]], int]:
        """(shard, start, stop) chunks of neighbouring images, and how many make a window: at least 64 if there are."""
        rows = max(1, window_bytes // (4 * self.d_in))
        images = max(1, rows // self.n_tokens)
        size = max(1, min(images // 64, 256))
        chunks, first = [], 0
        for index, shard in enumerate(self.store.manifest.shards):
            begin, end = max(self._images[0] - first, 0), min(self._images[1] - first, shard.n_images)
            chunks += [(index, start, min(start + size, end)) for start in range(begin, end, size)]
            first += shard.n_images
        if len(chunks) < self._world_size:
            raise ValueError(f"{len(chunks)} chunks of images cannot feed {self._world_size} ranks.")
        return chunks, max(1, images // size)

    def _epoch_chunks(self, epoch: int) -> list[tuple[int, int, int]]:
        chunks = self._chunks
        if self.shuffle:
            chunks = [chunks[i] for i in generator(self.seed, epoch, 0).permutation(len(chunks))]
        return chunks[self._rank :: self._world_size]

    def n_windows(self, epoch: int) -> int:
        return -(-len(self._epoch_chunks(epoch)) // self._chunks_per_window)

    def window_rows(self, epoch: int, window: int) -> Float[Tensor, "n d_in"]:
        size = self._chunks_per_window
        chunks = self._epoch_chunks(epoch)[window * size : (window + 1) * size]
        manifest = self.store.manifest
        parts = [
            read_rows(self.store.path, manifest, self.point, self.tokens, manifest.shards[index], start, stop)
            for index, start, stop in chunks
        ]
        return torch.cat(parts).flatten(0, 1)
