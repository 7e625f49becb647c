"""Distances between dictionaries: by hand, against numpy's correlations, and under what must not matter."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vitrail.coders.sparse import Codes
from vitrail.metrics.dictionary import (
    correlations,
    cosines,
    match,
    matched_correlation,
    matched_cosine,
    mean_max_cosine,
)


def test_by_hand():
    true = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    found = torch.tensor([[3.0, 4.0], [0.0, -1.0], [0.0, 0.0]])
    torch.testing.assert_close(cosines(true, found), torch.tensor([[0.6, 0, 0], [0.8, -1, 0]], dtype=torch.float64))
    assert mean_max_cosine(true, found) == pytest.approx(0.7)  # both take the first
    # One to one: 0.8 for the second true direction, then 0 for the first, is better than 0.6 and 0.
    matching = matched_cosine(true, found)
    assert matching.mean == pytest.approx(0.4)
    assert matching.latent[1] == 0


def test_a_concept_without_a_latent_counts_as_nothing():
    matching = match(torch.tensor([[0.9], [0.8]], dtype=torch.float64))
    assert matching.latent.tolist() == [0, -1]
    assert matching.mean == pytest.approx(0.45)


@given(n=st.integers(1, 6), more=st.integers(0, 4), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_order_and_length_do_not_matter_and_the_true_dictionary_is_perfect(n, more, seed):
    generator = torch.Generator().manual_seed(seed)
    true, others = (torch.randn(m, 5, generator=generator) for m in (n, more))
    found = torch.cat([true * 7, others])[torch.randperm(n + more, generator=generator)]
    assert matched_cosine(true, found).mean == pytest.approx(1)
    assert mean_max_cosine(true, found) == pytest.approx(1)


def test_correlations_are_numpys():
    generator = torch.Generator().manual_seed(0)
    z, f = (torch.randn(50, m, generator=generator).relu() for m in (3, 6))
    f[:, 2], z[:, 1] = 0.0, 0.0  # never fires; never present
    with np.errstate(invalid="ignore"):
        slow = np.corrcoef(z.double().numpy().T, f.double().numpy().T)[:3, 3:]
    np.testing.assert_allclose(correlations(z, Codes.from_dense(f)), np.nan_to_num(slow), atol=1e-10)


def test_codes_in_another_order_and_scale_match_perfectly():
    z = torch.randn(40, 4, generator=torch.Generator().manual_seed(0)).relu()
    order = [2, 0, 3, 1]
    matching = matched_correlation(z, Codes.from_dense(3 * z[:, order]))
    assert matching.latent.tolist() == [order.index(i) for i in range(4)]
    assert matching.mean == pytest.approx(1)


def test_wrong_shapes_are_named():
    with pytest.raises(ValueError, match="directions of different spaces: 3 and 4 dimensions"):
        cosines(torch.ones(2, 3), torch.ones(2, 4))
    with pytest.raises(ValueError, match="5 rows of truth and 4 rows of codes"):
        correlations(torch.ones(5, 2), Codes.from_dense(torch.ones(4, 3)))
