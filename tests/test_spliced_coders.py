"""Where both ground floors meet: real coders spliced into a real backbone."""

import pytest
import torch

from vitrail.backbones.toy import ToyViT, wrap
from vitrail.coders import CODERS, MultiSource, Transcoder, make_coder
from vitrail.statistics import ActivationStats

# What reads and writes one point. Transcoders are spliced between two: tests/test_transcoding.py.
OF_ONE_POINT = sorted(name for name, coder in CODERS.items() if not issubclass(coder, Transcoder | MultiSource))
POINTS = ["blocks.0.hook_resid_mid", "blocks.1.hook_mlp_out", "blocks.1.hook_resid_post", "hook_image_embed"]


@pytest.fixture(scope="module")
def backbone():
    torch.manual_seed(0)
    return wrap(ToyViT(image_px=32, patch_px=8, d_model=24, n_layers=2, n_heads=2, d_mlp=32, n_classes=5), name="t")


@pytest.fixture(scope="module")
def images():
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def coder_at(backbone, images, point, architecture, normalization):
    with torch.no_grad():
        x = backbone.activations(images, [point])[point].reshape(-1, 24)
    of_data = {"n_candidates": len(x)} if architecture.startswith("archetypal") else {}
    coder = make_coder(architecture, d_in=24, d_sae=40, normalization=normalization, **of_data)
    coder.fit(ActivationStats.of(x), x)
    coder.calibrate([x])
    return coder.eval()


@pytest.mark.parametrize("normalization", ["mean_std", "layer_norm"])
@pytest.mark.parametrize("architecture", OF_ONE_POINT)
@pytest.mark.parametrize("point", POINTS)
def test_with_its_error_term_a_coder_changes_nothing_until_its_codes_are_edited(
    backbone, images, point, architecture, normalization
):
    coder = coder_at(backbone, images, point, architecture, normalization)
    with torch.no_grad():
        clean = backbone(images)
        with backbone.with_coders({point: coder}, use_error_term=True) as spliced:
            assert torch.equal(spliced(images), clean)
        with backbone.with_coders({point: coder}) as spliced:
            substituted = spliced(images)
        assert not torch.equal(substituted, clean)
        with backbone.with_coders({point: coder}, use_error_term=True, edit=lambda z, _: z * 2) as spliced:
            assert not torch.equal(spliced(images), clean)
        with backbone.with_coders({point: coder}, edit=lambda z, _: z) as spliced:
            torch.testing.assert_close(spliced(images), substituted, rtol=0, atol=1e-5)


def test_a_coder_of_another_width_says_both(backbone, images):
    wide = make_coder("topk", d_in=32, d_sae=40, k=4, normalization="none")
    asked = backbone.with_coders({"blocks.1.hook_mlp_out": wide})
    with pytest.raises(ValueError, match=r"coder takes d_in=32, blocks.1.hook_mlp_out of t is 24 wide"), asked:
        pass
