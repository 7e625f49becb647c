"""Bit for bit the libraries' own transforms, on pictures of awkward sizes."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from vitrail import backbones
from vitrail.backbones import Preprocess
from vitrail.backbones.huggingface_preprocess import preprocess_of

SIZES = [(37, 53), (53, 37), (64, 64), (201, 40), (20, 20), (33, 32), (97, 98)]  # height, width


def picture(height: int, width: int, mode: str = "RGB") -> Image.Image:
    rng = np.random.default_rng(height * 1000 + width)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).convert(mode)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("crop_pct", [1.0, 0.9, 0.875])
@pytest.mark.parametrize("crop_mode", ["center", "squash"])
@pytest.mark.parametrize("image_px", [(32, 32), (24, 40)])
def test_as_timm(size, crop_pct, crop_mode, image_px):
    import timm.data

    config = {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.25, 0.3), "interpolation": "bicubic", "crop_pct": crop_pct}
    theirs = timm.data.create_transform(input_size=(3, *image_px), crop_mode=crop_mode, **config)
    ours = Preprocess.of(image_px, resize="squash" if crop_mode == "squash" else "shorter_side", **config)
    image = picture(*size)
    assert torch.equal(ours(image), theirs(image))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("mode", ["shortest", "squash"])
@pytest.mark.parametrize("image_px", [(32, 32), (24, 40)])
def test_as_open_clip(size, mode, image_px):
    import open_clip

    theirs = open_clip.image_transform(image_px, is_train=False, resize_mode=mode, interpolation="bicubic")
    ours = Preprocess.of(
        image_px,
        mean=open_clip.OPENAI_DATASET_MEAN,
        std=open_clip.OPENAI_DATASET_STD,
        resize="squash" if mode == "squash" else "shorter_side",
    )
    image = picture(*size)
    assert torch.equal(ours(image), theirs(image))


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "lanczos"])
def test_other_interpolations_as_timm(interpolation):
    import timm.data

    theirs = timm.data.create_transform((3, 32, 32), interpolation=interpolation, crop_pct=0.9)
    image = picture(70, 51)
    assert torch.equal(Preprocess.of((32, 32), interpolation=interpolation, crop_pct=0.9)(image), theirs(image))


@pytest.mark.parametrize(
    "described",
    [
        {"size": {"shortest_edge": 40}, "do_center_crop": True, "crop_size": {"height": 32, "width": 32}},
        {"size": {"height": 32, "width": 32}, "do_center_crop": False},
    ],
)
def test_as_transformers(tmp_path, described):
    """Their fast processors resize tensors, rounding otherwise than Pillow; the Pillow ones are the reference."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    described = {"resample": 3, "image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.25, 0.3], **described}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(described))
    ours = preprocess_of("clip", None, source=str(tmp_path))
    theirs = CLIPImageProcessorPil(**described)
    for size in [(64, 64), (70, 50)]:
        image = picture(*size)
        expected = theirs(images=image, return_tensors="pt").pixel_values[0]
        torch.testing.assert_close(ours(image), expected, rtol=0, atol=1e-5)


def test_by_hand():
    # A 2 x 4 picture, shorter side 2, centre crop 2 x 2: columns 1 and 2. (51 / 255 - 0.5) / 0.25 = (0.2 - 0.5) / 0.25
    pixels = np.zeros((2, 4, 3), dtype=np.uint8)
    pixels[:, 1] = 51
    ours = Preprocess.of((2, 2), mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    expected = torch.tensor([-1.2, -2.0]).expand(3, 2, 2)
    torch.testing.assert_close(ours(Image.fromarray(pixels)), expected)


def test_other_modes_become_rgb():
    ours = Preprocess.of((16, 16))
    for mode in ("L", "RGBA", "P", "CMYK"):
        assert ours(picture(30, 20, mode)).shape == (3, 16, 16)


def test_what_the_model_sees_is_a_picture_of_its_size():
    ours = Preprocess.of((24, 40), crop_pct=0.9)
    assert ours.crop(picture(100, 70)).size == (40, 24)


def test_json_round_trip():
    ours = Preprocess.of((24, 40), crop_pct=0.9, resize="squash")
    assert Preprocess.from_json(json.loads(json.dumps(ours.to_json()))) == ours
    with pytest.raises(ValueError, match="'cubic'"):
        Preprocess.of((2, 2), interpolation="cubic")


@pytest.mark.parametrize("name", ["test_vit", "vit_base_patch16_siglip_224", "deit_tiny_patch16_224"])
def test_a_timm_models_own_configuration_is_read(name):
    import timm
    import timm.data

    model = timm.create_model(name, pretrained=False) if name == "test_vit" else None
    config = timm.get_pretrained_cfg(name).to_dict()
    if model is None:
        from timm.models.vision_transformer import VisionTransformer

        model = VisionTransformer(img_size=32, patch_size=16, embed_dim=8, depth=1, num_heads=1, num_classes=2)
        config["input_size"] = (3, 32, 32)
        model.pretrained_cfg = config
    theirs = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    image = picture(211, 180)
    assert torch.equal(backbones.timm.wrap(model, name=name).preprocess(image), theirs(image))
