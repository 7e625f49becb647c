"""Gated: the gate decides, the magnitudes are not shrunk, and the auxiliary error leaves the decoder alone."""

import pytest
import torch
from coder_examples import D_IN, fitted, mean_max_cosine, planted, rows, train_briefly

from vitrail.coders import Gated, ReLU
from vitrail.statistics import ActivationStats


def by_hand() -> Gated:
    coder = Gated(d_in=2, d_sae=3, l1=0.5, normalization="none")
    W = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
    with torch.no_grad():
        coder.W_dec.copy_(W)
        coder.W_enc.copy_(W.t())
        coder.b_enc.copy_(torch.tensor([-1.0, 2.0, 0.0]))
        coder.r_mag.copy_(torch.tensor([2.0, 1.0, 1.0]).log())
        coder.b_mag.copy_(torch.tensor([-3.0, 0.0, -1.0]))
    return coder


def test_one_step_by_hand():
    # x = (2, -1): shared (2, -1, 0.4), gate pre (1, 1, 0.4), all open; mag (2*2 - 3, -1, 0.4 - 1) = (1, -1, -0.6):
    # z = (1, 0, 0), y_hat = (1, 0), error 1 + 1 = 2.    l1: 0.5 * (1 + 1 + 0.4) = 1.2.
    # via the gate: (1, 0) + (0, 1) + 0.4 (.6, .8) = (1.24, 1.32): error .76^2 + 2.32^2 = 5.96.
    coder = by_hand()
    step = coder.loss(torch.tensor([[2.0, -1.0]]))
    assert step.codes.to_dense().tolist() == [[1, 0, 0]]
    assert step.terms["reconstruction"].item() == pytest.approx(2)
    assert step.terms["l1"].item() == pytest.approx(1.2)
    assert step.terms["auxiliary"].item() == pytest.approx(5.96)
    assert step.loss.item() == pytest.approx(9.16)
    assert step.penalty == ("l1",)
    torch.testing.assert_close(coder.encode(torch.tensor([[2.0, -1.0]])), torch.tensor([[1.0, 0, 0]]))
    # Gradients. W_dec sees the first error only: 2 z (y_hat - y) = 2 (1 - 2, 0 + 1) = (-2, 2) in row 0.
    # b_mag_0: 2 (y_hat - y) . W_dec_0 = -2; r_mag_0: that times exp(r) * shared = 4: -8.
    # b_enc: l1 0.5, plus 2 (via - y) . W_dec = 2 (-.76, 2.32) . rows = (-1.52, 4.64, 2.8).
    step.loss.backward()
    torch.testing.assert_close(coder.W_dec.grad, torch.tensor([[-2.0, 2.0], [0, 0], [0, 0]]))
    torch.testing.assert_close(coder.b_mag.grad, torch.tensor([-2.0, 0, 0]))
    torch.testing.assert_close(coder.r_mag.grad, torch.tensor([-8.0, 0, 0]))
    torch.testing.assert_close(coder.b_enc.grad, torch.tensor([-1.02, 5.14, 3.3]))


def test_a_shut_gate_shuts_whatever_the_magnitude_says():
    # x = (0.5, 0): shared (.5, 0, .3), gate pre (-.5, 2, .3), mag (1 + 3, 0, .3 - 1): latent 0 alone has a magnitude.
    coder, x = by_hand(), torch.tensor([[0.5, 0.0]])
    with torch.no_grad():
        coder.b_mag[0] = 3
    assert coder.loss(x).codes.nnz == coder.encode_sparse(x).nnz == 0


def test_gradients_equal_an_independent_fp64_version():
    coder, x = fitted("gated").double(), rows(32).double()
    with torch.no_grad():
        for i, parameter in enumerate((coder.b_dec, coder.b_enc, coder.r_mag, coder.b_mag)):
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)))
    coder.loss(x).loss.backward()
    found = {key: parameter.grad.clone() for key, parameter in coder.named_parameters()}
    coder.zero_grad()
    by_rows(coder, coder.normalize(x).y).backward()
    for key, parameter in coder.named_parameters():
        torch.testing.assert_close(found[key], parameter.grad, rtol=1e-9, atol=1e-9, msg=key)
        assert found[key].abs().sum() > 0


def by_rows(coder, y):
    """The paper's listing, row by row, with a decoder that is a copy. Compared in numbers with dictionary-learning
    0.1.0 (GatedAutoEncoder and GatedAnnealTrainer's loss at p = 1): loss and every gradient equal to 1e-12."""
    frozen_W, frozen_b = coder.W_dec.detach().clone(), coder.b_dec.detach().clone()
    total = torch.zeros((), dtype=y.dtype)
    for row in y:
        shared = coder.W_enc.t() @ (row - coder.b_dec)
        gate = shared + coder.b_enc
        z = torch.where(gate > 0, torch.relu(coder.r_mag.exp() * shared + coder.b_mag), torch.zeros_like(gate))
        total = total + (coder.W_dec.t() @ z + coder.b_dec - row).pow(2).sum()
        total = total + (frozen_W.t() @ torch.relu(gate) + frozen_b - row).pow(2).sum()
        total = total + coder.l1 * torch.relu(gate).sum()
    return total / len(y)


def test_encoding_is_differentiable_in_both_paths():
    coder, x = fitted("gated").double(), rows(8).double().requires_grad_()
    with torch.no_grad():
        coder.b_enc.fill_(0.1)
        coder.r_mag.fill_(0.3)
    coder.encode(x).square().sum().backward()
    found = {key: p.grad.clone() for key, p in coder.named_parameters() if p.grad is not None} | {"x": x.grad.clone()}
    coder.zero_grad()
    x.grad = None
    shared = (coder.normalize(x).y - coder.b_dec) @ coder.W_enc
    z = (coder.r_mag.exp() * shared + coder.b_mag).relu() * (shared + coder.b_enc > 0)
    z.square().sum().backward()
    # b_enc only opens and shuts: what reaches it through the tied values cancels.
    assert found.pop("b_enc").abs().max() < 1e-9
    for key, gradient in found.items():
        dense = x.grad if key == "x" else coder.get_parameter(key).grad
        torch.testing.assert_close(gradient, dense, rtol=1e-9, atol=1e-9, msg=key)


def test_magnitudes_are_shrunk_less_than_those_of_a_relu_coder():
    x, directions = planted(8192)
    shrunk = {}
    for coder in (Gated(d_in=D_IN, d_sae=40, l1=3.0), ReLU(d_in=D_IN, d_sae=40, l1=3.0)):
        coder.fit(ActivationStats.of(x), x)
        train_briefly(coder, x)
        assert mean_max_cosine(directions, coder) > 0.9
        codes = coder.encode_sparse(x)
        y, y_hat = coder.normalize(x).y, coder.normalize(coder.decode_sparse(codes)).y
        y, y_hat = y - y.mean(0), y_hat - y_hat.mean(0)
        shrunk[coder.name] = ((y_hat * y).sum() / y.square().sum()).item()  # the slope of y_hat over y
    assert shrunk["relu"] < 0.9 < shrunk["gated"] < 1.02, shrunk


def test_impossible_settings_are_named():
    with pytest.raises(ValueError, match="l1 must not be negative, got -1"):
        Gated(d_in=3, d_sae=5, l1=-1.0)
