"""Steps of thresholded coders: the sparse and the dense way give the same numbers, and the batch itself decides."""

import pytest
import torch
from coder_examples import fitted, rows

from vitrail.coders import Codes, select, thresholded
from vitrail.coders.jump_relu import KERNELS, REACH
from vitrail.coders.select import rows_of_chunk
from vitrail.coders.thresholded import Kernel, above, entries, jumped, pre_above, rectified

NAMES = ("relu", "jump_relu", "gated")
every_way = pytest.mark.parametrize("share", [0.0, 2.0], ids=["dense", "sparse"])
every_coder = pytest.mark.parametrize("name", NAMES)
every_kernel = pytest.mark.parametrize("kernel", sorted(KERNELS))


def take(monkeypatch, share):
    """2: always the sparse way, 0: never."""
    monkeypatch.setattr(thresholded, "sparse_below", lambda dtype, device: share)


def random_weights(d_in=4, d_sae=6, d_out=5, seed=0):
    draw = torch.Generator().manual_seed(seed)
    shapes = {"y": (7, d_in), "b_dec": (d_in,), "W_enc": (d_in, d_sae), "b_enc": (d_sae,), "W_dec": (d_sae, d_out)}
    return [torch.randn(shape, generator=draw, dtype=torch.float64).requires_grad_() for shape in shapes.values()]


def moved(coder, size=0.2):
    with torch.no_grad():
        for i, parameter in enumerate(coder.parameters()):
            parameter.add_(size * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)))
    return coder


def step_of(coder, x):
    """(everything a step says, gradients)."""
    coder.zero_grad()
    step = coder.loss(x)
    step.loss.backward()
    said = {"loss": step.loss, **step.terms, "x_hat": step.x_hat, "z": step.codes.to_dense(), "fired": step.fired()}
    return {key: value.detach() for key, value in said.items()}, {k: p.grad for k, p in coder.named_parameters()}


def both_ways(monkeypatch, coder, x, rtol=1e-9, atol=1e-9):
    take(monkeypatch, 2.0)
    said, gradients = step_of(coder, x)
    take(monkeypatch, 0.0)
    said_densely, gradients_densely = step_of(coder, x)
    for sparse, dense in ((said, said_densely), (gradients, gradients_densely)):
        assert set(sparse) == set(dense)
        for key in sparse:
            torch.testing.assert_close(sparse[key], dense[key], rtol=rtol, atol=atol, msg=lambda m, key=key: key + m)
    return said


@every_way
def test_relu_by_hand_either_way(monkeypatch, share):
    # pre = (2, -1, 0.4): z = (2, 0, .4), decoded 2 (1, 0) + .4 (.6, .8) = (2.24, .32).
    take(monkeypatch, share)
    W = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
    found = rectified(torch.tensor([[2.0, -1.0]]), torch.zeros(2), W.t(), torch.zeros(3), W)
    torch.testing.assert_close(found.decoded, torch.tensor([[2.24, 0.32]]))
    torch.testing.assert_close(found.per_latent, torch.tensor([2.0, 0.0, 0.4]))
    assert found.rows_fired.tolist() == [1, 0, 1]
    torch.testing.assert_close(found.codes().to_dense(), torch.tensor([[2.0, 0.0, 0.4]]))


@every_way
def test_gradients_of_rectified_equal_finite_differences(monkeypatch, share):
    take(monkeypatch, share)

    def outputs(*tensors):
        found = rectified(*tensors)
        return found.decoded, found.per_latent

    assert torch.autograd.gradcheck(outputs, random_weights())


@every_way
def test_gradients_of_jumped_equal_finite_differences_but_for_theta(monkeypatch, share):
    take(monkeypatch, share)
    theta, kernel = torch.full((6,), 0.4, dtype=torch.float64), Kernel(KERNELS["rectangle"], 0.1, REACH["rectangle"])
    assert torch.autograd.gradcheck(lambda *tensors: jumped(*tensors, theta, kernel).decoded, random_weights())


@every_way
@every_coder
def test_gradients_of_a_loss_equal_finite_differences(monkeypatch, share, name):
    take(monkeypatch, share)
    coder, x = moved(fitted(name)).double(), rows(5).double()
    of = [key for key, _ in coder.named_parameters() if key not in ("log_threshold", "W_dec")]  # sg(W_dec), estimates
    if name == "gated":
        of.remove("b_dec")  # sg(b_dec)
    weights = {key: coder.get_parameter(key).detach() for key, _ in coder.named_parameters()}

    def loss(*tensors):
        given = {**weights, **dict(zip(of, tensors, strict=True))}
        return loss_at(coder, given, x)

    assert torch.autograd.gradcheck(loss, [weights[key].clone().requires_grad_() for key in of], fast_mode=True)


