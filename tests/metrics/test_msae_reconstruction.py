"""MSAE's three FVU, two cosines and their spreads: by hand, against numpy and torchmetrics, for every normalisation."""

import numpy as np
import pytest
import torch
from seen_examples import coder_of, same_in_two_batches, seen_by, setting_of, values

from vitrail.coders import make_coder
from vitrail.metrics.coder_space import in_coders_space, output_scale, row_terms
from vitrail.metrics.msae_reconstruction import MSAEReconstruction, fvu_msae_code, fvu_msae_loss, row_cosine
from vitrail.metrics.passing import Seen
from vitrail.metrics.reconstruction import fvu
from vitrail.statistics import ActivationStats


def rows(n=24, d=6, seed=0, offset=5.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=generator) + offset * torch.arange(float(d))


def test_three_definitions_of_one_error_by_hand():
    # Two rows about (10, 20): (11, 20) and (9, 20), each missed by (0, 1).
    # text: errors 1 + 1, about the mean 1 + 1: 1. loss: 1/521 and 1/481. code: var of (0, 1) is 1/4, var of (11, 20) is
    # 81/4 and of (9, 20) 121/4: 1/81 and 1/121.
    x = torch.tensor([[11.0, 20], [9, 20]])
    x_hat = x - torch.tensor([0.0, 1])
    assert fvu(x, x_hat) == pytest.approx(1)
    assert fvu_msae_loss(x, x_hat).tolist() == pytest.approx([1 / 521, 1 / 481])
    assert fvu_msae_code(x, x_hat).tolist() == pytest.approx([1 / 81, 1 / 121])


def test_metric_by_hand():
    coder = coder_of(4)
    x = torch.tensor([[[11.0, 20]], [[9, 20]]])
    codes = coder.encode_sparse(x.flatten(0, 1)).top(1)
    metric = MSAEReconstruction(setting_of(coder))
    metric.update(Seen(x=x, target=x, codes=codes, x_hat=x - torch.tensor([0.0, 1])))
    got = values(metric.compute(n_bootstrap=10))
    assert got["sparsity"] == pytest.approx(1 - 1 / 4)
    assert got["sparsity_std"] == 0
    assert got["fvu_msae_loss"] == pytest.approx((1 / 521 + 1 / 481) / 2)
    assert got["fvu_msae_loss_std"] == pytest.approx((1 / 481 - 1 / 521) / 2, rel=1e-4)
    assert got["fvu_msae_code"] == pytest.approx((1 / 81 + 1 / 121) / 2)
    assert got["fvu_std"] == 0  # both rows miss by 1


def test_mean_predictor_scores_one_by_the_text_and_far_less_by_the_code():
    x = rows(200)
    x_hat = x.mean(0).expand_as(x)
    assert fvu(x, x_hat) == pytest.approx(1)
    assert float(fvu_msae_code(x, x_hat).mean()) < 0.05


def test_spread_is_numpys_and_its_vectors_mean_is_fvu():
    coder = coder_of(12, 6, normalization="mean_std", k=2)
    x = rows(40).reshape(10, 4, 6)
    seen = seen_by(coder, x)
    metric = MSAEReconstruction(setting_of(coder, n_tokens=4))
    metric.update(seen)
    got = metric.compute(n_bootstrap=50)
    flat, flat_hat = x.flatten(0, 1).double(), seen.x_hat.flatten(0, 1).double()
    vector = (flat - flat_hat).square().sum(1) / (flat - flat.mean(0)).square().sum(1).mean()
    assert float(vector.mean()) == pytest.approx(fvu(flat, flat_hat), rel=1e-6)
    assert got["fvu_std"].value == pytest.approx(np.std(vector.numpy()), rel=1e-5)
    y, y_hat = (coder.normalize(each.float()).y for each in (flat, flat_hat))
    cosine = torch.cosine_similarity(y.double(), y_hat.double(), dim=1)
    assert got["cosine_normalized"].value == pytest.approx(float(cosine.mean()), abs=1e-6)
    assert got["cosine_normalized_std"].value == pytest.approx(np.std(cosine.numpy()), abs=1e-6)
    assert got["cosine_normalized"].low < got["cosine_normalized"].value < got["cosine_normalized"].high
    raw = torch.cosine_similarity(flat, flat_hat, dim=1)
    assert got["cosine_std"].value == pytest.approx(np.std(raw.numpy()), abs=1e-6)
    code = (flat - flat_hat).var(1) / flat.var(1)  # as MSAE's explained_variance_full
    assert got["fvu_msae_code"].value == pytest.approx(float(code.mean()), rel=1e-5)
    assert got["fvu_msae_code_std"].value == pytest.approx(np.std(code.numpy()), rel=1e-4)
    assert raw.mean() > got["cosine_normalized"].value  # the shared mean lifts it


