"""One small random instance of every kind of model vitrail opens, built once."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from vitrail import backbones
from vitrail.backbones import Backbone


@dataclass(frozen=True)
class Case:
    """A backbone and the module's own way to the same output."""

    backbone: Backbone
    native: Callable[[Tensor], Tensor]

    def images(self, n: int = 2) -> Tensor:
        return torch.randn(n, 3, *self.backbone.preprocess.image_px, generator=torch.Generator().manual_seed(1))


def randomised(module: nn.Module) -> Any:
    """Libraries initialise heads to zero and LayerScale to 1e-5, which would hide an edit that does not arrive."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.15)
    return module


_TOY = {"image_px": 32, "patch_px": 8, "d_model": 24, "n_layers": 3, "n_heads": 2, "d_mlp": 40}


def _toy(**changed: Any) -> Callable[[], Case]:
    def build() -> Case:
        model = randomised(backbones.toy.ToyViT(**{**_TOY, "n_classes": 5, **changed}))
        return Case(backbones.toy.wrap(model, name="toy/random"), model)

    return build


def _toy_clip() -> Case:
    words = ["a", "cat", "dog", "of", "photo", "red"]
    text = {"context_length": 8, "d_model": 16, "n_layers": 2, "n_heads": 2, "d_mlp": 24}
    model = randomised(backbones.toy_clip.ToyCLIP(words=words, vision=_TOY, text=text, d_embed=20))
    return Case(backbones.toy_clip.wrap(model, name="toy/random-clip"), model.encode_image)


def _timm(**changed: Any) -> Callable[[], Case]:
    def build() -> Case:
        from timm.models.vision_transformer import VisionTransformer

        small = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 2, "num_classes": 5}
        model = randomised((changed.pop("cls", None) or VisionTransformer)(**(small | changed)))
        return Case(backbones.timm.wrap(model, name="timm/random"), model)

    return build


def _distilled() -> Case:
    from timm.models.deit import VisionTransformerDistilled

    return _timm(cls=VisionTransformerDistilled)()


def _post_norm() -> Case:
    from timm.models.vision_transformer import ResPostBlock

    return _timm(block_fn=ResPostBlock, init_values=0.1)()


def _eva(**changed: Any) -> Callable[[], Case]:
    def build() -> Case:
        from timm.models.eva import Eva

        return _timm(cls=Eva, use_rot_pos_emb=True, init_values=0.1, **changed)()

    return build


def _open_clip(custom_text: bool = False, quick_gelu: bool = False, **vision: Any) -> Callable[[], Case]:
    def build() -> Case:
        import open_clip

        text = {"context_length": 8, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
        if "timm_model_name" not in vision:
            vision.update(layers=3, width=24, head_width=12, patch_size=8)
        cls = open_clip.CustomTextCLIP if custom_text else open_clip.CLIP
        model = cls(embed_dim=20, vision_cfg={"image_size": 32, **vision}, text_cfg=text, quick_gelu=quick_gelu)
        randomised(model)
        native = lambda images: out[0] if isinstance(out := model.encode_image(images), tuple) else out
        return Case(backbones.open_clip.wrap(model, name="open_clip/random"), native)

    return build


def _open_clip_trunk() -> Case:
    import open_clip
    import timm

    trunk = timm.models.vision_transformer.VisionTransformer(
        img_size=32,
        patch_size=8,
        embed_dim=24,
        depth=3,
        num_heads=2,
        class_token=False,
        global_pool="map",
        num_classes=0,
    )
    case_model = open_clip.CustomTextCLIP(
        embed_dim=20,
        vision_cfg={"image_size": 32, "layers": 1, "width": 24, "head_width": 12, "patch_size": 8},
        text_cfg={"context_length": 8, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    )
    # A TimmModel without its constructor, which only takes the names of models of full size.
    visual = open_clip.timm_model.TimmModel.__new__(open_clip.timm_model.TimmModel)
    nn.Module.__init__(visual)
    visual.image_size, visual.trunk = (32, 32), trunk
    visual.head = nn.Sequential(nn.Dropout(0.0), nn.Linear(24, 20, bias=False))
    case_model.visual = visual
    randomised(case_model)
    return Case(backbones.open_clip.wrap(case_model, name="open_clip/random-trunk"), case_model.encode_image)


_HF_VISION = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
_HF_TEXT = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 60,
    "max_position_embeddings": 8,
}


def hugging_face(architecture: str, native: Callable[[Any], Tensor], **changed: Any) -> Callable[[], Case]:
    def build() -> Case:
        import transformers

        arguments = {"add_pooling_layer": False} if changed.pop("no_pooler", False) else {}
        vision = _HF_VISION | changed
        if architecture in ("CLIPModel", "SiglipModel"):
            config_class = getattr(transformers, architecture.replace("Model", "Config"))
            # SigLIP has no projections: its two towers are equally wide.
            text = _HF_TEXT | ({"hidden_size": vision["hidden_size"]} if architecture == "SiglipModel" else {})
            config = config_class(vision_config=vision, text_config=text, projection_dim=20)
        else:
            family = architecture.removesuffix("WithProjection").removesuffix("Model")
            config_class = getattr(transformers, f"{family.removesuffix('ForImageClassification')}Config")
            config = config_class(**vision, **({"projection_dim": 20} if family == "CLIPVision" else {}))
        torch.manual_seed(0)
        model = randomised(getattr(transformers, architecture)(config, **arguments)).eval()
        call = model.get_image_features if architecture in ("CLIPModel", "SiglipModel") else model
        return Case(backbones.huggingface.wrap(model, name=f"hf/{architecture}"), lambda images: native(call(images)))

    return build


def _pooled(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output.pooler_output


CASES: dict[str, Callable[[], Case]] = {
    "toy": _toy(),
    "toy-patch": _toy(stem="patch"),
    "toy-attention-only": _toy(d_mlp=0),
    "toy-clip": _toy_clip,
    "timm-vit": _timm(),
    "timm-features": _timm(num_classes=0),
    "timm-not-square": _timm(img_size=(32, 48)),
    "timm-registers": _timm(reg_tokens=4, no_embed_class=True, init_values=1e-5, num_classes=0),
    "timm-registers-no-cls": _timm(reg_tokens=2, class_token=False, global_pool="avg"),
    "timm-siglip": _timm(class_token=False, global_pool="map", num_classes=0),
    "timm-clip": _timm(pre_norm=True),
    "timm-average": _timm(class_token=False, global_pool="avg"),
    "timm-any-size": _timm(dynamic_img_size=True),
    "timm-distilled": _distilled,
    "timm-post-norm": _post_norm,
    "timm-eva": _eva(),
    "timm-eva-any-size": _eva(dynamic_img_size=True, num_reg_tokens=4, use_abs_pos_emb=False),
    "timm-eva-mixed": _eva(rope_type="mixed", embed_dim=32),
    "open_clip": _open_clip(quick_gelu=True),
    "open_clip-layer-scale": _open_clip(ls_init_value=1e-5, output_tokens=True),
    "open_clip-average": _open_clip(pool_type="avg", final_ln_after_pool=True, no_ln_pre=True),
    "open_clip-pooler": _open_clip(attentional_pool=True, attn_pooler_heads=2, attn_pooler_queries=3),
    "open_clip-trunk": _open_clip_trunk,
    "hf-clip": hugging_face("CLIPModel", _pooled),
    "hf-clip-vision": hugging_face("CLIPVisionModel", _pooled),
    "hf-clip-projected": hugging_face("CLIPVisionModelWithProjection", lambda out: out.image_embeds),
    "hf-siglip": hugging_face("SiglipModel", _pooled),
    "hf-siglip-vision": hugging_face("SiglipVisionModel", _pooled),
    "hf-vit": hugging_face("ViTModel", _pooled),
    "hf-vit-no-pooler": hugging_face("ViTModel", lambda out: out.last_hidden_state[:, 0], no_pooler=True),
    "hf-vit-classes": hugging_face("ViTForImageClassification", lambda out: out.logits),
    "hf-dinov2": hugging_face("Dinov2Model", _pooled),
    "hf-dinov2-classes": hugging_face("Dinov2ForImageClassification", lambda out: out.logits),
    "hf-registers": hugging_face("Dinov2WithRegistersModel", _pooled),
    "hf-registers-classes": hugging_face("Dinov2WithRegistersForImageClassification", lambda out: out.logits),
}


@cache
def build_case(name: str) -> Case:
    torch.manual_seed(0)
    return CASES[name]()
