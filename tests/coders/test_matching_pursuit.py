"""Matching pursuit: greedy on the residual, each latent once per row, gradients of the unrolled steps."""

import pytest
import torch
from coder_examples import D_IN, D_SAE, fitted, mean_max_cosine, planted, rows, train_briefly

from vitrail.coders import MatchingPursuit, load_coder, save_coder
from vitrail.statistics import ActivationStats
from vitrail.training import TensorSource, TrainConfig, train


def by_hand(k: int) -> MatchingPursuit:
    coder = MatchingPursuit(d_in=2, d_sae=3, k=k, normalization="none")
    with torch.no_grad():
        coder.W_dec.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]]))
    return coder


def test_one_step_by_hand():
    # x = (1, 2): products (1, 2, 2.2): latent 2, residual (1, 2) - 2.2 (.6, .8) = (-.32, .24).
    # products (-.32, .24, 0): latent 1, .24, residual (-.32, 0). Then (-.32, 0, -.192): nothing is positive: the end.
    coder = by_hand(3)
    step = coder.loss(torch.tensor([[1.0, 2.0]]))
    torch.testing.assert_close(step.codes.to_dense(), torch.tensor([[0, 0.24, 2.2]]))
    assert step.codes.nnz == 2
    assert step.loss.item() == pytest.approx(0.32**2)
    torch.testing.assert_close(step.x_hat, torch.tensor([[1.32, 2.0]]))
    # Gradient at b_enc: dloss/dr = 2 r = (-.64, 0). Last step: d = -<s, w_1> = 0. First: s as before, d = -<s, w_2>
    # = .384: taking more of latent 2, whose x is already overshot, costs.
    step.loss.backward()
    torch.testing.assert_close(coder.b_enc.grad, torch.tensor([0.0, 0.0, 0.384]))


def test_a_latent_picked_twice_is_one_latent():
    # Directions (1, 0), (-.6, .8). x = (2, 2): products (2, .4): latent 0 takes 2, residual (0, 2); products (0, 1.6):
    # latent 1 takes 1.6, residual (.96, .72); products (.96, 0): latent 0 again, .96.
    coder = MatchingPursuit(d_in=2, d_sae=2, k=3, normalization="none")
    with torch.no_grad():
        coder.W_dec.copy_(torch.tensor([[1.0, 0.0], [-0.6, 0.8]]))
    codes = coder.encode_sparse(torch.tensor([[2.0, 2.0]]))
    assert codes.indices.tolist() == [0, 1]
    torch.testing.assert_close(codes.values, torch.tensor([2.96, 1.6]))


def greedy(x, W, b, k):
    """One row at a time in plain Python. Compared in numbers with overcomplete 0.3.0 (MpSAE.encode, b = 0) on rows
    whose every step was positive: equal to 1e-12."""
    z, residual = torch.zeros(len(W), dtype=x.dtype), x.clone()
    for _ in range(k):
        products = [float(residual @ w + bias) for w, bias in zip(W, b, strict=True)]
        i = max(range(len(W)), key=products.__getitem__)
        if products[i] <= 0:
            break
        z[i] += products[i]
        residual = residual - products[i] * W[i]
    return z, residual


def test_codes_and_loss_equal_a_slow_loop():
    coder, x = fitted("matching_pursuit", k=12).double(), rows(24).double()
    with torch.no_grad():
        coder.b_enc.normal_(0, 0.2, generator=torch.Generator().manual_seed(0))
        coder.b_dec.normal_(0, 0.2, generator=torch.Generator().manual_seed(1))
    y = coder.normalize(x).y - coder.b_dec
    slow = [greedy(row, coder.W_dec.detach(), coder.b_enc.detach(), 12) for row in y.detach()]
    step = coder.loss(x)
    torch.testing.assert_close(step.codes.to_dense(), torch.stack([z for z, _ in slow]))
    torch.testing.assert_close(coder.encode(x).detach(), torch.stack([z for z, _ in slow]))
    torch.testing.assert_close((step.y - step.x_hat).detach(), torch.stack([residual for _, residual in slow]))
    assert step.codes.l0().max() <= 12
    assert (step.codes.l0() < 12).any()  # some latent was picked twice, or a row ended


