"""Every k from one ranking and one decode, against the codes cut and decoded one k at a time."""

import numpy as np
import pytest
import torch
from seen_examples import coder_of, same_in_two_batches, seen_by, setting_of, values

from vitrail.coders import make_coder
from vitrail.coders.sparse import Codes
from vitrail.coders.transcoder import Transcoder
from vitrail.metrics import progressive, slabs
from vitrail.metrics.coder_space import in_coders_space, row_terms
from vitrail.metrics.passing import Seen
from vitrail.metrics.progressive import Progressive, k_grid, octave_weights, ranked_by_size
from vitrail.metrics.reconstruction import fvu
from vitrail.statistics import ActivationStats

D_IN, D_OUT, D_SAE = 6, 5, 20
CODERS = {
    "topk": {"k": 5, "normalization": "layer_norm"},
    "relu": {"normalization": "row_norm"},
    "batch_topk": {"k": 5},
    "matryoshka": {"ks": [2, 8], "soft_cap": 3.0},
    "topk_transcoder": {"d_out": D_OUT, "k": 5, "skip": True},
    "relu_transcoder": {"d_out": D_OUT, "normalization": "layer_norm", "output_normalization": "input_row"},
    "topk_crosscoder": {"widths": [2, 4], "k": 5},
}


def rows(n=30, d=D_IN, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed)) + torch.arange(float(d))


def shown(name, **changes):
    coder = make_coder(name, d_in=D_IN, d_sae=D_SAE, **{**CODERS[name], **changes})
    x = rows()
    target = rows(d=D_OUT, seed=1) if isinstance(coder, Transcoder) else x
    fit_on = torch.cat([x, target], 1) if isinstance(coder, Transcoder) else x
    coder.fit(ActivationStats.of(fit_on), fit_on)
    coder.calibrate([fit_on])
    with torch.no_grad():
        coder.b_dec.normal_(generator=torch.Generator().manual_seed(3))
        if isinstance(coder, Transcoder) and coder.W_skip is not None:
            coder.W_skip.normal_(std=0.1, generator=torch.Generator().manual_seed(4))
    return coder.eval(), seen_by(coder, x.reshape(10, 3, -1), target.reshape(10, 3, -1))


@pytest.mark.parametrize("cached", [10, 1 << 19])
@pytest.mark.parametrize("name", CODERS)
@torch.no_grad()
def test_each_k_is_the_codes_cut_and_decoded_on_their_own(name, cached, monkeypatch):
    monkeypatch.setattr(slabs, "VALUES_ON_CPU", cached)
    coder, seen = shown(name)
    x, target = seen.x.flatten(0, 1), seen.target.flatten(0, 1)
    metric = Progressive(setting_of(coder, n_tokens=3, shift=target.double().mean(0)))
    metric.update(seen)
    curve = metric.curves()["progressive"]
    assert [row["k"] for row in curve] == [1, 2, 4, 8, 16, 20]
    for row in curve:
        cut = seen.codes.top(row["k"])
        x_hat = coder.decode_sparse(cut, like=x) if isinstance(coder, Transcoder) else coder.decode_sparse(cut)
        assert row["fvu"] == pytest.approx(fvu(target, x_hat), rel=1e-4)
        assert row["cosine"] == pytest.approx(float(torch.cosine_similarity(target, x_hat, dim=1).mean()), abs=1e-5)
        terms = row_terms(cut, slice(None))
        y, y_hat = (in_coders_space(coder, each, terms) for each in (target, x_hat))
        expected = float(torch.cosine_similarity(y, y_hat, dim=1).mean())
        assert row["cosine_normalized"] == pytest.approx(expected, abs=1e-4)
        assert row["l0"] == pytest.approx(float(cut.l0().double().mean()))
        assert row["dead"] == int((cut.fired() == 0).sum())
        assert row["fvu_low"] <= row["fvu"] <= row["fvu_high"]
    last = fvu(target, seen.x_hat.flatten(0, 1))
    assert curve[-1]["fvu"] == pytest.approx(last, rel=1e-4)


