"""Asking for points: by name, pattern or not at all; what is wrong gets a sentence."""

import pytest
import torch


@pytest.fixture
def backbone(one_of_each):
    return one_of_each.backbone


def test_names_filter(one_of_each, backbone):
    images = one_of_each.images()
    everything = list(backbone.points)
    assert list(backbone.run_with_cache(images)[1]) == everything
    assert list(backbone.run_with_cache(images, "hook_embed")[1]) == ["hook_embed"]
    two = ["blocks.1.hook_mlp_out", "blocks.0.hook_resid_pre"]
    assert sorted(backbone.run_with_cache(images, two)[1]) == sorted(two)
    posts = backbone.run_with_cache(images, lambda name: name.endswith("resid_post"))[1]
    assert list(posts) == [f"blocks.{i}.hook_resid_post" for i in range(3)]


def test_an_unknown_point_names_the_nearest(one_of_each, backbone):
    expected = r"has no hook point 'blocks.1.hook_resid'. Nearest: blocks.1.hook_resid_"
    images = one_of_each.images()
    for ask in (
        lambda: backbone.run_with_cache(images, "blocks.1.hook_resid"),
        lambda: backbone.activations(images, ["hook_embed", "blocks.1.hook_resid"]),
        lambda: backbone.run_with_hooks(images, {"blocks.1.hook_resid": lambda value, point: value}),
        lambda: backbone.with_coders({"blocks.1.hook_resid": lambda x: x}).__enter__(),
    ):
        with pytest.raises(KeyError, match=expected):
            ask()


def test_hooks_of_a_point_run_in_order_and_know_where_they_are(one_of_each, backbone):
    images, seen = one_of_each.images(), []

    def look(value, point):
        seen.append((point.name, point.layer))

    name = "blocks.1.hook_attn_out"
    edits = [lambda value, _point: value * 0, look, lambda value, _point: value + 3]
    with backbone.hooks({name: edits}):
        _, cache = backbone.run_with_cache(images, name)
    assert torch.equal(cache[name], torch.full_like(cache[name], 3.0))
    assert seen == [(name, 1)]
    backbone.run_with_hooks(images, [(lambda name: "mlp_out" in name, look), ("hook_image_embed", look)])
    assert seen[1:] == [*((f"blocks.{i}.hook_mlp_out", i) for i in range(3)), ("hook_image_embed", None)]


def test_a_wrong_shape_names_the_point_and_both_shapes(one_of_each, backbone):
    expected = rf"'blocks.0.hook_resid_mid' returned shape \(2, 16, .*must be \(2, 17, {backbone.d_model}\)"
    with pytest.raises(ValueError, match=expected):
        backbone.run_with_hooks(one_of_each.images(), {"blocks.0.hook_resid_mid": lambda value, _point: value[:, 1:]})


def test_cached_values_keep_their_graph(one_of_each, backbone):
    images = one_of_each.images().requires_grad_()
    output, cache = backbone.run_with_cache(images)
    (gradient,) = torch.autograd.grad(output.sum(), cache["blocks.1.hook_resid_post"], retain_graph=True)
    assert gradient.abs().max() > 0
    with torch.no_grad():
        assert not backbone.run_with_cache(images)[1]["hook_embed"].requires_grad


def test_a_cached_value_outlives_later_edits(one_of_each, backbone):
    """An outer capture of resid_mid is not written over by an edit that is opened after it, nor is any other value."""
    images = one_of_each.images()
    _, clean = backbone.run_with_cache(images)
    spoil = [(lambda name: "blocks.2" in name, lambda value, _point: value.mul_(0))]
    with backbone.hooks(spoil):
        _, cache = backbone.run_with_cache(images)
    for name, value in cache.items():
        if name < "blocks.2":
            assert torch.equal(value, clean[name]), name


def test_points_that_a_short_run_cannot_reach_are_refused(one_of_each, backbone):
    images = one_of_each.images()
    with pytest.raises(ValueError, match=r"hook_image_embed cannot be cached with stop_at_layer=1"):
        backbone.run_with_cache(images, ["hook_embed", "hook_image_embed"], stop_at_layer=1)
    with pytest.raises(ValueError, match=r"stop_at_layer must be in -3\.\.3, got 4"):
        backbone.run_with_cache(images, stop_at_layer=4)


def test_inference_mode_is_fine(one_of_each, backbone):
    images = one_of_each.images()
    expected = backbone.run_with_hooks(images, {"blocks.1.hook_resid_mid": lambda value, _point: value + 1})
    with torch.inference_mode():
        edited = backbone.run_with_hooks(images, {"blocks.1.hook_resid_mid": lambda value, _point: value + 1})
    # Not bit for bit: torch's MultiheadAttention takes another path where no gradient is wanted.
    torch.testing.assert_close(edited, expected)
