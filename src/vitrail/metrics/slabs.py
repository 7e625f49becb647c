"""Rows a few at a time, so that a dozen passes over them find them in the cache."""

import itertools

import torch

VALUES_ON_CPU, VALUES_ON_GPU = 1 << 19, 1 << 26


def slabs(n: int, width: int, device: torch.device) -> list[slice]:
    """`width`: values held of each row."""
    at_once = max(1, (VALUES_ON_CPU if device.type == "cpu" else VALUES_ON_GPU) // max(width, 1))
    return [slice(a, b) for a, b in itertools.pairwise([*range(0, n, at_once), n])] if n else []
