"""JumpReLU: the estimated gradient is that of the expected loss, and the controller meets its target or says so."""

import math
import warnings

import pytest
import torch
from coder_examples import D_IN, D_SAE, mean_max_cosine, planted, rows, train_briefly

from vitrail.coders import JumpReLU, load_coder, save_coder
from vitrail.coders.baselines import untrained_like
from vitrail.coders.jump_relu import KERNELS
from vitrail.statistics import ActivationStats
from vitrail.training import TensorSource, TrainConfig, train

every_kernel = pytest.mark.parametrize("kernel", sorted(KERNELS))


def jump_relu(**arguments) -> JumpReLU:
    coder = JumpReLU(**{"d_in": D_IN, "d_sae": D_SAE, "bandwidth": 0.3, **arguments})
    coder.fit(ActivationStats.of(rows()), rows())
    return coder


def test_one_step_by_hand():
    # x = (2, -1), theta = 0.5: pre = (2, -1, 0.4), of which 2 fires: z = (2, 0, 0), y_hat = (2, 0), error 1; L0 1.
    # Rectangle of width 1: only pre_2 = 0.4 lies within 0.5 of theta: K = 1. Gradient of the error at z_2:
    # 2 (y_hat - y) . (.6, .8) = 2 * 0.8 = 1.6, so dloss/dtheta_2 = -0.5 * 1.6 - 3 * 1 = -3.8, and at log theta -1.9.
    # theta_2 is to rise: the penalty wants it, and 0.4 (.6, .8) would have made the error larger.
    W = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
    coder = JumpReLU(d_in=2, d_sae=3, l0_coefficient=3.0, bandwidth=1.0, initial_threshold=0.5, normalization="none")
    with torch.no_grad():
        coder.W_dec.copy_(W)
        coder.W_enc.copy_(W.t())
    step = coder.loss(torch.tensor([[2.0, -1.0]]))
    assert step.terms["reconstruction"].item() == pytest.approx(1)
    assert step.terms["l0"].item() == pytest.approx(3)
    assert step.codes.to_dense().tolist() == [[2, 0, 0]]
    assert step.penalty == ("l0",)
    step.loss.backward()
    torch.testing.assert_close(coder.log_threshold.grad, torch.tensor([0.0, 0.0, -1.9]))
    torch.testing.assert_close(coder.b_enc.grad, torch.tensor([0.0, 0.0, 0.0]))  # 2 (y_hat - y) . (1, 0) = 0


@every_kernel
def test_kernels_are_densities(kernel):
    u = torch.linspace(-30, 30, 600_001, dtype=torch.float64)
    k = KERNELS[kernel](u)
    assert torch.trapezoid(k, u).item() == pytest.approx(1, abs=1e-3)
    assert torch.trapezoid(k * u, u).item() == pytest.approx(0, abs=1e-9)
    assert (k.min() < 0) == (kernel == "silverman")
    assert KERNELS[kernel](torch.zeros(1, dtype=torch.float64)).item() == pytest.approx(
        {"rectangle": 1, "triangle": 2, "epanechnikov": 1.5, "gaussian": math.sqrt(2 / math.pi), "silverman": 0.5**0.5}[
            kernel
        ]
    )


@every_kernel
def test_the_gradient_at_the_threshold_is_that_of_the_expected_loss(kernel):
    # One latent, y uniform on (0, 2): L(t) = E[y^2; y <= t] + c P(y > t) = t^3 / 6 + c (2 - t) / 2,
    # L'(t) = t^2 / 2 - c / 2. Witness for L' itself: a finite difference of the loss over many rows.
    coder = JumpReLU(
        d_in=1, d_sae=1, l0_coefficient=0.4, kernel=kernel, bandwidth=0.01, initial_threshold=1.2, normalization="none"
    ).double()
    with torch.no_grad():
        coder.W_dec.fill_(1)
        coder.W_enc.fill_(1)
    x = ((torch.arange(400_000, dtype=torch.float64) + 0.5) / 200_000)[:, None]
    coder.loss(x).loss.backward()
    at_theta = coder.log_threshold.grad.item() / 1.2
    assert at_theta == pytest.approx(1.2**2 / 2 - 0.4 / 2, abs=0.01)

    def loss_at(theta):
        with torch.no_grad():
            coder.log_threshold.fill_(math.log(theta))
            return coder.loss(x).loss.item()

    assert (loss_at(1.21) - loss_at(1.19)) / 0.02 == pytest.approx(at_theta, abs=0.01)


