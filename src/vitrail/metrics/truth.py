"""What is there, picture by picture and patch by patch; what fired, in the same rows; and dials that spoil either.

    image label   the concept is in the picture: its mask has at least one pixel
    patch label   shown where coverage >= `coverage` (half the patch); not shown where coverage = 0; the patches in
                  between are left out of every count, for that concept alone

A world's classes become concepts too ("class:striped star"); their patches are those of "object". Rows are image-major,
as in stores and codes. Recovery.py compares the two. SPEC row 143.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Int, UInt8
from torch import Tensor

from vitrail.coders.sparse import Codes
from vitrail.codes import CodeStore
from vitrail.images.worlds.base import Scene, scene_coverage

Pool = Literal["max", "mean"]


@runtime_checkable
class Scenes(Protocol):
    """A world, or pictures with a table of factors."""

    concepts: tuple[str, ...]
    classes: tuple[str, ...]

    def scene(self, i: int) -> Scene: ...


@dataclass(frozen=True, eq=False)
class Truth:
    """Labels of n pictures. Patch labels are bits, eight concepts a byte; None where nothing is known of patches."""

    concepts: tuple[str, ...]
    images: Bool[np.ndarray, "n n_concepts"]
    grid: tuple[int, int] | None = None  # patches: rows, columns
    shown: UInt8[np.ndarray, "n_patches_in_all n_bytes"] | None = None
    unclear: UInt8[np.ndarray, "n_patches_in_all n_bytes"] | None = None

    @classmethod
    def of_world(
        cls,
        world: Scenes,
        positions: Sequence[int],
        *,
        grid: tuple[int, int] | None = None,
        coverage: float = 0.5,
        classes: bool = True,
    ) -> "Truth":
        """The truth about `world`'s pictures at `positions`, in that order: those of a store's image table.

        `grid`: rows and columns of patches, laid over the whole picture (a transform that crops would shift them); None
        leaves patches out. Raises ValueError if the picture's sides are no multiples of it.
        """
        if not 0 < coverage <= 1:
            raise ValueError(f"coverage must be above 0 and at most 1, a share of a patch, got {coverage}.")
        if len(positions) == 0:
            raise ValueError("positions is empty: give at least one picture.")
        concepts = (*world.concepts, *(f"class:{name}" for name in world.classes if classes))
        present = np.zeros((len(positions), len(concepts)), dtype=bool)
        shown, unclear = [], []
        for row, position in enumerate(positions):
            scene = world.scene(int(position))
            masks = dict(scene.masks)
            if classes and world.classes:
                name = f"class:{world.classes[scene.label]}"
                present[row, concepts.index(name)] = True
                masks |= {name: masks["object"]} if "object" in masks else {}
            for column, concept in enumerate(concepts):
                present[row, column] |= concept in masks and bool(masks[concept].any())
            if grid is not None:
                covered = scene_coverage(replace(scene, masks=masks), concepts, _patch_px(scene, grid)).numpy()
                covered = covered.reshape(len(concepts), -1).T
                shown.append(np.packbits(covered >= coverage, axis=1))
                unclear.append(np.packbits((covered > 0) & (covered < coverage), axis=1))
        if grid is None:
            return cls(concepts, present)
        return cls(concepts, present, grid, np.concatenate(shown), np.concatenate(unclear))

    @classmethod
    def of_concepts(cls, concepts: Sequence[str], present: Sequence[Sequence[str]]) -> "Truth":
        """Of pictures as wholes: `present[i]` are the concepts of picture i. Raises ValueError for one not listed."""
        place = {concept: column for column, concept in enumerate(concepts)}
        unknown = next((concept for those in present for concept in those if concept not in place), None)
        if unknown is not None:
            raise ValueError(f"{unknown!r} is in a picture but not among the {len(place)} concepts.")
        labels = np.zeros((len(present), len(place)), dtype=bool)
        for row, those in enumerate(present):
            labels[row, [place[concept] for concept in those]] = True
        return cls(tuple(concepts), labels)

    @property
    def n(self) -> int:
        return len(self.images)

    @property
    def n_patches(self) -> int:
        """Per picture; 0 where nothing is known of patches."""
        return 0 if self.grid is None else self.grid[0] * self.grid[1]

    @property
    def families(self) -> tuple[str, ...]:
        """The family of each concept: what stands before ":"."""
        return tuple(concept.partition(":")[0] for concept in self.concepts)

    def image_labels(self, concept: int) -> tuple[Bool[np.ndarray, " n"], None]:
        """Which pictures show it. All pictures count, hence None."""
        return self.images[:, concept], None

    def patch_labels(
        self, concept: int
    ) -> tuple[Bool[np.ndarray, " n_patches_in_all"], Bool[np.ndarray, " n_patches_in_all"] | None]:
        """Which patches show it, and which count at all (None: all do)."""
        if self.shown is None or self.unclear is None:
            raise ValueError("nothing is known of patches: make the truth with grid=(rows, columns).")
        unclear = _bit(self.unclear, concept)
        return _bit(self.shown, concept), ~unclear if unclear.any() else None

    def select(self, images: Int[np.ndarray, " m"]) -> "Truth":
        """These pictures, in this order."""
        rows = patch_rows(images, self.n_patches)
        shown, unclear = (None if bits is None else bits[rows] for bits in (self.shown, self.unclear))
        return replace(self, images=self.images[images], shown=shown, unclear=unclear)


@dataclass(frozen=True, eq=False)
class Firing:
    """How strongly each latent fired, per picture and (where rows are patches) per patch.

    `pool` of the patches of a picture is by default their maximum: a concept may fill two patches of 196, and a mean
    would measure its area. With "mean" it does.
    """

    images: Codes
    patches: Codes | None = None
    pool: Pool = "max"

    @classmethod
    def of_codes(cls, codes: Codes, n_tokens: int, patches: slice | None, *, pool: Pool = "max") -> "Firing":
        """`patches`: which of a picture's n_tokens rows are its patches; None: none is, and all rows are pooled."""
        if n_tokens < 1 or codes.n % n_tokens:
            raise ValueError(f"n_tokens must divide the {codes.n} rows of the codes, got {n_tokens}.")
        codes = codes.detach().to("cpu").with_row_terms(None, None)
        if patches is None:
            return cls(pooled(codes, n_tokens, pool), None, pool)
        kept = np.arange(n_tokens)[patches]
        if len(kept) < n_tokens:
            every = np.arange(0, codes.n, n_tokens)[:, None] + kept
            codes = codes.select_rows(torch.from_numpy(every.reshape(-1)))
        return cls(pooled(codes, len(kept), pool), codes, pool)

    @classmethod
    def of_store(cls, store: CodeStore, *, pool: Pool = "max") -> "Firing":
        """All codes of a store of them; CLS and registers are left out where there are patches."""
        grid, kind = store.manifest.grid, store.manifest.tokens
        patches = None
        if kind in ("all", "spatial"):
            patches = slice(None) if store.n_tokens == grid.n_patches else grid.tokens("spatial")
        parts = [cls.of_codes(codes, store.n_tokens, patches, pool=pool) for _, codes in store.shards() if codes.n]
        each = [part.patches for part in parts if part.patches is not None]
        return cls(Codes.cat([part.images for part in parts]), Codes.cat(each) if each else None, pool)

    @property
    def n(self) -> int:
        return self.images.n

    @property
    def d_sae(self) -> int:
        return self.images.d_sae

    def frequency_order(self) -> Int[np.ndarray, " d_sae"]:
        """Latents by the number of pictures they fire in, the rarest first."""
        return np.argsort(self.images.fired().numpy(), kind="stable")

    def select(self, images: Int[np.ndarray, " m"]) -> "Firing":
        """These pictures, in this order."""
        patches = self.patches
        if patches is not None:
            patches = patches.select_rows(torch.from_numpy(patch_rows(images, patches.n // self.n)))
        return Firing(self.images.select_rows(torch.from_numpy(np.asarray(images))), patches, self.pool)


def pooled(codes: Codes, n_tokens: int, pool: Pool) -> Codes:
    """One row per picture: of each latent the maximum, or the mean, over the picture's rows."""
    if pool not in ("max", "mean"):
        raise ValueError(f"pool must be 'max' or 'mean', got {pool!r}.")
    if n_tokens == 1:
        return codes
    return _summed(
        codes.rows() // n_tokens, codes.indices, codes.values, codes.n // n_tokens, codes.d_sae, pool, n_tokens
    )


def patch_rows(images: Int[np.ndarray, " m"], n_patches: int) -> Int[np.ndarray, " rows"]:
    return (np.asarray(images)[:, None] * n_patches + np.arange(n_patches)).reshape(-1)


# -- dials for calibration: 0 leaves everything as it is


def shuffled(truth: Truth, share: float, *, seed: int = 0) -> Truth:
    """The labels of `share` of the pictures change places among themselves, patches with them."""
    _check_share("share", share, 1.0)
    rng = np.random.default_rng(seed)
    # One order for every share: what is shuffled at 0.2 is shuffled at 0.4 as well.
    moved = rng.permutation(truth.n)[: round(share * truth.n)]
    order = np.arange(truth.n)
    order[moved] = rng.permutation(moved)
    return truth.select(order)


def displaced(truth: Truth, rows: int, columns: int = 0) -> Truth:
    """Patch labels moved by whole patches; what leaves on one side comes in on the other, so counts stay."""
    if truth.grid is None or truth.shown is None or truth.unclear is None:
        raise ValueError("nothing is known of patches: make the truth with grid=(rows, columns).")

    shape = (truth.n, *truth.grid, -1)

    def moved(bits: np.ndarray) -> np.ndarray:
        maps = bits.reshape(shape)
        return np.roll(maps, (rows, columns), axis=(1, 2)).reshape(bits.shape)

    return replace(truth, shown=moved(truth.shown), unclear=moved(truth.unclear))


def mixed(firing: Firing, dial: float, *, order: Int[np.ndarray, " d_sae"] | None = None, seed: int = 0) -> Firing:
    """Latents are paired, and each takes `dial` of its partner: z_i <- (1 - dial) z_i + dial z_j.

    At 0.5 the two of a pair are one. With an odd number of latents one stays as it is. `order`: neighbours in it are
    paired; None: at random. Where many latents hardly ever fire, most random partners change nothing: pair by
    `firing.frequency_order()` then, of one split for all.
    """
    _check_share("dial", dial, 0.5)
    if dial == 0:
        return firing
    if order is None:
        order = np.random.default_rng(seed).permutation(firing.d_sae)
    partner = np.arange(firing.d_sae)
    one, other = (order[start : firing.d_sae // 2 * 2 : 2] for start in (0, 1))
    partner[one], partner[other] = other, one
    to = torch.from_numpy(partner)

    def blend(codes: Codes) -> Codes:
        rows, own = codes.rows(), codes.indices.long()
        values = torch.cat([codes.values * (1 - dial), codes.values * dial])
        return _summed(rows.repeat(2), torch.cat([own, to[own]]), values, codes.n, codes.d_sae, "sum", 1)

    if firing.patches is None:
        return replace(firing, images=blend(firing.images))
    patches = blend(firing.patches)
    return Firing(pooled(patches, patches.n // firing.n, firing.pool), patches, firing.pool)


# -- helpers


def _check_share(name: str, value: float, most: float) -> None:
    if not 0 <= value <= most:
        raise ValueError(f"{name} must be in 0..{most:g}, got {value}.")


def _bit(bits: UInt8[np.ndarray, "n n_bytes"], column: int) -> Bool[np.ndarray, " n"]:
    return (bits[:, column // 8] >> (7 - column % 8) & 1).astype(bool)


def _patch_px(scene: Scene, grid: tuple[int, int]) -> int:
    height, width, _ = scene.image.shape
    rows, columns = grid
    if min(grid) < 1 or height % rows or width % columns or height // rows != width // columns:
        raise ValueError(
            f"a grid of {rows} x {columns} does not cut a picture of {height} x {width} pixels into square patches. "
            "Render the world at a size (image_px) that is a multiple of the grid."
        )
    return height // rows


def _summed(
    rows: Int[Tensor, " m"], latents: Int[Tensor, " m"], values: Tensor, n: int, d_sae: int, how: str, divisor: int
) -> Codes:
    """Entries of one (row, latent) put together: their maximum, mean or sum."""
    pairs, at = torch.unique(rows.long() * d_sae + latents.long(), return_inverse=True)  # sorted
    joined = values.new_zeros(len(pairs))
    if how == "max":
        joined = joined.scatter_reduce(0, at, values, "amax", include_self=False)
    else:
        joined = joined.index_add(0, at, values)
    if how == "mean":
        joined = joined / divisor
    return Codes.from_entries(pairs // d_sae, pairs % d_sae, joined, n=n, d_sae=d_sae)
