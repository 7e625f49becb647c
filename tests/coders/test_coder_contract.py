"""What every coder promises. Runs on each entry of the tables by itself."""

import copy
import json

import pytest
import torch
from coder_examples import (
    ALL,
    ARGUMENTS,
    D_IN,
    DENSE_LOSSES,
    OVERSHOOTING,
    SCALED,
    TIED,
    K,
    fitted,
    inputs_for,
    make,
    mean_max_cosine,
    normalized_row,
    planted,
    rows,
    rows_for,
    train_briefly,
)

from vitrail.coders import (
    BASELINES,
    CODERS,
    NORMALIZATIONS,
    Crosscoder,
    MultiSource,
    Transcoder,
    load_coder,
    save_coder,
)
from vitrail.statistics import ActivationStats

every_coder = pytest.mark.parametrize("name", sorted(ALL))
every_trained_coder = pytest.mark.parametrize("name", sorted(CODERS))


def test_every_entry_has_example_arguments_and_is_named_as_in_its_table():
    assert set(ARGUMENTS) == set(CODERS) | set(BASELINES)
    assert all(coder.name == name for name, coder in ALL.items())


@every_coder
def test_codes_are_positive_sparse_and_within_the_dictionary(name):
    coder = fitted(name)
    x = inputs_for(coder)
    codes = coder.encode_sparse(x)
    assert codes.n == len(x)
    assert codes.d_sae == coder.d_sae
    assert (codes.values > 0).all()
    assert 0 < codes.nnz < 0.75 * len(x) * coder.d_sae
    assert ((codes.indices >= 0) & (codes.indices < coder.d_sae)).all()
    pairs = codes.rows() * coder.d_sae + codes.indices
    assert len(pairs.unique()) == codes.nnz  # no latent twice in a row


@every_coder
def test_dense_and_sparse_say_the_same(name):
    coder = fitted(name)
    x = inputs_for(coder)
    codes = coder.encode_sparse(x)
    z = coder.encode(x)
    assert torch.equal(z, codes.to_dense())
    torch.testing.assert_close(coder.decode(z, like=codes), coder.decode_sparse(codes))
    torch.testing.assert_close(coder(x), coder.decode_sparse(codes), rtol=0, atol=0)


@every_coder
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_each_row_is_the_same_alone_as_in_a_batch(name, mode):
    coder = fitted(name)
    x = inputs_for(coder, 40)
    coder.train(mode == "train")
    together = coder.encode(x)
    alone = torch.cat([coder.encode(row[None]) for row in x])
    assert torch.equal(alone > 0, together > 0)
    torch.testing.assert_close(alone, together, rtol=1e-5, atol=1e-5)


@every_coder
def test_switching_between_train_and_eval_changes_nothing(name):
    coder = fitted(name)
    x = inputs_for(coder)
    as_constructed = coder.encode(x)  # before eval() was ever called
    state = {key: value.clone() for key, value in coder.state_dict().items()}
    assert torch.equal(coder.eval().encode(x), as_constructed)
    assert torch.equal(coder.train().encode(x), as_constructed)
    assert all(torch.equal(value, state[key]) for key, value in coder.state_dict().items())


@every_coder
def test_saved_and_reloaded_gives_identical_codes(name, tmp_path):
    coder = fitted(name)
    x = inputs_for(coder)
    with torch.no_grad():
        coder.b_enc.normal_(0, 0.05, generator=torch.Generator().manual_seed(3))
    save_coder(tmp_path / "coder", coder)
    reloaded = load_coder(tmp_path / "coder")
    assert type(reloaded) is type(coder)
    assert reloaded.config == coder.config
    assert reloaded.calibration == coder.calibration
    assert torch.equal(reloaded.encode(x), coder.encode(x))
    assert torch.equal(reloaded(x), coder(x))


@every_coder
def test_constructor_arguments_rebuild_the_coder_and_are_json(name):
    coder = make(name, seed=5)
    again = type(coder)(**json.loads(json.dumps(coder.config)))
    assert again.config == coder.config
    assert all(
        torch.equal(value, again.state_dict()[key]) for key, value in coder.state_dict().items() if key != "threshold"
    )
    assert not torch.equal(make("topk", seed=6).W_dec, make("topk", seed=5).W_dec)


@every_coder
def test_new_weights_change_the_decoder_at_once(name):
    coder, other = fitted(name).eval(), fitted(name, seed=9).eval()
    x = inputs_for(coder)
    codes = coder.encode_sparse(x)
    before = coder.decode_sparse(codes)
    changed = {key: value * 2 if key == "W_dec" else value for key, value in other.state_dict().items()}
    coder.load_state_dict(changed)
    torch.testing.assert_close(coder.decode_sparse(codes), coder.decode(codes.to_dense(), like=codes))
    assert not torch.allclose(coder.decode_sparse(codes), before)


