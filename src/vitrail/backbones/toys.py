"""The toys by name: the project's own small models, from the package's weights or from a file of yours."""

import difflib
from pathlib import Path

from torch import Tensor

from vitrail.backbones import toy, toy_clip
from vitrail.backbones.base import Backbone
from vitrail.backbones.checkpoints import load_exactly, read_weights
from vitrail.backbones.preprocess import HALF, Preprocess
from vitrail.files import read_json

WEIGHTS = Path(__file__).with_name("weights")


def load(
    name: str,
    *,
    weights: Path | None = None,
    pretrained: bool | str | None = None,
    image_px: int | tuple[int, int] | None = None,
    allow_pickle: bool = False,
) -> Backbone:
    """ "clip": the weights that ship with vitrail, or `weights`, a safetensors file with its JSON beside it.

    "dynamics@512": as the toy was after 512 steps of training, where it kept them. `pretrained=False` gives random
    weights. The JSON holds "model" (the arguments of ToyViT or ToyCLIP), "kind" ("vit" or "clip"), "class_names", and
    "mean" and "std" of the input.
    """
    if isinstance(pretrained, str):
        raise ValueError(f"a toy model has one set of weights: pretrained must be True or False, got {pretrained!r}.")
    plain, _, step = name.partition("@")
    path = weights or WEIGHTS / f"{plain}.safetensors"
    if weights is None and not path.is_file():
        known = sorted(found.stem for found in WEIGHTS.glob("*.json"))
        nearest = difflib.get_close_matches(plain, known, n=3, cutoff=0.0)
        raise KeyError(
            f"vitrail ships no weights of a toy {plain!r}. It ships {', '.join(known)}; nearest: {', '.join(nearest)}. "
            "Others: `vitrail toy get NAME` or `vitrail toy train NAME`, then load them with weights=."
        )
    about = read_json(path.with_suffix(".json"), "description of a toy model")
    is_clip = about.get("kind") == "clip"
    model = toy_clip.ToyCLIP(**about["model"]) if is_clip else toy.ToyViT(**about["model"])
    own_px = (model.visual if isinstance(model, toy_clip.ToyCLIP) else model).config["image_px"]
    if image_px not in (None, own_px, (own_px, own_px)):
        raise ValueError(f"toy/{name} takes images of {own_px} pixels and has no positions for others, got {image_px}.")
    if step:
        kept = [one["step"] for one in about.get("steps", [])]
        load_exactly(model, _at_step(path, plain, step, kept), what=f"toy/{name}")
    elif pretrained is not False:
        load_exactly(model, read_weights(path, allow_pickle=allow_pickle), what=f"toy/{name}")
    preprocess = Preprocess.of((own_px, own_px), mean=tuple(about.get("mean", HALF)), std=tuple(about.get("std", HALF)))
    named = {"name": f"toy/{name}", "class_names": about.get("class_names", ()), "preprocess": preprocess}
    return toy_clip.wrap(model, **named) if isinstance(model, toy_clip.ToyCLIP) else toy.wrap(model, **named)


def _at_step(path: Path, name: str, step: str, kept: list[int]) -> dict[str, Tensor]:
    """The weights after `step` steps, from NAME-steps.safetensors beside the toy's own."""
    if not kept:
        raise ValueError(f"toy/{name} kept no weights of its training: load it as toy/{name}.")
    if not step.isdecimal() or int(step) not in kept:
        raise KeyError(f"toy/{name} kept its weights after {', '.join(map(str, kept))} steps, not after {step!r}.")
    steps = read_weights(path.with_name(f"{path.stem}-steps.safetensors"), allow_pickle=False)
    prefix = f"{int(step)}/"
    return {key.removeprefix(prefix): tensor for key, tensor in steps.items() if key.startswith(prefix)}
