"""Sparse coders in the middle of a forward pass: any callable (n, d) -> (n, d) will do."""

import pytest
import torch
from torch import nn


class Half(nn.Module):
    """A coder with a wide code: z = relu(x W), x_hat = z W^T. In fp32 whatever the model is in."""

    def __init__(self, d_in: int, d_sae: int = 50) -> None:
        super().__init__()
        self.d_in = d_in
        self.W = nn.Parameter(torch.randn(d_in, d_sae, generator=torch.Generator().manual_seed(3)) / d_in**0.5)
        self.rows: list[int] = []

    def encode(self, x):
        self.rows.append(len(x))
        return (x @ self.W).relu()

    def decode(self, z, like=None):
        return z @ self.W.T

    def forward(self, x):
        return self.decode(self.encode(x))


def test_a_perfect_coder_changes_nothing(one_of_each):
    images, backbone = one_of_each.images(), one_of_each.backbone
    every = {name: lambda x: x for name in backbone.points}
    with backbone.with_coders(every) as spliced:
        assert torch.equal(spliced(images), one_of_each.native(images))


def test_reconstructions_take_the_place_of_activations(one_of_each):
    images, backbone = one_of_each.images(), one_of_each.backbone
    name = "blocks.1.hook_resid_post"
    coder = Half(backbone.d_model)
    _, before = backbone.run_with_cache(images, name)
    with backbone.with_coders({name: coder}) as spliced:
        output, after = spliced.run_with_cache(images, name)
    expected = coder(before[name].flatten(0, 1)).view_as(before[name])
    torch.testing.assert_close(after[name], expected)
    torch.testing.assert_close(output, backbone.finish(backbone.run_blocks(expected, start=2)))


def test_the_error_term_makes_every_splice_bit_identical(case):
    images, backbone = case.images(), case.backbone
    coders = {name: Half(point.width) for name, point in backbone.points.items()}
    with backbone.with_coders(coders, use_error_term=True) as spliced:
        assert torch.equal(spliced(images), case.native(images))
    with backbone.with_coders(coders) as spliced:
        assert not torch.equal(spliced(images), case.native(images))


@pytest.mark.parametrize(("tokens", "n_rows"), [("cls", 2), ("spatial", 2 * 16), ("all", 2 * 17)])
def test_only_the_chosen_tokens_are_replaced(one_of_each, tokens, n_rows):
    images, backbone = one_of_each.images(), one_of_each.backbone
    name, coder = "blocks.0.hook_attn_out", Half(backbone.d_model)
    _, before = backbone.run_with_cache(images, name)
    with backbone.with_coders({name: coder}, tokens=tokens) as spliced:
        _, after = spliced.run_with_cache(images, name)
    changed = (before[name] != after[name]).any(2).any(0)
    expected = torch.zeros(17, dtype=torch.bool)
    expected[backbone.grid.tokens(tokens)] = True
    assert torch.equal(changed, expected)
    assert coder.rows == [n_rows]


def test_patch_embeddings_have_no_special_tokens(one_of_each):
    images, backbone = one_of_each.images(), one_of_each.backbone
    for tokens in ("all", "spatial"):
        coder = Half(backbone.d_model)
        with backbone.with_coders({"hook_embed": coder}, tokens=tokens) as spliced:
            spliced(images)
        assert coder.rows == [2 * 16]
    with pytest.raises(ValueError, match="before the CLS"), backbone.with_coders({"hook_embed": coder}, tokens="cls"):
        pass


def test_an_edit_of_codes_moves_the_stream_by_its_decoder_directions(one_of_each):
    """With the error term: x + a W[:, 7], whatever the coder gets wrong."""
    images, backbone = one_of_each.images(), one_of_each.backbone
    name, coder = "blocks.1.hook_resid_post", Half(backbone.d_model)
    _, before = backbone.run_with_cache(images, name)

    def more_of_seven(z, point):
        assert point.name == name
        added = torch.zeros_like(z)
        added[:, 7] = 2.5
        return z + added

    with backbone.with_coders({name: coder}, use_error_term=True, edit=more_of_seven) as spliced:
        _, after = spliced.run_with_cache(images, name)
    moved = (after[name] - before[name]).flatten(0, 1)
    torch.testing.assert_close(moved, (2.5 * coder.W[:, 7]).expand_as(moved), rtol=1e-4, atol=1e-4)
    with backbone.with_coders({name: coder}, use_error_term=True, edit=lambda z, _point: z) as spliced:
        assert torch.equal(spliced(images), one_of_each.native(images))


@pytest.mark.parametrize("use_error_term", [True, False])
def test_gradients_flow_through_the_coder(one_of_each, use_error_term):
    images, backbone = one_of_each.images(), one_of_each.backbone
    coder = Half(backbone.d_model)
    with backbone.with_coders({"blocks.0.hook_resid_mid": coder}, use_error_term=use_error_term) as spliced:
        spliced(images).square().sum().backward()
    assert coder.W.grad is not None
    assert coder.W.grad.abs().max() > 0
    backbone.zero_grad()


def test_a_coder_of_another_width_is_refused_with_both(one_of_each):
    backbone = one_of_each.backbone
    expected = rf"coder takes d_in=7, blocks.0.hook_mlp_out of {backbone.name} is {backbone.d_model} wide"
    with pytest.raises(ValueError, match=expected), backbone.with_coders({"blocks.0.hook_mlp_out": Half(7)}):
        pass


def test_no_cls_token_no_cls_coder(case):
    if case.backbone.grid.n_cls:
        return
    with (
        pytest.raises(ValueError, match="no CLS token"),
        case.backbone.with_coders({"blocks.0.hook_mlp_out": Half(case.backbone.d_model)}, tokens="cls"),
    ):
        pass


def test_an_fp32_coder_works_in_a_half_precision_model():
    from vitrail.backbones import toy

    model = toy.ToyViT(image_px=16, patch_px=8, d_model=24, n_layers=2, n_heads=2, d_mlp=40, n_classes=5)
    backbone = toy.wrap(model.to(torch.bfloat16), name="toy/bf16")
    images = torch.randn(2, 3, 16, 16, dtype=torch.bfloat16)
    coder = Half(24)
    with backbone.with_coders({"blocks.0.hook_resid_post": coder}) as spliced:
        assert spliced(images).dtype == torch.bfloat16
    with backbone.with_coders({"blocks.0.hook_resid_post": coder}, use_error_term=True) as spliced:
        assert torch.equal(spliced(images), model(images))
