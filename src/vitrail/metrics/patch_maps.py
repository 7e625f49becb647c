"""From the rows of whole images to maps over patches: which entries of the codes belong to which map."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, Int64

from vitrail.metrics.lattice import Lattice, Pairs
from vitrail.metrics.passing import Seen, Setting

CELLS_AT_ONCE = 1 << 22  # of dense maps, if they were laid out


@dataclass(frozen=True, eq=False)
class Group:
    """Entries of a few images' patches."""

    first: int  # image's number in the pass
    n_maps: int
    map: Int64[np.ndarray, " nnz"]
    latent: Int64[np.ndarray, " nnz"]
    patch: Int64[np.ndarray, " nnz"]
    value: Float64[np.ndarray, " nnz"]

    def laid_out(self, pairs: Pairs, maps: "PatchMaps", d_sae: int) -> Float64[np.ndarray, "m p"]:
        number = np.full(self.n_maps * d_sae, -1)
        number[pairs.map * d_sae + pairs.latent] = np.arange(len(pairs))
        of_entry = number[self.map * d_sae + self.latent]
        kept = of_entry >= 0
        dense = np.zeros((len(pairs), maps.n_patches))
        dense[of_entry[kept], self.patch[kept]] = self.value[kept]
        return dense


@dataclass(frozen=True)
class PatchMaps:
    """Where an image's maps lie among its rows."""

    shape: tuple[int, ...]
    patches: slice
    n_tokens: int
    frames: int
    d_sae: int

    @classmethod
    def of(cls, setting: Setting, frames: int, through_time: bool) -> "PatchMaps | None":
        """None where the coder does not see all patches. Raises ValueError if they are not those of the frames."""
        patches, grid = setting.patches, setting.grid
        if frames < 1:
            raise ValueError(f"frames must be at least 1, got {frames}.")
        if patches is None:
            return None
        n = patches.stop - patches.start
        if n != frames * grid.n_patches:
            if frames == 1:
                return None
            raise ValueError(f"{frames} frames of {grid.height} x {grid.width} patches are not {n} patches.")
        plane = (grid.height, grid.width)
        return cls((frames, *plane) if through_time else plane, patches, setting.n_tokens, frames, setting.d_sae)

    def lattice(self, neighbours: str) -> Lattice:
        return Lattice(self.shape, neighbours)

    @property
    def n_patches(self) -> int:
        """Of a map."""
        return math.prod(self.shape)

    @property
    def maps_an_image(self) -> int:
        return (self.patches.stop - self.patches.start) // self.n_patches

    def groups(self, seen: Seen, first: int, every: int | None) -> Iterator[Group]:
        """`first`: the number of the first image. No group reaches over a multiple of `every`."""
        codes = seen.codes.detach()
        offsets = codes.offsets.cpu().numpy()
        latents = codes.indices.cpu().long().numpy()
        values = codes.values.cpu().double().numpy()
        l0 = np.diff(offsets)
        n_tokens, n_patches, n_maps = self.n_tokens, self.n_patches, self.maps_an_image
        # Of an image's rows: which are patches, of which map, and where in it.
        token = np.arange(n_tokens) - self.patches.start
        shown = (token >= 0) & (token < n_maps * n_patches)
        map_of, patch_of = np.divmod(token, n_patches)
        at_once = max(1, CELLS_AT_ONCE // (self.d_sae * n_patches * n_maps))
        start = 0
        while start < seen.n_images:
            room = at_once if every is None else min(at_once, every - (first + start) % every)
            stop = min(seen.n_images, start + room)
            rows, n = slice(start * n_tokens, stop * n_tokens), stop - start
            low, high = offsets[rows.start], offsets[rows.stop]
            patch = np.repeat(np.tile(patch_of, n), l0[rows])
            number = (np.arange(n)[:, None] * n_maps + map_of).ravel()
            maps = np.repeat(number, l0[rows]) if n * n_maps > 1 else np.zeros(1, dtype=np.int64)
            latent, value = latents[low:high], values[low:high]
            if not shown.all():
                kept = np.repeat(np.tile(shown, n), l0[rows])
                patch, latent, value = patch[kept], latent[kept], value[kept]
                maps = maps[kept] if len(maps) > 1 else maps
            yield Group(first + start, n * n_maps, np.broadcast_to(maps, latent.shape), latent, patch, value)
            start = stop