def loss_at(coder, weights, x):
    """The coder's own loss at other weights."""
    kept = {key: coder._parameters.pop(key) for key in weights}
    try:
        coder.__dict__.update(weights)
        return coder.loss(x).loss
    finally:
        for key in weights:
            coder.__dict__.pop(key)
        coder._parameters.update(kept)


@every_kernel
def test_both_ways_agree_for_every_kernel(monkeypatch, kernel):
    coder, x = moved(fitted("jump_relu", kernel=kernel, initial_threshold=0.5)).double(), rows(64).double()
    # Kernels without an end are cut where they are below 1e-7 of their peak.
    tolerance = 1e-6 if kernel in ("gaussian", "silverman") else 1e-9
    both_ways(monkeypatch, coder, x, rtol=tolerance, atol=tolerance)


@every_kernel
def test_a_kernel_has_ended_at_its_reach(kernel):
    u = torch.linspace(REACH[kernel], 50, 1000, dtype=torch.float64)
    assert KERNELS[kernel](u).abs().max() <= 1e-7


@every_coder
@pytest.mark.parametrize("size", [1, 64])
def test_both_ways_agree(monkeypatch, name, size):
    said = both_ways(monkeypatch, moved(fitted(name)).double(), rows(size).double())
    assert 0 < said["fired"].sum() < said["z"].numel()


@every_coder
@pytest.mark.parametrize(("bias", "firing"), [(-1e3, 0), (1e3, 1)], ids=["all dead", "all active"])
def test_both_ways_agree_where_none_or_all_fire(monkeypatch, name, bias, firing):
    coder, x = fitted(name).double(), rows(8).double()
    with torch.no_grad():
        coder.b_enc.fill_(bias)
        if name == "gated":
            coder.b_mag.fill_(1e3)
    said = both_ways(monkeypatch, coder, x)
    assert said["fired"].sum() == firing * said["z"].numel()


@every_coder
def test_both_ways_agree_at_ties(monkeypatch, name):
    # Whole numbers over the unit vectors: many pre-activations are the threshold itself, which does not fire.
    coder = fitted(name, d_sae=20, normalization="none", **({"initial_threshold": 1.0} if name == "jump_relu" else {}))
    x = torch.randint(-2, 3, (40, 20), generator=torch.Generator().manual_seed(3)).double()
    with torch.no_grad():
        coder.W_enc.copy_(torch.eye(20))
        coder.W_dec.copy_(torch.eye(20))
        if name == "jump_relu":
            coder.log_threshold.zero_()
    edge = 1 if name == "jump_relu" else 0
    said = both_ways(monkeypatch, coder.double(), x)
    assert torch.equal(said["z"] > 0, x > edge)
    assert (x == edge).sum() > 50


@every_coder
def test_bfloat16_is_near_float32_either_way(monkeypatch, name):
    coder, x = moved(fitted(name, d_sae=256)), rows(200)
    take(monkeypatch, 0.0)
    exact, exact_gradients = step_of(coder, x)
    coder.selection_dtype = torch.bfloat16
    for share in (0.0, 2.0):
        take(monkeypatch, share)
        said, gradients = step_of(coder, x)
        assert said["loss"].item() == pytest.approx(exact["loss"].item(), rel=0.01)
        # What bfloat16 takes for positive and is not is in no reconstruction.
        decoded = said["z"] @ coder.W_dec + coder.b_dec
        torch.testing.assert_close(
            said["x_hat"], decoded, **({"rtol": 1e-4, "atol": 1e-4} if share else {"rtol": 0.02, "atol": 0.2})
        )
        assert (said["x_hat"] - exact["x_hat"]).norm() < 0.02 * exact["x_hat"].norm()
        for key, gradient in gradients.items():
            # A threshold's gradient counts the entries of a window; bfloat16 puts some on the other side of its edge.
            allowed = 0.1 if key == "log_threshold" else 0.03
            assert gradient.dtype == torch.float32
            assert (gradient - exact_gradients[key]).norm() < allowed * exact_gradients[key].norm(), key


