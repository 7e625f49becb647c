"""Real transcoders in the place of a component of a real backbone."""

import copy

import pytest
import torch
from torch import nn

from vitrail.backbones.toy import ToyViT, wrap
from vitrail.backbones.transcode import transcoding
from vitrail.coders import CODERS, Transcoder, make_coder
from vitrail.statistics import ActivationStats

READ, WRITTEN = "blocks.1.hook_resid_mid", "blocks.1.hook_mlp_out"
TRANSCODERS = sorted(name for name, coder in CODERS.items() if issubclass(coder, Transcoder))
PAIRS = [(READ, WRITTEN), ("blocks.0.hook_resid_pre", "blocks.1.hook_resid_post"), ("hook_full_embed", READ)]


@pytest.fixture(scope="module")
def backbone():
    torch.manual_seed(0)
    return wrap(ToyViT(image_px=32, patch_px=8, d_model=24, n_layers=3, n_heads=2, d_mlp=32, n_classes=5), name="t")


@pytest.fixture(scope="module")
def images():
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def coder_between(backbone, images, source, target, name="topk_transcoder", **changes):
    with torch.no_grad():
        seen = backbone.activations(images, [source, target])
    x = torch.cat([seen[source].flatten(0, 1), seen[target].flatten(0, 1)], 1)
    coder = make_coder(name, d_in=24, d_out=24, d_sae=40, **changes)
    coder.fit(ActivationStats.of(x), x)
    if coder.W_skip is not None:
        nn.init.normal_(coder.W_skip, 0, 0.1)
    coder.calibrate([x])
    return coder.eval()


class MLPItself(nn.Module):
    """The component as a transcoder: what it reads, normed, through the MLP."""

    d_in = d_out = 24

    def __init__(self, block) -> None:
        super().__init__()
        self.block = copy.deepcopy(block)  # the original's modules carry the hooks

    def forward(self, x):
        return self.block.mlp(self.block.norm2(x))


@pytest.mark.parametrize("tokens", ["all", "cls", "spatial"])
def test_the_component_itself_as_a_transcoder_changes_nothing(backbone, images, tokens):
    with torch.no_grad():
        clean = backbone(images)
        with transcoding(backbone, MLPItself(backbone.blocks[1]), READ, WRITTEN, tokens=tokens) as replaced:
            torch.testing.assert_close(replaced(images), clean, rtol=1e-5, atol=1e-5)
        assert torch.equal(backbone(images), clean)  # and nothing is left behind


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("name", TRANSCODERS)
@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_with_its_error_term_it_changes_nothing_until_its_codes_are_edited(
    backbone, images, source, target, name, skip
):
    coder = coder_between(backbone, images, source, target, name, skip=skip)
    pair = (backbone, coder, source, target)
    with torch.no_grad():
        clean = backbone(images)
        with transcoding(*pair, use_error_term=True) as replaced:
            assert torch.equal(replaced(images), clean)
        with transcoding(*pair) as replaced:
            substituted = replaced(images)
        assert not torch.equal(substituted, clean)
        with transcoding(*pair, use_error_term=True, edit=lambda z, _: z) as replaced:
            torch.testing.assert_close(replaced(images), clean, rtol=0, atol=1e-5)
        with transcoding(*pair, use_error_term=True, edit=lambda z, _: z * 2) as replaced:
            assert not torch.allclose(replaced(images), clean, atol=1e-3)
        with transcoding(*pair, edit=lambda z, _: z) as replaced:
            torch.testing.assert_close(replaced(images), substituted, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("tokens", "n_changed"), [("all", 17), ("cls", 1), ("spatial", 16)])
def test_the_target_gets_what_the_coder_makes_of_the_source_at_the_chosen_tokens(backbone, images, tokens, n_changed):
    coder = coder_between(backbone, images, READ, WRITTEN)
    with torch.no_grad():
        before = backbone.activations(images, [READ, WRITTEN])
        with transcoding(backbone, coder, READ, WRITTEN, tokens=tokens) as replaced:
            after = replaced.activations(images, [READ, WRITTEN])
        expected = coder(before[READ].flatten(0, 1)).view_as(before[READ])
    assert torch.equal(after[READ], before[READ])
    chosen = backbone.grid.tokens(tokens)
    torch.testing.assert_close(after[WRITTEN][:, chosen], expected[:, chosen], rtol=1e-5, atol=1e-6)
    assert (after[WRITTEN] != before[WRITTEN]).any(2).all(0).sum() == n_changed


def test_from_the_cls_token_to_the_image_embedding(backbone, images):
    coder = nn.Linear(24, 24)
    with torch.no_grad():
        read = backbone.activations(images, [READ])[READ][:, 0]
        points = (READ, "hook_image_embed")
        with transcoding(backbone, coder, *points, tokens="cls") as replaced:
            found = replaced.activations(images, ["hook_image_embed"])["hook_image_embed"]
    torch.testing.assert_close(found, coder(read))
    asked = transcoding(backbone, coder, READ, "hook_image_embed")
    with pytest.raises(ValueError, match="has 17 'all' rows per image and hook_image_embed has 1"), asked:
        pass


def test_from_patch_embeddings_to_patch_tokens(backbone, images):
    with torch.no_grad():
        read = backbone.activations(images, ["hook_embed"])["hook_embed"]
        with transcoding(backbone, lambda x: x * 2, "hook_embed", READ, tokens="spatial") as replaced:
            found = replaced.activations(images, [READ])[READ]
    assert torch.equal(found[:, 1:], read * 2)
    with (
        pytest.raises(ValueError, match="before the CLS"),
        transcoding(backbone, abs, "hook_embed", READ, tokens="cls"),
    ):
        pass


@pytest.mark.parametrize("use_error_term", [True, False])
def test_gradients_flow_through_the_transcoder(backbone, images, use_error_term):
    coder = coder_between(backbone, images, READ, WRITTEN, skip=True)
    with transcoding(backbone, coder, READ, WRITTEN, use_error_term=use_error_term) as replaced:
        replaced(images).square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in coder.parameters())
    backbone.zero_grad()


def test_a_run_that_starts_after_the_source_has_nothing_to_read(backbone, images):
    coder = coder_between(backbone, images, "blocks.0.hook_resid_pre", WRITTEN)
    with torch.no_grad():
        tokens = backbone.run_blocks(backbone.embed(images), stop=1)
        with transcoding(backbone, coder, "blocks.0.hook_resid_pre", WRITTEN) as replaced:
            replaced(images)
            with pytest.raises(RuntimeError, match=r"reached without blocks.0.hook_resid_pre"):
                replaced.run_blocks(tokens, start=1)


def test_wrong_pairs_are_named(backbone, images):
    coder = coder_between(backbone, images, READ, WRITTEN)
    wrong = {
        "computed after": (coder, WRITTEN, READ),
        "coder has d_out=7, blocks.1.hook_mlp_out of t is 24 wide": (
            make_coder("topk_transcoder", d_in=24, d_out=7, d_sae=40),
            READ,
            WRITTEN,
        ),
        "coder has d_in=7, blocks.1.hook_resid_mid of t is 24 wide": (
            make_coder("topk_transcoder", d_in=7, d_out=24, d_sae=40),
            READ,
            WRITTEN,
        ),
    }
    for sentence, arguments in wrong.items():
        with pytest.raises(ValueError, match=sentence), transcoding(backbone, *arguments):
            pass
    with pytest.raises(KeyError, match="no hook point"), transcoding(backbone, coder, READ, "blocks.9.hook_mlp_out"):
        pass
