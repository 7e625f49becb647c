"""Shuffled rows, exactly resumable: what a store's reader and a live stream have in common.

An epoch is a sequence of windows; a window is many images' rows held in memory; batches are cut from the windows' rows
in a random order that depends only on (seed, epoch, window). The position after a batch is therefore three integers,
and a run that is resumed from them sees the same rows in the same order.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from queue import Empty, Full, Queue
from threading import Event, Thread
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from vitrail.statistics import ActivationStats

State = dict[str, int]


class WindowedSource(ABC):
    """Batches (batch_size, d_in) in fp32. One `iter()` gives the rest of the current epoch; the next one, the next.

    Batches are made ahead by a thread; `state_dict()` speaks of the last batch handed out, not of the last one made.
    """

    d_in: int
    stats: ActivationStats
    n_rows: int | None
    identity: str

    def __init__(self, *, batch_size: int, shuffle: bool, seed: int, drop_last: bool, prefetch: int) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
        self.batch_size, self.shuffle, self.seed = batch_size, shuffle, seed
        self.drop_last, self.prefetch = drop_last, prefetch
        self._state: State = {"epoch": 0, "window": 0, "offset": 0}

    @abstractmethod
    def n_windows(self, epoch: int) -> int: ...

    @abstractmethod
    def window_rows(self, epoch: int, window: int) -> Float[Tensor, "n d_in"]:
        """The rows of one window in their own order, fp32."""

    def state_dict(self) -> State:
        return dict(self._state)

    def load_state_dict(self, state: State) -> None:
        if set(state) != set(self._state):
            raise ValueError(f"a source state has the keys {sorted(self._state)}, got {sorted(state)}.")
        self._state = dict(state)

    def __iter__(self) -> Iterator[Float[Tensor, "n d_in"]]:
        begun = self.state_dict()
        for batch, state in self._batches(begun) if self.prefetch < 1 else self._made_ahead(begun):
            self._state = state
            yield batch
        # Also where drop_last left rows over, or nothing was left of the epoch: the next iter() is the next epoch.
        self._state = _start_of(begun["epoch"] + 1)

    def _made_ahead(self, begun: State) -> Iterator[tuple[Tensor, State]]:
        queue: Queue[Any] = Queue(maxsize=self.prefetch)
        stop = Event()
        maker = Thread(target=self._fill, args=(queue, stop, begun), daemon=True)
        maker.start()
        try:
            while (made := queue.get()) is not None:
                if isinstance(made, BaseException):
                    raise made
                yield made
        finally:
            stop.set()
            _drain(queue)
            maker.join()

    def _fill(self, queue: "Queue[Any]", stop: Event, state: State) -> None:
        try:
            for made in self._batches(state):
                if not _put(queue, made, stop):
                    return
            _put(queue, None, stop)
        except BaseException as error:
            _put(queue, error, stop)

    def _batches(self, state: State) -> Iterator[tuple[Tensor, State]]:
        """Batches of the rest of the epoch, each with the position after it."""
        epoch, offset = state["epoch"], state["offset"]
        n_windows = self.n_windows(epoch)
        parts: list[Tensor] = []
        n_held = 0
        for window in range(state["window"], n_windows):
            rows = self.window_rows(epoch, window)
            order = self._order(epoch, window, len(rows))
            while offset < len(order):
                taken = order[offset : offset + self.batch_size - n_held]
                parts.append(rows[taken])
                offset += len(taken)
                n_held += len(taken)
                if n_held == self.batch_size:
                    ended = offset == len(order) and window == n_windows - 1
                    here = {"epoch": epoch, "window": window, "offset": offset}
                    yield torch.cat(parts), _start_of(epoch + 1) if ended else here
                    parts, n_held = [], 0
            offset = 0
        if n_held and not self.drop_last:
            yield torch.cat(parts), _start_of(epoch + 1)

    def _order(self, epoch: int, window: int, n: int) -> Int[Tensor, " n"]:
        if not self.shuffle:
            return torch.arange(n)
        return torch.from_numpy(generator(self.seed, epoch, window + 1).permutation(n))


def generator(*key: int) -> np.random.Generator:
    """A random stream of its own for each key of integers."""
    return np.random.default_rng(np.random.SeedSequence(key))


def _start_of(epoch: int) -> State:
    return {"epoch": epoch, "window": 0, "offset": 0}


def _put(queue: "Queue[Any]", item: object, stop: Event) -> bool:
    while not stop.is_set():
        try:
            queue.put(item, timeout=0.2)
        except Full:
            continue
        return True
    return False


def _drain(queue: "Queue[Any]") -> None:
    while True:
        try:
            queue.get_nowait()
        except Empty:
            return