def unrolled(coder, y):
    """Dense, by plain autograd through every step."""
    residual, z = y - coder.b_dec, torch.zeros(len(y), coder.d_sae, dtype=y.dtype)
    for _ in range(coder.k):
        pre = residual @ coder.W_dec.t() + coder.b_enc
        step = pre.relu() * torch.nn.functional.one_hot(pre.argmax(1), coder.d_sae)
        z, residual = z + step, residual - step @ coder.W_dec
    return z


@pytest.mark.parametrize("k", [1, 4, 15])
def test_gradients_equal_those_of_the_unrolled_steps(k):
    coder, x = fitted("matching_pursuit", k=k).double(), rows(32).double().requires_grad_()
    with torch.no_grad():
        coder.b_dec.normal_(0, 0.1, generator=torch.Generator().manual_seed(0))
        coder.b_enc.normal_(-0.5, 0.1, generator=torch.Generator().manual_seed(1))  # so that rows end
    weights = torch.randn(D_SAE, dtype=torch.float64, generator=torch.Generator().manual_seed(2))

    def gradients(value):
        found = torch.autograd.grad(value, [*coder.parameters(), x], retain_graph=True)
        return dict(zip([*dict(coder.named_parameters()), "x"], found, strict=True))

    y = coder.normalize(x).y
    z = unrolled(coder, y)
    assert (z > 0).sum() < 32 * k or k < 15  # some were picked twice, or ended
    pairs = [
        (coder.loss(x).loss, (z @ coder.W_dec + coder.b_dec - y).pow(2).sum(1).mean()),
        ((coder.encode(x) * weights).square().sum(), (unrolled(coder, y) * weights).square().sum()),
    ]
    for sparse, dense in pairs:
        torch.testing.assert_close(sparse, dense)
        expected = gradients(dense)
        for key, gradient in gradients(sparse).items():
            torch.testing.assert_close(gradient, expected[key], rtol=1e-8, atol=1e-8, msg=key)


def test_every_step_takes_its_square_from_the_residual():
    x = rows()
    errors = [fitted("matching_pursuit", k=k).loss(x).loss.item() for k in (1, 2, 4, 8, 16)]
    assert errors == sorted(errors, reverse=True)
    coder = fitted("matching_pursuit", k=1)
    step = coder.loss(x)
    gained = step.y.square().sum(1) - (step.y - step.x_hat).square().sum(1)
    torch.testing.assert_close(gained, step.codes.values.square(), rtol=1e-4, atol=1e-4)


def test_encoder_and_decoder_are_one():
    coder = fitted("matching_pursuit")
    assert "W_enc" not in coder.state_dict()
    assert coder.W_enc.shape == (D_IN, D_SAE)
    with torch.no_grad():
        coder.W_dec[3] = 0
    assert (coder.W_enc[:, 3] == 0).all()
    with pytest.raises(AttributeError, match="W_encoder"):
        _ = coder.W_encoder


def test_correlated_directions_are_told_apart_where_topk_cannot():
    x, directions = planted(8192)
    coder = fitted("matching_pursuit", x, d_sae=40, k=3)
    train_briefly(coder, x)
    assert mean_max_cosine(directions, coder) > 0.9


def test_it_trains_revives_saves_and_loads(tmp_path):
    x = rows(512)
    coder = MatchingPursuit(d_in=D_IN, d_sae=60, k=3)
    coder.fit(ActivationStats.of(x), x)
    before = coder.loss(x).loss.item()
    train(
        coder,
        TensorSource(x, batch_size=64),
        tmp_path / "run",
        config=TrainConfig(n_rows=4096, lr=1e-2, dead_window_rows=64),
    )
    assert coder.loss(x).loss.item() < 0.7 * before
    torch.testing.assert_close(coder.W_dec.norm(dim=1), torch.ones(60))
    save_coder(tmp_path / "coder", coder)
    assert torch.equal(load_coder(tmp_path / "coder").encode(x), coder.encode(x))


def test_impossible_settings_are_named():
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        MatchingPursuit(d_in=3, d_sae=5, k=0)
