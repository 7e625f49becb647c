"""Stability across seeds: how much of a dictionary is found again from other starting weights.

    s = mean of cos(u_i, v_match(i)) over the one-to-one matching of two coders' directions with the largest sum
        decoder: rows of W_dec; encoder: columns of W_enc; each matched on its own
    b = the same between random directions of the same numbers and dimensions: the floor
    above floor = (s - b) / (1 - b)
    shared = share of decoder matches whose cosine exceeds 0.7 in the decoder and, the same pair, in the encoder

Range. s -1..1, above floor at most 1 and 0 for random directions, shared 0..1. No unit. Where the coders have different
numbers of latents, means are over the smaller number.

Moves with. d_sae and d_in, through the floor (768 dimensions: .112 for 1,024 directions, .130 for 6,144): scores
without their floor cannot be compared between widths. Sparsity: MSAE's table 18 has Spearman .77 and .82 with it.
Latents that never fired and kept their starting weights count as found again where coders share a starting seed.

Does not show. Whether the shared latents are right: coders can agree on the same mistake. Nor that a latent without a
partner is wrong; wider coders split latents.

Source. Paulo and Belrose 2025, arXiv:2501.16615; MSAE appendix H; SPEC row 61.

Tags. "hungarian": the exact matching (scipy: the extra `probes`). "sparse-hungarian": the exact matching of a graph
that has each direction's 32 nearest only, used above 8,192 directions; never above the exact score. Floors:
"random-matched", one seeded draw; "random-limit", the law of matched edges in a random assignment (Aldous 2001,
arXiv:math/0010063), used above 8,192; 1 to 2 % below the other. Numbers are means over all pairs of coders; their
interval, for three coders or more, is a jackknife over coders.

Costs F x F float64 for the exact matching (302 MB at 6,144), F x 64 numbers for the sparse one.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from vitrail.coders.base import SparseCoder
from vitrail.metrics.measured import Measured

SHARED_ABOVE = 0.7
EXACT_UP_TO = 8192  # directions
N_NEAREST = 32
ROWS_AT_ONCE = 1024


class Directions(NamedTuple):
    """Of one coder, one row a latent."""

    decoder: Float[Tensor, "d_sae d_out"]
    encoder: Float[Tensor, "d_sae d_in"]

    @classmethod
    def of(cls, coder: SparseCoder) -> "Directions":
        return cls(coder.W_dec.detach().flatten(1), coder.W_enc.detach().flatten(0, -2).t())


@dataclass(frozen=True, eq=False)
class Matching:
    """Row `a[i]` of the one belongs to row `b[i]` of the other."""

    a: Int64[np.ndarray, " m"]
    b: Int64[np.ndarray, " m"]
    cosine: Float64[np.ndarray, " m"]
    tag: str

    @property
    def mean(self) -> float:
        return float(self.cosine.mean())


@dataclass(frozen=True)
class PairStability:
    """Of coders number `a` and `b`."""

    a: int
    b: int
    decoder: float
    encoder: float
    decoder_floor: float
    encoder_floor: float
    shared: float
    n: int  # matched pairs
    matching: str
    floor: str

    @property
    def decoder_above_floor(self) -> float:
        return above_floor(self.decoder, self.decoder_floor)

    @property
    def encoder_above_floor(self) -> float:
        return above_floor(self.encoder, self.encoder_floor)


class Stability:
    """All pairs of two coders or more. Raises ValueError if there are fewer, or if they read different spaces."""

    def __init__(self, coders: Sequence[SparseCoder | Directions], *, seed: int = 0) -> None:
        if len(coders) < 2:
            raise ValueError(f"stability compares coders: give two or more, of different seeds, got {len(coders)}.")
        directions = [coder if isinstance(coder, Directions) else Directions.of(coder) for coder in coders]
        for part in ("decoder", "encoder"):
            widths = sorted({getattr(one, part).shape[1] for one in directions})
            if len(widths) > 1:
                raise ValueError(f"{part} directions of different spaces: {', '.join(map(str, widths))} dimensions.")
        self.n_coders = len(coders)
        floors: dict[tuple[int, int, int], tuple[float, str]] = {}
        self.pairs = [
            _pair(a, b, directions[a], directions[b], floors, seed) for a, b in combinations(range(len(coders)), 2)
        ]

    def compute(self) -> dict[str, Measured]:
        """Means over pairs: `stability_decoder`, `stability_encoder`, their `_floor` and `_above_floor`, `shared`."""
        out = {}
        for name, (attribute, of) in NAMES.items():
            tag = ", ".join(sorted({str(getattr(pair, kind)) for pair in self.pairs for kind in of}))
            out[name] = self._mean(lambda pair, attribute=attribute: getattr(pair, attribute), tag)
        return out

    def rows(self) -> list[dict[str, Any]]:
        """One a pair, with full precision."""
        names = {name: attribute for name, (attribute, _) in NAMES.items()}
        return [
            {"a": pair.a, "b": pair.b, "n": pair.n}
            | {name: getattr(pair, attribute) for name, attribute in names.items()}
            for pair in self.pairs
        ]

    def _mean(self, of: Callable[[PairStability], float], tag: str) -> Measured:
        values = np.array([of(pair) for pair in self.pairs])
        value, n = float(values.mean()), len(values)
        if self.n_coders < 3:
            return Measured(value, tag, n)
        without = np.array(
            [
                np.mean([of(pair) for pair in self.pairs if coder not in (pair.a, pair.b)])
                for coder in range(self.n_coders)
            ]
        )
        spread = np.square(without - without.mean()).sum()
        half = _t_quantile(self.n_coders - 1) * math.sqrt((self.n_coders - 1) / self.n_coders * spread)
        return Measured(value, f"{tag}, jackknife over coders", n, value - half, value + half)


# name -> attribute of a pair, and what the tag tells
NAMES: dict[str, tuple[str, tuple[str, ...]]] = {
    "stability_decoder": ("decoder", ("matching",)),
    "stability_encoder": ("encoder", ("matching",)),
    "stability_decoder_floor": ("decoder_floor", ("floor",)),
    "stability_encoder_floor": ("encoder_floor", ("floor",)),
    "stability_decoder_above_floor": ("decoder_above_floor", ("matching", "floor")),
    "stability_encoder_above_floor": ("encoder_above_floor", ("matching", "floor")),
    "stability_shared": ("shared", ("matching",)),
}


def above_floor(score: float, floor: float) -> float:
    """(s - b) / (1 - b): 0 at the floor, 1 where every direction is found again."""
    return (score - floor) / (1 - floor) if floor < 1 else math.nan


def _pair(
    a: int,
    b: int,
    one: Directions,
    other: Directions,
    floors: dict[tuple[int, int, int], tuple[float, str]],
    seed: int,
) -> PairStability:
    matched = match_directions(one.decoder, other.decoder)
    of_encoders = match_directions(one.encoder, other.encoder)
    values = []
    for rows, others in ((one.decoder, other.decoder), (one.encoder, other.encoder)):
        shape = (len(rows), len(others), rows.shape[1])
        if shape not in floors:
            floors[shape] = floor_of(*shape, seed=seed)
        values.append(floors[shape])
    same_pair = torch.cosine_similarity(
        one.encoder[torch.from_numpy(matched.a)].float(), other.encoder[torch.from_numpy(matched.b)].float(), dim=1
    ).numpy(force=True)
    return PairStability(
        a=a,
        b=b,
        decoder=matched.mean,
        encoder=of_encoders.mean,
        decoder_floor=values[0][0],
        encoder_floor=values[1][0],
        shared=float(((matched.cosine > SHARED_ABOVE) & (same_pair > SHARED_ABOVE)).mean()),
        n=len(matched.a),
        matching=matched.tag,
        floor=values[0][1],
    )


# -- matching


@torch.no_grad()
def match_directions(
    a: Float[Tensor, "n_a d"], b: Float[Tensor, "n_b d"], *, exact: bool | None = None, n_nearest: int = N_NEAREST
) -> Matching:
    """One-to-one, with the largest sum of cosines. A row of length zero has cosine 0 with all.

    `exact`: None means up to 8,192 directions. Without it, only pairs among the `n_nearest` of either side are
    considered, and those of a greedy matching, so that there always is one.
    """
    a, b = (torch.nn.functional.normalize(rows.float().cpu(), dim=1, eps=1e-30) for rows in (a, b))
    if exact is None:
        exact = max(len(a), len(b)) <= EXACT_UP_TO
    return _match_exactly(a, b) if exact else _match_nearest(a, b, n_nearest)


def _match_exactly(a: Tensor, b: Tensor) -> Matching:
    (linear_sum_assignment,) = _scipy("scipy.optimize", "linear_sum_assignment")
    costs = np.empty((len(a), len(b)))
    for first in range(0, len(a), ROWS_AT_ONCE):
        costs[first : first + ROWS_AT_ONCE] = (a[first : first + ROWS_AT_ONCE] @ b.t()).neg_().numpy()
    rows, columns = linear_sum_assignment(costs)
    return Matching(rows, columns, -costs[rows, columns], "hungarian")


def _match_nearest(a: Tensor, b: Tensor, n_nearest: int) -> Matching:
    csr_array, matching = (
        *_scipy("scipy.sparse", "csr_array"),
        *_scipy("scipy.sparse.csgraph", "min_weight_full_bipartite_matching"),
    )
    rows, columns = _nearest(a, b, n_nearest)
    other_columns, other_rows = _nearest(b, a, n_nearest)
    rows, columns = np.concatenate([rows, other_rows]), np.concatenate([columns, other_columns])
    rows, columns = np.divmod(np.unique(rows * len(b) + columns), len(b))
    cosine = _cosines(a, b, rows, columns)
    greedy_rows, greedy_columns = _greedy(rows, columns, cosine, len(a), len(b))
    extra = ~np.isin(greedy_rows * len(b) + greedy_columns, rows * len(b) + columns)
    rows, columns = np.concatenate([rows, greedy_rows[extra]]), np.concatenate([columns, greedy_columns[extra]])
    cosine = np.concatenate([cosine, _cosines(a, b, greedy_rows[extra], greedy_columns[extra])])
    graph = csr_array((2 - cosine, (rows, columns)), shape=(len(a), len(b)))  # 2: an edge of cost 0 is none
    in_a, in_b = (found.astype(np.int64) for found in matching(graph))
    return Matching(in_a, in_b, _cosines(a, b, in_a, in_b), "sparse-hungarian")


def _nearest(a: Tensor, b: Tensor, k: int) -> tuple[Int64[np.ndarray, " m"], Int64[np.ndarray, " m"]]:
    k = min(k, len(b))
    columns = torch.cat([(part @ b.t()).topk(k, dim=1, sorted=False).indices for part in a.split(ROWS_AT_ONCE)])
    return np.repeat(np.arange(len(a)), k), columns.flatten().numpy()


def _cosines(a: Tensor, b: Tensor, rows: np.ndarray, columns: np.ndarray) -> Float64[np.ndarray, " m"]:
    out = np.empty(len(rows))
    for first in range(0, len(rows), 2**16):
        part = slice(first, first + 2**16)
        out[part] = (a[torch.from_numpy(rows[part])] * b[torch.from_numpy(columns[part])]).sum(1).numpy()
    return out


def _greedy(
    rows: np.ndarray, columns: np.ndarray, cosine: np.ndarray, n_a: int, n_b: int
) -> tuple[Int64[np.ndarray, " m"], Int64[np.ndarray, " m"]]:
    """Best pair first; who is left over at the end is paired as they come."""
    partner, taken = np.full(n_a, -1), np.zeros(n_b, dtype=bool)
    for at in np.argsort(-cosine, kind="stable"):
        if partner[rows[at]] < 0 and not taken[columns[at]]:
            partner[rows[at]], taken[columns[at]] = columns[at], True
    left_a, left_b = np.flatnonzero(partner < 0), np.flatnonzero(~taken)
    m = min(len(left_a), len(left_b))
    partner[left_a[:m]] = left_b[:m]
    paired = np.flatnonzero(partner >= 0)
    return paired, partner[paired].astype(np.int64)


# -- the floor


def floor_of(n_a: int, n_b: int, d: int, *, seed: int = 0) -> tuple[float, str]:
    """The matched cosine of random directions, and by which definition."""
    if max(n_a, n_b) <= EXACT_UP_TO or n_a != n_b:
        return random_floor(n_a, n_b, d, seed=seed), "random-matched"
    return limit_floor(n_a, d), "random-limit"


def random_floor(n_a: int, n_b: int, d: int, *, seed: int = 0) -> float:
    """One draw, matched like coders. Its spread is small: a mean over thousands of pairs."""
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(n, d, generator=generator) for n in (n_a, n_b))
    return match_directions(a, b).mean


def limit_floor(n: int, d: int) -> float:
    """Of n and n directions, without drawing any: x pairs per row are above a matched one, of density h(x).

        h(x) = e^-x (e^-x - 1 + x) / (1 - e^-x)^2                          Aldous 2001, theorem 2
        floor = integral of h(x) q(1 - x / n), q the quantiles of a random cosine in d dimensions

    Exact in the limit of independent pairs and costs that are linear in x; a cosine's are logarithmic, so that the best
    matching does a little better (1 to 2 % at n = 256 .. 1,024).
    """
    if d < 2:
        raise ValueError(f"directions need two dimensions or more to have angles, got d={d}.")
    (betaincinv,) = _scipy("scipy.special", "betaincinv")
    x = (np.arange(40_000) + 0.5) / 1000
    h = np.exp(-x) * (np.exp(-x) - 1 + x) / np.square(np.expm1(-x))
    half = (d - 1) / 2
    cosine = 2 * betaincinv(half, half, np.clip(1 - x / n, 0, 1)) - 1
    return float(h @ cosine / h.sum())


def _t_quantile(df: int) -> float:
    (stdtrit,) = _scipy("scipy.special", "stdtrit")
    return float(stdtrit(df, 0.975))


def _scipy(module: str, *names: str) -> tuple[Any, ...]:
    from importlib import import_module

    try:
        found = import_module(module)
    except ImportError as error:
        raise ImportError('matching directions needs scipy: pip install "vitrail[probes]".') from error
    return tuple(getattr(found, name) for name in names)
