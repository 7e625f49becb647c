"""Transcoders: one step by hand, the skip, what an output is normalised by. The contract is tested with the others."""

import pytest
import torch
from coder_examples import (
    D_IN,
    D_OUT,
    DENSE_LOSSES,
    fitted,
    inputs_for,
    make,
    normalized_row,
    rows,
    rows_for,
    train_briefly,
)

from vitrail.coders import CODERS, ReLUTranscoder, TopKTranscoder, Transcoder, load_coder, save_coder
from vitrail.coders.base import geometric_median
from vitrail.coders.normalize import make_normalization
from vitrail.statistics import ActivationStats
from vitrail.training import TensorSource, TrainConfig, read_log, train
from vitrail.training.revive import REVIVERS

TRANSCODERS = sorted(name for name, coder in CODERS.items() if issubclass(coder, Transcoder))
every_transcoder = pytest.mark.parametrize("name", TRANSCODERS)


def by_hand(coder):
    """Three latents over a plane, written onto three coordinates and their diagonal: from 2 to 3 dimensions."""
    with torch.no_grad():
        coder.W_enc.copy_(torch.tensor([[1.0, 0.0, 0.6], [0.0, 1.0, 0.8]]))
        coder.W_dec.copy_(torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0.6, 0.8]]))
        coder.b_out.copy_(torch.tensor([0.5, 0.0, 0.0]))
    return coder


def test_one_step_by_hand():
    # x_in = (1, 2): pre = (1, 2, 2.2), k = 2 keeps latents 1 and 2. x_hat = 2 (0, 1, 0) + 2.2 (0, .6, .8) + (.5, 0, 0)
    # = (.5, 3.32, 1.76). Against x_out = (1, 3, 2): .5^2 + .32^2 + .24^2 = .41.
    coder = by_hand(TopKTranscoder(d_in=2, d_out=3, d_sae=3, k=2, normalization="none", output_normalization="none"))
    x_in, x_out = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 3.0, 2.0]])
    torch.testing.assert_close(coder(x_in), torch.tensor([[0.5, 3.32, 1.76]]))
    step = coder.loss(torch.cat([x_in, x_out], 1))
    assert step.loss.item() == pytest.approx(0.41)
    assert torch.equal(step.y, x_in)
    assert torch.equal(step.target, x_out)


def test_one_step_by_hand_with_a_penalty_and_a_skip():
    # All three latents: + 1 (1, 0, 0) = (1.5, 3.32, 1.76). The skip adds x_in W = (1, 2) [[1, 0, 0], [0, -.5, 0]] =
    # (1, -1, 0): (2.5, 2.32, 1.76). Error 1.5^2 + .68^2 + .24^2 = 2.77; L1 is .5 (1 + 2 + 2.2) = 2.6.
    plain = {"normalization": "none", "output_normalization": "none"}
    coder = by_hand(ReLUTranscoder(d_in=2, d_out=3, d_sae=3, l1=0.5, skip=True, **plain))
    with torch.no_grad():
        coder.W_skip.copy_(torch.tensor([[1.0, 0, 0], [0, -0.5, 0]]))
    x_in, x_out = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 3.0, 2.0]])
    step = coder.loss(torch.cat([x_in, x_out], 1))
    assert step.terms["reconstruction"].item() == pytest.approx(2.77)
    assert step.terms["l1"].item() == pytest.approx(2.6)
    torch.testing.assert_close(coder(x_in), torch.tensor([[2.5, 2.32, 1.76]]))


def with_skip(name, **changes):
    coder = fitted(name, skip=True, **changes)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in (coder.W_skip, coder.b_dec, coder.b_enc, coder.b_out):
            parameter.normal_(0, 0.1, generator=generator)
    coder.calibrate([rows_for(coder)])
    return coder


@every_transcoder
@pytest.mark.parametrize("skip", [True, False])
def test_gradients_of_every_parameter_equal_those_of_the_dense_formula(name, skip):
    coder = (with_skip(name) if skip else fitted(name)).double()
    x = rows_for(coder, 32).double()
    coder.loss(x).loss.backward()
    found = {key: parameter.grad.clone() for key, parameter in coder.named_parameters()}
    assert ("W_skip" in found) == skip
    coder.zero_grad()
    DENSE_LOSSES[name](coder, normalized_row(coder, x)).backward()
    for key, parameter in coder.named_parameters():
        assert found[key].abs().max() > 0, key
        torch.testing.assert_close(found[key], parameter.grad, rtol=1e-9, atol=1e-9, msg=lambda m, k=key: f"{k}: {m}")


