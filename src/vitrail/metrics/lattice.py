"""Moran's I of maps over a lattice of patches: dense, and of sparse codes from their entries alone.

    I = (n / W) sum_ij w_ij (x_i - m)(x_j - m) / sum_i (x_i - m)^2,    w_ij = 1 for neighbours, W = sum_ij w_ij

With d_i the neighbours of patch i and v the population variance, the numerator has three terms, none of which a zero
adds anything to:

    I = (sum_ij w_ij x_i x_j - 2 m sum_i d_i x_i + m^2 W) / (W v)

so that a map costs what fires in it: each entry is laid into a padded table, and looks at half of its neighbours.
Moran 1950; ViSAEBench Eq. 2.
"""

import itertools
import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

STEPS = ("queen", "rook")  # queen: corners touch as well
NEARLY_CONSTANT = 1e-6  # of the squared mean: below it the variance is taken about the mean, not from sums


@dataclass(frozen=True)
class Lattice:
    """(height, width) or (time, height, width) patches, row by row. Raises ValueError if none has a neighbour."""

    shape: tuple[int, ...]
    neighbours: str = "queen"

    def __post_init__(self) -> None:
        if self.neighbours not in STEPS:
            raise ValueError(f"neighbours must be 'queen' or 'rook', got {self.neighbours!r}.")
        if min(self.shape) < 1 or self.n < 2:
            raise ValueError(f"Moran's I needs at least two patches, got a lattice of {self.shape}.")

    @cached_property
    def n(self) -> int:
        return math.prod(self.shape)

    @property
    def null_mean(self) -> float:
        """Of I over all permutations of any map."""
        return -1 / (self.n - 1)

    @cached_property
    def steps(self) -> list[tuple[int, ...]]:
        """Half of the directions in which a neighbour lies: the other half leads back."""
        steps = [step for step in itertools.product((-1, 0, 1), repeat=len(self.shape)) if step > (0,) * len(step)]
        return [step for step in steps if self.neighbours == "queen" or sum(map(abs, step)) == 1]

    @cached_property
    def weight(self) -> int:
        """W: ordered pairs of neighbours."""
        pairs = (math.prod(s - abs(d) for s, d in zip(self.shape, step, strict=True)) for step in self.steps)
        return 2 * sum(pairs)

    @cached_property
    def degrees(self) -> Float64[np.ndarray, " n"]:
        degrees = np.zeros(self.shape)
        for step in self.steps:
            for ends in self._ends(step):
                degrees[ends] += 1
        return degrees.ravel()

    def _ends(self, step: tuple[int, ...]) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
        """Where pairs of neighbours start, and where they end."""
        here = {-1: slice(1, None), 0: slice(None), 1: slice(None, -1)}
        return tuple(here[d] for d in step), tuple(here[-d] for d in step)

    # One patch more at the end of each axis: a step over a border ends there, or in the one before.

    @property
    def _padded(self) -> tuple[int, ...]:
        return tuple(side + 1 for side in self.shape)

    @cached_property
    def block(self) -> int:
        """Cells of a map's padded table."""
        return math.prod(self._padded)

    @cached_property
    def places(self) -> Int64[np.ndarray, " n"]:
        """The cell of each patch."""
        return np.arange(self.block).reshape(self._padded)[tuple(slice(side) for side in self.shape)].ravel()

    @cached_property
    def strides(self) -> list[int]:
        """The steps, in cells."""
        of_axis = [math.prod(self._padded[axis + 1 :]) for axis in range(len(self.shape))]
        return [sum(d * stride for d, stride in zip(step, of_axis, strict=True)) for step in self.steps]


def morans_i(maps: Float[Tensor, "*m p"], lattice: Lattice) -> Float[Tensor, "*m"]:
    """Of dense maps, in fp64. NaN where a map is constant."""
    if maps.shape[-1] != lattice.n:
        raise ValueError(f"a lattice of {lattice.shape} has {lattice.n} patches; these maps have {maps.shape[-1]}.")
    x = maps.double()
    x = x - x.mean(-1, keepdim=True)
    square = x.square().sum(-1)
    # What rounding leaves of a constant map is no variance.
    constant = square <= 1e-30 * maps.double().square().sum(-1)
    x = x.unflatten(-1, lattice.shape)
    axes = tuple(range(-len(lattice.shape), 0))
    together = torch.zeros_like(square)
    for step in lattice.steps:
        start, end = lattice._ends(step)
        together += (x[(..., *start)] * x[(..., *end)]).sum(axes)
    found = 2 * lattice.n / lattice.weight * together / square
    return found.masked_fill(constant, torch.nan)


