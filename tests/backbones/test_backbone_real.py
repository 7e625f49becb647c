"""Real weights and photographs, where they are (see the `shared` marker)."""

import csv
import sys

import pytest
import torch
from PIL import Image

from vitrail.backbones import load

pytestmark = pytest.mark.shared


@pytest.fixture(scope="module")
def dequantised(shared_data, tmp_path_factory):
    sys.path.insert(0, str(shared_data.parent / "tools"))
    try:
        from dequantize import state_dict  # pyright: ignore[reportMissingImports]
    finally:
        sys.path.pop(0)
    return lambda name: state_dict(shared_data / "weights" / f"{name}_int8.safetensors")


def test_deit_tiny_is_timms_and_knows_its_photographs(shared_data):
    """On all 1,000 it is 76.3 %, as the note beside the weights says; on these 100 it is 76."""
    import timm

    path = shared_data / "weights" / "deit_tiny_patch16_224_in1k.safetensors"
    backbone = load("timm/deit_tiny_patch16_224", weights=path)
    theirs = timm.create_model("deit_tiny_patch16_224", checkpoint_path=str(path)).eval()
    with (shared_data / "imagenet_1000" / "labels.csv").open() as rows:
        rows = list(csv.DictReader(rows))[:100]
    right = 0
    with torch.no_grad():
        for start in range(0, 100, 25):
            batch = rows[start : start + 25]
            pictures = [Image.open(shared_data / "imagenet_1000" / row["file"]).convert("RGB") for row in batch]
            images = torch.stack([backbone.preprocess(picture) for picture in pictures])
            logits = backbone(images)
            if start == 0:
                assert torch.equal(logits, theirs(images))
            right += sum(int(found) == int(row["label"]) for found, row in zip(logits.argmax(1), batch, strict=True))
    assert right >= 70
    assert backbone.class_names[int(rows[0]["label"])].startswith(rows[0]["name"])


def test_dinov2_with_registers_at_another_size(dequantised, tmp_path):
    """37 x 37 positions resampled to 16 x 16, as timm does."""
    import timm
    from safetensors.torch import save_file

    path = tmp_path / "dinov2.safetensors"
    save_file(dequantised("vit_small_patch14_reg4_dinov2"), path)
    name = "vit_small_patch14_reg4_dinov2"
    backbone = load(f"timm/{name}", weights=path, image_px=224)
    overlay = {"file": str(path)}
    theirs = timm.create_model(name, pretrained=True, img_size=224, pretrained_cfg_overlay=overlay).eval()
    images = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(backbone(images), theirs(images))
    assert (backbone.grid.n_cls, backbone.grid.n_registers, backbone.grid.height) == (1, 4, 16)


def test_clip_from_a_folder_names_what_is_in_a_photograph(dequantised, shared_data, tmp_path):
    import json

    import numpy as np
    from safetensors.torch import save_file

    config = {
        "architectures": ["CLIPVisionModelWithProjection"],
        "model_type": "clip_vision_model",
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "patch_size": 16,
        "image_size": 224,
        "projection_dim": 512,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(dequantised("clip_vit_b16_vision"), tmp_path / "model.safetensors")
    backbone = load(f"hf/{tmp_path}")
    assert type(backbone.blocks[0].mlp.activation_fn).__name__ == "QuickGELUActivation"
    names = json.loads((shared_data / "vocabulary" / "clip_vit_b16_coco80_names.json").read_text())
    texts = torch.from_numpy(np.load(shared_data / "vocabulary" / "clip_vit_b16_coco80_text_embeddings.npy")).float()
    paths = [
        shared_data / "imagenet_1000" / "images" / f"{wnid}.jpg" for wnid in ("n02391049", "n07753592", "n02504458")
    ]
    with torch.no_grad():
        images = torch.stack([backbone.preprocess(Image.open(path).convert("RGB")) for path in paths])
        found = (torch.nn.functional.normalize(backbone(images), dim=1) @ texts.T).argmax(1)
    assert [names[i] for i in found] == ["zebra", "banana", "elephant"]
