"""What a vision model is: one interface over timm, OpenCLIP, Hugging Face and the project's own toy models.

    backbone = load("timm/deit_tiny_patch16_224", weights="deit_tiny.safetensors")
    backbone = load("open_clip/ViT-B-32@openai")
    backbone = load("hf/facebook/dinov2-small")        or a folder: load("hf/./my-model")
    backbone = load("toy/clip")

A model that is already built: `vitrail.backbones.timm.wrap(model, name=...)`, and likewise in the other adapters.
"""

import difflib
from pathlib import Path

import torch

from vitrail.backbones import huggingface, open_clip, timm, toys
from vitrail.backbones.base import Backbone, HookFn, Hooks
from vitrail.backbones.grid import Grid
from vitrail.backbones.points import Point
from vitrail.backbones.preprocess import Preprocess
from vitrail.backbones.text import TextTower, class_embeddings

BACKBONES = {"timm": timm.load, "open_clip": open_clip.load, "hf": huggingface.load, "toy": toys.load}

__all__ = [
    "BACKBONES",
    "Backbone",
    "Grid",
    "HookFn",
    "Hooks",
    "Point",
    "Preprocess",
    "TextTower",
    "class_embeddings",
    "load",
]


def load(
    name: str,
    weights: str | Path | None = None,
    pretrained: bool | str | None = None,
    device: str | torch.device = "cpu",
    image_px: int | tuple[int, int] | None = None,
    *,
    allow_pickle: bool = False,
) -> Backbone:
    """A backbone by name, "library/model".

    weights       a file on this machine (safetensors; a pickle only with allow_pickle=True), instead of the hub's
    pretrained    False: random weights; a tag, where the library has several sets of weights for one model
    image_px      another input size than the model's own, where the library can resample positions
    """
    library, _, model = name.partition("/")
    if library not in BACKBONES or not model:
        nearest = difflib.get_close_matches(library, BACKBONES, n=1, cutoff=0.0)
        raise KeyError(
            f"{name!r} must be LIBRARY/MODEL with a library of {', '.join(BACKBONES)}; nearest: {nearest[0]}."
        )
    path = None if weights is None else Path(weights)
    load_from = BACKBONES[library]
    backbone = load_from(model, weights=path, pretrained=pretrained, image_px=image_px, allow_pickle=allow_pickle)
    return backbone.to(device)
