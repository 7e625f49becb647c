"""Planted rows: frequencies, correlation and hierarchy are what the dials say, and a coder finds the directions."""

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vitrail.coders import TopK
from vitrail.metrics.dictionary import matched_correlation, matched_cosine, mean_max_cosine
from vitrail.training import Planted, PlantedSource, Source, TrainConfig, train

SMALL = Planted(d_in=32, n_concepts=48, l0=4, seed=3)


def present(planted, n=40_000, seed=0):
    return planted.draw(n, torch.Generator().manual_seed(seed))[1] > 0


def test_rows_are_codes_times_directions():
    quiet = replace(SMALL, noise=0.0)
    x, z = quiet.draw(100, torch.Generator().manual_seed(0))
    torch.testing.assert_close(x, z @ quiet.directions)
    assert torch.allclose(quiet.directions.norm(dim=1), torch.ones(48))


@given(l0=st.floats(0.5, 20), skew=st.floats(0, 3))
@settings(max_examples=30, deadline=None)
def test_frequencies_sum_to_l0(l0, skew):
    frequencies = replace(SMALL, l0=l0, skew=skew).frequencies
    assert float(frequencies.sum()) == pytest.approx(l0, rel=1e-4)
    assert float(frequencies.min()) > 0
    assert float(frequencies.max()) <= 0.5
    assert bool((frequencies.diff() <= 1e-7).all())


@pytest.mark.parametrize("correlation", [0.0, 0.6])
def test_concepts_are_as_frequent_as_said(correlation):
    planted = replace(SMALL, skew=0.7, correlation=correlation)
    seen = present(planted).float().mean(0)
    assert (seen - planted.frequencies).abs().max() < 0.012  # five standard errors


def test_correlation_is_within_groups_and_that_of_the_copula():
    planted = replace(SMALL, l0=12, correlation=0.6)
    together = torch.corrcoef(present(planted, 100_000).double().t())
    same = (planted.groups[:, None] == planted.groups) & ~torch.eye(48, dtype=torch.bool)
    # P(both) of a Gaussian pair of correlation 0.6 above the third quartile, by scipy's bivariate normal.
    from scipy.stats import multivariate_normal, norm

    q = norm.ppf(0.75)
    both = multivariate_normal(cov=[[1, 0.6], [0.6, 1]]).cdf([-q, -q])
    expected = (both - 1 / 16) / (3 / 16)
    assert together[same].mean().item() == pytest.approx(expected, abs=0.01)
    assert together[planted.groups[:, None] != planted.groups].abs().max() < 0.02


def test_a_child_never_comes_without_its_parent():
    strict = present(replace(SMALL, hierarchy=1.0)).reshape(-1, 12, 4)
    assert not bool((strict[..., 1:].any(-1) & ~strict[..., 0]).any())
    loose = present(replace(SMALL, hierarchy=0.5)).reshape(-1, 12, 4)
    only_one = loose[..., 1:].sum(-1) == 1
    # With one child there, the parent is brought along half of the time, or is there by itself (4 of 48).
    assert loose[..., 0][only_one].float().mean().item() == pytest.approx(0.5 + 0.5 / 12, abs=0.01)


def test_the_same_rows_every_time_and_others_every_epoch():
    def source():
        return PlantedSource(SMALL, n_rows=1000, batch_size=300)

    first, again = source(), source()
    assert isinstance(first, Source)
    epochs = [list(first), list(first)]
    assert [len(x) for x in epochs[0]] == [300, 300, 300, 100]
    assert all(torch.equal(a, b) for a, b in zip(epochs[0], again, strict=True))
    assert not torch.equal(epochs[0][0], epochs[1][0])
    assert not torch.equal(source().held_out(300)[0], epochs[0][0])
    assert first.identity == again.identity != PlantedSource(SMALL, n_rows=1000, batch_size=300, seed=1).identity


@pytest.mark.parametrize("after", [1, 3, 4, 5])
def test_it_goes_on_where_it_stood(after):
    whole, cut, resumed = (PlantedSource(SMALL, n_rows=1000, batch_size=300) for _ in range(3))
    expected = [*whole, *whole]
    taken = []
    while len(taken) < after:
        for x in cut:
            taken.append(x)
            if len(taken) == after:
                break
    resumed.load_state_dict(json.loads(json.dumps(cut.state_dict())))
    rest = [*resumed, *([] if after >= 4 else resumed)]
    assert len(taken) + len(rest) == 8
    assert all(torch.equal(a, b) for a, b in zip(expected, [*taken, *rest], strict=True))


def test_a_coder_finds_what_was_planted_and_an_untrained_one_does_not(tmp_path):
    planted = Planted(d_in=32, n_concepts=48, l0=3, seed=3)
    source = PlantedSource(planted, n_rows=400_000, batch_size=1000)
    coder = TopK(d_in=32, d_sae=64, k=3)
    x, z = source.held_out(5000)
    before = matched_cosine(planted.directions, coder.W_dec.detach()).mean
    train(coder, source, tmp_path, config=TrainConfig(lr=3e-3))
    found = matched_cosine(planted.directions, coder.W_dec.detach())
    assert before < 0.55
    assert found.mean > 0.95
    assert mean_max_cosine(planted.directions, coder.W_dec.detach()) >= found.mean
    assert matched_correlation(z, coder.encode_sparse(x).detach()).mean > 0.85


def test_bad_dials_are_named():
    for sentence, wrong in {
        "l0 must be above 0 and at most half of n_concepts=48, got 30": {"l0": 30},
        "correlation must be in 0..1, got 1.5": {"correlation": 1.5},
        "hierarchy must be in 0..1, got -1": {"hierarchy": -1},
        "noise must not be negative, got -0.1": {"noise": -0.1},
        "must be at least 1, got 32, 48 and 0": {"group_size": 0},
    }.items():
        with pytest.raises(ValueError, match=sentence):
            replace(SMALL, **wrong)
    with pytest.raises(ValueError, match="must be at least 1, got 0 and 3"):
        PlantedSource(SMALL, n_rows=0, batch_size=3)
