"""timm's VisionTransformer family (ViT, DeiT, distilled DeiT, DINOv2 with registers, SigLIP, CLIP towers) and Eva."""

import difflib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitrail.backbones.base import Backbone, Parts
from vitrail.backbones.checkpoints import load_exactly, read_weights
from vitrail.backbones.preprocess import Preprocess
from vitrail.backbones.torchvision_shim import ensure_torchvision
from vitrail.hooks import Site

_UNDERSTOOD = (
    "VisionTransformer, VisionTransformerDistilled and Eva, with Block, ResPostBlock, EvaBlock, EvaBlockPostNorm"
)
_POST_NORM = ("ResPostBlock", "EvaBlockPostNorm")
_BLOCKS = ("Block", "EvaBlock", *_POST_NORM)


def load(
    name: str,
    *,
    weights: Path | None = None,
    pretrained: bool | str | None = None,
    image_px: int | tuple[int, int] | None = None,
    allow_pickle: bool = False,
) -> Backbone:
    """`weights` are a file in timm's or the original authors' names; whether there is a head, and how many classes it
    knows, is read from them. Positions are resampled to `image_px` as timm does. Without `weights`: from the hub;
    `pretrained` may then be a tag ("augreg_in21k").
    """
    timm = _import()
    if not timm.is_model(name.split(".")[0]):
        nearest = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.0)
        raise KeyError(f"timm has no model {name!r}. Nearest: {', '.join(nearest)}.")
    if isinstance(pretrained, str):
        name = f"{name.split('.')[0]}.{pretrained}"
    size = {} if image_px is None else {"img_size": image_px}
    full_name = f"timm/{name}"
    if weights is None:
        return wrap(timm.create_model(name, pretrained=pretrained is not False, **size), name=full_name)
    state = read_weights(weights, allow_pickle=allow_pickle)
    classes = {"num_classes": len(state["head.weight"]) if "head.weight" in state else 0}
    model = timm.create_model(name, pretrained=False, **size, **classes)
    require_understood(model, full_name)
    load_exactly(model, _converted(state, model), what=full_name)
    return wrap(model, name=full_name)


def wrap(model: nn.Module, *, name: str, preprocess: Preprocess | None = None) -> Backbone:
    """A timm model as a Backbone."""
    require_understood(model, name)
    n_cls, n_registers, patch_px = tokens_of(model, name)
    own: Any = model
    return Backbone(
        model,
        parts(model),
        name=name,
        preprocess=preprocess or _preprocess(model),
        patch_px=patch_px,
        n_cls=n_cls,
        n_registers=n_registers,
        has_head=own.num_classes > 0,
        class_names=_class_names(model),
    )


def parts(model: nn.Module, project: Callable[[Tensor], Tensor] | None = None) -> Parts:
    """`project`: what a dual encoder puts behind this model, whose own head is then part of the pooling."""
    own: Any = model
    distilled = hasattr(own, "head_dist")
    pooled = _pool_distilled if distilled else _pool
    head = _head_distilled if distilled else _head
    # The final norm comes before the pooling (norm) or after it (fc_norm); the other is an Identity.
    after_pool = isinstance(own.norm, nn.Identity) and not isinstance(getattr(own, "fc_norm", own.norm), nn.Identity)
    dynamic = own.dynamic_img_size
    return Parts(
        embed=lambda images: _embed(own, images),
        blocks=tuple(own.blocks),
        pool=(lambda tokens: project(own.forward_head(own.norm(tokens)))) if project else lambda t: pooled(own, t),
        head=(lambda embedding: embedding) if project else lambda embedding: head(own, embedding),
        patches=Site(own.patch_embed, "output", layout="channels_last" if dynamic else "tokens"),
        full_embed=Site(own.norm_pre, "input"),
        ln_final=Site(own.fc_norm if after_pool else own.norm, "output"),
        post_norm=type(own.blocks[0]).__name__ in _POST_NORM,
        block_arguments=lambda i: _rotary(own, i),
    )


def tokens_of(model: nn.Module, name: str) -> tuple[int, int, int]:
    """(n_cls, n_registers, patch_px). A distillation token counts as a register."""
    own: Any = model
    height, width = own.patch_embed.patch_size
    if height != width:
        raise ValueError(f"{name} has patches of {height} x {width} pixels; vitrail understands square ones.")
    n_cls = int(own.cls_token is not None)
    return n_cls, own.num_prefix_tokens - n_cls, height


