"""Looking, replacing and stopping, on modules small enough to follow by hand."""

import pytest
import torch
from torch import nn

from vitrail.hooks import Site, capturing, editing


class Residual(nn.Module):
    """x -> m = x + 1 -> m + 10 * norm(m): as in a transformer block, `m` is read by norm and by the skip."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.Identity()

    def forward(self, x):
        m = x + 1
        return m + 10 * self.norm(m)


class Attention(nn.Module):
    def forward(self, x):
        return x * 2, "weights"


class Map(nn.Module):
    """(b, d, h, w) from (b, h*w, d), so that both sides can be checked."""

    def forward(self, x):
        return x.transpose(1, 2).reshape(1, 3, 2, 2)


def hooks_left(module):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules())


@pytest.fixture
def x():
    return torch.arange(12.0).reshape(1, 4, 3)


def test_an_edit_in_place_reaches_both_readers(x):
    block = Residual()
    site = Site(block.norm, "input", in_place=True)
    with editing([("mid", site, lambda m: m * 0 + 2)]):
        # m = 2 for the norm and for the skip: 2 + 10 * 2.
        assert torch.equal(block(x), torch.full_like(x, 22.0))
    with editing([("mid", Site(block.norm, "input"), lambda m: m * 0 + 2)]):
        # What goes wrong without it: the skip keeps x + 1.
        assert torch.equal(block(x), x + 1 + 20)


def test_an_edit_in_place_leaves_the_input_of_the_block_alone(x):
    block, before = Residual(), x.clone()
    with editing([("mid", Site(block.norm, "input", in_place=True), lambda m: m + 1)]):
        block(x)
    assert torch.equal(x, before)


def test_edits_run_in_order_and_a_capture_sees_the_last(x):
    module = nn.Identity()
    site = Site(module, "output")
    with (
        editing([("p", site, lambda v: v + 1), ("p", site, lambda v: v * 10), ("p", site, lambda _v: None)]),
        capturing({"p": site}) as cache,
    ):
        assert torch.equal(module(x), (x + 1) * 10)
    assert torch.equal(cache["p"], (x + 1) * 10)


def test_what_a_callback_does_to_its_argument_counts_only_if_returned(x):
    module = nn.Identity()

    def spoil(value):
        value.zero_()

    with editing([("p", Site(module, "output"), spoil)]):
        assert torch.equal(module(x), x)
    assert x.sum() > 0


def test_a_cache_is_not_written_over_by_a_later_edit_in_place(x):
    block = Residual()
    site = Site(block.norm, "input", in_place=True)
    with capturing({"mid": site}) as cache, editing([("mid", site, lambda m: m * 0)]):
        block(x)
    assert torch.equal(cache["mid"], x + 1), "it was opened before the edit, so it sees the value before it"


def test_the_first_of_a_tuple_is_the_value(x):
    module = Attention()
    site = Site(module, "output")
    with editing([("p", site, lambda v: v + 1)]), capturing({"p": site}) as cache:
        out, weights = module(x)
    assert torch.equal(out, x * 2 + 1)
    assert weights == "weights"
    assert torch.equal(cache["p"], out)


@pytest.mark.parametrize("layout", ["channels_first", "channels_last"])
def test_maps_are_seen_and_replaced_as_tokens(x, layout):
    module = nn.Sequential(Map(), nn.Identity())
    expected = module(x)
    if layout == "channels_last":
        module[1].forward = lambda v: v.permute(0, 2, 3, 1)
        expected = expected.permute(0, 2, 3, 1)
    site = Site(module[1], "output", layout=layout)
    with capturing({"p": site}) as cache, editing([("p", site, lambda v: v + 1)]):
        assert torch.equal(module(x), expected + 1)
    assert torch.equal(cache["p"], x)


def test_capture_that_stops_leaves_the_rest_undone(x):
    ran = []
    model = nn.Sequential(nn.Identity(), nn.Identity(), nn.Identity())
    model[2].register_forward_hook(lambda *_arguments: ran.append(2))
    with capturing({"b": Site(model[1], "output"), "a": Site(model[0], "input")}, stop=True) as cache:
        model(x)
        pytest.fail("the pass should have been left")
    assert sorted(cache) == ["a", "b"]
    assert ran == []


def test_a_stop_belongs_to_its_own_capture(x):
    """An inner capture does not swallow the stop of an outer one."""
    model = nn.Sequential(nn.Identity(), nn.Identity())
    after_inner = []
    with capturing({"a": Site(model[0], "output")}, stop=True) as outer:
        with capturing({"b": Site(model[1], "output")}, stop=True):
            model(x)
        after_inner.append(True)
    assert list(outer) == ["a"]
    assert after_inner == []


def test_hooks_are_gone_after_an_exception_even_while_attaching(x):
    model = nn.Sequential(nn.Identity(), nn.Identity())

    def fail(_value):
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"), editing([("a", Site(model[0], "output"), fail)]):
        model(x)
    assert hooks_left(model) == 0

    def sites():
        yield "a", Site(model[0], "input"), lambda _v: None
        raise LookupError("while listing")

    with pytest.raises(LookupError), editing(sites()):
        pass
    assert hooks_left(model) == 0


def test_a_wrong_shape_is_refused_by_name_with_both_shapes(x):
    module = nn.Identity()
    with (
        editing([("blocks.0.hook_mlp_out", Site(module, "output"), lambda v: v[:, :2])]),
        pytest.raises(ValueError, match=r"'blocks.0.hook_mlp_out' returned shape \(1, 2, 3\); it must be \(1, 4, 3\)"),
    ):
        module(x)
    with (
        editing([("p", Site(module, "output"), lambda v: v.tolist())]),
        pytest.raises(TypeError, match="returned a list"),
    ):
        module(x)


def test_an_edit_keeps_the_precision_of_what_it_replaces(x):
    module = nn.Identity()
    with editing([("p", Site(module, "output"), lambda v: v.double() + 1)]):
        assert module(x.half()).dtype == torch.float16
