"""Nested levels: the same reconstructions and gradients as decoding each level by itself."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vitrail.coders import levels as module
from vitrail.coders import select
from vitrail.coders.levels import nested_levels


def dense_levels(y, b_dec, W_enc, b_enc, W_dec, levels, soft_cap=None):
    """Reconstructions, and the positive entries of the largest level."""
    pre = (y - b_dec) @ W_enc + b_enc
    out = []
    for k in levels:
        top = pre.topk(k, dim=1)
        z = torch.zeros_like(pre).scatter(1, top.indices, top.values.relu())
        z = z if soft_cap is None else soft_cap * torch.tanh(z / soft_cap)
        out.append(z @ W_dec + b_dec)
    return out


def dense_errors(y, *others, **more):
    return torch.stack([(x_hat - y).square().sum(1).mean() for x_hat in dense_levels(y, *others, **more)])


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


@pytest.fixture(params=["one chunk", "chunks of two rows"])
def chunked(request, monkeypatch):
    if request.param != "one chunk":
        monkeypatch.setattr(select, "PRE_ACTIVATION_BYTES", 2 * 40 * 8)


@pytest.mark.parametrize("soft_cap", [None, 2.0])
@pytest.mark.parametrize(
    ("levels", "shift"),
    # All positive in the last; a last level below that; all of them above it; hardly anything positive.
    [((2, 5, 11, 40), 0.0), ((3, 9), 0.0), ((39, 40), 0.0), ((2, 5, 11, 40), -9.0), ((40,), 0.0)],
)
@pytest.mark.usefixtures("share", "chunked")
def test_errors_and_every_gradient_are_those_of_dense_levels(levels, shift, soft_cap):
    y, *weights = parameters(7, 6, 40, 0, shift)
    alphas = tuple(1.0 + 0.5 * i for i in range(len(levels)))
    found = nested_levels(y, *weights, levels, alphas, soft_cap=soft_cap)
    slow = dense_errors(y, *weights, levels, soft_cap=soft_cap)
    torch.testing.assert_close(found.errors, slow.detach(), rtol=1e-10, atol=1e-10)
    loss = (torch.tensor(alphas, dtype=torch.float64) * slow).sum()
    torch.testing.assert_close(found.loss, loss, rtol=1e-10, atol=1e-10)
    # Twice the loss: what comes from above is not always 1.
    by_us, by_autograd = (torch.autograd.grad(2 * x, weights) for x in (found.loss, loss))
    torch.testing.assert_close(by_us, by_autograd, rtol=1e-10, atol=1e-10)


def test_gradcheck():
    y, *weights = parameters(5, 3, 12, 3)
    assert torch.autograd.gradcheck(lambda *w: nested_levels(y, *w, (2, 5, 12), (3.0, 2.0, 1.0)).loss, weights)


@given(n=st.integers(1, 9), d_sae=st.integers(2, 60), seed=st.integers(0, 50), data=st.data())
@settings(max_examples=40, deadline=None)
def test_any_levels_agree_with_dense_ones(n, d_sae, seed, data):
    levels = tuple(sorted(data.draw(st.sets(st.integers(1, d_sae), min_size=1, max_size=6))))
    fired_k = data.draw(st.none() | st.integers(1, d_sae))
    y, *weights = (t.detach() for t in parameters(n, 4, d_sae, seed))
    b_dec, W_enc, b_enc, _ = weights
    found = nested_levels(y, *weights, levels, (1.0,) * len(levels), fired_k=fired_k)
    torch.testing.assert_close(found.errors, dense_errors(y, *weights, levels), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found.x_hat, dense_levels(y, *weights, levels)[-1], rtol=1e-10, atol=1e-10)
    top = ((y - b_dec) @ W_enc + b_enc).topk(fired_k or d_sae, dim=1)
    assert found.fired.tolist() == top.indices[top.values > 0].bincount(minlength=d_sae).tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("d_sae", [50, 70_000])  # the latent's number in 16 bits, or in 32
def test_ranking_is_that_of_a_stable_sort(dtype, d_sae):
    pre = torch.randn(3, d_sae, generator=torch.Generator().manual_seed(0)).to(dtype)
    k = 20
    slow = pre.double().argsort(dim=1, stable=True)[:, -k:]
    assert torch.equal(module._ranking(pre, k), slow)


def test_ranking_puts_the_positive_last_whatever_the_others_are():
    pre = torch.tensor([[-0.0, 3.0, 0.0, -torch.inf, 1e-40, -2.0, torch.inf]])
    assert module._ranking(pre, 3).tolist() == [[4, 1, 6]]


def test_by_hand():
    # pre = (3, 1, 2, -1): rank 1 is latent 0, rank 2 latent 2, rank 3 latent 1. W_dec rows 1, 10, 100, 1000 in the
    # first dimension, so that levels 1, 2, 4 give 3, 203 and 213; the target is y itself.
    y = torch.tensor([[3.0, 1.0, 2.0, -1.0]])
    W_dec = torch.tensor([[1.0], [10.0], [100.0], [1000.0]]) * torch.tensor([[1.0, 0.0, 0.0, 0.0]])
    found = nested_levels(y, torch.zeros(4), torch.eye(4), torch.zeros(4), W_dec, (1, 2, 4), (1.0, 1.0, 1.0))
    rest = 1 + 4 + 1
    assert found.errors.tolist() == [0 + rest, 200**2 + rest, 210**2 + rest]
    assert found.loss.item() == 200**2 + 210**2 + 3 * rest
    assert found.x_hat.tolist() == [[213.0, 0.0, 0.0, 0.0]]
    assert found.fired.tolist() == [1, 1, 1, 0]


@pytest.mark.usefixtures("share")
def test_equal_values_at_an_edge_belong_to_one_band():
    y = torch.ones(3, 8, dtype=torch.float64)
    eye, zero = torch.eye(8, dtype=torch.float64), torch.zeros(8, dtype=torch.float64)
    W_dec = torch.ones(8, 8, dtype=torch.float64)
    found = nested_levels(y, zero, eye, zero, W_dec, (2, 5, 8), (1.0, 1.0, 1.0))
    assert found.errors.tolist() == [8 * (k - 1) ** 2 for k in (2, 5, 8)]


def test_bfloat16_is_near():
    y, *weights = (t.detach().float() for t in parameters(64, 16, 512, 1))
    weights = [t.requires_grad_() for t in weights]
    levels = (8, 32, 128, 512)
    full, half = (nested_levels(y, *weights, levels, (1.0,) * 4, dtype=dtype) for dtype in (None, torch.bfloat16))
    # Latents at an edge change levels, so 8 of 512 agree less than all of them.
    assert ((full.errors - half.errors).abs() / full.errors < 0.05).all()
    assert 0 < (full.x_hat - half.x_hat).norm() / full.x_hat.norm() < 0.005
    gradients = (torch.autograd.grad(found.loss, weights) for found in (full, half))
    for a, b in zip(*gradients, strict=True):
        assert 0 < (a - b).norm() / a.norm() < 0.05


def test_nothing_is_differentiated_where_nobody_asks():
    y, *weights = parameters(5, 3, 12, 3)
    with torch.no_grad():
        assert not nested_levels(y, *weights, (2, 12), (1.0, 1.0)).loss.requires_grad
