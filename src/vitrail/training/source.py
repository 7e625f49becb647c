"""Where training rows come from: the face a trainer sees; rows held in memory, and mixtures of sources, behind it.

Store readers and streams have the same face (vitrail.store).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from math import floor
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from vitrail.files import json_digest, tensors_digest
from vitrail.statistics import ActivationStats
from vitrail.training.draws import generator

STATS_ROWS = 4096  # of each source of a mixture, for the norm about their common mean


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
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def first_rows(source: Source, n_rows: int) -> Iterator[Float[Tensor, "_ d_in"]]:
    """Whole batches from where the source stands, until n_rows or as many as an epoch has."""
    wanted = n_rows if source.n_rows is None else min(n_rows, source.n_rows)
    seen, seen_before = 0, -1
    while seen_before < seen < wanted:
        seen_before = seen
        for x in source:
            yield x
            seen += len(x)
            if seen >= wanted:
                return


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


class MixedSource:
    """Rows of several sources in fixed shares, mixed within each batch: images and captions, say.

    {name: (source, weight)}; shares are weights divided by their sum. After any batch each source has given its share
    of all rows so far to within less than one row: what a batch cannot give in whole rows is owed to the next. Sources
    that end begin again, so an epoch, as many rows as the sources have together in whole batches, may hold rows of a
    small source twice and lack some of a large one. Rows come as the sources give them: nothing is normalised.
    """

    def __init__(self, sources: Mapping[str, tuple[Source, float]], *, batch_size: int, seed: int = 0) -> None:
        if not sources or batch_size < 1:
            raise ValueError(f"needs sources and a batch_size of at least 1, got {len(sources)} and {batch_size}.")
        widths = {name: source.d_in for name, (source, _) in sources.items()}
        if len({*widths.values()}) > 1:
            raise ValueError(f"sources of different widths cannot be mixed: d_in is {widths}.")
        if len({id(source) for source, _ in sources.values()}) < len(sources):
            raise ValueError("one source under two names would give its rows to either: give each name its own.")
        for name, (_, weight) in sources.items():
            if not 0 < weight < float("inf"):
                raise ValueError(f"the weight of {name} must be positive, got {weight}.")
        self.sources = {name: source for name, (source, _) in sources.items()}
        # By way of its digits: 0.1 is a tenth.
        weights = {name: Fraction(str(float(weight))) for name, (_, weight) in sources.items()}
        self.shares = {name: weight / sum(weights.values()) for name, weight in weights.items()}
        for name, share in self.shares.items():
            if share * batch_size < 1:
                raise ValueError(
                    f"{name} has less than one row in a batch of {batch_size}: its share is {float(share):.3g}. "
                    f"Take larger batches or give it more weight."
                )
        self.batch_size, self.seed, self.d_in = batch_size, seed, next(iter(widths.values()))
        self._given = dict.fromkeys(self.sources, 0)
        self._places = {name: _Place(source.state_dict(), 0) for name, source in self.sources.items()}
        counts = [source.n_rows for source in self.sources.values()]
        known = [count for count in counts if count is not None]
        self._batches_per_epoch = max(1, sum(known) // batch_size) if len(known) == len(counts) else None
        self.n_rows: int | None = None if self._batches_per_epoch is None else self._batches_per_epoch * batch_size
        self.stats = self._merged_stats()
        parts = [[name, source.identity, str(self.shares[name])] for name, source in self.sources.items()]
        self.identity = json_digest({"mixture": parts, "batch_size": batch_size, "seed": seed})

    def __iter__(self) -> Iterator[Float[Tensor, "n d_in"]]:
        readers = {name: _Reader(self.sources[name], place) for name, place in self._places.items()}
        try:
            while True:
                number = sum(self._given.values()) // self.batch_size
                counts = apportioned(self.shares, self._given, self.batch_size)
                rows = torch.cat([readers[name].take(count) for name, count in counts.items()])
                self._given = {name: given + counts[name] for name, given in self._given.items()}
                self._places = {name: reader.place for name, reader in readers.items()}
                yield rows[torch.from_numpy(generator(self.seed, number).permutation(len(rows)))]
                if self._batches_per_epoch is not None and (number + 1) % self._batches_per_epoch == 0:
                    return
        finally:
            for reader in readers.values():
                reader.close()

    def state_dict(self) -> dict[str, Any]:
        places = {name: {"before": dict(place.before), "used": place.used} for name, place in self._places.items()}
        return {"given": dict(self._given), "places": places}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if set(state["given"]) != set(self.sources):
            raise ValueError(f"the state is of sources {sorted(state['given'])}, this mixes {sorted(self.sources)}.")
        self._given = {name: state["given"][name] for name in self.sources}
        self._places = {name: _Place(**state["places"][name]) for name in self.sources}

    def _merged_stats(self) -> ActivationStats:
        """Of rows drawn by share. Means and variances are exact; norms about the common mean are of some rows."""
        of = {name: source.stats for name, source in self.sources.items()}
        weights = {name: float(share) for name, share in self.shares.items()}
        mean = torch.stack([weights[name] * stats.mean.double() for name, stats in of.items()]).sum(0)
        variance = torch.stack(
            [weights[name] * (stats.variance.double() + (stats.mean - mean).square()) for name, stats in of.items()]
        ).sum(0)
        centred, n_seen = 0.0, 0
        for name, source in self.sources.items():
            reader = _Reader(source, self._places[name])
            rows = reader.take(min(STATS_ROWS, source.n_rows or STATS_ROWS))
            reader.close()
            source.load_state_dict(self._places[name].before)
            centred += weights[name] * float(
                torch.linalg.vector_norm(rows.double() - mean.to(rows.device), dim=1).mean()
            )
            n_seen += len(rows)
        return ActivationStats(
            n=sum(stats.n for stats in of.values()),
            mean=mean,
            variance=variance,
            mean_norm=sum(weights[name] * stats.mean_norm for name, stats in of.items()),
            max_norm=max(stats.max_norm for stats in of.values()),
            centred_norm=centred,
            centred_norm_rows=n_seen,
        )


def apportioned(shares: Mapping[str, Fraction], given: Mapping[str, int], n_rows: int) -> dict[str, int]:
    """How many of the next n_rows each source gives: what it is owed in whole rows, the rest by largest fraction.

    With share * n_rows >= 1 nobody is ever owed less than nothing, and each stays within a row of its share.
    """
    total = sum(given.values()) + n_rows
    owed = {name: share * total - given[name] for name, share in shares.items()}
    counts = {name: floor(rows) for name, rows in owed.items()}
    by_fraction = sorted(owed, key=lambda name: owed[name] - counts[name], reverse=True)  # stable: ties go by order
    for name in by_fraction[: n_rows - sum(counts.values())]:
        counts[name] += 1
    return counts


@dataclass(frozen=True)
class _Place:
    """Where a source's next row is: `used` rows into the batch that it gives from the position `before`."""

    before: dict[str, Any]
    used: int


