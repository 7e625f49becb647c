"""Where training rows come from: the face a trainer sees, and rows held in memory behind it.

Store readers and streams have the same face (vitrail.store).
"""

from collections.abc import Iterator
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from vitrail.files import json_digest, tensors_digest
from vitrail.statistics import ActivationStats


@runtime_checkable
class Source(Protocol):
    """Batches of raw activations. An iterator gives what is left of the current epoch; a new one then begins the next.

    `state_dict` is the exact position after the batch last yielded, as JSON; a source that is given it back yields what
    would have followed. `identity` is a digest of what the rows are and in which order they come.
    """

    d_in: int
    stats: ActivationStats
    n_rows: int | None  # per epoch; None if unknown
    identity: str

    def __iter__(self) -> Iterator[Float[Tensor, "n d_in"]]: ...
    def state_dict(self) -> dict[str, int]: ...
    def load_state_dict(self, state: dict[str, int]) -> None: ...


class TensorSource:
    """Rows in memory, in another order each epoch (a function of seed and epoch alone)."""

    def __init__(
        self, x: Float[Tensor, "n d_in"], *, batch_size: int, seed: int = 0, stats: ActivationStats | None = None
    ) -> None:
        if len(x) == 0 or batch_size < 1:
            raise ValueError(f"needs at least one row and a batch_size of at least 1, got {len(x)} and {batch_size}.")
        self.x, self.batch_size, self.seed = x, batch_size, seed
        self.d_in, self.n_rows = x.shape[1], len(x)
        self.stats = ActivationStats.of(x) if stats is None else stats
        self.identity = json_digest({"rows": tensors_digest({"x": x}), "batch_size": batch_size, "seed": seed})
        self._epoch, self._next_row = 0, 0

    def __iter__(self) -> Iterator[Float[Tensor, "n d_in"]]:
        # The factor keeps (seed, epoch) apart from (seed + 1, epoch - 1).
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self._epoch)
        order = torch.randperm(len(self.x), generator=generator)
        while self._next_row < len(order):
            rows = order[self._next_row : self._next_row + self.batch_size]
            self._next_row += len(rows)
            last = self._next_row == len(order)
            if last:  # moved on before the yield, so that the state after the last batch is the next epoch's start
                self._epoch, self._next_row = self._epoch + 1, 0
            yield self.x[rows]
            if last:
                return

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self._epoch, "next_row": self._next_row}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._epoch, self._next_row = state["epoch"], state["next_row"]
