"""Held-out detection."""

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch.nn.functional import normalize

from vitrail.coders.sparse import Codes
from vitrail.concepts.detection import (
    auc_of_ranks,
    best_concepts,
    bootstrapped_auc,
    detect,
    firing,
    largest,
    mean_ranks,
)
from vitrail.metrics.measured import resample_weights
from vitrail.metrics.sparse_probing import roc_auc
from vitrail.metrics.truth import Truth


def test_auc_is_scikit_learns_with_ties_and_in_resamples():
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 6, 40).astype(float)
    positive = rng.random(40) < 0.4
    weights = np.concatenate(list(resample_weights(40, 20, 0)))
    value, draws = bootstrapped_auc(scores, positive, weights)
    assert value == pytest.approx(roc_auc_score(positive, scores))
    for row in range(20):
        assert draws[row] == pytest.approx(roc_auc_score(positive, scores, sample_weight=weights[row]))
    ranked = auc_of_ranks(mean_ranks(scores[:, None]), positive)
    assert ranked[0] == pytest.approx(value)
    assert roc_auc(scores[None], positive[None])[0][0] == pytest.approx(value)


def test_auc_by_hand():
    # Positives at 2 and 3, negatives at 1, 2 and 2: of six pairs four are won, and two (2 against 2) count half.
    scores, positive = np.array([2.0, 3, 1, 2, 2]), np.array([True, True, False, False, False])
    assert bootstrapped_auc(scores, positive, None)[0] == pytest.approx(5 / 6)


def planted(n=200, seed=0):
    """Latent 0 fires where pictures lie along axis 0; latent 1 at random; latent 2 twice."""
    generator = torch.Generator().manual_seed(seed)
    shows = torch.arange(n) % 4 == 0
    embeddings = torch.randn(n, 8, generator=generator)
    embeddings[:, 0] += 4 * shows
    z = torch.zeros(n, 3)
    z[:, 0], z[:, 1] = shows * 1.0, torch.rand(n, generator=generator).round()
    z[:2, 2] = 1
    return Codes.from_dense(z), normalize(embeddings, dim=1)


def test_a_true_name_is_found_and_a_wrong_one_is_not():
    codes, embeddings = planted()
    random = normalize(torch.randn(50, 8, generator=torch.Generator().manual_seed(1)), dim=1)
    random[:, 0] = 0
    random = normalize(random, dim=1)
    axis = torch.eye(8)
    found = detect(codes, embeddings, np.array([0, 1, 2, 0]), axis[[0, 0, 0, 3]], random, n_bootstrap=200)
    right, noise, rare, wrong = found
    assert right is not None
    assert right.auc > 0.95
    assert right.found()
    assert right.low <= right.auc <= right.high
    assert right.n_fires == 50
    assert noise is not None
    assert not noise.found()
    assert abs(noise.auc - 0.5) < 0.12
    assert wrong is not None
    assert not wrong.found()
    assert rare is None  # fires in two pictures
    assert right.random == pytest.approx(0.5, abs=0.05)


def test_a_name_is_not_compared_with_itself_and_one_without_a_direction_is_not_measured():
    codes, embeddings = planted()
    axis = torch.eye(8)
    found = detect(codes, embeddings, np.array([0, 0]), axis[[0, 0]] * torch.tensor([[1.0], [0.0]]), axis[:3])
    assert found[0] is not None
    assert found[0].random_high < 0.75  # of axes 1 and 2 alone: with axis 0 among them it would be near 1
    assert found[1] is None


def test_firing_above_a_threshold_and_the_best_concept_by_hand():
    codes = Codes.from_dense(torch.tensor([[1.0, 0], [4.0, 2], [3.0, 0], [0, 2]]))
    np.testing.assert_array_equal(largest(codes), [4, 2])
    kept = firing(codes, 0.5 * largest(codes))
    np.testing.assert_array_equal(kept.to_dense() > 0, [[False, False], [True, True], [True, False], [False, True]])
    truth = Truth.of_concepts(("colour:red", "colour:blue"), [["colour:blue"], ["colour:red"], ["colour:red"], []])
    # Latent 0 above 1 is red: F1 1. Latent 1 is red in one of its two: F1 1/2, below "always" (2 p / (1 + p) = 2/3).
    assert best_concepts(codes, truth, [0, 1]) == {0: "colour:red", 1: None}
