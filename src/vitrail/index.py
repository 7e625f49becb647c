"""Per latent: the images and patches that excite it most, how often it fires, and how strongly.

    INDEX/latents.parquet        latent, n_tokens_active, density, n_images_active, image_density, mean, max, dead
    INDEX/images.parquet         latent, rank, image, token, value   top images by their strongest token
    INDEX/patches.parquet        latent, rank, image, token, value   top single tokens, at most one row per token
    INDEX/histograms.safetensors counts (d_sae, n_bins), edges (n_bins + 1): log10 of the activations
    INDEX/manifest.json

One pass over the codes with bounded memory: nothing of size rows x latents. Ties go to the earlier image, then the
earlier token, so an index does not depend on how the codes were cut into shards (SPEC row 17).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray

from vitrail.coders.sparse import Codes
from vitrail.codes import CodeStore
from vitrail.files import read_json, read_tensors, write_json, write_tensors
from vitrail.progress import SILENT, Progress
from vitrail.tables import Columns, read_table, write_table

FORMAT = "vitrail-index"
VERSION = 1
EDGES = np.linspace(-4.0, 4.0, 65)  # log10; values beyond fall into the outermost bins
TOP_TYPES = {"latent": "INTEGER", "rank": "INTEGER", "image": "BIGINT", "token": "INTEGER", "value": "FLOAT"}
LATENT_TYPES = {
    "latent": "INTEGER",
    "n_tokens_active": "BIGINT",
    "density": "DOUBLE",
    "n_images_active": "BIGINT",
    "image_density": "DOUBLE",
    "mean": "FLOAT",
    "max": "FLOAT",
    "dead": "BOOLEAN",
}


@dataclass(frozen=True)
class Candidates:
    """Parallel arrays: latent i fired with `value` at `token` of `image`."""

    latent: NDArray[np.int64]
    value: NDArray[np.float32]
    image: NDArray[np.int64]
    token: NDArray[np.int64]

    def take(self, chosen: NDArray[Any]) -> "Candidates":
        return Candidates(self.latent[chosen], self.value[chosen], self.image[chosen], self.token[chosen])

    def join(self, other: "Candidates") -> "Candidates":
        pairs = ((getattr(self, name), getattr(other, name)) for name in ("latent", "value", "image", "token"))
        return Candidates(*(np.concatenate(pair) for pair in pairs))

    def ordered(self) -> "Candidates":
        """By latent, then strongest first, then earlier image, then earlier token."""
        return self.take(np.lexsort((self.token, self.image, -self.value, self.latent)))


class TopK:
    """The k strongest candidates of every latent seen so far. `flush()` before reading `best`."""

    def __init__(self, *, d_sae: int, k: int, one_per_image: bool) -> None:
        self.k, self.one_per_image = k, one_per_image
        none = np.zeros(0, dtype=np.int64)
        self.best = Candidates(none, np.zeros(0, dtype=np.float32), none, none)
        self._waiting: list[Candidates] = []
        self._n_waiting = 0
        self._floor = np.full(d_sae, -np.inf, dtype=np.float32)  # the k-th best value of each latent, once it has k

    def update(self, new: Candidates) -> None:
        """`new` must come from images not seen before, later than all that were: so a tie with the k-th best loses."""
        new = new.take(new.value > self._floor[new.latent])
        self._waiting.append(new)
        self._n_waiting += len(new.latent)
        if self._n_waiting > max(len(self.best.latent), 100_000):  # sorting is paid for by as many new candidates
            self.flush()

    def flush(self) -> None:
        best = self.best
        for new in self._waiting:
            best = best.join(new)
        best = best.ordered()
        if self.one_per_image:
            best = best.take(first_of_each_image(best)).ordered()
        self.best = best.take(rank_in_run(best.latent) < self.k)
        full = rank_in_run(self.best.latent) == self.k - 1
        self._floor[self.best.latent[full]] = self.best.value[full]
        self._waiting, self._n_waiting = [], 0

    def columns(self) -> dict[str, NDArray[Any]]:
        self.flush()
        best = self.best
        ranks = rank_in_run(best.latent)
        return {"latent": best.latent, "rank": ranks, "image": best.image, "token": best.token, "value": best.value}


def first_of_each_image(ordered: Candidates) -> NDArray[np.int64]:
    """Places of the strongest candidate of each (latent, image). `ordered` as by Candidates.ordered."""
    by_image = np.lexsort((ordered.image, ordered.latent))  # stable: the strongest stays first within an image
    latent, image = ordered.latent[by_image], ordered.image[by_image]
    first = np.ones(len(by_image), dtype=bool)
    first[1:] = (latent[1:] != latent[:-1]) | (image[1:] != image[:-1])
    return by_image[first]


def rank_in_run(keys: NDArray[np.int64]) -> NDArray[np.int64]:
    """[4 4 4 7 9 9] -> [0 1 2 0 0 1]: the place of each element in its run of equal keys."""
    starts = np.ones(len(keys), dtype=bool)
    starts[1:] = keys[1:] != keys[:-1]
    at = np.arange(len(keys))
    return at - np.maximum.accumulate(np.where(starts, at, 0))


class Tally:
    """Counts, sums, maxima and histograms of every latent."""

    def __init__(self, d_sae: int) -> None:
        self.d_sae = d_sae
        self.n_tokens = np.zeros(d_sae, dtype=np.int64)
        self.n_images = np.zeros(d_sae, dtype=np.int64)
        self.sum = np.zeros(d_sae)
        self.max = np.zeros(d_sae, dtype=np.float32)
        self.histogram = np.zeros((d_sae, len(EDGES) - 1), dtype=np.int64)

    def update(self, seen: Candidates) -> None:
        self.n_tokens += np.bincount(seen.latent, minlength=self.d_sae)
        self.sum += np.bincount(seen.latent, weights=seen.value, minlength=self.d_sae)
        np.maximum.at(self.max, seen.latent, seen.value)
        # One count per (image, latent), however many of the image's tokens fire.
        pairs = np.unique(seen.image * self.d_sae + seen.latent)
        self.n_images += np.bincount(pairs % self.d_sae, minlength=self.d_sae)
        bins = np.clip(np.digitize(np.log10(seen.value), EDGES) - 1, 0, len(EDGES) - 2)
        flat = np.bincount(seen.latent * (len(EDGES) - 1) + bins, minlength=self.histogram.size)
        self.histogram += flat.reshape(self.histogram.shape)

    def columns(self, n_rows: int, n_images: int) -> dict[str, NDArray[Any]]:
        return {
            "latent": np.arange(self.d_sae),
            "n_tokens_active": self.n_tokens,
            "density": self.n_tokens / n_rows,
            "n_images_active": self.n_images,
            "image_density": self.n_images / n_images,
            "mean": np.divide(self.sum, self.n_tokens, out=np.zeros(self.d_sae), where=self.n_tokens > 0),
            "max": self.max,
            "dead": self.n_tokens == 0,
        }


class Index:
    """An index on disk. `Index.open(path)`; `.latents`, `.top_images`, `.top_patches` are columns of numpy arrays."""

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.path, self.manifest = path, manifest

    @classmethod
    def open(cls, path: str | Path) -> Self:
        path = Path(path)
        manifest = read_json(path / "manifest.json", "index manifest")
        if manifest.get("format") != FORMAT or manifest.get("version") != VERSION:
            raise ValueError(f"{path} is not a {FORMAT} of version {VERSION}.")
        return cls(path, manifest)

    @cached_property
    def latents(self) -> Columns:
        return read_table(self.path / "latents.parquet", order_by="latent")

    def top_images(self, latent: int) -> Columns:
        """`rank`, `image` (row of the store), `token` and `value` of the images with the strongest tokens."""
        return self._top("images", latent)

    def top_patches(self, latent: int) -> Columns:
        return self._top("patches", latent)

    def histograms(self) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        stored = read_tensors(self.path / "histograms.safetensors", "histograms")
        return stored["counts"].numpy(), stored["edges"].numpy()

    def _top(self, table: str, latent: int) -> Columns:
        if not 0 <= latent < self.manifest["d_sae"]:
            raise IndexError(f"latent must be in 0..{self.manifest['d_sae'] - 1}, got {latent}.")
        rows = self._tops[table]
        start, stop = np.searchsorted(rows["latent"], [latent, latent + 1])
        return {name: values[start:stop] for name, values in rows.items()}

    @cached_property
    def _tops(self) -> dict[str, Columns]:
        """Both tables whole: k rows a latent are little, and a page asks for many latents."""
        order = "latent, rank"
        return {name: read_table(self.path / f"{name}.parquet", order_by=order) for name in ("images", "patches")}


def build_index(codes: CodeStore, out: str | Path, *, k: int = 16, progress: Progress = SILENT) -> Index:
    """Index every latent of `codes`. An index of the same codes that is already there is returned as it is."""
    out = Path(out)
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}.")
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "codes": str(codes.path.resolve()),  # where they lay; what they are is the digest
        "codes_digest": codes.manifest.digest,
        "k": k,
        "d_sae": codes.d_sae,
        "n_images": codes.n_images,
        "n_tokens": codes.n_tokens,
    }
    if (out / "manifest.json").exists():
        found = Index.open(out)
        if all(found.manifest.get(key) == value for key, value in manifest.items() if key != "codes"):
            return found
        raise ValueError(f"{out} holds an index of other codes or another k. Choose another folder, or delete it.")
    images = TopK(d_sae=codes.d_sae, k=k, one_per_image=True)
    patches = TopK(d_sae=codes.d_sae, k=k, one_per_image=False)
    tally = Tally(codes.d_sae)
    with progress.task("index", codes.n_images, "images") as task:
        for first, shard in codes.shards():
            for seen, n_images in candidates(shard, first, codes.n_tokens):
                tally.update(seen)
                images.update(seen)
                patches.update(seen.take(is_patch(seen, codes)))
                task.advance(n_images)
    n_rows = codes.n_images * codes.n_tokens
    write_table(out / "latents.parquet", tally.columns(n_rows, codes.n_images), LATENT_TYPES)
    write_table(out / "images.parquet", images.columns(), TOP_TYPES)
    write_table(out / "patches.parquet", patches.columns(), TOP_TYPES)
    histograms = {"counts": torch.from_numpy(tally.histogram), "edges": torch.from_numpy(EDGES)}
    write_tensors(out / "histograms.safetensors", histograms)
    write_json(out / "manifest.json", manifest)  # last: an index with a manifest is whole
    return Index.open(out)


def candidates(
    codes: Codes, first_image: int, n_tokens: int, *, n_images: int = 64
) -> Iterator[tuple[Candidates, int]]:
    """(candidates, number of images) of runs of `n_images` images: what bounds the index's memory."""
    total = codes.n // n_tokens
    for start in range(0, total, n_images):
        stop = min(start + n_images, total)
        offsets = codes.offsets[start * n_tokens : stop * n_tokens + 1].numpy()
        a, b = int(offsets[0]), int(offsets[-1])
        rows = np.repeat(np.arange(start * n_tokens, stop * n_tokens), np.diff(offsets))
        seen = Candidates(
            latent=codes.indices[a:b].numpy(),
            value=codes.values[a:b].numpy(),
            image=first_image + rows // n_tokens,
            token=rows % n_tokens,
        )
        yield seen, stop - start


def is_patch(seen: Candidates, codes: CodeStore) -> NDArray[np.bool_]:
    """Which candidates lie on a patch: of codes over all tokens, CLS and registers do not."""
    if codes.manifest.tokens == "all" and codes.n_tokens == codes.manifest.grid.n_tokens:
        return seen.token >= codes.manifest.grid.n_special
    return np.ones(len(seen.token), dtype=bool)
