"""Adam on transposed memory: the numbers of torch's on plain memory, and nothing is copied."""

import pytest
import torch

from vitrail.training.adam import Adam


def parameter(transposed):
    drawn = torch.randn(40, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return torch.nn.Parameter(drawn.t().contiguous() if not transposed else drawn.t())


def stepped(optimizer_class, parameters, n_steps=5, **options):
    optimizer = optimizer_class(parameters, lr=1e-2, betas=(0.8, 0.95), **options)
    for step in range(n_steps):
        for i, p in enumerate(parameters):
            drawn = torch.randn(p.shape, generator=torch.Generator().manual_seed(10 * step + i), dtype=torch.float64)
            p.grad = torch.empty_like(p).copy_(drawn)  # in the memory format of the parameter
        optimizer.step()
    return optimizer


def formula(p, n_steps=5, lr=1e-2, betas=(0.8, 0.95), eps=1e-8):
    m = v = torch.zeros_like(p)
    for step in range(n_steps):
        g = torch.randn(p.shape, generator=torch.Generator().manual_seed(10 * step), dtype=torch.float64)
        m, v = betas[0] * m + (1 - betas[0]) * g, betas[1] * v + (1 - betas[1]) * g * g
        m_hat, v_hat = m / (1 - betas[0] ** (step + 1)), v / (1 - betas[1] ** (step + 1))
        p = p - lr * m_hat / (v_hat.sqrt() + eps)
    return p


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("transposed", [True, False])
def test_the_numbers_are_the_formula_s(fused, transposed):
    p, vector = parameter(transposed), torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))
    expected = formula(p.detach().clone())
    optimizer = stepped(Adam, [p, vector], fused=fused)
    torch.testing.assert_close(p.detach(), expected, rtol=1e-12, atol=1e-12)
    assert optimizer.state[p]["exp_avg"].shape == p.shape  # as it is saved


def test_no_gradient_is_copied():
    p = parameter(True)
    optimizer = stepped(Adam, [p], fused=True)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        optimizer.step()
    names = {event.key for event in profile.key_averages()}
    assert "aten::_fused_adam_" in names
    assert "aten::clone" not in names


def test_a_gradient_that_lies_otherwise_is_taken_too():
    p = parameter(True)
    expected = formula(p.detach().clone())
    optimizer = Adam([p], lr=1e-2, betas=(0.8, 0.95))
    for step in range(5):
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(10 * step), dtype=torch.float64)
        optimizer.step()
    torch.testing.assert_close(p.detach(), expected, rtol=1e-12, atol=1e-12)
