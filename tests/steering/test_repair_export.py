"""Models of every library, repaired and exported."""

import pytest
import torch

from backbones.small_backbones import build_case
from vitrail.coders import make_coder
from vitrail.steering.repair import Part, export_repaired, repair

WHOLE = [
    "toy-clip",
    "timm-vit",
    "timm-registers",
    "timm-siglip",
    "timm-eva",
    "open_clip",
    "hf-clip",
    "hf-clip-projected",
    "hf-vit-classes",
    "hf-registers",
    "hf-siglip-vision",
]


EVERY_TIME = {"toy-clip", "timm-vit", "open_clip", "hf-clip-projected"}


@pytest.mark.parametrize(
    "name", [name if name in EVERY_TIME else pytest.param(name, marks=pytest.mark.slow) for name in WHOLE]
)
def test_a_model_of_every_library_is_repaired_and_exported(name, tmp_path):
    case = build_case(name)
    backbone, images = case.backbone, case.images(3)
    point = f"blocks.{backbone.n_layers - 2}.hook_resid_post"
    coder = make_coder("topk", d_in=backbone.d_model, d_sae=64, k=6, normalization="none", seed=0).eval()
    repaired = repair(backbone, Part(coder=coder, point=point, latents=range(32)))
    untouched = repair(backbone, Part(coder=coder, point=point, latents=[0], operation="scale", value=1.0))
    with torch.no_grad():
        plain, got = case.native(images), repaired(images)
        assert torch.equal(untouched(images), plain), "an edit that changes nothing is the library's own model"
        assert (got - plain).abs().max() > 1e-4
    program = torch.export.load(export_repaired(tmp_path, repaired)).module()
    with torch.no_grad():
        torch.testing.assert_close(program(images), got, atol=1e-4, rtol=1e-4)