@every_kernel
def test_gradients_equal_plain_autograd_of_a_surrogate(kernel):
    coder, x = jump_relu(kernel=kernel, l0_coefficient=0.7).double(), rows(32).double()
    with torch.no_grad():
        for i, parameter in enumerate((coder.b_dec, coder.b_enc, coder.log_threshold)):
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)))
    coder.loss(x).loss.backward()
    found = {key: parameter.grad.clone() for key, parameter in coder.named_parameters()}
    coder.zero_grad()
    surrogate(coder, coder.normalize(x).y).backward()
    for key, parameter in coder.named_parameters():
        torch.testing.assert_close(found[key], parameter.grad, rtol=1e-9, atol=1e-9, msg=key)
    assert found["log_threshold"].abs().min() > 0 or kernel != "silverman"


def surrogate(coder, y):
    """The same values and, by plain autograd, the derivatives the paper prescribes: constants times (theta - itself).

    Compared in numbers with the JumpReLU and Step functions of sae-lens 6.54.12 (rectangle): equal to 1e-12.
    """
    pre, theta = (y - coder.b_dec) @ coder.W_enc + coder.b_enc, coder.log_threshold.exp()
    fired = (pre > theta).to(pre.dtype)
    moved = theta - theta.detach()
    slope = KERNELS[coder.kernel]((pre - theta) / coder.bandwidth).detach() / coder.bandwidth
    z = pre * fired - theta.detach() * slope * moved
    error = (z @ coder.W_dec + coder.b_dec - y).pow(2).sum(-1).mean()
    return error + coder.coefficient * (fired - slope * moved).sum(1).mean()


def test_thresholds_start_in_proportion_to_the_data():
    x = rows()
    for normalization, size in (("mean_std", 1.0), ("msae_code", None)):
        coder = JumpReLU(d_in=D_IN, d_sae=D_SAE, initial_threshold=0.5, normalization=normalization)
        coder.fit(ActivationStats.of(x), x)
        rms = coder.normalize(x).y.square().mean().sqrt().item()
        assert size is None or rms == pytest.approx(size, rel=1e-4)
        torch.testing.assert_close(coder.log_threshold.detach().exp(), torch.full((D_SAE,), 0.5 * rms))
        assert coder.encode_sparse(x).nnz > 0


def test_a_bandwidth_that_reaches_nothing_gives_thresholds_no_gradient():
    coder = jump_relu(bandwidth=1e-12)
    coder.loss(rows()).loss.backward()
    assert (coder.log_threshold.grad == 0).all()


def test_coefficient_and_thresholds_move_by_the_formula_in_training_only_and_survives_saving(tmp_path):
    coder, x = jump_relu(target_l0=5.0, controller_rate=0.1, l0_coefficient=2.0), rows()
    before = coder.log_threshold.detach().exp()
    l0 = coder.loss(x).codes.nnz / len(x)
    factor = math.exp(0.1 * min((l0 - 5) / 5, 1))
    assert coder.coefficient.item() == pytest.approx(2 * factor)
    torch.testing.assert_close(coder.log_threshold.detach().exp(), before * factor)
    now = coder.eval().loss(x)
    assert now.terms["l0"].item() == pytest.approx(2 * factor * now.codes.nnz / len(x))  # the loss uses the new one
    assert coder.coefficient.item() == pytest.approx(2 * factor)
    torch.testing.assert_close(coder.log_threshold.detach().exp(), before * factor)
    save_coder(tmp_path, coder)
    assert load_coder(tmp_path).coefficient.item() == coder.coefficient.item()
    fixed = jump_relu(l0_coefficient=2.0)
    fixed.loss(x)
    assert fixed.coefficient == 2.0
    torch.testing.assert_close(fixed.log_threshold.detach().exp(), before)


def test_the_first_batches_do_not_send_the_coefficient_to_infinity():
    coder = jump_relu(target_l0=0.01, controller_rate=0.1, initial_threshold=1e-3)
    for _ in range(10):
        coder.loss(rows())
    assert coder.coefficient.item() == pytest.approx(math.exp(10 * 0.1))


