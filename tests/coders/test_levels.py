"""Nested levels: the same reconstructions and gradients as decoding each level by itself."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vitrail.coders import levels as module
from vitrail.coders.levels import decode_levels


def dense_levels(y, b_dec, W_enc, b_enc, W_dec, levels, soft_cap):
    pre = (y - b_dec) @ W_enc + b_enc
    out = []
    for k in levels:
        top = pre.topk(k, dim=1)
        z = torch.zeros_like(pre).scatter(1, top.indices, top.values.relu())
        z = z if soft_cap is None else soft_cap * torch.tanh(z / soft_cap)
        out.append(z @ W_dec)
    return out


def parameters(n, d, d_sae, seed, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    y, b_dec, W_dec, W_enc, b_enc = (
        torch.randn(*size, generator=generator, dtype=torch.float64)
        for size in ((n, d), (d,), (d_sae, d), (d_sae, d), (d_sae,))
    )
    return y, *(t.requires_grad_() for t in (b_dec, W_enc.t().detach(), b_enc + shift, W_dec))


@pytest.fixture(params=["sparse", "dense", "mixed"])
def share(request, monkeypatch):
    shares = {"sparse": 2.0, "dense": 0.0, "mixed": 0.15}
    monkeypatch.setitem(module.SPARSE_BELOW, torch.float64, shares[request.param])
    return request.param


@pytest.mark.parametrize("soft_cap", [None, 2.0])
@pytest.mark.parametrize(
    ("levels", "shift"),
    # All positive in the last; a last level below that; all of them above it; hardly anything positive.
    [((2, 5, 11, 40), 0.0), ((3, 9), 0.0), ((39, 40), 0.0), ((2, 5, 11, 40), -9.0), ((40,), 0.0)],
)
def test_reconstructions_and_every_gradient_are_those_of_dense_levels(share, levels, shift, soft_cap):
    y, *weights = parameters(7, 6, 40, 0, shift)
    weigh = [torch.randn(7, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) for i in range(9)]
    found = decode_levels(y, *weights, levels, soft_cap=soft_cap).reconstructions
    slow = dense_levels(y, *weights, levels, soft_cap)
    torch.testing.assert_close(found, slow, rtol=1e-10, atol=1e-10)
    by_us = torch.autograd.grad(sum((w * x).sum() for w, x in zip(weigh, found, strict=False)), weights)
    by_autograd = torch.autograd.grad(sum((w * x).sum() for w, x in zip(weigh, slow, strict=False)), weights)
    torch.testing.assert_close(by_us, by_autograd, rtol=1e-10, atol=1e-10)


@given(n=st.integers(1, 9), d_sae=st.integers(2, 60), seed=st.integers(0, 50), data=st.data())
@settings(max_examples=40, deadline=None)
def test_any_levels_agree_with_dense_ones(n, d_sae, seed, data):
    levels = tuple(sorted(data.draw(st.sets(st.integers(1, d_sae), min_size=1, max_size=6))))
    y, *weights = parameters(n, 4, d_sae, seed)
    found = decode_levels(y, *weights, levels).reconstructions
    torch.testing.assert_close(found, dense_levels(y, *weights, levels, None), rtol=1e-10, atol=1e-10)


def test_by_hand():
    # pre = (3, 1, 2, -1): rank 1 is latent 0, rank 2 latent 2, rank 3 latent 1. W_dec rows 1, 10, 100, 1000.
    y = torch.tensor([[3.0, 1.0, 2.0, -1.0]])
    W_dec = torch.tensor([[1.0], [10.0], [100.0], [1000.0]])
    found = decode_levels(y, torch.zeros(4), torch.eye(4), torch.zeros(4), W_dec, (1, 2, 4))
    assert [x.item() for x in found.reconstructions] == [3, 203, 213]


def test_equal_values_at_an_edge_belong_to_one_band(share):
    y = torch.ones(3, 8, dtype=torch.float64)
    eye, zero = torch.eye(8, dtype=torch.float64), torch.zeros(8, dtype=torch.float64)
    found = decode_levels(y, zero, eye, zero, torch.ones(8, 1, dtype=torch.float64), (2, 5, 8)).reconstructions
    assert [x.flatten().tolist() for x in found] == [[2.0] * 3, [5.0] * 3, [8.0] * 3]


def test_bfloat16_is_near():
    y, *weights = (t.detach().float() for t in parameters(64, 16, 512, 1))
    levels = (8, 32, 128, 512)
    full = decode_levels(y, *weights, levels).reconstructions
    half = decode_levels(y, *weights, levels, dtype=torch.bfloat16).reconstructions
    for a, b in zip(full, half, strict=True):
        # Latents at an edge change levels, so 8 of 512 agree less than all of them.
        assert (a - b).norm() / a.norm() < 0.1
    assert 0 < (full[-1] - half[-1]).norm() / full[-1].norm() < 0.005
