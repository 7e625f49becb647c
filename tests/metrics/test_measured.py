import numpy as np
import pytest
import scipy.stats

from vitrail.metrics.measured import Measured, over_images


def mean(c):
    return c["x"] / c["n"]


def test_the_interval_of_a_mean_is_scipys():
    x = np.random.default_rng(0).normal(2, 1, size=400)
    measured = over_images({"x": x, "n": np.ones(400)}, mean, definition="d", n_bootstrap=4000)
    witness = scipy.stats.bootstrap((x,), np.mean, method="percentile", n_resamples=4000, rng=1).confidence_interval
    assert measured.value == pytest.approx(x.mean())
    assert measured.low == pytest.approx(witness.low, abs=0.02)
    assert measured.high == pytest.approx(witness.high, abs=0.02)


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    rng, covered = np.random.default_rng(1), 0
    for trial in range(200):
        x = rng.exponential(1.0, size=100)
        m = over_images({"x": x, "n": np.ones(100)}, mean, definition="d", n_bootstrap=300, seed=trial)
        covered += m.low <= 1.0 <= m.high
    assert 176 <= covered <= 199  # 95 % nominal; a percentile bootstrap of a skewed mean covers a little less


def test_one_image_has_no_interval_and_none_has_no_number():
    one = over_images({"x": np.array([3.0]), "n": np.ones(1)}, mean, definition="d")
    assert (one.value, one.low, one.high) == (3.0, None, None)
    with pytest.raises(ValueError, match="no images were measured"):
        over_images({"x": np.zeros(0), "n": np.zeros(0)}, mean, definition="d")


def test_a_ratio_without_a_denominator_is_null_not_a_number():
    measured = over_images({"x": np.ones(3), "n": np.zeros(3)}, mean, definition="d")
    assert measured.to_json()["value"] is None
    assert Measured(value=float("nan"), definition="d", n=1).to_json()["value"] is None
