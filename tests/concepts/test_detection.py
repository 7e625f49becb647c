"""Held-out detection."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score, roc_auc_score
from torch.nn.functional import normalize

from vitrail.coders.sparse import Codes
from vitrail.concepts.detection import (
    RIVAL,
    Detection,
    auc_draws,
    auc_of_ranks,
    best_concepts,
    best_words,
    class_f1s,
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
    positive = rng.random((40, 3)) < [0.4, 0.1, 0.9]
    weights = np.concatenate(list(resample_weights(40, 20, 0)))
    value, draws = auc_draws(scores, positive, np.ones((1, 40))), auc_draws(scores, positive, weights)
    for column in range(3):
        assert value[0, column] == pytest.approx(roc_auc_score(positive[:, column], scores))
        for row in range(20):
            assert draws[row, column] == pytest.approx(
                roc_auc_score(positive[:, column], scores, sample_weight=weights[row])
            )
    ranked = auc_of_ranks(mean_ranks(scores[:, None]), positive[:, 0])
    assert ranked[0] == pytest.approx(value[0, 0])
    assert roc_auc(scores[None], positive[None, :, 0])[0][0] == pytest.approx(value[0, 0])


def test_auc_by_hand():
    # Positives at 2 and 3, negatives at 1, 2 and 2: of six pairs four are won, and two (2 against 2) count half.
    scores, positive = np.array([2.0, 3, 1, 2, 2]), np.array([[True], [True], [False], [False], [False]])
    assert auc_draws(scores, positive, np.ones((1, 5)))[0, 0] == pytest.approx(5 / 6)
    # The picture at 3 drawn twice and the one at 1 never: pairs 2 x (2 and 2) won, 1 x (2 and 2) half: 5 of 6.
    # Without positives there is no AUC.
    drawn = auc_draws(scores, positive, np.array([[1.0, 2, 0, 1, 1], [0, 0, 2, 2, 1]]))
    assert drawn[0, 0] == pytest.approx(5 / 6)
    assert np.isnan(drawn[1, 0])


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


def test_latents_of_one_name_are_measured_as_each_would_be_alone():
    codes, embeddings = planted()
    axis = torch.eye(8)
    latents, names, rivals = np.array([1, 0, 2, 1, 0]), axis[[0, 3, 0, 3, 0]], axis[[1, 0, 0, 5, 6]]
    together = detect(codes, embeddings, latents, names, axis, rivals=rivals, n_bootstrap=50)
    for at_once in (1, 2):
        assert detect(codes, embeddings, latents, names, axis, rivals=rivals, n_bootstrap=50, at_once=at_once) == (
            together
        )
    for at in range(5):
        one = slice(at, at + 1)
        alone = detect(codes, embeddings, latents[one], names[one], axis, rivals=rivals[one], n_bootstrap=50)
        assert alone == together[one]
    fires = (codes.to_dense()[:, 0] > 0).numpy()
    assert together[1] is not None
    assert together[1].rival == pytest.approx(roc_auc_score(fires, embeddings[:, 0].numpy()))


def test_a_name_loses_to_a_better_word_but_not_to_a_synonym():
    far = Detection(0.8, 0.75, 0.85, 0.5, 0.4, 0.6, 20)
    assert far.found()  # 0.75 > 0.6 + 0.05
    assert not replace(far, rival=0.8 + 2 * RIVAL).found()
    assert replace(far, rival=0.8 + RIVAL / 2).found()
    assert not replace(far, rival=0.5).found(margin=0.2)


def test_the_best_word_is_that_of_a_slow_loop():
    generator = torch.Generator().manual_seed(3)
    z = (torch.rand(50, 4, generator=generator) < 0.3).float()
    z[:, 3] = 0
    embeddings, words = (normalize(torch.randn(n, 5, generator=generator), dim=1) for n in (50, 7))
    latents, barred = np.array([2, 0, 1, 3, 0]), [[], [], [4], [], list(range(7))]
    expected = []
    for latent, out in zip(latents.tolist(), barred, strict=True):
        aucs = [
            -1.0 if word in out else roc_auc_score(z[:, latent].numpy(), (embeddings @ words[word]).numpy())
            for word in range(7)
            if latent != 3
        ]
        expected.append(int(np.argmax(aucs)) if aucs and max(aucs) >= 0 else -1)
    codes = Codes.from_dense(z)
    assert expected[3:] == [-1, -1]  # a silent one; one to which every word is barred
    for at_once in (1, 3, 256):
        np.testing.assert_array_equal(best_words(codes, embeddings, latents, words, barred, at_once=at_once), expected)


def test_firing_above_a_threshold_and_the_best_concept_by_hand():
    codes = Codes.from_dense(torch.tensor([[1.0, 0], [4.0, 2], [3.0, 0], [0, 2]]))
    np.testing.assert_array_equal(largest(codes), [4, 2])
    kept = firing(codes, 0.5 * largest(codes))
    np.testing.assert_array_equal(kept.to_dense() > 0, [[False, False], [True, True], [True, False], [False, True]])
    truth = Truth.of_concepts(("colour:red", "colour:blue"), [["colour:blue"], ["colour:red"], ["colour:red"], []])
    # Latent 0 above 1 is red: F1 1. Latent 1 is red in one of its two: F1 1/2, below "always" (2 p / (1 + p) = 2/3).
    assert best_concepts(codes, truth, [0, 1]) == {0: "colour:red", 1: None}


def test_the_f1_of_a_class_by_hand():
    # Latent 0 on the naming pictures: 3 and 2 on class 0, 1 on class 1: best threshold 1. On held-out pictures, above 1
    # are two of class 0, one of class 1, and a third of class 0 is below: F1 = 2 * 2 / (3 + 3).
    naming = Codes.from_dense(torch.tensor([[3.0, 0], [2, 1], [1, 0], [9, 9]]))
    trying = Codes.from_dense(torch.tensor([[5.0, 0], [4, 0], [2, 3], [0.5, 2], [7, 0]]))
    label, held_out = np.array([0, 0, 1, -1]), np.array([0, 0, 1, 0, -1])
    f1 = class_f1s(naming, label, trying, held_out, np.array([0, 0, 1]), np.array([0, 2, 1]))
    assert f1[0] == pytest.approx(4 / 6)
    assert np.isnan(f1[1]), "no held-out picture has class 2"
    threshold = 0.0  # latent 1 fires on one picture of class 0: for class 1 nothing is better than to let all in
    says = (trying.to_dense()[:4, 1] > threshold).numpy()
    assert f1[2] == pytest.approx(f1_score(held_out[:4] == 1, says))


def test_a_class_must_be_most_of_what_fires():
    seen = Detection(0.95, 0.93, 0.97, 0.5, 0.3, 0.7, 40, rival=0.9)
    assert seen.found()
    assert replace(seen, class_f1=0.5).found()
    assert not replace(seen, class_f1=0.49).found(), "a latent of crescents is not one of checked crescents"
    assert not replace(seen, class_f1=float("nan")).found(), "no held-out picture has the class"