@every_transcoder
def test_a_skip_adds_a_linear_map_of_what_was_read(name):
    coder = with_skip(name)
    x = inputs_for(coder)
    codes = coder.encode_sparse(x)
    y_hat = codes.to_dense() @ coder.W_dec + coder.b_out + coder.normalize(x).y @ coder.W_skip
    expected = coder.normalize_out.invert(y_hat, None, None)
    torch.testing.assert_close(coder(x), expected)
    torch.testing.assert_close(coder.decode(codes.to_dense(), like=x), expected)
    torch.testing.assert_close(coder.decode_sparse(codes, like=x), coder(x), rtol=0, atol=0)
    for ask in (lambda: coder.decode_sparse(codes), lambda: coder.decode(codes.to_dense())):
        with pytest.raises(ValueError, match="not a function of the codes alone"):
            ask()


@every_transcoder
def test_a_new_skip_changes_nothing(name):
    plain, skipping = fitted(name), fitted(name, skip=True)
    x = inputs_for(plain)
    assert torch.equal(plain(x), skipping(x))
    assert "W_skip" not in plain.state_dict()


@every_transcoder
def test_a_skip_survives_saving(name, tmp_path):
    coder = with_skip(name)
    save_coder(tmp_path, coder)
    reloaded = load_coder(tmp_path)
    assert reloaded.config == coder.config
    assert torch.equal(reloaded(inputs_for(coder)), coder(inputs_for(coder)))


@every_transcoder
def test_what_a_step_leaves_over_is_what_the_output_lacks(name):
    """Trainer and revival work it out from target, codes and output bias; with a skip it must be the true error."""
    coder = with_skip(name).eval()
    x = rows_for(coder)
    step = coder.loss(x)
    left_over = step.target - step.codes.to_dense() @ coder.W_dec - coder.output_bias()
    x_in, x_out = coder.split(x)
    if name != "batch_topk_transcoder":  # whose codes in training are of the batch
        missing = coder.normalize_out(x_out).y - coder.normalize_out(coder(x_in)).y
        torch.testing.assert_close(left_over, missing, rtol=1e-4, atol=1e-5)
    assert step.terms["reconstruction"].item() == pytest.approx(left_over.square().sum(1).mean().item(), rel=1e-5)
    dead = torch.arange(coder.d_sae) < 7
    REVIVERS["auxk"].term(coder, step, dead).backward()
    assert coder.W_skip.grad is None  # a matter of the living
    assert coder.W_dec.grad[:7].abs().sum() > 0


@every_transcoder
def test_halves_are_normalised_by_their_own_statistics(name):
    coder = fitted(name, normalization="mean_norm", output_normalization="mean_std")
    x = rows_for(coder)
    x_in, x_out = coder.split(x)
    own_in, own_out = make_normalization("mean_norm", d_in=D_IN), make_normalization("mean_std", d_in=D_OUT)
    own_in.fit(ActivationStats.of(x_in))
    own_out.fit(ActivationStats.of(x_out))
    torch.testing.assert_close(coder.normalize(x_in).y, own_in(x_in).y)
    torch.testing.assert_close(coder.normalize_out(x_out).y, own_out(x_out).y)


def test_an_output_normalised_by_its_input_row_is_prismas():
    """Witness: Prisma's forward written out, h W_dec + b_dec_out brought back by the input's mean and deviation."""
    given = {"d_out": D_IN, "normalization": "layer_norm", "output_normalization": "input_row"}
    coder = fitted("topk_transcoder", rows(d_in=2 * D_IN), **given)
    x = rows(d_in=2 * D_IN)
    x_in, x_out = coder.split(x)
    mean, deviation = x_in.mean(1, keepdim=True), x_in.std(1, keepdim=True) + 1e-5
    pre = ((x_in - mean) / deviation - coder.b_dec) @ coder.W_enc + coder.b_enc
    values, indices = pre.topk(coder.k, dim=1)
    h = torch.zeros_like(pre).scatter(1, indices, values.relu())
    expected = (h @ coder.W_dec + coder.b_out) * deviation + mean
    torch.testing.assert_close(coder(x_in), expected)
    torch.testing.assert_close(coder.decode(h, like=x_in), expected)
    torch.testing.assert_close(coder.loss(x).target, (x_out - mean) / deviation)
    with pytest.raises(ValueError, match="by its input row's numbers"):
        coder.decode(h)


def test_fewer_latents_than_k_where_fewer_are_positive():
    """SPEC row 26: a mean L0 of 29 at k = 512 on CLS rows is what TopK before the ReLU gives."""
    coder = fitted("topk_transcoder", k=20)
    with torch.no_grad():
        coder.b_enc.fill_(-1.0)
    assert 0 < coder.encode_sparse(inputs_for(coder)).l0().float().mean() < 15


