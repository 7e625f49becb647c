"""Random numbers as a pure function of (key, index, purpose): the same on every platform and numpy version.

Only the raw 64-bit stream of Philox is used. numpy freezes that stream, but not what `Generator` makes of it.
"""

from collections.abc import Iterable

import numpy as np
from jaxtyping import UInt8


class Draws:
    """The draws of one scene for one purpose. Scenes share nothing, so any scene is reached in constant time."""

    def __init__(self, key: tuple[int, int], index: int, purpose: int) -> None:
        # The counter's lowest word counts the draws; the words above it separate scenes and purposes.
        self._stream = np.random.Philox(key=np.array(key, dtype=np.uint64), counter=[0, index, purpose, 0])

    def uniform(self, n: int) -> list[float]:
        """n floats in [0, 1), 53 bits each."""
        return [value * 2.0**-53 for value in (self._stream.random_raw(n) >> np.uint64(11)).tolist()]

    def bytes(self, *shape: int) -> UInt8[np.ndarray, "..."]:
        """Uniform bytes 0..255."""
        n = int(np.prod(shape))
        raw = self._stream.random_raw(-(-n // 8)).astype("<u8", copy=False)
        return raw.view(np.uint8)[:n].reshape(shape)


def stream_key(*parts: int) -> tuple[int, int]:
    """A Philox key from whole numbers >= 0; different numbers give unrelated streams."""
    low, high = np.random.SeedSequence(parts).generate_state(2, np.uint64).tolist()
    return low, high


def pick(names: Iterable[str], share: float) -> str:
    """The name at `share`, in 0..1, of the list."""
    listed = list(names)
    return listed[int(share * len(listed))]


def spread(share: float, most: float) -> float:
    """From 0..1 to -most..most."""
    return (2.0 * share - 1.0) * most
