"""A toy from its recipe: trained, measured as it is kept, and written with all that is known of it."""

import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from vitrail.backbones.checkpoints import load_exactly
from vitrail.backbones.toy import ToyViT
from vitrail.backbones.toy_clip import ToyCLIP
from vitrail.backbones.toys import WEIGHTS
from vitrail.files import read_json, read_tensors, tensors_digest, write_json, write_tensors
from vitrail.images.worlds import World, open_world
from vitrail.images.worlds.shapes import ShapesWorld
from vitrail.progress import SILENT, Progress
from vitrail.provenance import provenance
from vitrail.toys.classifier import Classifying
from vitrail.toys.clip import Contrasting
from vitrail.toys.describing import words_of
from vitrail.toys.fitting import Objective, fit, half
from vitrail.toys.held_out import held_out, zero_shot
from vitrail.toys.recipes import ClipRecipe, ToyRecipe, toy_recipe

N_WORDS_FROM = 4_000  # pictures whose captions are read for the vocabulary; they hold every value many times
N_TEST_KEPT = 960  # pictures on which weights kept on the way are measured


def train_toy(
    name: str, out: Path | None = None, *, recipe: ToyRecipe | None = None, progress: Progress = SILENT
) -> dict[str, Any]:
    """Train the toy `name` and write out/name.safetensors and out/name.json; returns what the JSON says.

    `out`: a folder, by default the package's own weights. `recipe`: instead of TOYS[name]. An unfinished run is kept in
    out/name.training, and gone on with. Weights kept on the way go to out/name-steps.safetensors, as "STEP/NAME".
    """
    recipe, folder = recipe or toy_recipe(name), out or WEIGHTS
    began = time.monotonic()
    torch.manual_seed(recipe.seed)
    world = open_world(recipe.world, split="train", n=recipe.n_images)
    objective = make_objective(world, recipe)
    if isinstance(recipe, ClipRecipe) and recipe.start is not None:
        start = folder if (folder / f"{recipe.start}.safetensors").is_file() else WEIGHTS
        weights = read_tensors(start / f"{recipe.start}.safetensors", f"toy {recipe.start!r}, from which {name} starts")
        load_exactly(objective.toy, weights, what=f"toy/{name}, from {recipe.start}")
    losses = fit(objective, world, recipe, folder / f"{name}.training", progress)
    weights = half(objective.toy)
    objective.toy.load_state_dict(weights)  # measured as kept
    description: dict[str, Any] = {
        "kind": "clip" if isinstance(recipe, ClipRecipe) else "vit",
        "about": recipe.about,
        "model": objective.toy.config,
        "class_names": list(world.classes),
        "mean": list(recipe.mean),
        "std": list(recipe.std),
        "world": recipe.world,
        "recipe": asdict(recipe),
        "n_parameters": sum(weight.numel() for weight in objective.toy.parameters()),
        "losses": losses,
        "held_out": measured(objective.toy, recipe, progress),
        "train_seconds": round(time.monotonic() - began, 1),
        "digest": tensors_digest(weights),
        "provenance": provenance(),
    }
    if recipe.n_kept:
        description["steps"] = _keep_steps(name, folder, objective.toy, recipe, progress)
    write_tensors(folder / f"{name}.safetensors", weights)
    write_json(folder / f"{name}.json", description)
    shutil.rmtree(folder / f"{name}.training", ignore_errors=True)
    return description


def make_objective(world: World, recipe: ToyRecipe) -> Objective:
    vision = {**recipe.model, "image_px": world.image_px}
    if not isinstance(recipe, ClipRecipe):
        return Classifying(ToyViT(**{**vision, "n_classes": len(world.classes)}), world, recipe)
    if not isinstance(world, ShapesWorld):
        raise ValueError(f"a toy CLIP is told of the world shapes and its dials, not of {world.name!r}.")
    words = words_of([world.factors(i).attributes for i in range(min(len(world), N_WORDS_FROM))])
    model = ToyCLIP(words=words, vision=vision, text=recipe.text, d_embed=recipe.d_embed)
    return Contrasting(model, world, recipe)


def measured(
    toy: ToyViT | ToyCLIP,
    recipe: ToyRecipe,
    progress: Progress = SILENT,
    *,
    n: int | None = None,
    seed: int | None = None,
) -> dict[str, Any]:
    """Held-out accuracy, on `n` pictures of the test split (default: as many as the recipe says) of another `seed`."""
    other = {} if seed is None else {"seed": seed}

    def test(spec: str) -> World:
        return open_world(spec, split="test", n=n or recipe.n_test, **other)

    if isinstance(recipe, ClipRecipe):
        assert isinstance(toy, ToyCLIP)
        worlds = {name: test(spec) for name, spec in recipe.tested_on.items()}
        return {name: zero_shot(toy, one, recipe.mean, recipe.std, progress=progress) for name, one in worlds.items()}
    assert isinstance(toy, ToyViT)
    return held_out(toy, test(recipe.world), recipe.mean, recipe.std, progress=progress)


def _keep_steps(
    name: str, folder: Path, toy: ToyViT | ToyCLIP, recipe: ToyRecipe, progress: Progress
) -> list[dict[str, Any]]:
    """Joins the weights kept on the way into one file; the accuracy at each."""
    told, tensors = [], {}
    for step in recipe.kept_steps:
        weights = read_tensors(folder / f"{name}.training" / f"step-{step:07d}.safetensors", "weights kept on the way")
        tensors |= {f"{step}/{key}": tensor for key, tensor in weights.items()}
        toy.load_state_dict(weights)
        test = open_world(recipe.world, split="test", n=min(N_TEST_KEPT, recipe.n_test))
        assert isinstance(toy, ToyViT)
        found = held_out(toy, test, recipe.mean, recipe.std, progress=progress)
        told.append({"step": step, "images": step * recipe.batch_size, "top1": found["top1"]})
    write_tensors(folder / f"{name}-steps.safetensors", tensors)
    return told


def description_of(name: str, folder: Path | None = None) -> dict[str, Any]:
    """What is kept with a toy. Raises FileNotFoundError if it is neither in the package nor in `folder`."""
    return read_json((folder or WEIGHTS) / f"{name}.json", "description of a toy model")
