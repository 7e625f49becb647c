"""Random draws that belong to a place in the training, so that a resumed run draws what it would have drawn."""

import numpy as np


def generator(*key: int) -> np.random.Generator:
    """A random stream of its own for each key of non-negative integers, such as (seed, step)."""
    return np.random.default_rng(np.random.SeedSequence(key))
