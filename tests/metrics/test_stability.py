"""Stability: matchings by hand and by all permutations, floors against each other and the published numbers."""

import csv
import sys
from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr

from vitrail.coders import TopK
from vitrail.metrics.stability import (
    Directions,
    Stability,
    above_floor,
    limit_floor,
    match_directions,
    random_floor,
)


def rows(n, d, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def test_by_hand():
    # Two coders of two latents in the plane. Decoders: the axes, and (.6, .8), (0, -1) times 3.
    # 1-1 and 2-2: .6 - 1; 1-2 and 2-1: 0 + .8, the better: mean .4.
    a, b = torch.eye(2), torch.tensor([[0.6, 0.8], [0.0, -3.0]])
    matched = match_directions(a, b)
    assert matched.mean == pytest.approx(0.4)
    assert (matched.a.tolist(), matched.b.tolist()) == ([0, 1], [1, 0])
    # Only the pair (second, first) exceeds .7 in the decoder; its encoder cosine is 1 in one case, 0 in the other.
    agree = Stability([Directions(a, a), Directions(b, a.flip(0))]).pairs[0]
    assert (agree.shared, agree.encoder) == (0.5, 1.0)
    differ = Stability([Directions(a, a), Directions(b, a)]).pairs[0]
    assert (differ.shared, differ.encoder) == (0.0, 1.0)
    assert above_floor(0.4, 0.1) == pytest.approx(1 / 3)


@given(n_a=st.integers(1, 5), n_b=st.integers(1, 5), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_no_other_matching_is_better(n_a, n_b, seed):
    a, b = rows(n_a, 3, seed), rows(n_b, 3, seed + 100)
    cosines = torch.cosine_similarity(a[:, None], b[None], dim=2).numpy()
    small = cosines if n_a <= n_b else cosines.T
    m, n = small.shape
    best = max(sum(small[i, j] for i, j in enumerate(chosen)) / m for chosen in permutations(range(n), m))
    assert match_directions(a, b).mean == pytest.approx(best, abs=1e-6)
    assert match_directions(a, b, exact=False).mean == pytest.approx(best, abs=1e-6)  # here all are near


def test_the_matching_of_nearest_ones_is_never_better_and_hardly_worse():
    known = rows(200, 32)
    for a, b in (
        (known, (known + 0.15 * rows(200, 32, 1))[torch.randperm(200)]),  # seeds that found the same
        (rows(300, 32, 2), rows(300, 32, 3)),  # nothing in common
        (rows(150, 32, 4), rows(300, 32, 5)),
    ):
        exact, near = match_directions(a, b).mean, match_directions(a, b, exact=False).mean
        assert exact - 0.005 < near <= exact + 1e-6
        few = match_directions(a, b, exact=False, n_nearest=2)  # most find no partner among two: greedy pairs remain
        assert len(set(few.a.tolist())) == len(set(few.b.tolist())) == min(len(a), len(b))
        assert few.mean <= near + 1e-6


def test_floors_agree_and_are_the_published_ones():
    for n, d in ((64, 16), (256, 64)):
        assert 0.97 * (drawn := random_floor(n, n, d)) < limit_floor(n, d) < drawn
    assert random_floor(256, 256, 768) == pytest.approx(0.097, abs=0.003)
    assert limit_floor(1024, 768) == pytest.approx(0.112, abs=0.0015)  # SPEC, section M, by matching: 0.112 and 0.130
    assert limit_floor(6144, 768) == pytest.approx(0.130, abs=0.0015)


def test_the_floor_of_1024_directions():
    assert random_floor(1024, 1024, 768) == pytest.approx(0.112, abs=0.0015)


@pytest.mark.slow
def test_the_floor_of_6144_directions():
    assert random_floor(6144, 6144, 768) == pytest.approx(0.130, abs=0.001)


def test_coders_of_one_seed_are_the_same_and_of_others_at_the_floor():
    one, same, other = (TopK(d_in=24, d_sae=96, k=4, seed=seed) for seed in (0, 0, 1))
    found = Stability([one, same]).compute()
    assert found["stability_decoder"].value == pytest.approx(1, abs=1e-5)
    assert found["stability_shared"].value == 1
    assert found["stability_decoder_above_floor"].value == pytest.approx(1, abs=1e-5)
    assert found["stability_decoder"].low is None  # two coders: nothing to leave out
    found = Stability([one, other]).compute()
    assert found["stability_encoder_above_floor"].value == pytest.approx(0, abs=0.05)
    assert found["stability_shared"].value < 0.05


def test_three_coders_are_three_pairs_with_an_interval():
    coders = [TopK(d_in=12, d_sae=d_sae, k=4, seed=seed) for seed, d_sae in enumerate((20, 20, 30))]
    stability = Stability(coders)
    assert [(row["a"], row["b"], row["n"]) for row in stability.rows()] == [(0, 1, 20), (0, 2, 20), (1, 2, 20)]
    found = stability.compute()["stability_decoder"]
    assert found.n == 3
    values = np.array([row["stability_decoder"] for row in stability.rows()])
    # Without a coder one pair is left, so the jackknife's values are the pairs': half = 4.303 sqrt(2/3 sum dev^2).
    half = 4.3027 * np.sqrt(2 / 3 * np.square(values - values.mean()).sum())
    assert (found.low, found.high) == pytest.approx((values.mean() - half, values.mean() + half), rel=1e-4)
    assert found.definition == "hungarian, jackknife over coders"


def test_dead_directions_and_wrong_arguments():
    a = rows(5, 3)
    a[0] = 0
    assert np.isfinite(match_directions(a, rows(5, 3, 1)).mean)
    with pytest.raises(ValueError, match="two or more, of different seeds, got 1"):
        Stability([Directions(a, a)])
    with pytest.raises(ValueError, match="decoder directions of different spaces: 3, 4 dimensions"):
        Stability([Directions(a, a), Directions(rows(5, 4), a)])
    with pytest.raises(ValueError, match="two dimensions or more"):
        limit_floor(10, 1)


def test_without_scipy_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(ImportError, match=r"vitrail\[probes\]"):
        match_directions(rows(3, 2), rows(3, 2))


@pytest.mark.shared
def test_msaes_table_18_correlates_with_sparsity(shared_data):
    path = shared_data.parent / "reference/tables/msae_table18_stability.csv"
    with path.open(encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    sparsity, decoder, encoder = (
        [float(row[name]) for row in table] for name in ("L0_zero_fraction", "stability_decoder", "stability_encoder")
    )
    assert spearmanr(sparsity, decoder).statistic == pytest.approx(0.768, abs=0.0005)
    assert spearmanr(sparsity, encoder).statistic == pytest.approx(0.817, abs=0.0005)
    # d_sae = 6,144, d_in = 768: seven encoder scores lie below that of random directions.
    floor = limit_floor(6144, 768)
    below = [row["model"] for row, value in zip(table, encoder, strict=True) if value < floor]
    assert len(below) == 7
    assert all(value > floor for value in decoder)
