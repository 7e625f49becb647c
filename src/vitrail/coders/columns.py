"""Statistics of some of a row's columns, for coders whose rows carry several points side by side."""

import itertools
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from vitrail.statistics import ActivationStats


def column_slices(widths: Sequence[int]) -> list[slice]:
    """Where parts of these widths lie in a row, one after another."""
    ends = list(itertools.accumulate(widths))
    return [slice(end - width, end) for end, width in zip(ends, widths, strict=True)]


def stats_of_columns(stats: ActivationStats, sample: Float[Tensor, "n d_row"], columns: slice) -> ActivationStats:
    """Mean and variance are those of `stats`; norms do not fall apart by columns, so they are the sample's."""
    mean = stats.mean[columns]
    rows = sample[:, columns].double()
    norms = torch.linalg.vector_norm(rows, dim=1)
    return ActivationStats(
        n=stats.n,
        mean=mean,
        variance=stats.variance[columns],
        mean_norm=float(norms.mean()),
        max_norm=float(norms.max()),
        centred_norm=float(torch.linalg.vector_norm(rows - mean.to(rows), dim=1).mean()),
        centred_norm_rows=len(rows),
    )
