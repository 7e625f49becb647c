import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from vitrail.statistics import ActivationStats, Moments


def test_two_rows_by_hand():
    # rows (3, 4) and (-3, 4): mean (0, 4), variance (9, 0), norms 5 and 5, centred norms 3 and 3, s = sqrt(4.5)
    stats = ActivationStats.of(torch.tensor([[3.0, 4.0], [-3.0, 4.0]]))
    assert stats.mean.tolist() == [0, 4]
    assert stats.variance.tolist() == [9, 0]
    assert (stats.mean_norm, stats.max_norm, stats.centred_norm, stats.n) == (5, 5, 3, 2)
    assert stats.scalar_std == pytest.approx(4.5**0.5, rel=1e-12)


@settings(max_examples=50, deadline=None)
@given(cuts=st.lists(st.integers(0, 200), max_size=4), seed=st.integers(0, 1000))
def test_merging_any_split_equals_numpy(cuts, seed):
    x = np.random.default_rng(seed).normal(1000, 1e-2, size=(200, 3))  # a mean that fp32 sums would drown in
    edges = [0, *sorted(cuts), 200]
    whole = Moments()
    for start, stop in zip(edges, edges[1:], strict=False):
        part = Moments()
        part.update(torch.from_numpy(x[start:stop]))
        whole.merge(Moments.from_json(part.to_json()))
    np.testing.assert_allclose(whole.mean().numpy(), x.mean(0), rtol=1e-12)
    np.testing.assert_allclose(whole.variance().numpy(), x.var(0), rtol=1e-8)


def test_json_round_trip_is_exact():
    stats = ActivationStats.of(torch.randn(50, 4, generator=torch.Generator().manual_seed(0)))
    again = ActivationStats.from_json(stats.to_json())
    assert torch.equal(stats.mean, again.mean)
    assert stats.to_json() == again.to_json()


def test_no_rows_have_no_mean():
    with pytest.raises(ValueError, match="no mean of nothing"):
        Moments().mean()
