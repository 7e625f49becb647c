"""From a name, a file or a folder to a backbone, and what bad input gets. No hub: everything is made here."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from vitrail import backbones
from vitrail.backbones import load


def save(path, state):
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
    return path


@pytest.fixture(scope="module")
def timm_model():
    import timm

    torch.manual_seed(0)
    return timm.create_model("test_vit", pretrained=False, num_classes=7).eval()


@pytest.fixture
def toy_files(tmp_path):
    """A toy model as it ships: weights and, beside them, a JSON."""
    config = {
        "image_px": 16, "patch_px": 8, "d_model": 24, "n_layers": 2, "n_heads": 2, "d_mlp": 40, "n_classes": 3,
    }  # fmt: skip
    torch.manual_seed(0)
    model = backbones.toy.ToyViT(**config)
    about = {"model": config, "class_names": ["red", "green", "blue"], "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    (tmp_path / "three.json").write_text(json.dumps(about))
    return model, save(tmp_path / "three.safetensors", model.state_dict())


# ------ toy


def test_toy_weights_and_their_json(toy_files):
    model, path = toy_files
    backbone = load("toy/three", weights=path)
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(backbone(images), model.eval()(images))
    assert backbone.class_names == ("red", "green", "blue")
    assert (backbone.preprocess.mean, backbone.preprocess.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert load("toy/three", weights=str(path), pretrained=False).digest != backbone.digest


def test_the_toy_that_ships_is_complete():
    backbone = load("toy/shapes")
    assert backbone.name == "toy/shapes"
    assert len(backbone.class_names) == backbone.n_classes
    images = torch.randn(1, 3, *backbone.preprocess.image_px)
    assert torch.equal(backbone(images), backbone.module(images))


def test_a_tag_where_there_are_none_is_refused(toy_files, tmp_path):
    for name, weights in (("toy/three", toy_files[1]), (f"hf/{tmp_path}", None)):
        with pytest.raises(ValueError, match=r"pretrained must be True or False, got 'large'"):
            load(name, weights=weights, pretrained="large")


def test_toy_positions_are_not_resampled(toy_files):
    with pytest.raises(ValueError, match="takes images of 16 pixels"):
        load("toy/three", weights=toy_files[1], image_px=32)


def test_unknown_names_say_the_known_ones():
    with pytest.raises(KeyError, match=r"nearest: timm"):
        load("tim/vit_base_patch16_224")
    with pytest.raises(KeyError, match=r"LIBRARY/MODEL"):
        load("timm")
    with pytest.raises(KeyError, match=r"no weights of a toy 'nothing'"):
        load("toy/nothing")
    with pytest.raises(KeyError, match=r"Nearest: .*deit_tiny_patch16_224"):
        load("timm/deit_tiny_patch16_22")
    with pytest.raises(KeyError, match=r"Nearest: .*ViT-B-32"):
        load("open_clip/ViT-B32@openai")


# ------ weights


def test_timm_weights_say_how_many_classes_there_are(timm_model, tmp_path):
    path = save(tmp_path / "mine.safetensors", timm_model.state_dict())
    backbone = load("timm/test_vit", weights=path)
    images = torch.randn(1, 3, *backbone.preprocess.image_px)
    assert torch.equal(backbone(images), timm_model(images))
    assert backbone.n_classes == 7
    headless = {name: tensor for name, tensor in timm_model.state_dict().items() if not name.startswith("head.")}
    backbone = load("timm/test_vit", weights=save(tmp_path / "headless.safetensors", headless))
    assert backbone.n_classes is None
    assert torch.equal(backbone(images), timm_model.forward_head(timm_model.forward_features(images), pre_logits=True))


def test_timm_positions_are_resampled_as_timm_does(timm_model, tmp_path):
    import timm

    path = save(tmp_path / "mine.safetensors", timm_model.state_dict())
    backbone = load("timm/test_vit", weights=path, image_px=(96, 128))
    overlay = {"file": str(path), "num_classes": 7}
    theirs = timm.create_model(
        "test_vit", pretrained=True, num_classes=7, img_size=(96, 128), pretrained_cfg_overlay=overlay
    ).eval()
    images = torch.randn(1, 3, 96, 128)
    assert torch.equal(backbone(images), theirs(images))
    assert (backbone.grid.height, backbone.grid.width) == (6, 8)


def test_half_precision_weights_fill_an_fp32_model(timm_model, tmp_path):
    half = {name: tensor.half() for name, tensor in timm_model.state_dict().items()}
    backbone = load("timm/test_vit", weights=save(tmp_path / "half.safetensors", half))
    assert {parameter.dtype for parameter in backbone.parameters()} == {torch.float32}


def test_missing_unexpected_and_misshapen_keys_are_named(timm_model, tmp_path):
    state = dict(timm_model.state_dict())
    del state["blocks.0.norm1.weight"]
    state["blocks.0.norm9.weight"] = torch.zeros(3)
    state["norm.bias"] = torch.zeros(5)
    path = save(tmp_path / "wrong.safetensors", state)
    with pytest.raises(ValueError, match="not those of timm/test_vit") as error:
        load("timm/test_vit", weights=path)
    assert "missing: blocks.0.norm1.weight" in str(error.value)
    assert "unexpected: blocks.0.norm9.weight" in str(error.value)
    assert "norm.bias (5,), not (64,)" in str(error.value)


def test_a_pickle_is_refused_unless_asked_for(timm_model, tmp_path):
    path = tmp_path / "mine.pth"
    torch.save({"state_dict": timm_model.state_dict()}, path)
    with pytest.raises(ValueError, match=r"is a pickle, which can run code .* allow_pickle=True"):
        load("timm/test_vit", weights=path)
    assert load("timm/test_vit", weights=path, allow_pickle=True).n_classes == 7


def test_a_pickle_in_disguise_or_half_a_file_is_named(timm_model, tmp_path):
    torch.save(timm_model.state_dict(), tmp_path / "disguised.safetensors")
    whole = save(tmp_path / "whole.safetensors", timm_model.state_dict())
    (tmp_path / "half.safetensors").write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    for name in ("disguised", "half"):
        with pytest.raises(ValueError, match=f"{name}.safetensors is cut short or not a safetensors file"):
            load("timm/test_vit", weights=tmp_path / f"{name}.safetensors", allow_pickle=True)
    with pytest.raises(FileNotFoundError, match=r"absent.safetensors is missing"):
        load("timm/test_vit", weights=tmp_path / "absent.safetensors")


def test_the_digest_tells_weights_apart(timm_model, tmp_path):
    path = save(tmp_path / "a.safetensors", timm_model.state_dict())
    changed = {name: tensor + (name == "norm.bias") for name, tensor in timm_model.state_dict().items()}
    a, again, b = (
        load("timm/test_vit", weights=p).digest for p in (path, path, save(tmp_path / "b.safetensors", changed))
    )
    assert a == again != b


# ------ open_clip


@pytest.fixture
def small_clip(tmp_path):
    """A CLIP small enough to make, registered with open_clip under a name of its own."""
    import open_clip
    import open_clip.factory

    config = {
        "embed_dim": 20,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 24, "head_width": 12, "patch_size": 8},
        "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    }
    (tmp_path / "vitrail-small.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "vitrail-small.json")
    yield "vitrail-small"
    open_clip.factory._MODEL_CONFIGS.pop("vitrail-small")
    open_clip.factory._MODEL_CONFIG_PATHS[:] = [
        path for path in open_clip.factory._MODEL_CONFIG_PATHS if "vitrail-small" not in str(path)
    ]


def test_open_clip_weights_positions_and_tags(small_clip, tmp_path):
    import open_clip

    torch.manual_seed(0)
    model = open_clip.create_model(small_clip).eval()
    path = save(tmp_path / "clip.safetensors", model.state_dict())
    backbone = load(f"open_clip/{small_clip}", weights=path)
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(backbone(images), model.encode_image(images))
    larger = load(f"open_clip/{small_clip}", weights=path, image_px=48)
    theirs = open_clip.create_model(small_clip, pretrained=str(path), force_image_size=48).eval()
    images = torch.randn(1, 3, 48, 48)
    assert torch.equal(larger(images), theirs.encode_image(images))
    with pytest.raises(ValueError, match="@TAG with a TAG of"):
        load(f"open_clip/{small_clip}")


def test_openai_weights_run_with_quick_gelu():
    backbone = load("open_clip/ViT-B-32@openai", pretrained=False)
    assert type(backbone.blocks[0].mlp.gelu).__name__ == "QuickGELU"
    assert type(load("open_clip/ViT-B-32", pretrained=False).blocks[0].mlp.gelu).__name__ == "GELU"
    with pytest.raises(ValueError, match=r"@TAG with a TAG of openai, .*laion2b"):
        load("open_clip/ViT-B-32@openia")


# ------ hugging face


@pytest.mark.parametrize("architecture", ["CLIPVisionModelWithProjection", "ViTForImageClassification", "Dinov2Model"])
def test_a_folder_of_hugging_face(architecture, tmp_path, request):
    from small_backbones import hugging_face

    model = hugging_face(architecture, lambda output: output)().backbone.module
    model.save_pretrained(tmp_path)
    processor = {
        "size": {"shortest_edge": 40}, "do_center_crop": True, "crop_size": {"height": 32, "width": 32},
        "image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "resample": 2,
    }  # fmt: skip
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    backbone = load(f"hf/{tmp_path}")
    assert type(backbone.module).__name__ == architecture
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(backbone(images), backboned(model)(images))
    assert backbone.preprocess.resize_px == (40, 40)
    assert backbone.preprocess.interpolation == "bilinear"
    state = {name: tensor * 2 for name, tensor in model.state_dict().items()}
    doubled = load(f"hf/{tmp_path}", weights=save(tmp_path / "other.safetensors", state))
    assert torch.equal(doubled.module.state_dict()[next(iter(state))], next(iter(state.values())))
    state.popitem()
    with pytest.raises(ValueError, match=f"a {architecture}. missing: "):
        load(f"hf/{tmp_path}", weights=save(tmp_path / "less.safetensors", state))
    (tmp_path / "model.safetensors").rename(tmp_path / "model.bin")
    with pytest.raises(OSError, match="safetensors"):
        load(f"hf/{tmp_path}")


def backboned(model):
    return backbones.huggingface.wrap(model, name="hf/again")


def test_positions_of_clip_are_interpolated_as_transformers_does(tmp_path):
    from small_backbones import hugging_face

    model = hugging_face("CLIPVisionModelWithProjection", lambda output: output)().backbone.module
    model.save_pretrained(tmp_path)
    backbone = load(f"hf/{tmp_path}", image_px=48)
    images = torch.randn(1, 3, 48, 48)
    assert torch.equal(backbone(images), model(images, interpolate_pos_encoding=True).image_embeds)
    assert backbone.grid.n_patches == 36


def test_weights_without_a_pooler_give_a_model_without_one(tmp_path):
    """DINO's: transformers would put a random pooler behind it."""
    from small_backbones import hugging_face

    model = hugging_face("ViTModel", lambda output: output, no_pooler=True)().backbone.module
    model.save_pretrained(tmp_path)
    backbone = load(f"hf/{tmp_path}")
    assert backbone.module.pooler is None
    images = torch.randn(1, 3, 32, 32)
    assert torch.equal(backbone(images), model(images).last_hidden_state[:, 0])


