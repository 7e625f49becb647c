"""A measured number: its value, its interval, over what it was taken, and by which definition."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Measured:
    """`low`..`high` is a 95 % bootstrap interval over images, None where there is none. `definition` is a tag."""

    value: float
    definition: str
    n: int
    low: float | None = None
    high: float | None = None

    def to_json(self) -> dict[str, Any]:
        """NaN (a ratio without a denominator) is written as null."""
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in asdict(self).items()}


def over_images(
    columns: dict[str, Array],
    statistic: Callable[[dict[str, Array]], Array],
    *,
    definition: str,
    n_bootstrap: int = 1000,
    seed: int = 0,
) -> Measured:
    """The statistic of the columns' sums, with a percentile bootstrap over images.

    `columns`: per image sums, each (n_images,). `statistic` gets their totals, (b,) each, and must work elementwise:
    it is called once with the real totals and once with those of `n_bootstrap` resamples. The same seed and number of
    images give the same resamples, so that two numbers over the same images are compared as pairs.
    """
    n = len(next(iter(columns.values())))
    if n == 0:
        raise ValueError("no images were measured: there is nothing to report.")
    stacked = np.stack([np.asarray(values, dtype=np.float64) for values in columns.values()])
    names = list(columns)
    with np.errstate(divide="ignore", invalid="ignore"):
        value = float(statistic(dict(zip(names, stacked.sum(1, keepdims=True), strict=True)))[0])
        if n < 2 or n_bootstrap < 1:
            return Measured(value=value, definition=definition, n=n)
        totals = np.concatenate(
            [stacked @ weights.T for weights in resample_weights(n, n_bootstrap, seed)], axis=1
        )  # (columns, n_bootstrap)
        resampled = statistic(dict(zip(names, totals, strict=True)))
    finite = resampled[np.isfinite(resampled)]
    if len(finite) == 0:
        return Measured(value=value, definition=definition, n=n)
    low, high = np.percentile(finite, [2.5, 97.5])
    return Measured(value=value, definition=definition, n=n, low=float(low), high=float(high))


def resample_weights(n: int, n_bootstrap: int, seed: int):
    """How often each image is drawn, (b, n) at a time: bounded memory for any number of images."""
    rng = np.random.default_rng(seed)
    at_once = max(1, min(n_bootstrap, 4_000_000 // n))
    for start in range(0, n_bootstrap, at_once):
        b = min(at_once, n_bootstrap - start)
        yield rng.multinomial(n, np.full(n, 1 / n), size=b).astype(np.float64)