class _Reader:
    """Any number of rows at a time from a source that has batches of its own size."""

    def __init__(self, source: Source, place: _Place) -> None:
        self.source, self.place = source, place
        source.load_state_dict(place.before)
        self._batches = iter(source)
        self._held: Tensor | None = None

    def take(self, count: int) -> Float[Tensor, "n d_in"]:
        parts = []
        while count or not parts:
            rows = self._rows_at_place()
            taken = rows[self.place.used : self.place.used + count]
            self.place = _Place(self.place.before, self.place.used + len(taken))
            parts.append(taken)
            count -= len(taken)
        return torch.cat(parts)

    def _rows_at_place(self) -> Tensor:
        """The batch that holds the next row."""
        if self._held is None:
            self._held = self._next_batch()[1]
        while self.place.used >= len(self._held):
            before, self._held = self._next_batch()
            self.place = _Place(before, 0)
        return self._held

    def _next_batch(self) -> tuple[dict[str, Any], Tensor]:
        for _ in range(3):  # the rest of this epoch may be nothing
            before = self.source.state_dict()
            for rows in self._batches:
                return before, rows
            self._batches = iter(self.source)  # the next epoch
        raise ValueError("a source of the mixture gave no rows in a whole epoch.")

    def close(self) -> None:
        close = getattr(self._batches, "close", None)
        if close is not None:
            close()