@pytest.mark.parametrize("normalization", ["none", "mean_std", "mean_norm", "msae_code", "layer_norm", "row_norm"])
def test_coders_space_is_that_of_its_loss(normalization):
    coder = coder_of(12, 6, normalization=normalization, k=3)
    x = rows(9)
    codes = coder.encode_sparse(x)
    terms = row_terms(codes, slice(None))
    torch.testing.assert_close(in_coders_space(coder, x, terms), coder.normalize(x).y)
    y_hat = codes.to_dense() @ coder.W_dec + coder.b_dec  # what the loss compares with y
    torch.testing.assert_close(in_coders_space(coder, coder(x), terms), y_hat, rtol=1e-3, atol=1e-4)
    moved = coder.normalize.invert(y_hat + 1, codes.shift, codes.scale) - coder(x)
    torch.testing.assert_close(moved, output_scale(coder, terms).expand_as(moved), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("output_normalization", ["mean_std", "input_row"])
def test_a_transcoders_rows_are_normalised_as_it_writes_them(output_normalization):
    coder = make_coder(
        "topk_transcoder",
        d_in=6,
        d_out=5,
        d_sae=12,
        k=3,
        normalization="layer_norm",
        output_normalization=output_normalization,
    )
    pair = torch.cat([rows(30), rows(30, d=5, seed=1)], 1)
    coder.fit(ActivationStats.of(pair), pair)
    x, target = pair[:, :6], pair[:, 6:]
    terms = row_terms(coder.encode_sparse(x), slice(None))
    torch.testing.assert_close(in_coders_space(coder, target, terms), coder.normalized_pair(pair)[1])
    assert output_scale(coder, terms).shape == ((30, 1) if output_normalization == "input_row" else (1, 1))


def test_a_crosscoders_sources_each_have_their_scale():
    coder = make_coder("topk_crosscoder", d_in=6, d_sae=12, widths=[2, 4], k=3)
    x = rows(30) * torch.tensor([1.0, 1, 9, 9, 9, 9])
    coder.fit(ActivationStats.of(x), x)
    scale = output_scale(coder, None)
    assert scale.shape == (1, 6)
    torch.testing.assert_close(coder.normalize(x + scale).y - coder.normalize(x).y, torch.ones(30, 6))


def test_streaming_in_two_batches_equals_one():
    coder = coder_of(12, 6, normalization="layer_norm", k=2)
    x = rows(40).reshape(10, 4, 6)
    parts = [seen_by(coder, part) for part in x.split([3, 7])]
    same_in_two_batches(lambda: MSAEReconstruction(setting_of(coder, n_tokens=4)), seen_by(coder, x), parts)


def test_edges_one_image_no_codes_constant_rows():
    coder = coder_of(4)
    metric = MSAEReconstruction(setting_of(coder, n_tokens=2))
    x = torch.ones(1, 2, 2)
    codes = coder.encode_sparse(x[0]).keep(torch.zeros(4, dtype=torch.bool))
    metric.update(Seen(x=x, target=x, codes=codes, x_hat=torch.zeros_like(x)))
    got = values(metric.compute(n_bootstrap=5))
    assert got["sparsity"] == 1
    assert np.isnan(got["fvu_msae_code"])  # no row has any variance over its coordinates
    assert np.isnan(got["fvu_std"])
    assert got["fvu_msae_loss"] == 1
    with pytest.raises(ValueError, match="no images were measured"):
        MSAEReconstruction(setting_of(coder)).compute()


def test_row_cosine_is_torchs():
    a, b = rows(20), rows(20, seed=3)
    torch.testing.assert_close(
        row_cosine(a, b), torch.cosine_similarity(a.double(), b.double(), dim=1), atol=1e-6, rtol=0
    )
    assert row_cosine(torch.zeros(1, 3), torch.ones(1, 3)).item() == 0