@dataclass(frozen=True, eq=False)
class Pairs:
    """(map, latent) pairs of a batch, by map and then by latent."""

    map: Int64[np.ndarray, " m"]
    latent: Int64[np.ndarray, " m"]
    active: Int64[np.ndarray, " m"]  # patches
    mass: Float64[np.ndarray, " m"]  # sum of activations
    variance: Float64[np.ndarray, " m"]  # population
    moran: Float64[np.ndarray, " m"]

    def __len__(self) -> int:
        return len(self.map)

    def where(self, kept: np.ndarray) -> "Pairs":
        """`kept`: marks, or places."""
        return Pairs(**{name: values[kept] for name, values in vars(self).items()})


class SparseMorans:
    """Keeps its table between calls, all zeros: only what was written is wiped."""

    def __init__(self, lattice: Lattice) -> None:
        self.lattice = lattice
        self._table = np.zeros(0)

    def __call__(
        self,
        maps: Int64[np.ndarray, " nnz"],
        latents: Int64[np.ndarray, " nnz"],
        patches: Int64[np.ndarray, " nnz"],
        values: Float64[np.ndarray, " nnz"],
        *,
        n_maps: int,
        d_sae: int,
        min_active: int = 1,
        max_active: int | None = None,
    ) -> Pairs:
        """Of the pairs with so many active patches; those of variance 0 have an I of NaN or infinity."""
        lattice = self.lattice
        cells = maps * d_sae + latents if n_maps > 1 else latents
        active = np.bincount(cells, minlength=n_maps * d_sae)
        asked = active >= min_active if max_active is None else (active >= min_active) & (active <= max_active)
        pairs = np.flatnonzero(asked)
        number = np.full(len(active), -1)
        number[pairs] = np.arange(len(pairs))
        of_entry = number.take(cells)
        if int(active[pairs].sum()) < len(cells):
            kept = np.flatnonzero(of_entry >= 0)
            of_entry, patches, values = of_entry.take(kept), patches.take(kept), values.take(kept)
        at = lattice.places.take(patches)
        at += of_entry * lattice.block
        table = self._room_for(len(pairs))
        table[at] = values
        near, ahead = table[lattice.strides[0] :].take(at), np.empty(len(at))
        for stride in lattice.strides[1:]:
            near += table[stride:].take(at, out=ahead, mode="clip")  # none lies outside; the check would copy

        # Of no pairs at all bincount gives integers.
        mass = np.bincount(of_entry, values, len(pairs)).astype(np.float64, copy=False)
        mean, square = mass / lattice.n, np.bincount(of_entry, values * values, len(pairs)) / lattice.n
        variance = square - mean * mean
        # x_i (half of what it touches - m d_i), in one sum
        near -= mean.take(of_entry) * lattice.degrees.take(patches)
        together = 2 * np.bincount(of_entry, values * near, len(pairs)) + mean * mean * lattice.weight
        with np.errstate(divide="ignore", invalid="ignore"):
            moran = together / (lattice.weight * variance)
        flat = np.flatnonzero(variance < NEARLY_CONSTANT * square)  # cancellation
        if len(flat):
            dense = table[(flat * lattice.block)[:, None] + lattice.places]
            variance[flat], moran[flat] = dense.var(1), morans_i(torch.from_numpy(dense), lattice).numpy()
        table[at] = 0
        which, latent = np.divmod(pairs, d_sae)
        return Pairs(which, latent, active[pairs], mass, variance, moran)

    def _room_for(self, n_pairs: int) -> Float64[np.ndarray, " cells"]:
        needed = (n_pairs + 1) * self.lattice.block  # a step may end in the block after the last one
        if len(self._table) < needed:
            self._table = np.zeros(needed)
        return self._table
