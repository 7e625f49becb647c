"""What every backbone promises, on a small random instance of each kind."""

import pytest
import torch
from torch import Tensor, nn

from vitrail.backbones import Backbone, Point
from vitrail.backbones.toy import ToyStem


def _noise(like: Tensor) -> Tensor:
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(7))


def _has_hooks(backbone: Backbone) -> bool:
    return any(module._forward_hooks or module._forward_pre_hooks for module in backbone.modules())


@pytest.mark.parametrize("gradients", [True, False])
def test_parts_equal_the_module_itself_bit_for_bit(case, gradients):
    images = case.images()
    with torch.set_grad_enabled(gradients):  # libraries choose other kernels where no gradient is wanted
        output = case.backbone.finish(case.backbone.run_blocks(case.backbone.embed(images)))
        assert torch.equal(output, case.native(images))
        assert torch.equal(case.backbone(images), output)


def spoil(value: Tensor, _point: Point) -> None:
    value.zero_()


def test_output_is_logits_or_the_embedding(case):
    backbone = case.backbone
    assert backbone(case.images()).shape == (2, backbone.n_classes or backbone.d_embed)


@pytest.mark.parametrize("gradients", [True, False])
def test_capturing_everything_leaves_the_output_bit_identical(case, gradients):
    images = case.images()
    with torch.set_grad_enabled(gradients):
        output, cache = case.backbone.run_with_cache(images)
        assert torch.equal(output, case.native(images))
        looked = case.backbone.run_with_hooks(images, [(lambda _name: True, spoil)])
        assert torch.equal(looked, output)
    assert list(cache) == list(case.backbone.points), "in order of computation"


def test_points_say_the_shapes_they_have(case):
    backbone = case.backbone
    _, cache = backbone.run_with_cache(case.images())
    for name, value in cache.items():
        point = backbone.points[name]
        n_tokens = backbone.grid.n_patches if name == "hook_embed" else backbone.grid.n_tokens
        assert value.shape == ((2, n_tokens, point.width) if point.has_tokens else (2, point.width)), name


def test_tokens_are_grid_and_special_tokens(case):
    backbone = case.backbone
    grid = backbone.grid
    tokens = backbone.embed(case.images())
    assert tokens.shape == (2, grid.height * grid.width + grid.n_cls + grid.n_registers, backbone.d_model)
    assert tokens[:, grid.tokens("spatial")].shape[1] == grid.n_patches


def test_special_tokens_come_first(case):
    """Of two pictures that differ in one patch, that token differs on the way into the model, and no other unless
    patches are made by a stem of overlapping convolutions: then also its neighbours, on every side alike."""
    backbone, grid = case.backbone, case.backbone.grid
    images = case.images(1)
    changed = images.clone()
    left, top, right, bottom = grid.box_px(grid.token_of_patch(1, 2))
    changed[:, :, top:bottom, left:right] += 1.0
    a, b = (backbone.run_with_cache(x, "hook_full_embed")[1]["hook_full_embed"] for x in (images, changed))
    there = grid.token_of_patch(1, 2)
    touched = set((a != b).any(2)[0].nonzero().flatten().tolist())
    overlapping = any(isinstance(module, ToyStem) for module in backbone.modules())
    around = {there + down * grid.width + across for down in (-1, 0, 1) for across in (-1, 0, 1)}
    assert touched == (around if overlapping else {there})


def test_attention_and_mlp_add_up_to_the_stream(case):
    """attn_out and mlp_out are what is added, after LayerScale."""
    _, cache = case.backbone.run_with_cache(case.images())
    for i in range(case.backbone.n_layers):
        if f"blocks.{i}.hook_mlp_out" not in cache:  # attention alone
            attention, post = cache[f"blocks.{i}.hook_attn_out"], cache[f"blocks.{i}.hook_resid_post"]
            torch.testing.assert_close(cache[f"blocks.{i}.hook_resid_pre"] + attention, post)
            assert f"blocks.{i}.hook_resid_mid" not in cache
            continue
        pre, attn, mid, mlp, post = (
            cache[f"blocks.{i}.hook_{last}"] for last in ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")
        )
        torch.testing.assert_close(pre + attn, mid)
        torch.testing.assert_close(mid + mlp, post)


def test_values_are_keyed_by_name_not_by_order(case):
    images = case.images()
    _, cache = case.backbone.run_with_cache(images)
    backwards = case.backbone.activations(images, list(case.backbone.points)[::-1])
    assert list(backwards) == list(case.backbone.points)[::-1]
    for name, value in backwards.items():
        assert torch.equal(value, cache[name]), name


def test_an_edit_at_every_point_reaches_the_output(case):
    images = case.images()
    before = case.backbone(images)
    for name in case.backbone.points:
        after = case.backbone.run_with_hooks(images, {name: lambda value, _point: value + _noise(value)})
        assert (after - before).abs().max() > 1e-4, name


def test_a_gradient_flows_through_an_edit_at_every_point(case):
    images = case.images()
    _, cache = case.backbone.run_with_cache(images)
    for name, value in cache.items():
        added = torch.zeros_like(value, requires_grad=True)
        output = case.backbone.run_with_hooks(images, {name: lambda value, _point, added=added: value + added})
        (gradient,) = torch.autograd.grad((output * _noise(output)).sum(), added)
        assert gradient.abs().max() > 1e-6, name