def test_bfloat16_values_of_sparse_codes_are_exact(monkeypatch):
    take(monkeypatch, 2.0)
    coder, x = fitted("relu"), rows(50)
    exact = coder.loss(x).codes.to_dense()
    coder.selection_dtype = torch.bfloat16
    found = coder.loss(x).codes.to_dense()
    in_both = (exact > 0) & (found > 0)
    assert in_both.sum() > 0.99 * (exact > 0).sum()
    torch.testing.assert_close(found[in_both], exact[in_both])


def test_the_first_chunk_of_a_batch_decides_and_what_comes_later_is_found_all_the_same(monkeypatch):
    monkeypatch.setattr(select, "PRE_ACTIVATION_BYTES", 4 * 10 * 8)  # 10 rows of 8 latents
    y = torch.full((40, 8), -1.0)
    y[::3, 2] = 1.0
    plain = (torch.zeros(8), torch.eye(8), torch.zeros(8))
    few = pre_above(y, *plain, None)
    assert isinstance(few, Codes)
    assert torch.equal(few.to_dense(), y.relu())
    y[10:] = 1.0  # every latent, from the second chunk on
    assert torch.equal(pre_above(y, *plain, None).to_dense(), y.relu())
    y[:10, :2] = 1.0  # a quarter and more of the first
    dense = pre_above(y, *plain, None)
    assert isinstance(dense, torch.Tensor)
    assert torch.equal(dense, y)


def test_chunks_are_of_equal_size(monkeypatch):
    monkeypatch.setattr(select, "PRE_ACTIVATION_BYTES", 1000)
    assert [rows_of_chunk(n, 10, torch.device("cpu")) for n in (1, 100, 101, 250)] == [1, 100, 51, 84]
    assert rows_of_chunk(5, 10_000, torch.device("cpu")) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_entries_are_those_marked(dtype):
    pre = torch.randn(30, 17, generator=torch.Generator().manual_seed(0)).to(dtype)
    pre[4], pre[5], pre[6, 3], pre[6, 4] = -1, 1, 0.0, -0.0
    for floor in (None, torch.linspace(-1, 1, 17).to(dtype)):
        wanted = pre > (0 if floor is None else floor)
        found = entries(pre, above(pre, floor))
        assert torch.equal(found.to_dense(), pre * wanted)
        assert torch.equal(found.l0(), wanted.sum(1))


@every_coder
def test_long_batches_are_many_chunks_and_parts(monkeypatch, name):
    coder, x = moved(fitted(name)).double(), rows(64).double()
    whole = step_of(coder, x)
    monkeypatch.setattr(select, "PRE_ACTIVATION_BYTES", 8 * 28 * 7)
    for share in (0.0, 2.0):
        take(monkeypatch, share)
        cut = step_of(coder, x)
        for a, b in zip(whole, cut, strict=True):
            for key in a:
                torch.testing.assert_close(a[key], b[key], rtol=1e-9, atol=1e-9)


def test_the_gradient_of_the_input_is_that_of_plain_autograd(monkeypatch):
    tensors = random_weights()
    y, b_dec, W_enc, b_enc, W_dec = tensors
    (((y - b_dec) @ W_enc + b_enc).relu() @ W_dec).square().sum().backward()
    plain = [tensor.grad.clone() for tensor in tensors]
    for share in (0.0, 2.0):
        take(monkeypatch, share)
        for tensor in tensors:
            tensor.grad = None
        rectified(*tensors).decoded.square().sum().backward()
        for tensor, wanted in zip(tensors, plain, strict=True):
            torch.testing.assert_close(tensor.grad, wanted)


def test_a_bandwidth_finer_than_bfloat16_is_not_left_to_it(monkeypatch):
    coder, x = fitted("jump_relu", bandwidth=1e-3, d_sae=256), rows(400)
    take(monkeypatch, 0.0)
    _, exact = step_of(coder, x)
    coder.selection_dtype = torch.bfloat16
    _, found = step_of(coder, x)
    torch.testing.assert_close(found["log_threshold"], exact["log_threshold"])
    assert exact["log_threshold"].count_nonzero() > 10


def test_a_gate_that_only_bfloat16_sees_open_is_shut(monkeypatch):
    take(monkeypatch, 2.0)
    coder, x = fitted("gated", d_sae=256), rows(400)
    with torch.no_grad():
        coder.b_mag.fill_(1.0)  # every latent that the gate lets through has a magnitude
    gates = coder.pre_activations(coder.normalize(x).y)
    coder.selection_dtype = torch.bfloat16
    found = coder.loss(x).codes.to_dense()
    assert (found > 0).sum() > 0.99 * (gates > 0).sum()
    assert (gates[found > 0] > -1e-5).all()
