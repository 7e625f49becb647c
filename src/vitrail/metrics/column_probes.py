"""Logistic regressions on a few latents each, from sparse codes: the rows that fire, the others counted as one."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vitrail.coders.sparse import Codes
from vitrail.metrics.logistic_probes import Probes, SparseRows, fit_binary_sparse

GATHERED = 2**24  # values of rows laid out at once


def columns(codes: Codes, latents: Int[Tensor, " k"]) -> Float[Tensor, "n k"]:
    """These latents of all rows, dense."""
    place = torch.full((codes.d_sae,), -1)
    place[latents] = torch.arange(len(latents))
    column = place[codes.indices.long()]
    kept = column >= 0
    out = torch.zeros(codes.n, len(latents))
    out[codes.rows()[kept], column[kept]] = codes.values[kept].float()
    return out


def fit_columns(
    codes: Codes,
    latents: Int[Tensor, "b k"],
    positive: Bool[Tensor, "b n"],
    *,
    counted: Bool[Tensor, "b n"] | None = None,
    start: Probes | None = None,
) -> Probes:
    """b regressions, each on k latents of its own. `counted`: the rows of each (None: all).

    Rows in which none of its latents fires are one row to a regression, which counts as often as they are.
    """
    b, k = latents.shape
    part = max(1, GATHERED // ((codes.n + 2) * min(k + 1, 64)))
    found = []
    for first in range(0, b, part):
        some = slice(first, first + part)
        x, y, weights = _laid_out(codes, latents[some], positive[some], None if counted is None else counted[some])
        before = None if start is None else Probes(start.weight[some], start.bias[some], start.gradient[some])
        found.append(fit_binary_sparse(x, y, weights, start=before))
    return Probes(
        torch.cat([one.weight for one in found]),
        torch.cat([one.bias for one in found]),
        torch.cat([one.gradient for one in found]),
    )


def column_logits(codes: Codes, latents: Int[Tensor, "b k"], probes: Probes) -> Float[Tensor, "b n"]:
    problem, column, row, value = _entries(codes, latents)
    out = probes.bias[:, None].repeat(1, codes.n)
    out.view(-1).index_add_(0, problem * codes.n + row, probes.weight[problem, column] * value.double())
    return out


def _entries(codes: Codes, latents: Int[Tensor, "b k"]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What is not zero of the latents of each regression: regression, column, row, value."""
    order, rows, offsets = codes.transposed()
    flat, (b, k) = latents.reshape(-1), latents.shape
    first, count = offsets[flat].long(), offsets.diff()[flat].long()
    entry = torch.repeat_interleave(first - (count.cumsum(0) - count), count)
    entry += torch.arange(len(entry))
    problem = torch.repeat_interleave(torch.arange(b), count.view(b, k).sum(1))
    column = torch.repeat_interleave(torch.arange(k).repeat(b), count)
    return problem, column, rows.long().take(entry), codes.values[order].take(entry)


def _laid_out(
    codes: Codes, latents: Int[Tensor, "b k"], positive: Bool[Tensor, "b n"], counted: Bool[Tensor, "b n"] | None
) -> tuple[SparseRows, Bool[Tensor, "b m"], Float[Tensor, "b m"]]:
    """Rows of each regression, of those that are all zero one positive and one negative; and how often each counts."""
    problem, column, row, value = _entries(codes, latents)
    if counted is not None:
        kept = counted[problem, row]
        problem, column, row, value = problem[kept], column[kept], row[kept], value[kept]
    b, k = latents.shape
    fires = torch.zeros(b, codes.n, dtype=torch.bool)
    fires[problem, row] = True
    place = fires.cumsum(1) - 1
    m = int(place[:, -1].max()) + 3
    x = SparseRows(problem, column, place[problem, row], value.float(), (b, m, k))
    y, weights = torch.zeros(b, m, dtype=torch.bool), torch.zeros(b, m, dtype=torch.float64)
    one, at = fires.nonzero(as_tuple=True)
    y[one, place[one, at]], weights[one, place[one, at]] = positive[one, at], 1.0
    silent = ~fires if counted is None else counted & ~fires
    y[:, -2] = True
    weights[:, -2], weights[:, -1] = (silent & positive).sum(1).double(), (silent & ~positive).sum(1).double()
    return x, y, weights