def test_editing_resid_mid_is_editing_attn_out(case):
    """The edited value is what both the MLP and the skip connection see, forwards and backwards."""
    images = case.images()
    layers = [i for i in range(case.backbone.n_layers) if f"blocks.{i}.hook_resid_mid" in case.backbone.points]
    assert layers or case.backbone.module.config["d_mlp"] == 0  # blocks of attention alone have no such point
    for i in layers:
        outputs, gradients = [], []
        for last in ("hook_attn_out", "hook_resid_mid"):
            added = _noise(case.backbone.embed(images)).requires_grad_()
            output = case.backbone.run_with_hooks(images, {f"blocks.{i}.{last}": lambda x, _point, a=added: x + a})
            outputs.append(output.detach())
            gradients.append(torch.autograd.grad((output * _noise(output)).sum(), added)[0])
        torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-5)


def test_editing_resid_post_is_editing_the_next_resid_pre(case):
    images = case.images()
    a, b = (
        case.backbone.run_with_hooks(images, {name: lambda value, _point: value * 0.5 + 1.0})
        for name in ("blocks.0.hook_resid_post", "blocks.1.hook_resid_pre")
    )
    assert torch.equal(a, b)


def test_a_gradient_through_a_nonlinear_edit_of_resid_mid_is_the_numerical_one(one_of_each):
    """The edit is written in place; autograd must differentiate the edit at the value before it."""
    images, backbone = one_of_each.images(1), one_of_each.backbone
    name = "blocks.1.hook_resid_mid"
    backbone.double()
    try:

        def output(scale: Tensor) -> Tensor:
            return backbone.run_with_hooks(images.double(), {name: lambda x, _point: (x * scale).square() + x.exp()})

        scale = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
        (gradient,) = torch.autograd.grad(output(scale).sum(), scale)
        with torch.no_grad():
            numerical = (output(scale + 1e-5).sum() - output(scale - 1e-5).sum()) / 2e-5
        torch.testing.assert_close(gradient, numerical, rtol=1e-5, atol=1e-8)
    finally:
        backbone.float()


def test_resuming_from_any_block_equals_the_full_run(case):
    images, backbone = case.images(), case.backbone
    output, cache = backbone.run_with_cache(images)
    for i in range(backbone.n_layers):
        resumed = backbone.finish(backbone.run_blocks(cache[f"blocks.{i}.hook_resid_pre"], start=i))
        assert torch.equal(resumed, output)


def test_stopping_at_a_layer_returns_what_would_enter_it(case):
    images, backbone = case.images(), case.backbone
    _, full = backbone.run_with_cache(images)
    for layer in range(backbone.n_layers):
        residual, cache = backbone.run_with_cache(images, stop_at_layer=layer)
        assert torch.equal(residual, full[f"blocks.{layer}.hook_resid_pre"])
        assert f"blocks.{layer}.hook_resid_pre" not in cache
        for name, value in cache.items():
            assert torch.equal(value, full[name])
    assert torch.equal(backbone.run_with_cache(images, stop_at_layer=-1)[0], residual)


def test_activations_compute_nothing_after_the_last_point(case):
    backbone = case.backbone
    ran: list[int] = []
    handles = [
        block.register_forward_hook(lambda *_arguments, i=i: ran.append(i)) for i, block in enumerate(backbone.blocks)
    ]
    for name, completed in {
        "hook_full_embed": [],
        "blocks.1.hook_resid_pre": [0],
        "blocks.1.hook_attn_out": [0],
        "blocks.1.hook_resid_post": [0, 1],
    }.items():
        ran.clear()
        backbone.activations(case.images(), [name])
        assert ran == completed, name
    for handle in handles:
        handle.remove()


def test_hooks_are_gone_after_an_exception(case):
    def fail(_value: Tensor, point: Point) -> None:
        raise RuntimeError(point.name)

    for name in case.backbone.points:
        with pytest.raises(RuntimeError, match=name.replace(".", r"\.")):
            case.backbone.run_with_hooks(case.images(), {name: fail})
        assert not _has_hooks(case.backbone)
    case.backbone.activations(case.images(), list(case.backbone.points)[:3])
    assert not _has_hooks(case.backbone)


def test_one_pixel_of_error_is_refused(case):
    height, width = case.backbone.preprocess.image_px
    with pytest.raises(ValueError, match="takes images of"):
        case.backbone(torch.zeros(1, 3, height, width + 1))


def test_rows_of_a_batch_do_not_see_each_other(case):
    images = case.images(3)
    alone = torch.cat([case.backbone(image[None]) for image in images])
    torch.testing.assert_close(case.backbone(images), alone)


def test_the_module_is_the_original_and_its_weights_have_a_digest(case):
    backbone = case.backbone
    assert isinstance(backbone.module, nn.Module)
    assert all(any(block is module for module in backbone.module.modules()) for block in backbone.blocks)
    assert len(backbone.digest) == 64
