"""Rows that carry several points side by side: what transcoders and crosscoders learn from.

    row = [part_1 | part_2 | ...]     the same token of the same image, of several hook points or several models

Parts are points of one store, or points of several stores of the same images in the same order. One plan of chunks and
windows is read from all of them, so that rows are aligned by construction; each epoch's order depends only on (seed,
epoch), as a single reader's does. Models with other token grids have no common tokens and are refused.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from vitrail.files import json_digest
from vitrail.statistics import ActivationStats
from vitrail.store.read import WINDOW_BYTES, Store, read_rows
from vitrail.store.windows import WindowedSource, generator

# Norms of joined rows are not to be had from those of the parts. They are taken over about so many rows, in so many
# blocks of neighbouring images.
NORM_ROWS, NORM_BLOCKS = 4096, 64
ONE_PER_IMAGE = ("cls", "pooled")


@dataclass(frozen=True)
class Part:
    """One point of one store. `tokens` None: as it was stored."""

    store: Store
    point: str
    tokens: str | None = None

    @property
    def kind(self) -> str:
        return self.store.kind(self.point, self.tokens)

    @property
    def n_tokens(self) -> int:
        return self.store.tokens_per_image(self.point, self.kind)

    @property
    def width(self) -> int:
        return self.store.manifest.points[self.point].d_in

    @property
    def label(self) -> str:
        return f"{self.point} of {self.store.path} ({self.kind} tokens)"


class JoinedSource(WindowedSource):
    """Batches (batch_size, sum of widths) in fp32. See `Store.reader` for the options.

    `widths` says where the parts lie in a row. `stats` are the parts' means and variances one after another; the norms
    are those of joined rows spread over the images (`centred_norm_rows` says how many).
    """

    def __init__(
        self,
        parts: Sequence[Part],
        *,
        batch_size: int = 4096,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = False,
        window_bytes: int = WINDOW_BYTES,
        prefetch: int = 2,
        images: tuple[int, int] | None = None,
    ) -> None:
        super().__init__(batch_size=batch_size, shuffle=shuffle, seed=seed, drop_last=drop_last, prefetch=prefetch)
        self.parts = tuple(Part(p.store, p.store.default_point(p.point), p.kind) for p in parts)
        check_aligned(self.parts)
        n_images = self.parts[0].store.n_images
        images = (0, n_images) if images is None else images
        if not 0 <= images[0] < images[1] <= n_images:
            raise ValueError(f"images must be a range within 0..{n_images}, got {images}.")
        self.widths = tuple(part.width for part in self.parts)
        self.d_in, self.n_tokens = sum(self.widths), self.parts[0].n_tokens
        self.n_rows: int | None = (images[1] - images[0]) * self.n_tokens
        self._chunks, self._chunks_per_window = self._plan(window_bytes, images)
        order = {"seed": seed, "shuffle": shuffle, "batch_size": batch_size, "images": list(images)}
        read = [[part.store.digest, part.point, part.kind] for part in self.parts]
        self.identity = json_digest(["joined", read, order, self._chunks_per_window, len(self._chunks)])
        self.stats = self._joined_stats()

    def n_windows(self, epoch: int) -> int:
        return -(-len(self._chunks) // self._chunks_per_window)

    def window_rows(self, epoch: int, window: int) -> Float[Tensor, "n d_in"]:
        order = list(range(len(self._chunks)))
        if self.shuffle:
            order = generator(self.seed, epoch, 0).permutation(len(order)).tolist()
        size = self._chunks_per_window
        return self._read([self._chunks[i] for i in order[window * size : (window + 1) * size]])

    def _read(self, chunks: Sequence[tuple[int, int]]) -> Float[Tensor, "n d_in"]:
        joined = [
            torch.cat([_images(part, start, stop) for part in self.parts], 2).flatten(0, 1) for start, stop in chunks
        ]
        return torch.cat(joined)

    def _plan(self, window_bytes: int, images: tuple[int, int]) -> tuple[list[tuple[int, int]], int]:
        """Chunks of neighbouring images, none across the end of any store's shard; and how many make a window."""
        per_window = max(1, window_bytes // (4 * self.d_in) // self.n_tokens)
        size = max(1, min(per_window // 64, 256))
        ends = {end for part in self.parts for end in _shard_ends(part.store)}
        bounds = sorted({*images, *(end for end in ends if images[0] < end < images[1])})
        chunks = [
            (start, min(start + size, stop))
            for first, stop in zip(bounds[:-1], bounds[1:], strict=True)
            for start in range(first, stop, size)
        ]
        return chunks, max(1, per_window // size)

    def _joined_stats(self) -> ActivationStats:
        of_parts = [part.store.stats(part.point, part.kind) for part in self.parts]
        mean, variance = torch.cat([s.mean for s in of_parts]), torch.cat([s.variance for s in of_parts])
        every = max(1, len(self._chunks) // NORM_BLOCKS)
        n_images = -(-NORM_ROWS // (NORM_BLOCKS * self.n_tokens))
        blocks = [(start, min(start + n_images, stop)) for start, stop in self._chunks[::every]]
        rows = self._read(blocks).double()
        norms = torch.linalg.vector_norm(rows, dim=1)
        return ActivationStats(
            n=of_parts[0].n,
            mean=mean,
            variance=variance,
            mean_norm=float(norms.mean()),
            max_norm=float(norms.max()),
            centred_norm=float(torch.linalg.vector_norm(rows - mean, dim=1).mean()),
            centred_norm_rows=len(rows),
        )


def check_aligned(parts: Sequence[Part]) -> None:
    """Raise, naming the two that differ, unless row i is the same token of the same image in every part."""
    if len(parts) < 2:
        raise ValueError(f"name at least two points to read side by side, got {len(parts)}.")
    if len({(part.store.path.resolve(), part.point, part.kind) for part in parts}) < len(parts):
        raise ValueError(f"each point once, got {', '.join(part.label for part in parts)}.")
    first = parts[0]
    for other in parts[1:]:
        _check_tokens(first, other)
        if other.store.path.resolve() != first.store.path.resolve():
            _check_images(first.store, other.store)


def _check_tokens(first: Part, other: Part) -> None:
    if first.n_tokens != other.n_tokens:
        raise ValueError(
            f"{first.label} has {first.n_tokens} rows per image, {other.label} has {other.n_tokens}: they have no "
            f"common rows. Read the same token kind of models with the same grid, or 'cls' of both."
        )
    if first.kind in ONE_PER_IMAGE and other.kind in ONE_PER_IMAGE:
        return
    if first.kind != other.kind:
        raise ValueError(f"{first.label} and {other.label} are of different token kinds: rows would not be the same.")
    grids = [
        (g.height, g.width, g.n_cls, g.n_registers) for g in (first.store.manifest.grid, other.store.manifest.grid)
    ]
    if grids[0] != grids[1]:
        raise ValueError(
            f"{first.label} and {other.label} have other token grids (height, width, CLS, registers): {grids[0]} and "
            f"{grids[1]}. Read models with the same grid, or one row per image (tokens 'cls' or 'pooled')."
        )


def _check_images(first: Store, other: Store) -> None:
    if first.n_images != other.n_images:
        raise ValueError(
            f"{first.path} holds {first.n_images} images, {other.path} {other.n_images}: they are not of the same "
            f"images. Extract both from the same images with the same seed and limit."
        )
    ours, theirs = _ids(first), _ids(other)
    if ours != theirs:
        row = next(i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b)
        raise ValueError(
            f"image {row} is {ours[row]!r} in {first.path} and {theirs[row]!r} in {other.path}: other images, "
            f"or the same in another order: extract both from the same images with the same seed and limit."
        )


def _ids(store: Store) -> list[str]:
    return [str(image) for image in store.images()["id"][: store.n_images]]


def _shard_ends(store: Store) -> list[int]:
    ends, end = [], 0
    for shard in store.manifest.shards:
        end += shard.n_images
        ends.append(end)
    return ends


def joined_images(
    parts: Sequence[Part], *, n_images: int = 256, start: int = 0
) -> Iterator[tuple[int, Float[Tensor, "n t d_in"]]]:
    """(row of the first image, the parts side by side) in the first part's order, from image `start` on."""
    first, *others = parts
    for row, x in first.store.image_batches(first.point, first.kind, n_images=n_images, start=start):
        yield row, torch.cat([x, *(_images_of(part, row, row + len(x)) for part in others)], dim=-1)


def _images_of(part: Part, start: int, stop: int) -> Float[Tensor, "n t d"]:
    """Rows of images start..stop, of as many shards as they lie in."""
    first, pieces = 0, []
    for shard in part.store.manifest.shards:
        a, b = max(start, first), min(stop, first + shard.n_images)
        if a < b:
            pieces.append(_images(part, a, b))
        first += shard.n_images
    return torch.cat(pieces)


def _images(part: Part, start: int, stop: int) -> Float[Tensor, "n t d"]:
    """Rows of images start..stop, which lie in one shard."""
    first, manifest = 0, part.store.manifest
    for shard in manifest.shards:
        if start < first + shard.n_images:
            return read_rows(part.store.path, manifest, part.point, part.kind, shard, start - first, stop - first)
        first += shard.n_images
    raise AssertionError("a chunk outside the store")
