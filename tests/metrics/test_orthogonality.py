"""Decoder orthogonality: by hand, against the Gram matrix itself, and above the Welch bound."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vitrail.metrics import orthogonality as module
from vitrail.metrics.orthogonality import DecoderOrthogonality, orthogonality, welch_bound


def test_by_hand():
    # Three directions of the plane, 120 degrees apart: every cosine is -1/2, and the Welch bound is met.
    angles = torch.tensor([0.0, 2, 4]) * math.pi / 3
    found = orthogonality(torch.stack([angles.cos(), angles.sin()], dim=1) * torch.tensor([[1.0], [5], [0.1]]))
    assert found.mean_signed == pytest.approx(-0.5, abs=1e-6)
    assert found.mean_abs == pytest.approx(0.5, abs=1e-6)
    assert found.mean_sq == pytest.approx(0.25, abs=1e-6)
    assert found.welch == 0.25  # (3 - 2) / (2 * 2)
    assert found.mean_sq_all_entries == pytest.approx(0.25 * 6 / 9, abs=1e-6)  # six entries of nine


@pytest.mark.parametrize(("n", "d"), [(2, 3), (50, 7), (7, 50), (70, 8)])
def test_the_same_as_the_gram_matrix(monkeypatch, n, d):
    monkeypatch.setattr(module, "ROWS_AT_ONCE", 16)  # several blocks, the last one smaller
    W_dec = torch.randn(n, d, generator=torch.Generator().manual_seed(0)) + 0.3
    w = W_dec.double() / W_dec.double().norm(dim=1, keepdim=True)
    lower = (w @ w.t())[tuple(torch.tril_indices(n, n, -1))]
    found = orthogonality(W_dec)
    assert found.mean_sq == pytest.approx(float(lower.square().mean()), rel=1e-5)
    assert found.mean_signed == pytest.approx(float(lower.mean()), rel=1e-5)
    assert found.mean_abs == pytest.approx(float(lower.abs().mean()), rel=1e-5)
    # MSAE's code: ((D D^T) * (1 - I)) ** 2, mean
    code = ((w @ w.t()) * (1 - torch.eye(n))).square().mean()
    assert found.mean_sq_all_entries == pytest.approx(float(code), rel=1e-5)


@given(n=st.integers(2, 40), d=st.integers(1, 12), seed=st.integers(0, 99))
@settings(max_examples=50, deadline=None)
def test_no_directions_are_below_the_welch_bound(n, d, seed):
    found = orthogonality(torch.randn(n, d, generator=torch.Generator().manual_seed(seed)))
    assert found.mean_sq >= found.welch - 1e-6


def test_orthogonal_directions_have_zero_and_fewer_than_d_no_bound():
    found = orthogonality(torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(0)))[0][:4])
    assert (found.mean_sq, found.mean_abs, found.mean_signed) == pytest.approx((0, 0, 0), abs=1e-6)
    assert found.welch == 0
    assert welch_bound(6144, 768) == pytest.approx(5376 / (768 * 6143))
    assert welch_bound(1, 768) == 0


def test_directions_without_length_are_left_out():
    W_dec = torch.randn(9, 4, generator=torch.Generator().manual_seed(0))
    without = orthogonality(W_dec[2:])
    W_dec[:2] = 0
    found = orthogonality(W_dec)
    assert found.n_zero == 2
    assert (found.n, found.mean_sq, found.mean_abs) == (7, without.mean_sq, without.mean_abs)
    with pytest.raises(ValueError, match="1 of 3 directions have a length"):
        orthogonality(torch.eye(3) * torch.tensor([1.0, 0, 0]))


class Decoder:
    def __init__(self, W_dec):
        self.W_dec = W_dec


def measured(W_dec):
    metric = DecoderOrthogonality.__new__(DecoderOrthogonality)
    metric._coder = Decoder(W_dec)
    return metric.compute()


def test_as_a_metric_it_says_what_was_left_out():
    W_dec = torch.eye(4)[:, :3] + 0.1
    found = measured(W_dec)
    assert set(found) == {"do_mean_sq", "do_msae_code", "do_mean_signed", "do_mean_abs", "do_welch"}
    assert found["do_msae_code"].definition == "msae-code"
    assert found["do_mean_sq"].n == 4
    dead = measured(torch.cat([W_dec, torch.zeros(2, 3)]))["do_mean_sq"]
    assert dead.definition == "pairs, 2 of length zero left out"
    assert dead.value == found["do_mean_sq"].value
    assert math.isnan(measured(torch.zeros(3, 2))["do_mean_abs"].value)