def require_understood(model: nn.Module, name: str) -> None:
    timm = _import()
    known: Any = next(
        (
            cls
            for cls in (timm.models.vision_transformer.VisionTransformer, timm.models.eva.Eva)
            if isinstance(model, cls)
        ),
        None,
    )
    own: Any = type(model)
    if known is None or own.forward_features is not known.forward_features or own.forward is not known.forward:
        raise ValueError(f"{name} is a {own.__name__}. Of timm, vitrail opens {_UNDERSTOOD}.")
    blocks = {type(block).__name__ for block in model.blocks}  # pyright: ignore[reportGeneralTypeIssues]
    if not blocks <= set(_BLOCKS):
        raise ValueError(f"{name} is made of {', '.join(sorted(blocks))}. Of timm, vitrail opens {_UNDERSTOOD}.")


def _import() -> Any:
    ensure_torchvision()
    try:
        import timm
        import timm.data
        import timm.models.eva
        import timm.models.vision_transformer
    except ImportError as error:
        raise ImportError('timm models need timm: pip install "vitrail[timm]".') from error
    return timm


def _embed(model: Any, images: Tensor) -> Tensor:
    tokens = model._pos_embed(model.patch_embed(images))
    if isinstance(tokens, tuple):  # Eva: (tokens, rotary positions); _rotary gives the latter to each block
        return model.norm_pre(tokens[0])
    return model.norm_pre(model.patch_drop(tokens))


def _rotary(model: Any, block: int) -> dict[str, Tensor]:
    if getattr(model, "rope", None) is None:
        return {}
    weight = model.patch_embed.proj.weight
    height, width = model.patch_embed.grid_size
    shape = (1, height, width, model.embed_dim) if model.dynamic_img_size else (1, height * width, model.embed_dim)
    rope = model._pos_embed(torch.zeros(shape, dtype=weight.dtype, device=weight.device))[1]
    return {"rope": rope[block] if getattr(model, "rope_mixed", False) else rope}


def _pool(model: Any, tokens: Tensor) -> Tensor:
    return model.forward_head(model.norm(tokens), pre_logits=True)


def _head(model: Any, embedding: Tensor) -> Tensor:
    return model.head(embedding)


def _pool_distilled(model: Any, tokens: Tensor) -> Tensor:
    """CLS and distillation token side by side: each has a head of its own."""
    tokens = model.norm(tokens)
    return torch.cat([model.head_drop(tokens[:, 0]), model.head_drop(tokens[:, 1])], dim=1)


def _head_distilled(model: Any, embedding: Tensor) -> Tensor:
    cls, distilled = embedding.chunk(2, dim=1)
    return (model.head(cls) + model.head_dist(distilled)) / 2


def _converted(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Original names (Meta's DINOv2, OpenAI's CLIP ...) to timm's, and positions resampled to the model's grid."""
    convert = sys.modules[type(model).__module__].checkpoint_filter_fn
    scales = any(".gamma_1" in key for key in state) and hasattr(next(iter(model.blocks)), "ls1")  # pyright: ignore[reportArgumentType, reportCallIssue]
    return convert(state, model, adapt_layer_scale=True) if scales else convert(state, model)


def _preprocess(model: Any) -> Preprocess:
    timm = _import()
    config = timm.data.resolve_model_data_config(model)
    if config["crop_mode"] not in ("center", "squash"):
        raise ValueError(f"crop_mode {config['crop_mode']!r} is not understood; pass preprocess= to wrap().")
    return Preprocess.of(
        tuple(model.patch_embed.img_size or config["input_size"][1:]),
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        resize="squash" if config["crop_mode"] == "squash" else "shorter_side",
        crop_pct=config["crop_pct"],
        interpolation=config["interpolation"],
    )


def _class_names(model: Any) -> tuple[str, ...]:
    timm = _import()
    subset = timm.data.infer_imagenet_subset(model) if model.num_classes > 0 else None
    if subset is None:
        return ()
    info = timm.data.ImageNetInfo(subset)
    return tuple(info.index_to_description(i) for i in range(model.num_classes))
