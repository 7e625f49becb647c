"""Pareto fronts by hand and by comparing all pairs; hypervolume against a count of cells."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vitrail.metrics.pareto import Family, at_equal, compare, hypervolume, pareto_front

POINTS = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=12)
BETTER = st.tuples(st.sampled_from(["lower", "higher"]), st.sampled_from(["lower", "higher"]))


def test_by_hand():
    # L0 lower, EVR higher: (30, .7) loses to (20, .8); (40, .8) to (20, .8).
    points = [(40.0, 0.9), (20.0, 0.8), (30.0, 0.7), (10.0, 0.5), (40.0, 0.8)]
    assert pareto_front(points) == [3, 1, 0]
    # From (50, 0): 40 wide and .5 high, 30 wide from .5 to .8, 10 wide from .8 to .9: 20 + 9 + 1.
    assert hypervolume(points, reference=(50, 0)) == pytest.approx(30)
    assert hypervolume(points, reference=(10, 0)) == 0  # nothing is sparser
    assert hypervolume([], reference=(1, 1)) == 0


@given(points=POINTS, better=BETTER)
@settings(max_examples=80, deadline=None)
def test_the_front_is_what_no_other_point_beats(points, better):
    def beats(one, other):
        costs = [
            [value if which == "lower" else -value for value, which in zip(p, better, strict=True)]
            for p in (one, other)
        ]
        return all(a <= b for a, b in zip(*costs, strict=True)) and costs[0] != costs[1]

    alive = {point for point in points if not any(beats(other, point) for other in points)}
    front = pareto_front(points, better=better)
    assert {points[at] for at in front} == alive
    assert len(front) == len(alive)


@given(points=POINTS, better=BETTER)
@settings(max_examples=80, deadline=None)
def test_the_area_is_the_number_of_cells_that_a_point_dominates(points, better):
    reference = tuple(8 if which == "lower" else 1 for which in better)
    cells = 0
    for x in range(-1, 11):
        for y in range(-1, 11):
            centre = (x + 0.5, y + 0.5)
            inside = all(c < r if w == "lower" else c > r for c, r, w in zip(centre, reference, better, strict=True))
            cells += inside and any(
                all(p < c if w == "lower" else p > c for p, c, w in zip(point, centre, better, strict=True))
                for point in points
            )
    assert hypervolume(points, reference=reference, better=better) == cells


def test_values_at_equal_l0():
    family = Family(x=[64, 16, 16], y=[0.9, 0.4, 0.6])  # two seeds at 16: .5
    assert at_equal(family, 16) == pytest.approx(0.5)
    assert at_equal(family, 32) == pytest.approx(0.7)  # half-way in log L0
    assert at_equal(family, 64) == pytest.approx(0.9)
    for x in (15.9, 65, 0, -3):
        with pytest.raises(ValueError, match="outside of what was measured, 16..64"):
            at_equal(family, x)


@given(
    y=st.lists(st.floats(0, 1), min_size=2, max_size=6, unique=True),
    at=st.lists(st.floats(0, 1), min_size=2, max_size=6),
)
@settings(max_examples=50, deadline=None)
def test_what_rises_is_interpolated_by_what_rises(y, at):
    family = Family(x=[2.0**i for i in range(len(y))], y=sorted(y))
    values = [at_equal(family, 2 ** (share * (len(y) - 1))) for share in sorted(at)]
    assert all(a <= b + 1e-12 for a, b in zip(values, values[1:], strict=False))
    assert min(y) <= min(values) <= max(values) <= max(y)


def test_two_families_are_compared_where_both_were_measured():
    a = Family(x=[8, 32, 128], y=[0.3, 0.7, 0.8])
    b = Family(x=[16, 64], y=[0.4, 0.6])
    found = compare(a, b)
    assert found.at == pytest.approx([16, 32, 64])
    # a: .5, .7, .75; b: .4, .5, .6
    assert [one.value for one in found.differences] == pytest.approx([0.1, 0.2, 0.15])
    assert found.mean.value == pytest.approx((0.15 + 0.175) / 2)
    assert found.mean.low is None
    slow = [at_equal(a, 2**e) - at_equal(b, 2**e) for e in np.linspace(4, 6, 4001)]
    assert found.mean.value == pytest.approx(np.mean(slow), abs=1e-3)
    with pytest.raises(ValueError, match=r"measured at 8..128 and at 200..300: they share no x"):
        compare(a, Family(x=[200, 300], y=[1, 2]))
    assert compare(a, Family(x=[32], y=[0.6])).mean.value == pytest.approx(0.1)  # one L0 in common


def test_paired_resamples_give_the_interval_of_the_difference():
    rng = np.random.default_rng(0)
    luck = rng.normal(0, 0.1, (1, 400))  # of the images, the same for both
    ours, theirs = np.array([[0.5], [0.7]]), np.array([[0.4], [0.6]])
    paired = compare(
        Family([10, 20], ours[:, 0].tolist(), ours + luck), Family([10, 20], theirs[:, 0].tolist(), theirs + luck)
    ).mean
    assert (paired.low, paired.high) == pytest.approx((0.1, 0.1))
    assert paired.definition == "matched-log-x, paired"
    other = rng.normal(0, 0.1, (1, 400))
    loose = compare(
        Family([10, 20], ours[:, 0].tolist(), ours + luck), Family([10, 20], theirs[:, 0].tolist(), theirs + other)
    ).mean
    assert loose.low < 0 < 0.1 < loose.high


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="point 1 is"):
        pareto_front([(1.0, 2.0), (math.nan, 1.0)])
    with pytest.raises(ValueError, match="must be positive"):
        at_equal(Family([0, 1], [1, 2]), 1)
    with pytest.raises(ValueError, match="as many values of x as of y"):
        at_equal(Family([1, 2], [1]), 1)
    with pytest.raises(ValueError, match="leave out the coders that have none"):
        at_equal(Family([1, 2], [1, math.nan]), 1)
    with pytest.raises(ValueError, match="resampled values of 3 coders, but there are 2"):
        at_equal(Family([1, 2], [1, 2], np.zeros((3, 5))), 1)
