import numpy as np
import pytest
import torch
from scipy import stats
from seen_examples import coder_of, grid_of, same_in_two_batches, seen_codes, setting_of, values

from vitrail.metrics import l0_maps
from vitrail.metrics.l0_maps import L0Maps, centre_and_border, cls_trajectory, quantiles_of_counts, sign_flip_p
from vitrail.metrics.measured import Measured

H, W, D = 4, 5, 30


def setting(d_sae=D, **changes):
    given = {"n_tokens": 1 + H * W, "grid": grid_of(H, W), "cls_token": 0, "patches": slice(1, 1 + H * W)}
    return setting_of(coder_of(d_sae), **{**given, **changes})


def with_l0(l0, d_sae=D):
    """Dense codes of rows with so many latents each."""
    return (torch.arange(d_sae) < torch.as_tensor(l0).reshape(-1, 1)).float()


def some_l0(n=12, seed=0):
    return torch.randint(0, D, (n, 1 + H * W), generator=torch.Generator().manual_seed(seed))


def test_map_and_contrast_by_hand():
    # One image of 4 x 5: the centre, rows 1-2 of column 2 (patches wholly in 1.25 .. 3.75), has 9 latents, the ring 3,
    # what lies between 5, CLS 12: (9 - 3) / 6 = 1.
    centre, border = centre_and_border(H, W)
    assert centre.nonzero().tolist() == [[1, 2], [2, 2]]
    assert int(border.sum()) == 2 * W + 2 * (H - 2)
    l0 = torch.where(centre, 9, torch.where(border, 3, 5))
    metric = L0Maps(setting())
    metric.update(seen_codes(with_l0([12, *l0.flatten().tolist()]), 1 + H * W))
    got = values(metric.compute())
    assert got["l0_centre_border"] == pytest.approx(1)
    assert got["l0_centre_border_p"] == 1  # one image: either sign is as far
    assert got["l0_patches"] == pytest.approx(float(l0.double().mean()))
    assert got["l0_cls_share"] == pytest.approx(12 / float(l0.double().mean()))
    curves = metric.curves()
    assert [(row["row"], row["column"], row["mean"]) for row in curves["l0_map"]] == [
        (i, j, l0[i, j]) for i in range(H) for j in range(W)
    ]
    assert curves["l0_positions"][0]["kind"] == "cls"
    assert curves["l0_positions"][0]["mean"] == 12


def test_box_plots_are_numpys_quantiles():
    l0 = some_l0()
    metric = L0Maps(setting())
    metric.update(seen_codes(with_l0(l0), 1 + H * W))
    names = ("minimum", "low", "q1", "median", "q3", "high", "maximum")
    expected = np.quantile(l0.numpy(), [0, 0.05, 0.25, 0.5, 0.75, 0.95, 1], axis=0)
    for token, row in enumerate(metric.curves()["l0_positions"]):
        assert [row[name] for name in names] == pytest.approx(expected[:, token].tolist())


def test_very_wide_dictionaries_share_cells(monkeypatch):
    monkeypatch.setattr(l0_maps, "MOST_COUNTS", 10)
    l0 = some_l0()
    metric = L0Maps(setting())
    metric.update(seen_codes(with_l0(l0), 1 + H * W))
    medians = torch.tensor([row["median"] for row in metric.curves()["l0_positions"]])
    assert (medians - torch.from_numpy(np.median(l0.numpy(), axis=0))).abs().max() < 4  # cells of 4 counts
    assert values(metric.compute())["l0_patches"] == pytest.approx(float(l0[:, 1:].double().mean()))


def test_quantiles_of_one_number():
    assert quantiles_of_counts(torch.tensor([[0, 0, 1, 0]]), [0, 0.5, 1]).flatten().tolist() == [2, 2, 2]


@pytest.mark.parametrize("n", [3, 8, 13])
def test_p_is_scipys_exact_one(n):
    differences = np.random.default_rng(n).normal(0.5, 1, n)
    expected = stats.permutation_test(
        (differences,), np.sum, permutation_type="samples", n_resamples=np.inf, alternative="two-sided"
    ).pvalue
    assert sign_flip_p(differences) == pytest.approx(expected)


def test_p_of_many_images_is_near_the_t_tests():
    differences = np.random.default_rng(0).normal(0.2, 1, 200)
    assert sign_flip_p(differences) == pytest.approx(stats.ttest_1samp(differences, 0).pvalue, abs=0.01)
    assert sign_flip_p(np.ones(30)) == pytest.approx(1e-4, rel=0.01)
    assert sign_flip_p(np.zeros(30)) == 1


def test_centre_interval_contains_a_planted_contrast():
    centre, border = centre_and_border(14, 14)
    assert centre.sum() == 36  # rows and columns 4 .. 9
    assert not (centre & border).any()
    rates = torch.where(centre, 12.0, 8.0)
    generator = torch.Generator().manual_seed(0)
    l0 = torch.poisson(rates.flatten().expand(60, -1), generator=generator).long().clamp_max(D)
    metric = L0Maps(setting(n_tokens=196, grid=grid_of(14, 14, n_cls=0), cls_token=None, patches=slice(0, 196)))
    metric.update(seen_codes(with_l0(l0), 196))
    measured = metric.compute(n_bootstrap=200)
    assert measured["l0_centre_border"].low < 0.4 < measured["l0_centre_border"].high
    assert measured["l0_centre_border_p"].value < 0.001
    assert "l0_cls_share" not in measured


def test_equal_l0_everywhere_is_no_contrast():
    metric = L0Maps(setting())
    metric.update(seen_codes(with_l0(torch.full((20, 1 + H * W), 7)), 1 + H * W))
    got = values(metric.compute())
    assert got["l0_centre_border"] == 0
    assert got["l0_centre_border_p"] == 1


def test_streaming_in_two_batches_equals_one():
    z, t = with_l0(some_l0()), 1 + H * W
    same_in_two_batches(
        lambda: L0Maps(setting()), seen_codes(z, t), [seen_codes(z[: 5 * t], t), seen_codes(z[5 * t :], t)]
    )


def test_without_a_grid_or_a_centre_less_is_said():
    metric = L0Maps(setting_of(coder_of(D)))
    metric.update(seen_codes(with_l0([3])))
    assert metric.compute() == {}
    assert list(metric.curves()) == ["l0_positions"]
    two = L0Maps(setting(n_tokens=4, grid=grid_of(2, 2, n_cls=0), cls_token=None, patches=slice(0, 4)))
    two.update(seen_codes(with_l0([1, 2, 3, 4]), 4))
    assert list(two.compute()) == ["l0_patches"]
    silent = L0Maps(setting())
    silent.update(seen_codes(torch.zeros(1 + H * W, D), 1 + H * W))
    assert np.isnan(silent.compute()["l0_centre_border"].value)
    with pytest.raises(ValueError, match="no images were measured"):
        L0Maps(setting()).compute()


def test_trajectory_is_in_order_of_layers():
    measured = Measured(value=3.0, definition="count-active", n=2, low=1.0, high=4.0)
    rows = cls_trajectory({6: {"l0_cls": measured}, 2: {"l0_patches": measured}})
    assert [row["layer"] for row in rows] == [2, 6]
    assert rows[1]["l0_cls"] == 3.0
    assert rows[1]["l0_patches"] is None
    assert (rows[0]["l0_patches_low"], rows[0]["l0_patches_high"]) == (1.0, 4.0)
