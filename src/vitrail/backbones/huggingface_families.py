"""CLIP, SigLIP, ViT and DINOv2 of Hugging Face, each as embed, blocks and finish; which class is of which family."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vitrail.backbones.base import Parts
from vitrail.hooks import Site


@dataclass(frozen=True)
class Family:
    """`parts(model, other_size)`: `other_size` says that images are not of the size the positions were learnt for."""

    name: str
    parts: Callable[[Any, bool], Parts]


def _clip(model: Any, other_size: bool) -> Parts:
    vision = getattr(model, "vision_model", model)
    project = getattr(model, "visual_projection", nn.Identity())
    return Parts(
        embed=lambda images: vision.pre_layrnorm(vision.embeddings(images, interpolate_pos_encoding=other_size)),
        blocks=_blocks(vision),
        pool=lambda tokens: project(vision.post_layernorm(tokens[:, 0, :])),
        head=lambda embedding: embedding,
        patches=Site(vision.embeddings.patch_embedding, "output", layout="channels_first"),
        full_embed=Site(vision.embeddings, "output"),
        ln_final=Site(vision.post_layernorm, "output"),
        block_arguments=_required(vision),
    )


def _siglip(model: Any, other_size: bool) -> Parts:
    vision = getattr(model, "vision_model", model)
    classifier = getattr(model, "classifier", None)
    if classifier is None and not vision.use_head:
        raise ValueError("this SigLIP tower has no attention pooling (vision_use_head=False), so no image embedding.")

    def pool(tokens: Tensor) -> Tensor:
        tokens = vision.post_layernorm(tokens)
        return vision.head(tokens) if classifier is None else torch.mean(tokens, dim=1)

    return Parts(
        embed=lambda images: vision.embeddings(images, interpolate_pos_encoding=other_size),
        blocks=_blocks(vision),
        pool=pool,
        head=classifier or (lambda embedding: embedding),
        patches=Site(vision.embeddings.patch_embedding, "output", layout="channels_first"),
        full_embed=Site(vision.embeddings, "output"),
        ln_final=Site(vision.post_layernorm, "output"),
        block_arguments=_required(vision),
    )


def _vit(model: Any, other_size: bool) -> Parts:
    vision = getattr(model, "vit", model)

    def pool(tokens: Tensor) -> Tensor:
        tokens = vision.layernorm(tokens)
        return tokens[:, 0, :] if vision.pooler is None else vision.pooler(tokens)

    return Parts(
        embed=lambda images: vision.embeddings(images, interpolate_pos_encoding=other_size),
        blocks=_blocks(vision),
        pool=pool,
        head=getattr(model, "classifier", lambda embedding: embedding),
        patches=Site(vision.embeddings.patch_embeddings, "output"),
        full_embed=Site(vision.embeddings, "output"),
        ln_final=Site(vision.layernorm, "output"),
        block_arguments=_required(vision),
    )


def _dinov2(model: Any, _other_size: bool) -> Parts:
    vision = getattr(model, "dinov2", getattr(model, "dinov2_with_registers", model))
    classifier = getattr(model, "classifier", None)
    n_special = 1 + getattr(model.config, "num_register_tokens", 0)

    def pool(tokens: Tensor) -> Tensor:
        tokens = vision.layernorm(tokens)
        if classifier is None:
            return tokens[:, 0]
        return torch.cat([tokens[:, 0], tokens[:, n_special:].mean(dim=1)], dim=1)

    return Parts(
        embed=vision.embeddings,
        blocks=_blocks(vision),
        pool=pool,
        head=classifier or (lambda embedding: embedding),
        patches=Site(vision.embeddings.patch_embeddings, "output"),
        full_embed=Site(vision.embeddings, "output"),
        ln_final=Site(vision.layernorm, "output"),
        block_arguments=_required(vision),
    )


def _blocks(vision: nn.Module) -> tuple[nn.Module, ...]:
    """The longest list of modules of one class: its path has moved between versions (encoder.layer, layers ...)."""
    lists = [module for module in vision.modules() if isinstance(module, nn.ModuleList)]
    uniform = [list(found) for found in lists if len({type(block) for block in found}) == 1]
    return tuple(max(uniform, key=len))


def _required(vision: nn.Module) -> Callable[[int], dict[str, None]]:
    """Masks that a block's forward demands (transformers 4); there are none for images."""
    parameters = list(inspect.signature(_blocks(vision)[0].forward).parameters.values())[1:]
    demanded = {
        parameter.name: None
        for parameter in parameters
        if parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
    }
    return lambda _block: demanded


FAMILIES = {
    "CLIPModel": Family("clip", _clip),
    "CLIPVisionModelWithProjection": Family("clip", _clip),
    "CLIPVisionModel": Family("clip", _clip),
    "SiglipModel": Family("siglip", _siglip),
    "SiglipVisionModel": Family("siglip", _siglip),
    "SiglipForImageClassification": Family("siglip", _siglip),
    "ViTModel": Family("vit", _vit),
    "ViTForImageClassification": Family("vit", _vit),
    "Dinov2Model": Family("dinov2", _dinov2),
    "Dinov2ForImageClassification": Family("dinov2", _dinov2),
    "Dinov2WithRegistersModel": Family("dinov2", _dinov2),
    "Dinov2WithRegistersForImageClassification": Family("dinov2", _dinov2),
}
# Where the config names no class of ours: what opens a checkpoint of this model_type.
BY_TYPE = {
    "clip": "CLIPModel",
    "clip_vision_model": "CLIPVisionModelWithProjection",
    "siglip": "SiglipModel",
    "siglip_vision_model": "SiglipVisionModel",
    "vit": "ViTModel",
    "dinov2": "Dinov2Model",
    "dinov2_with_registers": "Dinov2WithRegistersModel",
}
UNDERSTOOD = f"Of transformers, vitrail opens {', '.join(FAMILIES)}."
