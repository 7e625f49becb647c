import numpy as np
import pytest
import scipy.stats

from vitrail.metrics.measured import Measured, all_paired, over_images, paired


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


def test_a_paired_difference_by_hand():
    # Errors of two coders on three images, 1, 2, 6 and 2, 3, 7: means 3 and 4. Whichever images are drawn, the second
    # is one more: the difference is -1 without any spread, while each mean has a wide interval.
    one, two = (
        over_images({"x": np.array(x), "n": np.ones(3)}, mean, definition="d") for x in ([1.0, 2, 6], [2.0, 3, 7])
    )
    found = paired(one, two)
    assert (found.value, found.low, found.high, found.n) == pytest.approx((-1, -1, -1, 3))
    assert one.high - one.low > 2
    assert found.definition == "d; paired"


def test_the_paired_interval_is_scipys_paired_bootstrap():
    rng = np.random.default_rng(0)
    shared = rng.normal(0, 3, size=300)
    a, b = shared + rng.normal(0.5, 1, 300), 0.8 * shared + rng.normal(0, 1, 300)
    one, two = (
        over_images({"x": x, "n": np.ones(300)}, mean, definition="d", n_bootstrap=4000, seed=3) for x in (a, b)
    )
    found = paired(one, two)
    witness = scipy.stats.bootstrap(
        (a, b), lambda x, y, axis: x.mean(axis) - y.mean(axis), paired=True, vectorized=True, method="percentile",
        n_resamples=4000, rng=1,
    ).confidence_interval  # fmt: skip
    assert found.value == pytest.approx(a.mean() - b.mean())
    assert found.low == pytest.approx(witness.low, abs=0.02)
    assert found.high == pytest.approx(witness.high, abs=0.02)
    # Unpaired it would be far wider: the images that are hard for one are hard for the other.
    assert found.high - found.low < 0.6 * np.hypot(one.high - one.low, two.high - two.low)


def test_what_is_not_over_the_same_resamples_has_no_paired_interval():
    def over(n, **options):
        return over_images({"x": np.arange(n, dtype=float), "n": np.ones(n)}, mean, **{"definition": "d", **options})

    own = over(5)
    assert paired(own, over(5)) is not None
    for other in (over(6), over(5, definition="e"), over(5, seed=1), over(5, n_bootstrap=10), Measured(2.0, "d", 5)):
        assert paired(own, other) is None
        assert paired(other, own) is None
    assert set(all_paired({"a": own, "b": own, "c": own}, {"a": over(5), "b": over(6)})) == {"a"}


def test_draws_stay_in_memory_and_out_of_comparisons():
    measured = over_images({"x": np.arange(4.0), "n": np.ones(4)}, mean, definition="d")
    assert set(measured.to_json()) == {"value", "definition", "n", "low", "high"}
    assert Measured(**measured.to_json()) == measured
