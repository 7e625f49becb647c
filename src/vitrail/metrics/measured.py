"""A measured number: its value, its interval, over what it was taken, and by which definition."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Draws:
    """The number in each bootstrap resample, and the seed that drew them: what `paired` sets beside another's."""

    values: Array
    seed: int


@dataclass(frozen=True)
class Measured:
    """`low`..`high` is a 95 % bootstrap interval over images, None where there is none. `definition` is a tag."""

    value: float
    definition: str
    n: int
    low: float | None = None
    high: float | None = None
    draws: Draws | None = field(default=None, compare=False, repr=False)  # in memory only

    def to_json(self) -> dict[str, Any]:
        """NaN (a ratio without a denominator) is written as null. The draws are not kept."""
        numbers = {name: getattr(self, name) for name in ("value", "definition", "n", "low", "high")}
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in numbers.items()}


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
    return _with_interval(value, resampled, definition=definition, n=n, seed=seed)


def paired(a: Measured, b: Measured) -> Measured | None:
    """a less b, of the same images in the same order: each resample gives both numbers, and so their difference.

    None where there is no such interval: where one of them has none over images, they are over different numbers of
    images or of other resamples, or are by different definitions. Whether the images are the same, the caller knows.
    """
    if a.draws is None or b.draws is None or a.definition != b.definition or a.n != b.n:
        return None
    if a.draws.seed != b.draws.seed or len(a.draws.values) != len(b.draws.values):
        return None
    with np.errstate(invalid="ignore"):
        differences = a.draws.values - b.draws.values
    return _with_interval(
        a.value - b.value, differences, definition=f"{a.definition}; paired", n=a.n, seed=a.draws.seed
    )


def all_paired(a: Mapping[str, Measured], b: Mapping[str, Measured]) -> dict[str, Measured]:
    """`paired` of each measure that both have, where there is such a number."""
    found = {name: paired(a[name], b[name]) for name in a if name in b}
    return {name: one for name, one in found.items() if one is not None}


def _with_interval(value: float, resampled: Array, *, definition: str, n: int, seed: int) -> Measured:
    """The middle 95 % of the resamples that are numbers; no interval where none is."""
    finite = resampled[np.isfinite(resampled)]
    if len(finite) == 0:
        return Measured(value=value, definition=definition, n=n)
    low, high = np.percentile(finite, [2.5, 97.5])
    draws = Draws(np.asarray(resampled), seed)
    return Measured(value=value, definition=definition, n=n, low=float(low), high=float(high), draws=draws)


def resample_weights(n: int, n_bootstrap: int, seed: int):
    """How often each image is drawn, (b, n) at a time: bounded memory for any number of images."""
    rng = np.random.default_rng(seed)
    at_once = max(1, min(n_bootstrap, 4_000_000 // n))
    for start in range(0, n_bootstrap, at_once):
        b = min(at_once, n_bootstrap - start)
        yield rng.multinomial(n, np.full(n, 1 / n), size=b).astype(np.float64)