def test_area_by_hand():
    # d_sae = 4: k = 1, 2, 4 lie one octave apart; the trapezoids give weights 1/4, 1/2, 1/4.
    assert k_grid(4) == [1, 2, 4]
    assert octave_weights([1, 2, 4]).tolist() == [0.25, 0.5, 0.25]
    assert k_grid(6) == [1, 2, 4, 6]
    assert octave_weights([1]).tolist() == [1]
    assert k_grid(1) == [1]
    coder = coder_of(4, k=4)
    with torch.no_grad():
        coder.W_dec.copy_(torch.tensor([[1.0, 0], [0, 1], [-1, 0], [0, -1]]))
        coder.W_enc.copy_(coder.W_dec.t())
    # (2, 1) needs both latents, (-2, -1) as well: variance 10; the largest alone leaves 1 + 1.
    x = torch.tensor([[[2.0, 1]], [[-2, -1]]])
    metric = Progressive(setting_of(coder))
    metric.update(seen_by(coder, x))
    assert [row["fvu"] for row in metric.curves()["progressive"]] == pytest.approx([0.2, 0, 0])
    assert values(metric.compute())["progressive_fvu"] == pytest.approx(0.25 * 0.2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("at_once", [3, 256])
def test_ranking_is_a_sort_of_each_row_ties_in_order(dtype, at_once, monkeypatch):
    monkeypatch.setattr(progressive, "ROWS_PER_SORT", at_once)
    generator = torch.Generator().manual_seed(0)
    z = torch.randint(-3, 4, (11, 9), generator=generator).to(dtype).relu()  # many ties, and silent rows
    z[4] = 0
    codes = Codes.from_dense(z)
    ranked = ranked_by_size(codes)
    assert torch.equal(ranked.to_dense(), z)
    for r in range(11):
        expected = sorted(((-float(v), i) for i, v in enumerate(z[r]) if v > 0))
        part = slice(int(ranked.offsets[r]), int(ranked.offsets[r + 1]))
        assert ranked.indices[part].tolist() == [i for _, i in expected]


def test_similarity_at_each_k_is_of_the_same_drawn_rows_whatever_the_batches():
    coder, seen = shown("relu")
    calls = []

    def similarity(x, codes):
        calls.append((x, codes))
        return float(codes.values.sum() / len(x))

    setting = setting_of(coder, n_tokens=3, n_images=10)
    metric = Progressive(setting, cknna=similarity, sample_rows=12)
    for part in seen.x.split([4, 6]):
        metric.update(seen_by(coder, part))
    curve = metric.curves()["progressive"]
    x, codes = calls[0]
    assert len(x) == codes.n == 12
    flat = seen.x.flatten(0, 1)
    drawn = [int((flat == row).all(1).nonzero()) for row in x]
    assert drawn == sorted(set(drawn))
    expected = [float(seen.codes.select_rows(torch.tensor(drawn)).top(k).values.sum() / 12) for k in metric.ks]
    assert [row["cknna"] for row in curve] == pytest.approx(expected)
    area = metric.compute(n_bootstrap=5)["progressive_cknna"]
    assert area.value == pytest.approx(float(np.dot(expected, octave_weights(metric.ks))))
    assert area.n == 12


def test_streaming_in_two_batches_equals_one():
    coder, seen = shown("topk")
    parts = [seen_by(coder, part) for part in seen.x.split([3, 7])]
    shift = seen.x.flatten(0, 1).double().mean(0)
    same_in_two_batches(lambda: Progressive(setting_of(coder, n_tokens=3, shift=shift)), seen, parts)


def test_no_codes_at_all_constant_rows_one_image():
    coder = coder_of(6, normalization="mean_std")
    x = torch.ones(1, 4, 2)
    codes = coder.encode_sparse(x[0])
    codes = codes.keep(torch.zeros(codes.nnz, dtype=torch.bool))
    metric = Progressive(setting_of(coder, n_tokens=4))
    metric.update(Seen(x=x, target=x, codes=codes, x_hat=coder.decode_sparse(codes)[None]))
    curve = metric.curves()["progressive"]
    assert {row["l0"] for row in curve} == {0}
    assert {row["dead"] for row in curve} == {6}
    assert all(np.isnan(row["fvu"]) or np.isinf(row["fvu"]) for row in curve)  # nothing to explain
    with pytest.raises(ValueError, match="no images were measured"):
        Progressive(setting_of(coder)).compute()
