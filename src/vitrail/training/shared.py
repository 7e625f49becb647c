"""What the coders of a sweep have in common: the rows, their normalisation, those held out. Made once for all."""

import json
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from vitrail.coders import Normalization, SparseCoder
from vitrail.coders.normalize import Normalized
from vitrail.files import tensors_digest
from vitrail.statistics import ActivationStats, Moments
from vitrail.training.source import Source

HELD_OUT_BYTES = 2**30  # up to so many are read once and kept; more are read again for every coder
Batches = Iterable[Float[Tensor, "_ d_in"]]


class SharedReading:
    """A source whose rows are read once, however many coders ask for them.

    Within `remembering()` what was read is kept, so that another reading from the same position costs nothing; outside
    it, what was kept is handed out once more and forgotten. The iterator below is left open between readings: a store
    would otherwise fill its window again.
    """

    d_in: int
    stats: ActivationStats
    n_rows: int | None
    identity: str

    def __init__(self, source: Source) -> None:
        self.source = source
        self.d_in, self.stats, self.n_rows, self.identity = source.d_in, source.stats, source.n_rows, source.identity
        self._position, self._remember = source.state_dict(), False
        self._kept: dict[str, tuple[Tensor, dict[str, Any]]] = {}
        self._open: Iterator[Tensor] | None = None
        self._open_at: dict[str, Any] = {}

    def state_dict(self) -> dict[str, Any]:
        return dict(self._position)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._position = dict(state)

    def __iter__(self) -> Iterator[Float[Tensor, "n d_in"]]:
        while True:
            key = json.dumps(self._position, sort_keys=True)
            made = self._kept.get(key) if self._remember else self._kept.pop(key, None)
            if made is None:
                made = self._next()
                if made is None:
                    return
                if self._remember:
                    self._kept[key] = made
            x, self._position = made
            yield x

    def _next(self) -> tuple[Tensor, dict[str, Any]] | None:
        if self._open is None or self._open_at != self._position:
            self.close()
            self.source.load_state_dict(self._position)
            self._open = iter(self.source)
        try:
            x = next(self._open)
        except StopIteration:
            self._open, self._position = None, self.source.state_dict()
            return None
        self._open_at = self.source.state_dict()
        return x, dict(self._open_at)

    @contextmanager
    def remembering(self) -> Iterator[None]:
        self._remember = True
        try:
            yield
        finally:
            self._remember = False

    def batches(self, rows: int, total: int, device: torch.device) -> Iterator[Float[Tensor, "n d_in"]]:
        """From `rows` to `total`, over as many epochs as it takes: what a run alone would be handed."""
        while rows < total:
            rows_before = rows
            for x in self:
                x = x[: total - rows].to(device)
                rows += len(x)
                yield x
                if rows >= total:
                    return
            if rows == rows_before:
                raise ValueError("the source gave no rows in a whole epoch: there is nothing to train on.")

    def close(self) -> None:
        if self._open is not None and hasattr(self._open, "close"):
            self._open.close()  # pyright: ignore[reportAttributeAccessIssue]
        self._open = None


class SharedNormalization:
    """Normalises prepared batches once for all coders of the same normalisation and the same buffers.

    It stands before each module's `forward`, so that coders, their buffers and what is saved of them stay as they are.
    What is not a prepared batch, or a view of all of one, takes the module's own way.
    """

    def __init__(self) -> None:
        self._ways: dict[str, Any] = {}
        # The batch is held beside what was made of it, so that its memory is not another's meanwhile.
        self._made: dict[str, dict[tuple[Any, ...], tuple[Tensor, Normalized]]] = {}

    @contextmanager
    def of(self, normalizations: Iterable[Normalization]) -> Iterator[None]:
        joined = list(normalizations)
        for normalization in joined:
            kind = f"{type(normalization).__qualname__} {tensors_digest(normalization.state_dict())}"
            self._ways.setdefault(kind, normalization.forward)
            normalization.forward = self._way(kind, normalization.forward)
        try:
            yield
        finally:
            self._ways, self._made = {}, {}
            for normalization in joined:
                vars(normalization).pop("forward", None)

    def _way(self, kind: str, own: Any) -> Any:
        def forward(x: Float[Tensor, "n d_in"]) -> Normalized:
            _, made = self._made.get(kind, {}).get(_memory(x), (x, None))
            return own(x) if made is None else made

        return forward

    def prepare(self, batches: Iterable[Float[Tensor, "_ d_in"]]) -> None:
        """Forgets the batches before."""
        batches = list(batches)
        for kind, own in self._ways.items():
            self._made[kind] = {_memory(x): (x, own(x)) for x in batches}


def _memory(x: Tensor) -> tuple[Any, ...]:
    """The same for views of the same numbers, until one of them is written to."""
    return x.data_ptr(), x.shape, x.stride(), x.dtype, x.device, x._version


class HeldOut:
    """Held-out rows, the same in the same order for every coder."""

    def __init__(self, batches: Batches, device: torch.device) -> None:
        self.batches, self.device = list(batches) if isinstance(batches, Iterator) else batches, device
        self.identity = getattr(batches, "identity", "") or ""
        self._start = batches.state_dict() if isinstance(batches, Source) else None
        self._kept: list[Tensor] | None = None
        self._spread: Moments | None = None

    def __iter__(self) -> Iterator[Float[Tensor, "_ d_in"]]:
        if self._kept is not None:
            yield from self._kept
            return
        if isinstance(self.batches, Source) and self._start is not None:
            self.batches.load_state_dict(self._start)
        for x in self.batches:
            yield x.to(self.device)

    def keep(self) -> list[Tensor]:
        """The batches, held from now on; none of them if they are more than HELD_OUT_BYTES."""
        kept, size = [], 0
        for x in self:
            size += x.numel() * x.element_size()
            if size > HELD_OUT_BYTES:
                return []
            kept.append(x)
        self._kept = kept
        return kept

    @torch.no_grad()
    def measure(self, coder: SparseCoder) -> dict[str, Any]:
        """fvu: sum ||x - x_hat||^2 / sum ||x - mean||^2 over all rows, from sparse codes; l0: their mean per row.
        {} for coders whose rows carry a target of another kind."""
        if coder.d_row != coder.d_in:
            return {}
        if self._spread is None:
            self._spread = Moments()
            for x in self:
                self._spread.update(x.float().cpu())
        error, entries = 0.0, 0
        for x in self:
            codes = coder.encode_sparse(x)
            error += float((coder.decode_sparse(codes) - x).square().sum(dtype=torch.float64))
            entries += codes.nnz
        rows, total = self._spread.n, float(self._spread.variance().sum()) * self._spread.n
        fvu = error / total if total > 0 else math.nan
        return {"fvu": fvu if math.isfinite(fvu) else None, "l0": entries / rows, "rows": rows}
