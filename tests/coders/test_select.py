"""Selection by groups and by a guess finds what ranking everything finds."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vitrail.coders import TopK
from vitrail.coders import select as module
from vitrail.coders.select import Encoder, largest_of_batch, largest_of_rows
from vitrail.coders.sparse import Codes, entry_dots
from vitrail.statistics import ActivationStats


def encoder(n, d_sae, seed, dtype=None, d_in=24, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    centred, W_dec, b_enc = (torch.randn(*size, generator=generator) for size in ((n, d_in), (d_sae, d_in), (d_sae,)))
    return Encoder(centred, W_dec.t(), 0.1 * b_enc + shift, dtype)


def pre_activations(of):
    return torch.cat([pre.float().clone() for _, pre in of.chunks()])


def ranked_rows(pre, k):
    top = pre.topk(k, dim=1)
    return torch.zeros_like(pre).scatter(1, top.indices, top.values.relu())


def ranked_batch(pre, count):
    top = pre.flatten().topk(count)
    return torch.zeros_like(pre).flatten().scatter(0, top.indices, top.values.relu()).view_as(pre)


# 509 is prime and 100 too few for groups.
SIZES = (100, 509, 520, 768, 1024, 6144)


@given(n=st.integers(1, 40), d_sae=st.sampled_from(SIZES), k=st.integers(1, 70), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_the_largest_of_each_row_are_those_that_ranking_finds(n, d_sae, k, seed):
    found = encoder(n, d_sae, seed)
    codes = largest_of_rows(found, k)
    assert torch.equal(codes.to_dense(), ranked_rows(pre_activations(found), k))
    assert codes.nnz == 0 or codes.values.min() > 0


@given(
    n=st.integers(1, 40),
    d_sae=st.sampled_from(SIZES),
    k=st.integers(1, 40),
    seed=st.integers(0, 99),
    usual=st.sampled_from([None, 0.1, 5.0, 12.0, 1e9]),
)
@settings(max_examples=60, deadline=None)
def test_the_largest_of_the_batch_are_those_that_ranking_finds_whatever_was_usual(n, d_sae, k, seed, usual):
    found = encoder(n, d_sae, seed)
    codes = largest_of_batch(found, n * k, usual=usual)
    assert torch.equal(codes.to_dense(), ranked_batch(pre_activations(found), n * k))


def test_groups_are_used_at_these_sizes():
    sizes = {(6144, 64): 6, (24576, 72): 12, (509, 4): 1, (100, 4): 1, (6144, 4096): 1}
    assert {asked: module._group_size(*asked) for asked in sizes} == sizes


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("d_sae", [100, 1024])
def test_where_many_are_equal_all_are_ranked(dtype, d_sae):
    # Half of the latents are the same number, the largest: more candidates than are worth looking at.
    b_enc = torch.arange(d_sae).remainder(2).float()
    same = Encoder(torch.zeros(5, 8), torch.zeros(8, d_sae), b_enc, dtype)
    codes = largest_of_rows(same, 3)
    assert codes.l0().tolist() == [3] * 5
    assert codes.values.tolist() == [1.0] * 15
    assert largest_of_batch(same, 15, usual=0.5).values.tolist() == [1.0] * 15


def test_rows_with_less_than_k_positive_entries_keep_only_those():
    found = encoder(30, 1024, 3, shift=-14.0)
    pre = pre_activations(found)
    assert (pre > 0).any()
    assert (pre > 0).sum(1).max() < 32
    assert torch.equal(largest_of_rows(found, 32).to_dense(), pre.relu())
    assert torch.equal(largest_of_batch(found, 30 * 32, usual=3.0).to_dense(), pre.relu())


def test_rows_that_are_all_the_same_number_give_k_of_them():
    same = Encoder(torch.zeros(5, 8), torch.zeros(8, 1024), torch.ones(1024))
    assert largest_of_rows(same, 7).l0().tolist() == [7] * 5
    assert largest_of_batch(same, 35, usual=1.0).nnz == 35


@pytest.mark.parametrize("of_batch", [False, True])
def test_bfloat16_finds_the_same_entries_and_values_them_in_full(of_batch):
    full, half = encoder(200, 6144, 1, d_in=64), encoder(200, 6144, 1, torch.bfloat16, d_in=64)
    select = (lambda e: largest_of_batch(e, 200 * 32, usual=20.0)) if of_batch else (lambda e: largest_of_rows(e, 32))
    exact, found = select(full).to_dense(), select(half).to_dense()
    both = (exact > 0) & (found > 0)
    assert both.sum() == 200 * 32  # some to spare: none was missed
    torch.testing.assert_close(found[both], exact[both], rtol=1e-5, atol=1e-5)
    assert half.chunks().__next__()[1].dtype == torch.bfloat16


def test_a_bfloat16_step_has_the_full_step_s_loss_and_gradients():
    x = torch.randn(256, 32, generator=torch.Generator().manual_seed(0))
    gradients = []
    for dtype in (None, torch.bfloat16):
        coder = TopK(d_in=32, d_sae=1024, k=8)
        coder.fit(ActivationStats.of(x), x)
        coder.selection_dtype = dtype
        loss = coder.loss(x).loss
        loss.backward()
        gradients.append([loss.detach()] + [parameter.grad for parameter in coder.parameters()])
    for full, half in zip(*gradients, strict=True):
        torch.testing.assert_close(half, full, rtol=1e-4, atol=1e-4)


def test_dots_by_hand_come_in_the_order_of_the_entries():
    # Row 0 fires latents 2 and 0, row 1 latent 2: <(1, 2), (5, 6)> = 17, <(1, 2), (1, 0)> = 1, <(3, 4), (5, 6)> = 39.
    codes = Codes(torch.tensor([0, 2, 3]), torch.tensor([2, 0, 2]), torch.ones(3), 3)
    per_row = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    per_latent = torch.tensor([[1.0, 0.0], [0.0, 0.0], [5.0, 6.0]])
    assert entry_dots(per_row, per_latent, codes).tolist() == [17, 1, 39]


def test_no_rows_are_no_chunks():
    none = Encoder(torch.zeros(0, 8), torch.zeros(8, 1024), torch.ones(1024))
    assert list(none.chunks()) == []
