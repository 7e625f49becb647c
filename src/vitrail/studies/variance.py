"""How much of a metric's spread over configurations each factor accounts for: eta^2 and omega^2, by least squares.

    SS(term)  residual sum of squares without the term, less that with it (among the terms that do not contain it)
    eta^2     SS(term) / SS_total
    omega^2   (SS(term) - df(term) MS_residual) / (SS_total + MS_residual)        the same, less what chance adds
    F         (SS(term) / df(term)) / MS_residual

Type II sums of squares. In a balanced design they are those of types I and III as well, and eta^2 of all terms and the
residual sum to 1. In an unbalanced one they do not: what factors share is nobody's, and stands apart as "shared", which
may be below 0.

ViSAEBench section 5.7 and table 3: backbone (5) and configuration (12), one seed; so its residual is their interaction,
and no noise was measured. SPEC row 81: width and k apart, omega^2, and a bootstrap over seeds where there are some.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
RESIDUAL, SHARED = "residual", "shared"


@dataclass(frozen=True)
class Share:
    """One line of a decomposition. NaN where a number does not exist: no variance, or no residual freedom."""

    term: str
    ss: float
    df: int
    eta2: float
    omega2: float
    f: float
    low: float | None = None  # of eta^2, over seeds
    high: float | None = None


@dataclass(frozen=True)
class Decomposition:
    terms: tuple[Share, ...]  # as asked for, then "residual" and, where the design is unbalanced, "shared"
    n: int
    ss_total: float
    balanced: bool

    def __getitem__(self, term: str) -> Share:
        found = next((one for one in self.terms if one.term == term), None)
        if found is None:
            raise KeyError(f"there is no term {term!r}. There are {', '.join(one.term for one in self.terms)}.")
        return found


def decompose(
    values: Sequence[float] | Array,
    factors: Mapping[str, Sequence[Any]],
    *,
    terms: Sequence[str] | None = None,
) -> Decomposition:
    """`factors`: of each value the level it was measured at. `terms`: by default one a factor; "width:k" is an
    interaction. Levels are names, whatever they are: 8 and 16 have no distance.

    Raises ValueError for lengths that differ, values that are not finite and factors of one level; KeyError for a term
    whose factor there is not.
    """
    y = np.asarray(values, dtype=np.float64)
    terms = list(factors) if terms is None else list(terms)
    _check(y, factors, terms)
    coded = {name: _contrasts(levels) for name, levels in factors.items()}
    columns = {term: _interaction([coded[name] for name in term.split(":")]) for term in terms}
    everything = _residual(y, columns.values())
    total = float(np.square(y - y.mean()).sum())
    df_residual = len(y) - everything[1]
    ms = everything[0] / df_residual if df_residual else math.nan
    shares = []
    for term in terms:
        others = [c for other, c in columns.items() if not set(term.split(":")) <= set(other.split(":"))]
        without, with_it = _residual(y, others), _residual(y, [*others, columns[term]])
        shares.append(_share(term, max(without[0] - with_it[0], 0.0), with_it[1] - without[1], total, ms))
    shares.append(
        Share(RESIDUAL, everything[0], df_residual, _over(everything[0], total), math.nan, math.nan),
    )
    balanced = _is_balanced(factors, terms)
    if not balanced:
        ss = total - sum(one.ss for one in shares)
        shares.append(Share(SHARED, ss, 0, _over(ss, total), math.nan, math.nan))
    return Decomposition(tuple(shares), len(y), total, balanced)


def decompose_rows(
    rows: Sequence[Mapping[str, Any]],
    metric: str,
    factors: Sequence[str],
    *,
    terms: Sequence[str] | None = None,
    seed_column: str | None = "seed",
    n_bootstrap: int = 1000,
    seed: int = 0,
) -> Decomposition:
    """Of a table's rows. Where each cell was trained with several seeds, eta^2 has a percentile interval: seeds are
    drawn anew within each cell. Two or three seeds a cell make for intervals that are too short: read them as a floor.
    """
    y = np.array([float(row[metric]) for row in rows])
    levels = {name: [row[name] for row in rows] for name in factors}
    found = decompose(y, levels, terms=terms)
    cells: dict[tuple[Any, ...], list[int]] = {}
    for place, cell in enumerate(zip(*levels.values(), strict=True)):
        cells.setdefault(cell, []).append(place)
    several = seed_column is not None and all(seed_column in row for row in rows)
    if not several or n_bootstrap < 1 or min(map(len, cells.values())) < 2:
        return found
    rng = np.random.default_rng(seed)
    drawn = []
    for _ in range(n_bootstrap):
        at = np.concatenate([rng.choice(places, len(places)) for places in cells.values()])
        again = decompose(y[at], {name: [values[i] for i in at] for name, values in levels.items()}, terms=terms)
        drawn.append([one.eta2 for one in again.terms])
    return _bounded(found, drawn)


def noise_over_seeds(cells: Sequence[Sequence[float]]) -> float:
    """Standard deviation between seeds, pooled over the cells that have several; NaN where none has."""
    several = [np.asarray(one, dtype=np.float64) for one in cells if len(one) > 1]
    freedom = sum(len(one) - 1 for one in several)
    return (
        math.sqrt(sum(float(np.square(one - one.mean()).sum()) for one in several) / freedom) if freedom else math.nan
    )


def with_noise(
    found: Decomposition,
    values: Sequence[float] | Array,
    factors: Mapping[str, Sequence[Any]],
    *,
    terms: Sequence[str] | None = None,
    sd: float,
    n_bootstrap: int = 1000,
    seed: int = 0,
) -> Decomposition:
    """With an interval of each eta^2: where 95 % of them lie once noise of this sd is added to each value anew.

    For designs in which only some cells have several seeds (`noise_over_seeds`), so that seeds cannot be drawn.
    """
    if not (math.isfinite(sd) and sd >= 0):
        raise ValueError(f"sd must be a number from 0 on, got {sd}.")
    y, rng = np.asarray(values, dtype=np.float64), np.random.default_rng(seed)
    drawn = [
        [one.eta2 for one in decompose(y + rng.normal(0, sd, len(y)), factors, terms=terms).terms]
        for _ in range(n_bootstrap)
    ]
    return _bounded(found, drawn)


def omega_squared(eta2: float, df: int, eta2_residual: float, df_residual: int) -> float:
    """From shares as papers print them: both sums of squares over the total."""
    if df_residual < 1:
        raise ValueError(f"without residual degrees of freedom there is no omega^2: got {df_residual}.")
    ms = eta2_residual / df_residual
    return (eta2 - df * ms) / (1 + ms)


def interactions(factors: Sequence[str]) -> list[str]:
    """All factors, and all pairs of them."""
    return [*factors, *(f"{a}:{b}" for a, b in combinations(factors, 2))]


# -- helpers


def _check(y: Array, factors: Mapping[str, Sequence[Any]], terms: Sequence[str]) -> None:
    if not np.isfinite(y).all():
        raise ValueError(f"{int((~np.isfinite(y)).sum())} of {len(y)} values are not finite: leave those rows out.")
    for name, levels in factors.items():
        if len(levels) != len(y):
            raise ValueError(f"factor {name!r} has {len(levels)} levels for {len(y)} values: one each.")
        if len(set(levels)) < 2:
            raise ValueError(f"factor {name!r} has one level only: it can account for nothing. Leave it out.")
    for term in terms:
        for name in term.split(":"):
            if name not in factors:
                raise KeyError(f"term {term!r}: there is no factor {name!r}. There are {', '.join(factors)}.")


def _contrasts(levels: Sequence[Any]) -> Array:
    """Sum-to-zero coding, a column less than levels: main effects then mean the same beside interactions."""
    names = list(dict.fromkeys(levels))
    out = np.zeros((len(levels), len(names) - 1))
    for row, level in enumerate(levels):
        place = names.index(level)
        out[row] = -1.0 if place == len(names) - 1 else np.eye(len(names) - 1)[place]
    return out


def _bounded(found: Decomposition, drawn: Sequence[Sequence[float]]) -> Decomposition:
    low, high = np.percentile(np.array(drawn), [2.5, 97.5], axis=0)
    bounded = [replace(one, low=float(a), high=float(b)) for one, a, b in zip(found.terms, low, high, strict=True)]
    return replace(found, terms=tuple(bounded))


def _interaction(parts: list[Array]) -> Array:
    out = parts[0]
    for part in parts[1:]:
        out = (out[:, :, None] * part[:, None, :]).reshape(len(out), -1)
    return out


def _residual(y: Array, columns: Any) -> tuple[float, int]:
    """Sum of squares that is left, and the rank of what was fitted, the mean included."""
    design = np.concatenate([np.ones((len(y), 1)), *columns], axis=1)
    fitted, _, rank, _ = np.linalg.lstsq(design, y - y.mean(), rcond=1e-10)
    return float(np.square(y - y.mean() - design @ fitted).sum()), int(rank)


def _share(term: str, ss: float, df: int, total: float, ms: float) -> Share:
    f = ss / df / ms if df and ms > 0 else math.nan
    return Share(term, ss, df, _over(ss, total), _over(ss - df * ms, total + ms), f)


def _over(a: float, b: float) -> float:
    return a / b if b > 0 else math.nan


def _is_balanced(factors: Mapping[str, Sequence[Any]], terms: Sequence[str]) -> bool:
    """Every combination of levels as often as any other."""
    used = [factors[name] for name in dict.fromkeys(name for term in terms for name in term.split(":"))]
    counts: dict[tuple[Any, ...], int] = {}
    for cell in zip(*used, strict=True):
        counts[cell] = counts.get(cell, 0) + 1
    return len(set(counts.values())) == 1 and len(counts) == math.prod(len(set(levels)) for levels in used)