def test_neither_a_folder_nor_on_the_hub(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"not a folder with a config.json here, nor to be had from the hub"):
        load("hf/nobody/nothing-at-all")


# ------ what is not understood


def test_other_architectures_are_refused_by_class(tmp_path):
    import open_clip
    import timm
    import transformers
    from timm.models.swin_transformer import SwinTransformer
    from timm.models.vision_transformer import ParallelScalingBlock, VisionTransformer

    small = {"img_size": 32, "embed_dim": 8, "num_classes": 2}
    swin = SwinTransformer(patch_size=4, depths=(1,), num_heads=(1,), window_size=4, **small)
    parallel = VisionTransformer(patch_size=8, depth=1, num_heads=1, block_fn=ParallelScalingBlock, **small)
    resnet = timm.create_model("test_resnet", pretrained=False)
    for model, expected in (
        (swin, "is a SwinTransformer. Of timm, vitrail opens VisionTransformer,"),
        (parallel, "is made of ParallelScalingBlock"),
        (resnet, "is a ResNet"),
    ):
        with pytest.raises(ValueError, match=expected):
            backbones.timm.wrap(model, name="timm/other")
    with pytest.raises(ValueError, match="timm/test_resnet is a ResNet"):
        load("timm/test_resnet", pretrained=False)

    vision = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 8}
    text = {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1}
    clip = open_clip.CLIP(embed_dim=8, vision_cfg=vision, text_cfg=text)
    with pytest.raises(ValueError, match="image tower of class ModifiedResNet"):
        backbones.open_clip.wrap(clip, name="open_clip/RN")

    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1])
    with pytest.raises(ValueError, match=r"is a ResNetModel. Of transformers, vitrail opens CLIPModel"):
        backbones.huggingface.wrap(transformers.ResNetModel(config), name="hf/resnet")
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"is a resnet. Of transformers"):
        load(f"hf/{tmp_path}")