@every_coder
def test_a_row_in_which_nothing_fires_is_decoded_to_the_bias(name):
    coder = fitted(name)
    x = inputs_for(coder, 6)
    with torch.no_grad():
        coder.b_enc.fill_(-1e6)
    codes = coder.encode_sparse(x)
    assert codes.nnz == 0
    assert torch.equal(coder.decode_sparse(codes), coder.decode(torch.zeros(6, coder.d_sae), like=codes))


@every_trained_coder
def test_a_batch_where_nothing_fires_has_a_finite_loss_and_gradient(name):
    coder = fitted(name)
    with torch.no_grad():
        coder.b_enc.fill_(-1e6)
    step = coder.loss(rows_for(coder, 6))
    step.loss.backward()
    assert step.codes.nnz == 0
    assert step.loss.isfinite()
    assert all(parameter.grad.isfinite().all() for parameter in coder.parameters())


@every_trained_coder
def test_every_parameter_gets_a_gradient_with_dead_latents_present(name):
    coder = fitted(name)
    with torch.no_grad():
        coder.b_enc[: coder.d_sae // 2] = -1e6
    coder.loss(rows_for(coder)).loss.backward()
    for key, parameter in coder.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.shape == parameter.shape
        assert parameter.grad.isfinite().all()
        assert parameter.grad.abs().sum() > 0, key


@every_trained_coder
def test_terms_sum_to_the_loss_and_the_step_says_where_it_was_measured(name):
    coder = fitted(name)
    x = rows_for(coder)
    step = coder.loss(x)
    torch.testing.assert_close(sum(step.terms.values()), step.loss)
    y = normalized_row(coder, x)
    assert torch.equal(step.y, y[:, : coder.d_in])
    assert torch.equal(step.target, y[:, -coder.d_out :])
    assert step.x_hat.shape == (len(x), coder.d_out)
    assert step.codes.n == len(x)


@every_trained_coder
def test_the_loss_falls_with_the_gradient_and_evaluating_it_in_eval_changes_no_state(name):
    coder = fitted(name)
    x = rows_for(coder)
    coder.eval()
    state = {key: value.clone() for key, value in coder.state_dict().items()}
    first = coder.loss(x).loss
    assert all(torch.equal(value, state[key]) for key, value in coder.state_dict().items())
    first.backward()
    with torch.no_grad():
        for parameter in coder.parameters():
            parameter -= 1e-4 * parameter.grad
    assert coder.loss(x).loss < first


@every_trained_coder
def test_gradients_equal_those_of_the_dense_formula(name):
    """Independent witness: the same support, dense products, plain autograd, in fp64."""
    coder = fitted(name).double()
    x = rows_for(coder, 32).double()
    with torch.no_grad():
        coder.b_dec.normal_(0, 0.1, generator=torch.Generator().manual_seed(0))
        coder.b_enc.normal_(0, 0.1, generator=torch.Generator().manual_seed(1))
    coder.loss(x).loss.backward()
    found = {key: parameter.grad.clone() for key, parameter in coder.named_parameters()}
    coder.zero_grad()
    dense_loss(coder, normalized_row(coder, x)).backward()
    for key, parameter in coder.named_parameters():
        torch.testing.assert_close(
            found[key], parameter.grad, rtol=1e-9, atol=1e-9, msg=lambda m, key=key: f"{key}: {m}"
        )


def dense_loss(coder, y):
    if coder.name in DENSE_LOSSES:
        return DENSE_LOSSES[coder.name](coder, y)
    pre = (y - coder.b_dec) @ coder.W_enc + coder.b_enc

    def error(z):
        return (z @ coder.W_dec + coder.b_dec - y).pow(2).sum(-1).mean()

    def topk(k):
        return pre.relu() * (pre >= pre.sort(1, descending=True).values[:, k - 1 : k]).detach()

    if coder.name == "relu":
        return error(pre.relu()) + coder.l1 * pre.relu().sum(1).mean()
    if coder.name == "topk":
        return error(topk(coder.k))
    if coder.name == "batch_topk":
        smallest = pre.flatten().sort(descending=True).values[len(y) * coder.k - 1]
        return error(pre.relu() * (pre >= smallest).detach())
    if coder.name == "matryoshka":
        weights = range(len(coder.ks), 0, -1)
        return sum(w * error(topk(k)) for w, k in zip(weights, coder.ks, strict=True)) / sum(weights)
    raise AssertionError(f"write the dense loss of {coder.name} in coder_examples.py.")


@every_trained_coder
def test_a_planted_dictionary_is_found(name):
    sparsity = {"ks": [1, 3, 6, 40]} if name == "matryoshka" else {"k": 3} if "k" in ARGUMENTS[name] else {}
    x, directions = planted(8192, d_row=make(name).d_row)
    coder = fitted(name, x, d_sae=40, **sparsity)
    before = mean_max_cosine(directions, coder)
    train_briefly(coder, x)
    assert before < 0.7
    assert mean_max_cosine(directions, coder) > 0.9


@every_trained_coder
def test_decoder_directions_start_and_stay_at_unit_norm(name):
    coder = fitted(name)
    ones = torch.ones(coder.d_sae)
    torch.testing.assert_close(coder.W_dec.norm(dim=1), ones)
    factor = coder.W_enc[:, 0].norm().item() if name in SCALED else 1.0
    torch.testing.assert_close(coder.W_enc.norm(dim=0), factor * ones)
    if not isinstance(coder, Transcoder):
        torch.testing.assert_close(coder.W_enc, factor * coder.W_dec.t())  # tied at the start
    if isinstance(coder, Crosscoder):
        return  # its penalty is measured by the norms, which are free: tests/coders/test_crosscoder.py
    coder.loss(rows_for(coder)).loss.backward()
    coder.constrain_gradients()
    along = (coder.W_dec.grad * coder.W_dec).sum(1)
    assert along.abs().max() < 1e-4 * coder.W_dec.grad.norm(dim=1).max()
    with torch.no_grad():
        coder.W_dec += 0.1
    if name not in TIED:
        torch.testing.assert_close(coder.W_enc.norm(dim=0), factor * ones)  # untied since: W_enc did not move with it
    coder.constrain_weights()
    torch.testing.assert_close(coder.W_dec.norm(dim=1), ones)


@every_coder
@pytest.mark.parametrize("normalization", sorted(NORMALIZATIONS))
def test_a_coder_takes_and_gives_raw_activations_under_every_normalisation(name, normalization):
    if issubclass(ALL[name], MultiSource) and NORMALIZATIONS[normalization].per_row:
        with pytest.raises(ValueError, match=f"cannot use normalization={normalization!r}"):
            make(name, normalization=normalization)
        return
    coder = fitted(name, normalization=normalization)
    x = inputs_for(coder)
    codes = coder.encode_sparse(x)
    y_hat = codes.to_dense() @ coder.W_dec + coder.output_bias()
    _, shift, scale = coder.normalize(x)
    written = coder.normalize_out if isinstance(coder, Transcoder) else coder.normalize
    torch.testing.assert_close(coder.decode_sparse(codes), written.invert(y_hat, shift, scale))
    assert (codes.shift is None) == (not coder.normalize.per_row)
    y = normalized_row(coder, rows_for(coder))[:, -coder.d_out :]
    # Half of all latents overshoot at the start, and a transcoder's decoder knows nothing of its encoder yet.
    blind = name in {"relu", "crosscoder", *OVERSHOOTING} or isinstance(coder, Transcoder)
    assert (y - y_hat).square().sum() < (y - coder.output_bias()).square().sum() or blind
    torch.testing.assert_close(coder.decode_sparse(codes.select_rows(slice(3, 9))), coder(x)[3:9])


@every_coder
def test_fp16_and_bf16_activations_are_welcome(name):
    coder = fitted(name)
    x = inputs_for(coder)
    for dtype in (torch.float16, torch.bfloat16):
        assert torch.equal(coder(x.to(dtype)), coder(x.to(dtype).float()))


@every_coder
def test_no_rows_give_no_codes(name):
    coder = fitted(name)
    assert coder.encode_sparse(torch.empty(0, D_IN)).n == 0
    assert coder(torch.empty(0, D_IN)).shape == (0, coder.d_out)


@every_coder
def test_wrong_use_is_named(name):
    coder = fitted(name)
    with pytest.raises(ValueError, match=rf"d_in={D_IN}, got {D_IN + 1}"):
        coder.encode(torch.zeros(2, D_IN + 1))
    with pytest.raises(ValueError, match="no rows"):
        coder.loss(torch.zeros(0, coder.d_row))
    with pytest.raises(ValueError, match="d_sae=99"):
        coder.decode_sparse(coder.encode_sparse(rows()).from_dense(torch.ones(1, 99)))
    with pytest.raises(RuntimeError, match="has not seen its data"):
        make(name).encode(rows())
    with pytest.raises(ValueError, match=f"of 3 dimensions; this coder has d_in={D_IN}"):
        make(name).fit(ActivationStats.of(torch.randn(5, 3)), torch.randn(5, 3))


@every_coder
def test_a_copy_is_independent(name):
    coder = fitted(name)
    x = inputs_for(coder)
    twin = copy.deepcopy(coder)
    before = coder(x)
    with torch.no_grad():
        twin.W_dec.mul_(2)
        twin.b_enc.add_(1)
    assert torch.equal(coder(x), before)
    assert not torch.equal(twin(x), before)


def test_example_k_is_kept():
    for name in ("topk", "matryoshka", "random", "neurons", "pca"):
        assert fitted(name).encode_sparse(rows()).l0().max() <= K
