"""Pareto fronts: coders compared at equal cost, and a whole family of them in one number.

    front         the points that no other beats or equals in both directions while beating it in one
    hypervolume   the area that the front dominates, up to a reference point: sum of (x_ref - x_i) (y_i - y_(i-1))
    at equal L0   y between the two nearest L0s, linear in log L0
    difference    mean over log L0, where both families were measured, of y_a - y_b

Range. The hypervolume is 0 where nothing is better than the reference, and at most the rectangle between it and the
best value of each axis; its unit is that of x times that of y. The difference has the unit of y.

Moves with. The reference point and the scale of x: give log L0 to count every halving alike. How densely a family was
trained: a front gains by more points alone, a value at equal L0 does not.

Does not show. What lies beyond the measured L0s: nothing is extrapolated. Nor that a front's points are the family's
best; each is one training run, with its own luck.

Source. Zitzler and Thiele 1998 (hypervolume); MSAE figures 2, 3, 11-13; SPEC rows 62 and 146.

Tags. "pareto": fronts and areas. "matched-log-x": values and differences at equal L0 (or parameters, or FLOPs).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float64, Int64

from vitrail.metrics.measured import Measured

Better = Literal["lower", "higher"]


def pareto_front(
    points: Sequence[tuple[float, float]], *, better: tuple[Better, Better] = ("lower", "higher")
) -> list[int]:
    """Which points are on the front, the best in the first direction first. Of equal points the first one.

    Raises ValueError if a coordinate is not a number.
    """
    x, y = _as_costs(points, better)
    front: list[int] = []
    best = np.inf
    for at in np.lexsort((y, x)):
        if y[at] < best:
            front.append(int(at))
            best = y[at]
    return front


def hypervolume(
    points: Sequence[tuple[float, float]],
    *,
    reference: tuple[float, float],
    better: tuple[Better, Better] = ("lower", "higher"),
) -> float:
    """Exact, in two dimensions. Points that are not better than the reference in both directions count for nothing."""
    x, y = _as_costs(points, better)
    (x_ref,), (y_ref,) = _as_costs([reference], better)
    inside = (x < x_ref) & (y < y_ref)
    area, height = 0.0, float(y_ref)
    for at in np.lexsort((y, x)):
        if inside[at] and y[at] < height:
            area += (float(x_ref) - float(x[at])) * (height - float(y[at]))
            height = float(y[at])
    return area


@dataclass(frozen=True, eq=False)
class Family:
    """Coders of one kind at several L0s (or numbers of parameters, or FLOPs): x, all positive, and what they reach.

    `resampled`: y under `b` resamples of the images; two families whose resamples are the same ones are compared as
    pairs. Points of equal x (seeds) are averaged.
    """

    x: Sequence[float]
    y: Sequence[float]
    resampled: Float64[np.ndarray, "m b"] | None = None

    def curve(self) -> tuple[Float64[np.ndarray, " knots"], Float64[np.ndarray, "columns knots"]]:
        """log x, ascending, and y there: first as measured, then under each resample."""
        if not self.x or len(self.x) != len(self.y):
            raise ValueError(
                f"a family needs as many values of x as of y, at least one; got {len(self.x)} and {len(self.y)}."
            )
        x, columns = np.asarray(self.x, dtype=np.float64), np.asarray(self.y, dtype=np.float64)[:, None]
        if not (np.isfinite(x).all() and (x > 0).all()):
            raise ValueError(f"x is taken to the logarithm and must be positive, got {x.tolist()}.")
        if self.resampled is not None:
            if len(self.resampled) != len(x):
                raise ValueError(f"resampled values of {len(self.resampled)} coders, but there are {len(x)}.")
            columns = np.concatenate([columns, self.resampled], axis=1)
        if not np.isfinite(columns[:, 0]).all():
            raise ValueError(f"y must be numbers, got {list(self.y)}: leave out the coders that have none.")
        knots, which = np.unique(np.log(x), return_inverse=True)
        sums = np.zeros((len(knots), columns.shape[1]))
        np.add.at(sums, which, columns)
        return knots, (sums / np.bincount(which)[:, None]).T


def at_equal(family: Family, x: float) -> float:
    """The family's value at x. Never beyond those of the two neighbours. Raises ValueError outside of what was
    measured."""
    knots, values = family.curve()
    return float(_interpolated(knots, values[:1], np.log([x]) if x > 0 else np.array([-np.inf]))[0, 0])


@dataclass(frozen=True, eq=False)
class Comparison:
    """Where both families were measured: `differences[i]` at `at[i]`, which are their own x; `mean` over log x."""

    at: list[float]
    differences: list[Measured]
    mean: Measured


def compare(a: Family, b: Family) -> Comparison:
    """a - b at equal x. Intervals are percentiles over the resamples, if both families have the same number of them.

    Raises ValueError if there is no x at which both were measured.
    """
    (knots_a, values_a), (knots_b, values_b) = a.curve(), b.curve()
    low, high = max(knots_a[0], knots_b[0]), min(knots_a[-1], knots_b[-1])
    if low > high:
        spans = [f"{np.exp(knots[0]):.4g}..{np.exp(knots[-1]):.4g}" for knots in (knots_a, knots_b)]
        raise ValueError(
            f"the families were measured at {spans[0]} and at {spans[1]}: they share no x. Train more of them."
        )
    if len(values_a) != len(values_b):
        values_a, values_b = values_a[:1], values_b[:1]
    knots = np.union1d(knots_a, knots_b)
    knots = knots[(knots >= low) & (knots <= high)]
    difference = _interpolated(knots_a, values_a, knots) - _interpolated(knots_b, values_b, knots)
    if high > low:
        width = np.diff(knots)
        mean = ((difference[:, 1:] + difference[:, :-1]) / 2 * width).sum(1) / width.sum()
    else:
        mean = difference[:, 0]
    n = len(knots)
    return Comparison(
        at=np.exp(knots).tolist(),
        differences=[_measured(column, 1) for column in difference.T],
        mean=_measured(mean, n),
    )


def _as_costs(
    points: Sequence[tuple[float, float]], better: tuple[Better, Better]
) -> tuple[Float64[np.ndarray, " n"], Float64[np.ndarray, " n"]]:
    """Both directions turned so that lower is better."""
    if not set(better) <= {"lower", "higher"}:
        raise ValueError(f"better must say 'lower' or 'higher' of each direction, got {better}.")
    values = np.asarray(points, dtype=np.float64).reshape(-1, 2)
    if np.isnan(values).any():
        bad = int(np.flatnonzero(np.isnan(values).any(1))[0])
        raise ValueError(f"point {bad} is {tuple(values[bad].tolist())}: leave out the coders that have no number.")
    signs = [1.0 if which == "lower" else -1.0 for which in better]
    return signs[0] * values[:, 0], signs[1] * values[:, 1]


def _interpolated(
    knots: Float64[np.ndarray, " knots"], values: Float64[np.ndarray, "columns knots"], at: Float64[np.ndarray, " m"]
) -> Float64[np.ndarray, "columns m"]:
    slack = 1e-9  # of exp(log(x))
    if (at < knots[0] - slack).any() or (at > knots[-1] + slack).any():
        outside = np.exp(at[(at < knots[0] - slack) | (at > knots[-1] + slack)][0])
        raise ValueError(
            f"{outside:.4g} lies outside of what was measured, {np.exp(knots[0]):.4g}..{np.exp(knots[-1]):.4g}: "
            "values are not extrapolated."
        )
    return np.stack([np.interp(at, knots, column) for column in values])


def _measured(column: Float64[np.ndarray, " b_plus_1"] | Int64[np.ndarray, " b"], n: int) -> Measured:
    value, resampled = float(column[0]), column[1:][np.isfinite(column[1:])]
    if not len(resampled):
        return Measured(value, "matched-log-x", n)
    low, high = np.percentile(resampled, [2.5, 97.5])
    return Measured(value, "matched-log-x, paired", n, float(low), float(high))
