"""Normalisations: numbers worked by hand, and the way back."""

import math

import pytest
import torch
from coder_examples import rows

from vitrail.coders.normalize import NORMALIZATIONS, make_normalization
from vitrail.statistics import ActivationStats

# Mean (3, 0). Deviations (-1, 0), (1, 0), (0, -2), (0, 2).
# Var = (2/4, 8/4) = (0.5, 2); scalar variance (0.5 + 2) / 2 = 1.25.  E||x - mean|| = (1 + 1 + 2 + 2) / 4 = 1.5.
X = torch.tensor([[2.0, 0.0], [4.0, 0.0], [3.0, -2.0], [3.0, 2.0]])
CENTRED = torch.tensor([[-1.0, 0.0], [1.0, 0.0], [0.0, -2.0], [0.0, 2.0]])
BY_HAND = {
    "none": X,
    "mean_std": CENTRED / math.sqrt(1.25),
    "mean_norm": CENTRED / (1.5 / math.sqrt(2)),
    "msae_code": CENTRED / (2.5 / math.sqrt(2)),  # E||x - mean||^2 = (1 + 1 + 4 + 4) / 4 = 2.5
    # Row (2, 0): mean 1, unbiased sd sqrt((1 + 1) / 1) = 2 / sqrt 2.  Means 1, 2, 0.5, 2.5; sds 2, 4, 5, 1 over sqrt 2.
    "layer_norm": torch.tensor([[1.0, -1.0], [2.0, -2.0], [2.5, -2.5], [0.5, -0.5]])
    / (torch.tensor([[2.0], [4.0], [5.0], [1.0]]) / math.sqrt(2) + 1e-5),
    "row_norm": X * math.sqrt(2) / torch.tensor([[2.0], [4.0], [math.sqrt(13)], [math.sqrt(13)]]),
}


def test_every_normalisation_is_worked_by_hand():
    assert set(BY_HAND) == set(NORMALIZATIONS)


@pytest.mark.parametrize("name", sorted(NORMALIZATIONS))
def test_it_gives_the_number_worked_by_hand(name):
    normalize = make_normalization(name, d_in=2)
    normalize.fit(ActivationStats.of(X))
    torch.testing.assert_close(normalize(X).y, BY_HAND[name])


@pytest.mark.parametrize("name", sorted(NORMALIZATIONS))
def test_the_way_back_is_exact(name):
    x = rows(50).double()
    normalize = make_normalization(name, d_in=x.shape[1]).double()
    normalize.fit(ActivationStats.of(x))
    y, shift, scale = normalize(x)
    torch.testing.assert_close(normalize.invert(y, shift, scale), x, rtol=1e-12, atol=1e-12)
    assert (shift is not None) == normalize.per_row


def test_mean_norm_makes_the_mean_norm_the_root_of_the_width():
    x = rows(500)
    normalize = make_normalization("mean_norm", d_in=x.shape[1])
    normalize.fit(ActivationStats.of(x))
    assert normalize(x).y.norm(dim=1).mean().item() == pytest.approx(math.sqrt(x.shape[1]), rel=1e-5)


def test_mean_std_uses_one_scale_for_all_dimensions():
    x = rows(500)
    normalize = make_normalization("mean_std", d_in=x.shape[1])
    normalize.fit(ActivationStats.of(x))
    y = normalize(x).y
    assert y.var(0, unbiased=False).mean().item() == pytest.approx(1, rel=1e-5)
    assert y.var(0).max() > 3 * y.var(0).min()  # not one per dimension: that would change what is large


def test_rows_without_spread_stay_finite():
    flat = torch.tensor([[3.0, 3.0, 3.0], [0.0, 0.0, 0.0]])
    for name in ("layer_norm", "row_norm"):
        normalize = make_normalization(name, d_in=3)
        y, shift, scale = normalize(flat)
        assert y.isfinite().all()
        torch.testing.assert_close(normalize.invert(y, shift, scale), flat)


def test_what_cannot_be_normalised_is_named():
    same = torch.ones(4, 3)
    with pytest.raises(ValueError, match="every row is the same"):
        make_normalization("mean_std", d_in=3).fit(ActivationStats.of(same))
    with pytest.raises(ValueError, match=r"no normalisation 'zscore'. Known: none, mean_std"):
        make_normalization("zscore", d_in=3)
    with pytest.raises(ValueError, match=r"decode\(z, like=codes\)"):
        make_normalization("layer_norm", d_in=3).invert(same, None, None)