def test_an_output_as_wide_as_the_input_unless_said_otherwise():
    assert make("topk_transcoder", d_out=None).d_out == D_IN
    assert make("topk_transcoder", d_out=None).d_row == 2 * D_IN
    assert make("topk_transcoder").config["d_out"] == D_OUT


def test_encoder_and_decoder_start_apart():
    coder = make("topk_transcoder", d_out=None)
    assert (coder.W_enc.t() * coder.W_dec).sum(1).abs().max() < 0.9


def test_both_biases_may_start_at_the_median():
    coder = fitted("topk_transcoder", b_dec_init="geometric_median")
    x_in, x_out = coder.split(rows_for(coder))
    torch.testing.assert_close(coder.b_dec.detach(), geometric_median(coder.normalize(x_in).y))
    torch.testing.assert_close(coder.b_out.detach(), geometric_median(coder.normalize_out(x_out).y))


@pytest.fixture(scope="module")
def component():
    """Rows of an imagined component: a linear map of what it reads, and 24 sparse directions read and written."""
    generator = torch.Generator().manual_seed(3)
    unit = lambda *shape: torch.nn.functional.normalize(torch.randn(*shape, generator=generator), dim=1)
    read, written = unit(24, D_IN), unit(24, D_OUT)
    z = (torch.rand(6000, 24, generator=generator) < 0.1) * (0.5 + torch.rand(6000, 24, generator=generator))
    x_in = z @ read
    linear = torch.randn(D_IN, D_OUT, generator=generator) / D_IN**0.5
    return x_in, z @ written + x_in @ linear


def fvu(coder, x_in, x_out):
    return ((coder(x_in) - x_out).square().sum() / (x_out - x_out.mean(0)).square().sum()).item()


@every_transcoder
def test_a_skip_takes_the_linear_part_off_the_latents(name, component):
    x_in, x_out = component
    x, found = torch.cat([x_in, x_out], 1), {}
    for skip in (False, True):
        sparsity = {"l1": 0.5} if name == "relu_transcoder" else {"k": 2}
        coder = fitted(name, x, d_sae=40, skip=skip, **sparsity)
        before = fvu(coder, x_in, x_out)
        train_briefly(coder, x, n_steps=400, lr=5e-3)
        coder.calibrate([x])
        found[skip] = fvu(coder, x_in, x_out)
        assert found[skip] < 0.5 * before
    assert found[True] < 0.75 * found[False]


def test_trained_by_the_loop_as_any_coder(component, tmp_path):
    source = TensorSource(torch.cat(component, 1), batch_size=256)
    coder = make("topk_transcoder", d_sae=40, skip=True, k=2)
    result = train(coder, source, tmp_path, config=TrainConfig(n_rows=50_000, lr=5e-3, warmup_steps=10))
    log = read_log(tmp_path / "log.jsonl")
    assert log[-1]["fvu"] < 0.7 * log[0]["fvu"]
    assert torch.equal(load_coder(tmp_path)(component[0]), result.coder(component[0]))


def test_a_source_of_another_width_is_refused(tmp_path):
    with pytest.raises(ValueError, match=rf"d_in={D_IN}, the coder takes d_in={D_IN + D_OUT}"):
        train(make("topk_transcoder"), TensorSource(rows(), batch_size=8), tmp_path)


@pytest.mark.parametrize(
    ("ask", "sentence"),
    [
        (lambda: make("topk_transcoder", d_out=0), "d_out must be at least 1, got 0"),
        (lambda: make("topk_transcoder", output_normalization="layer_norm"), "not known where only the input is"),
        (lambda: make("topk_transcoder", output_normalization="l2"), "no normalisation 'l2'"),
        (lambda: make("topk_transcoder", output_normalization="input_row"), "normalization='mean_std' has none"),
        (lambda: fitted("topk_transcoder").loss(rows()), "20 \\+ 23 = 43 wide; got 20"),
        (lambda: fitted("topk_transcoder").encode(rows(d_in=43)), "takes activations of d_in=20, got 43"),
        (lambda: make("topk_transcoder", k=29), "k must be in 1..d_sae=28, got 29"),
    ],
)
def test_impossible_settings_are_named_where_they_enter(ask, sentence):
    with pytest.raises(ValueError, match=sentence):
        ask()


def test_unfitted_says_so_also_where_only_the_output_needs_it():
    coder = make("topk_transcoder", normalization="none")
    with pytest.raises(RuntimeError, match="has not seen its data"):
        coder.encode(rows())
    assert make("topk_transcoder", normalization="none", output_normalization="none").is_fitted
