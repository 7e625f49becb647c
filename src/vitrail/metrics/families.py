"""Several tests at once."""

import math
from collections.abc import Sequence

import numpy as np


def holm(p: Sequence[float]) -> list[float]:
    """In the order given. NaN stays and is no member of the family."""
    values = np.asarray(p, dtype=np.float64)
    real = np.flatnonzero(np.isfinite(values))
    if ((values[real] < 0) | (values[real] > 1)).any():
        raise ValueError("p-values must be in 0..1.")
    order = real[np.argsort(values[real], kind="stable")]
    scaled = values[order] * (len(order) - np.arange(len(order)))
    out = np.full(len(values), math.nan)
    out[order] = np.minimum(np.maximum.accumulate(scaled), 1.0)
    return out.tolist()