def test_a_model_that_does_not_pool_is_refused():
    from timm.models.vision_transformer import VisionTransformer

    model = VisionTransformer(
        img_size=32, patch_size=8, embed_dim=8, depth=1, num_heads=1, num_classes=0, global_pool=""
    )
    with pytest.raises(ValueError, match="does not pool its tokens"):
        backbones.timm.wrap(model, name="timm/tokens")


# ------ optional and pleasant


def test_importing_backbones_imports_no_library():
    code = (
        "import sys, vitrail.backbones;"
        "found = {'timm', 'open_clip', 'transformers', 'torchvision'} & set(sys.modules);"
        "assert not found, found"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.mark.parametrize(
    ("name", "module", "extra"),
    [
        ("timm/test_vit", "timm", "vitrail[timm]"),
        ("open_clip/ViT-B-32@openai", "open_clip", "vitrail[open-clip]"),
        ("hf/a/b", "transformers", "vitrail[hf]"),
    ],
)
def test_an_absent_library_names_its_extra(name, module, extra, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)  # import raises ModuleNotFoundError
    with pytest.raises(ImportError) as error:
        load(name)
    assert extra in str(error.value)


def test_torchvision_becomes_importable_and_stays_importable():
    """In a process of its own: the shim must come before the first import, and a second call must do nothing."""
    code = (
        "from vitrail.backbones.torchvision_shim import ensure_torchvision as ensure; ensure(); ensure();"
        "import torchvision, timm, open_clip; torchvision.transforms.Resize(8)"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, capture_output=True)
