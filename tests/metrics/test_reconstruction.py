import numpy as np
import pytest
import torch
from torchmetrics.functional import r2_score

from vitrail.metrics.reconstruction import Reconstruction, explained_variance_mean_of_ratios, fvu


def test_fvu_by_hand():
    # rows (0, 0), (2, 0), (4, 6): mean (2, 2); squared distances 8, 4, 20 -> 32.
    # x_hat misses the last row by (0, 4): 16. FVU = 16 / 32.
    x = torch.tensor([[0.0, 0], [2, 0], [4, 6]])
    x_hat = torch.tensor([[0.0, 0], [2, 0], [4, 2]])
    assert fvu(x, x_hat) == 0.5


def test_the_mean_predictor_scores_one_and_perfection_zero():
    x = torch.randn(200, 5, generator=torch.Generator().manual_seed(0)) + 50
    assert fvu(x, x.mean(0).expand_as(x)) == pytest.approx(1, abs=1e-6)
    assert fvu(x, x) == 0
    assert fvu(3 * x + 7, 3 * (x + 0.1) + 7) == pytest.approx(fvu(x, x + 0.1), rel=1e-4)
    assert np.isnan(fvu(torch.ones(4, 2), torch.zeros(4, 2)))


@pytest.mark.parametrize("offset", [0.0, 300.0])
def test_streaming_equals_torchmetrics_and_sees_no_batches(offset):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(37, 5, 6, generator=generator) + offset * torch.arange(6.0)
    x_hat = x + 0.3 * torch.randn(37, 5, 6, generator=generator)
    flat, flat_hat = x.flatten(0, 1).double(), x_hat.flatten(0, 1).double()
    expected = float(r2_score(flat_hat, flat, multioutput="variance_weighted"))
    for cuts in ([37], [1, 30, 6]):
        streamed = Reconstruction(shift=x[:3].mean((0, 1)))
        for a, b in zip(x.split(cuts), x_hat.split(cuts), strict=True):
            streamed.update(a, b)
        measured = streamed.compute(n_bootstrap=50)
        assert measured["explained_variance"].value == pytest.approx(expected, abs=1e-6)
        assert measured["fvu"].value == pytest.approx(1 - expected, abs=1e-6)
        cosine = torch.cosine_similarity(flat, flat_hat, dim=-1).mean()
        assert measured["cosine"].value == pytest.approx(float(cosine), abs=1e-6)
        assert measured["fvu"].low < measured["fvu"].value < measured["fvu"].high


def test_cosine_is_of_each_row_not_of_each_dimension():
    # x_hat is parallel to x row by row, at other lengths: every row's cosine is 1; over the token axis it would not be.
    x = torch.tensor([[[1.0, 0], [0, 1], [1, 1]]])
    x_hat = x * torch.tensor([1.0, 5, 0.1])[None, :, None]
    streamed = Reconstruction(shift=torch.zeros(2))
    streamed.update(x, x_hat)
    assert streamed.compute()["cosine"].value == pytest.approx(1, abs=1e-6)


def test_mean_of_ratios_is_another_number_and_has_its_own_name():
    # rows at distances 1, 1, 3, 3 from the mean 0, each missed by 1: ratio of sums 1 - 4/20;
    # mean of ratios: mean(0, 0, 8/9, 8/9) = 4/9
    x = torch.tensor([[1.0], [-1], [3], [-3]])
    x_hat = x + torch.tensor([[1.0], [-1], [1], [-1]])
    assert explained_variance_mean_of_ratios(x, x_hat) == pytest.approx(4 / 9)
    assert 1 - fvu(x, x_hat) == pytest.approx(1 - 4 / 20)
