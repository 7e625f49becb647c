"""Rows whose dictionary is known: sparse codes over planted directions, for millions of rows without an image.

    x = z @ directions + bias + noise,   z_i = m_i where concept i is present, else 0

The ground on which a coder can be asked whether it found the *right* directions (vitrail.metrics.dictionary), made as
hard as wanted by dials:

    l0             concepts present per row, on average, before the hierarchy's parents are brought along
    skew           concept i's frequency falls as (i + 1)^-skew within its kind; 0: all alike
    correlation    0..1: presences within groups of `group_size` share a Gaussian factor of this weight (a copula)
    hierarchy      0..1: the chance that a concept present brings its group's first, its parent, along. 1: a child never
                   comes without its parent, where absorption is seen (Chanin et al. 2024, arXiv:2409.14507)
    spread         of a present concept's size m, which is log-normal with median 1
    noise          standard deviation per dimension, in units of a present concept's norm over sqrt(d_in)

Batch b of epoch e is a function of (seed, e, b) alone.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vitrail.files import json_digest
from vitrail.statistics import ActivationStats

STATS_ROWS = 16_384


@dataclass(frozen=True)
class Planted:
    """The dials. `d_in` dimensions, `n_concepts` unit directions drawn from `seed`."""

    d_in: int
    n_concepts: int
    l0: float = 8.0
    skew: float = 0.0
    correlation: float = 0.0
    hierarchy: float = 0.0
    group_size: int = 4
    spread: float = 0.25
    noise: float = 0.05
    seed: int = 0

    def __post_init__(self) -> None:
        if self.d_in < 1 or self.n_concepts < 1 or self.group_size < 1:
            raise ValueError(
                f"d_in, n_concepts and group_size must be at least 1, got {self.d_in}, {self.n_concepts} and "
                f"{self.group_size}."
            )
        if not 0 < self.l0 <= self.n_concepts / 2:
            raise ValueError(f"l0 must be above 0 and at most half of n_concepts={self.n_concepts}, got {self.l0}.")
        for name in ("correlation", "hierarchy"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in 0..1, got {getattr(self, name)}.")
        for name in ("skew", "spread", "noise"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}.")

    @property
    def directions(self) -> Float[Tensor, "n_concepts d_in"]:
        """Unit rows; random, so nearly orthogonal only where d_in is large."""
        drawn = torch.randn(self.n_concepts, self.d_in, generator=torch.Generator().manual_seed(self.seed))
        return drawn / torch.linalg.vector_norm(drawn, dim=1, keepdim=True)

    @property
    def groups(self) -> Int[Tensor, " n_concepts"]:
        """Which group a concept is of; its parent is the group's first."""
        return torch.arange(self.n_concepts) // self.group_size

    @property
    def parents(self) -> Bool[Tensor, " n_concepts"]:
        return torch.arange(self.n_concepts) % self.group_size == 0

    @property
    def frequencies(self) -> Float[Tensor, " n_concepts"]:
        """How often each concept is present by itself. They sum to `l0`; none is above 1/2."""
        weights = torch.arange(1, self.n_concepts + 1, dtype=torch.float64) ** -self.skew
        low, high = 0.0, 0.5 / float(weights.min())
        for _ in range(100):  # the factor at which the capped frequencies sum to l0
            middle = (low + high) / 2
            if float((weights * middle).clamp_max(0.5).sum()) < self.l0:
                low = middle
            else:
                high = middle
        return (weights * high).clamp_max(0.5).float()

    def draw(
        self, n_rows: int, generator: torch.Generator
    ) -> tuple[Float[Tensor, "n d_in"], Float[Tensor, "n n_concepts"]]:
        """(rows, codes)."""
        shape = (n_rows, self.n_concepts)
        own = torch.randn(shape, generator=generator)
        if self.correlation:
            n_groups = int(self.groups.max()) + 1
            of_group = torch.randn(n_rows, n_groups, generator=generator)[:, self.groups]
            own = self.correlation**0.5 * of_group + (1 - self.correlation) ** 0.5 * own
        present = own > torch.special.ndtri(1 - self.frequencies.double()).float()
        if self.hierarchy:
            brings = present & (torch.rand(shape, generator=generator) < self.hierarchy)
            n_groups = int(self.groups.max()) + 1
            called = torch.zeros(n_rows, n_groups).index_add_(1, self.groups, brings.float()) > 0
            present[:, self.parents] |= called
        size = torch.exp(self.spread * torch.randn(shape, generator=generator))
        z = size * present
        x = z @ self.directions
        return x + self.noise / self.d_in**0.5 * torch.randn(x.shape, generator=generator), z


class PlantedSource:
    """A training source of `n_rows` planted rows per epoch, other rows in each epoch."""

    def __init__(self, planted: Planted, *, n_rows: int, batch_size: int, seed: int = 0) -> None:
        if n_rows < 1 or batch_size < 1:
            raise ValueError(f"n_rows and batch_size must be at least 1, got {n_rows} and {batch_size}.")
        self.planted, self.n_rows, self.batch_size, self.seed = planted, n_rows, batch_size, seed
        self.d_in = planted.d_in
        self.identity = json_digest(
            {"planted": asdict(planted), "n_rows": n_rows, "batch_size": batch_size, "seed": seed}
        )
        self.stats = ActivationStats.of(planted.draw(STATS_ROWS, self._generator(-1, 0))[0])
        self._epoch, self._batch = 0, 0

    def __iter__(self) -> Iterator[Float[Tensor, "n d_in"]]:
        epoch, n_batches = self._epoch, -(-self.n_rows // self.batch_size)
        while self._batch < n_batches:
            batch, self._batch = self._batch, self._batch + 1
            if self._batch == n_batches:  # before the yield: the state after the last batch is the next epoch's start
                self._epoch, self._batch = epoch + 1, 0
            n = min(self.batch_size, self.n_rows - batch * self.batch_size)
            yield self.planted.draw(n, self._generator(epoch, batch))[0]
            if self._epoch > epoch:
                return

    def held_out(self, n_rows: int) -> tuple[Float[Tensor, "n d_in"], Float[Tensor, "n n_concepts"]]:
        """(rows, codes) that no epoch gives."""
        return self.planted.draw(n_rows, self._generator(-2, 0))

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self._epoch, "batch": self._batch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._epoch, self._batch = state["epoch"], state["batch"]

    def _generator(self, epoch: int, batch: int) -> torch.Generator:
        digest = json_digest({"planted": self.planted.seed, "seed": self.seed, "epoch": epoch, "batch": batch})
        return torch.Generator().manual_seed(int(digest[:15], 16))
