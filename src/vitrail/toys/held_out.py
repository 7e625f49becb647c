"""How good a toy is, on pictures of a world that training did not see."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from vitrail.backbones.text import OPENAI_SIMPLE
from vitrail.backbones.toy import ToyViT
from vitrail.backbones.toy_clip import ToyCLIP
from vitrail.images.worlds import Scene, World
from vitrail.images.worlds.backgrounds import BACKGROUNDS
from vitrail.images.worlds.factors import COLOURS, POSITIONS, SIZES
from vitrail.images.worlds.fills import FILLS
from vitrail.images.worlds.silhouettes import SILHOUETTES
from vitrail.progress import SILENT, Progress
from vitrail.toys.fitting import normalized

BATCH = 96
# family -> value -> what the text tower is asked, put into "a photo of a {}."
PROMPTS: Mapping[str, Mapping[str, str]] = {
    "shape": {shape: shape for shape in SILHOUETTES},
    "texture": {texture: f"{texture} thing" for texture in FILLS},
    "colour": {colour: f"{colour} thing" for colour in COLOURS},
    "size": {size: f"{size} thing" for size in SIZES},
    "position": {position: f"thing at the {position}" for position in POSITIONS},
    "background": {name: f"thing on {one.phrase}" for name, one in BACKGROUNDS.items()},
}


def held_out(
    model: ToyViT, world: World, mean: Sequence[float], std: Sequence[float], *, progress: Progress = SILENT
) -> dict[str, Any]:
    """Top-1 accuracy on the pictures of `world`: overall, per sibling group and per size, each with n and interval."""
    hits: dict[str, list[bool]] = {"all": []}
    for scenes, logits in outputs(model, world, mean, std, progress):
        for scene, answer in zip(scenes, logits.argmax(1).tolist(), strict=True):
            for key in ("all", f"shape:{scene.attributes['shape']}", f"size:{scene.attributes['size']}"):
                hits.setdefault(key, []).append(answer == scene.label)
    overall = accuracy(hits.pop("all"))
    return {"source": world.spec, "top1": overall, "by": {key: accuracy(hits[key]) for key in sorted(hits)}}


def zero_shot(
    model: ToyCLIP, world: World, mean: Sequence[float], std: Sequence[float], *, progress: Progress = SILENT
) -> dict[str, Any]:
    """Top-1 accuracy of the words nearest to each picture: over the classes, and over the values of each family.

    Prompts are PROMPTS in CLIP's one template. Where words are written, `said_the_word` is the share of those pictures
    whose answer is a class of the written shape.
    """
    families = {"class": {name: name for name in world.classes}} | dict(PROMPTS)
    with torch.no_grad():
        texts = {family: _texts(model, list(prompts.values())) for family, prompts in families.items()}
    hits: dict[str, list[bool]] = {family: [] for family in families}
    said: list[bool] = []
    for scenes, images in outputs(model, world, mean, std, progress):
        for family, prompts in families.items():
            answers = [list(prompts)[place] for place in (images @ texts[family].T).argmax(1).tolist()]
            for scene, answer in zip(scenes, answers, strict=True):
                true = world.classes[scene.label] if family == "class" else scene.attributes[family]
                hits[family].append(answer == true)
                if family == "class" and "word" in scene.attributes:
                    said.append(answer.endswith(f" {scene.attributes['word']}"))
    found = {"source": world.spec, **{family: accuracy(those) for family, those in hits.items()}}
    return found | ({"said_the_word": accuracy(said)} if said else {})


def outputs(
    model: Callable[[Tensor], Tensor], world: World, mean: Sequence[float], std: Sequence[float], progress: Progress
) -> Iterator[tuple[list[Scene], Float[Tensor, "b d_out"]]]:
    """Scenes and what the model, in eval mode, makes of their pictures, in batches."""
    if isinstance(model, torch.nn.Module):
        model.eval()
    with progress.task("held-out accuracy", len(world), "img") as task:
        for start in range(0, len(world), BATCH):
            scenes = [world.scene(i) for i in range(start, min(start + BATCH, len(world)))]
            with torch.no_grad():
                yield scenes, model(normalized(np.stack([scene.image for scene in scenes]), mean, std))
            task.advance(len(scenes))


def accuracy(hits: Sequence[bool]) -> dict[str, float | int]:
    """Share of hits in 0..1 with its 95 % interval (Wilson 1927), which stays inside 0..1 and is right near 1."""
    n, share, z = len(hits), sum(hits) / len(hits), 1.959964
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return {"accuracy": round(share, 4), "low": round(centre - half, 4), "high": round(centre + half, 4), "n": n}


def _texts(model: ToyCLIP, phrases: Sequence[str]) -> Float[Tensor, "n d_embed"]:
    (template,) = OPENAI_SIMPLE
    embedded = model.encode_text(model.tokenizer([template.format(phrase) for phrase in phrases]))
    return torch.nn.functional.normalize(embedded, dim=-1)