@pytest.mark.parametrize(("target", "lr"), [(2.0, 1e-2), (4.0, 1e-2), (8.0, 1e-2), (2.0, 1e-3)])
def test_a_target_is_met(target, lr):
    x = rows(4096)  # a third of 28 latents fire at the start: 8.6 per row
    coder = JumpReLU(d_in=D_IN, d_sae=D_SAE, target_l0=target)
    coder.fit(ActivationStats.of(x), x)
    train_briefly(coder, x, n_steps=800, lr=lr)
    done = coder.calibrate(iter([x[:1000], x[1000:3000]]))
    assert done["converged"] is True
    assert done == coder.calibration
    assert done["mean_l0"] == pytest.approx(target, abs=0.5)
    assert done["mean_l0"] == pytest.approx(coder.encode_sparse(x[:3000]).l0().double().mean().item())
    assert done["n_rows"] == 3000


@every_kernel
def test_the_dictionary_is_found_at_the_default_bandwidth(kernel):
    x, directions = planted(8192)
    coder = JumpReLU(d_in=D_IN, d_sae=40, kernel=kernel)
    coder.fit(ActivationStats.of(x), x)
    assert mean_max_cosine(directions, train_briefly(coder, x)) > 0.95


def test_a_run_that_misses_its_target_says_so_and_an_untrained_control_does_not(tmp_path):
    x = rows(256)
    coder = JumpReLU(d_in=D_IN, d_sae=D_SAE, target_l0=1.0)
    with pytest.warns(UserWarning, match=r"missed its target: mean L0 \d+\.\d, target_l0=1.0 \+- 2"):
        train(coder, TensorSource(x, batch_size=64), tmp_path / "run", config=TrainConfig(n_rows=256, lr=1e-4))
    calibration = load_coder(tmp_path / "run").calibration
    assert calibration["converged"] is False
    assert calibration["mean_l0"] > 3
    assert calibration["target_l0"] == 1.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert untrained_like(coder, x).calibration["converged"] is False
        assert JumpReLU(d_in=D_IN, d_sae=D_SAE).calibrate([]) == {}
    with pytest.raises(ValueError, match="got no rows"):
        coder.calibrate([])


def test_training_interrupted_resumes_the_controller(tmp_path):
    x = rows(512)
    config = TrainConfig(n_rows=512, lr=1e-2, checkpoint_every=3)

    def coder():
        return JumpReLU(d_in=D_IN, d_sae=D_SAE, target_l0=8.0, bandwidth=0.3)

    whole = coder()
    train(whole, TensorSource(x, batch_size=64), tmp_path / "whole", config=config)

    class Killed(Exception):
        pass

    broken = coder()
    plain_loss, calls = broken.loss, []

    def loss(batch):
        calls.append(1)
        if len(calls) == 6:
            raise Killed
        return plain_loss(batch)

    broken.loss = loss
    with pytest.raises(Killed):
        train(broken, TensorSource(x, batch_size=64), tmp_path / "cut", config=config)
    resumed = coder()
    train(resumed, TensorSource(x, batch_size=64), tmp_path / "cut", config=config)
    assert resumed.coefficient == whole.coefficient != 1.0
    assert all(torch.equal(value, resumed.state_dict()[key]) for key, value in whole.state_dict().items())


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"kernel": "boxcar"}, "one of rectangle, triangle, epanechnikov, gaussian, silverman, got 'boxcar'"),
        ({"bandwidth": 0.0}, "bandwidth and initial_threshold must be positive, got 0.0"),
        ({"initial_threshold": -1.0}, "must be positive, got 0.1 and -1.0"),
        ({"target_l0": 6.0}, r"target_l0 must be in 0\.\.d_sae=5"),
        ({"l0_coefficient": -1.0}, "l0_coefficient must not be negative"),
        ({"l0_coefficient": 0.0, "target_l0": 2.0}, "nor zero where target_l0 multiplies it"),
        ({"controller_rate": 0.0}, "controller_rate must be positive"),
    ],
)
def test_impossible_settings_are_named(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        JumpReLU(d_in=3, d_sae=5, **arguments)
