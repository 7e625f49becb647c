"""Codes and their products against the dense reference."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vitrail.coders import Codes
from vitrail.coders.sparse import activations, decode


@st.composite
def dense_codes(draw, max_rows=6, max_latents=9):
    """Small dense z >= 0, often with empty rows, often with nothing at all."""
    n, d_sae = draw(st.integers(0, max_rows)), draw(st.integers(1, max_latents))
    cells = draw(st.lists(st.sampled_from([0.0, 0.0, 0.5, 1.0, 2.0, 7.25]), min_size=n * d_sae, max_size=n * d_sae))
    return torch.tensor(cells, dtype=torch.float64).reshape(n, d_sae)


few = settings(max_examples=60, deadline=None, derandomize=True)


@few
@given(dense_codes())
def test_dense_to_codes_and_back_is_the_identity(z):
    codes = Codes.from_dense(z)
    assert torch.equal(codes.to_dense(), z)
    assert (codes.n, codes.d_sae, codes.nnz) == (*z.shape, int((z > 0).sum()))
    assert torch.equal(codes.l0(), (z > 0).sum(1))
    assert torch.equal(codes.fired(), (z > 0).sum(0))
    assert torch.equal(codes.rows(), z.nonzero()[:, 0])


@few
@given(dense_codes(), st.data())
def test_rows_can_be_picked_in_any_order_and_more_than_once(z, data):
    picked = data.draw(st.lists(st.integers(0, len(z) - 1), max_size=8)) if len(z) else []
    rows = torch.tensor(picked, dtype=torch.int64)
    assert torch.equal(Codes.from_dense(z).select_rows(rows).to_dense(), z[rows])
    assert torch.equal(Codes.from_dense(z).select_rows(slice(1, 4)).to_dense(), z[1:4])


@few
@given(dense_codes(max_latents=5), st.data())
def test_joining_parts_gives_the_whole(z, data):
    cut = data.draw(st.integers(0, len(z)))
    parts = [Codes.from_dense(part) for part in (z[:cut], z[cut:])]
    assert torch.equal(Codes.cat(parts).to_dense(), z)


@few
@given(dense_codes(), st.integers(1, 10))
def test_top_keeps_the_k_largest_of_each_row(z, k):
    kept = Codes.from_dense(z).top(k).to_dense()
    for before, after in zip(z, kept, strict=True):  # a slow loop as the witness
        assert sorted(after[after > 0]) == sorted(before[before > 0])[-k:]
        assert ((after == before) | (after == 0)).all()


@few
@given(dense_codes())
def test_the_transpose_lists_each_latents_rows_in_order(z):
    order, rows, offsets = Codes.from_dense(z).transposed()
    for latent in range(z.shape[1]):
        part = slice(int(offsets[latent]), int(offsets[latent + 1]))
        assert torch.equal(rows[part], z[:, latent].nonzero().squeeze(1))
        assert torch.equal(Codes.from_dense(z).values[order[part]], z[:, latent][z[:, latent] > 0])


@few
@given(dense_codes())
def test_decoding_equals_the_dense_product(z):
    W_dec = torch.linspace(-1, 2, z.shape[1] * 3, dtype=torch.float64).reshape(z.shape[1], 3)
    torch.testing.assert_close(decode(Codes.from_dense(z), W_dec), z @ W_dec)


def test_padded_candidates_that_are_not_positive_did_not_fire():
    indices, values = torch.tensor([[4, 1], [0, 2], [3, 3]]), torch.tensor([[2.0, 0.0], [1.0, 3.0], [-1.0, 0.0]])
    z = torch.tensor([[0, 0, 0, 0, 2.0], [1, 0, 3, 0, 0], [0, 0, 0, 0, 0]])
    codes = Codes.from_padded(indices, values, 5)
    assert torch.equal(codes.to_dense(), z)
    assert codes.offsets.tolist() == [0, 1, 3, 3]


def test_gradients_of_decode_in_fp64():
    z, W_dec = example()

    def run(values, W_dec):
        return decode(Codes.from_dense(z).with_values(values), W_dec)

    values = Codes.from_dense(z).values.clone().requires_grad_()
    assert torch.autograd.gradcheck(run, (values, W_dec.requires_grad_()))


def test_gradients_of_the_encoder_at_the_support_equal_those_of_the_dense_product():
    z, W_dec = example()
    generator = torch.Generator().manual_seed(2)
    arguments = [
        torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((6, 4), (4,), (4, 7), (7,))
    ]
    g = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    support = Codes.from_dense(z)

    def pre(y, b_dec, W_enc, b_enc):
        return (y - b_dec) @ W_enc + b_enc

    dense = [argument.clone().requires_grad_() for argument in arguments]
    (((pre(*dense) * (z > 0)) @ W_dec) * g).sum().backward()
    sparse = [argument.clone().requires_grad_() for argument in arguments]
    found = support.with_values(pre(*arguments)[z > 0])
    (decode(activations(*sparse, found), W_dec) * g).sum().backward()
    for theirs, ours in zip(dense, sparse, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_one_transpose_serves_both_weight_gradients():
    codes = Codes.from_dense(example()[0])
    assert codes.with_values(codes.values * 2).transposed() is codes.transposed()
    assert codes.with_values(codes.values * 2).rows() is codes.rows()
    assert codes.top(1).transposed() is not codes.transposed()


def test_with_nothing_at_all_there_is_a_zero_output_and_zero_gradients():
    codes = Codes.from_dense(torch.zeros(3, 5))
    W_dec = torch.randn(5, 2, requires_grad=True)
    out = decode(codes, W_dec)
    out.sum().backward()
    assert torch.equal(out, torch.zeros(3, 2))
    assert torch.equal(W_dec.grad, torch.zeros(5, 2))


def test_fp16_values_and_int32_indices_from_disk_decode():
    z, W_dec = example()
    codes = Codes.from_dense(z)
    stored = Codes(codes.offsets, codes.indices.int(), codes.values.half(), codes.d_sae)
    torch.testing.assert_close(decode(stored, W_dec), z @ W_dec, rtol=1e-3, atol=1e-3)
    assert torch.equal(stored.select_rows(slice(0, 2)).to_dense(), z[:2].half())


def test_row_terms_follow_their_rows():
    z = example()[0]
    shift, scale = torch.arange(6.0)[:, None], torch.arange(6.0)[:, None] + 1
    codes = Codes.from_dense(z).with_row_terms(shift, scale)
    picked = Codes.cat([codes.select_rows(torch.tensor([5, 0])), codes.top(1)])
    assert picked.shift.squeeze(1).tolist() == [5, 0, 0, 1, 2, 3, 4, 5]
    assert picked.scale.squeeze(1).tolist() == [6, 1, 1, 2, 3, 4, 5, 6]
    assert codes.to("cpu").detach().scale.equal(scale)


def test_what_cannot_be_joined_or_cut_is_named():
    codes = Codes.from_dense(torch.ones(1, 2))
    with pytest.raises(ValueError, match=r"d_sae is \[2, 3\]"):
        Codes.cat([codes, Codes.from_dense(torch.ones(1, 3))])
    with pytest.raises(ValueError, match="different coders"):
        Codes.cat([codes, codes.with_row_terms(torch.zeros(1, 1), torch.ones(1, 1))])
    with pytest.raises(ValueError, match="nothing to join"):
        Codes.cat([])
    with pytest.raises(ValueError, match="at least 1, got 0"):
        codes.top(0)


def example():
    generator = torch.Generator().manual_seed(1)
    z = torch.rand(6, 7, generator=generator, dtype=torch.float64)
    z = z * (z > 0.6)
    z[2] = 0  # an empty row
    z[:, 3] = 0  # a latent that never fires
    return z, torch.randn(7, 4, generator=generator, dtype=torch.float64)
