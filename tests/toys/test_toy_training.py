"""Training a toy: it learns, repeats itself, survives a kill, and keeps what it says it keeps."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from vitrail.backbones import load
from vitrail.backbones.toy import ToyViT
from vitrail.files import read_tensors, tensors_digest
from vitrail.images import open_world
from vitrail.toys import (
    ClipRecipe,
    ToyRecipe,
    accuracy,
    clip,
    fetch,
    fitting,
    held_out,
    normalized,
    toy_recipe,
    train_toy,
)
from vitrail.toys.fetch import get_toy
from vitrail.toys.train import make_objective

TINY = ToyRecipe(
    world="world:shapes?image_px=32&seed=7",
    model={"d_model": 32, "n_layers": 1, "d_mlp": 64},
    n_images=24 * 60,
    batch_size=24,
    n_test=96,
    learning_rate=5e-3,
    bfloat16=False,
)
SHORT = dataclasses.replace(TINY, n_images=24 * 12, n_test=24)
CLIP = ClipRecipe(
    world=TINY.world,
    model={"d_model": 24, "n_layers": 1, "n_heads": 2, "d_mlp": 32},
    text={"d_model": 24, "n_layers": 1, "n_heads": 2, "d_mlp": 32},
    d_embed=16,
    n_images=24 * 40,
    batch_size=24,
    n_test=48,
    learning_rate=5e-3,
    bfloat16=False,
    tested_on={
        "held out": "world:shapes?image_px=32",
        "wrong words": "world:shapes?image_px=64&words=1.0&wrong_words=1.0",
    },
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy")
    return folder, train_toy("shapes", folder, recipe=TINY)


def test_training_lowers_the_loss(trained):
    _, description = trained
    losses = description["losses"]
    assert len(losses) == 20
    assert losses[0] > 3.8  # chance: ln 48 = 3.87
    assert losses[-1] < losses[0] - 0.05


def test_the_same_recipe_gives_the_same_weights(tmp_path):
    once, again = (train_toy("shapes", tmp_path / name, recipe=SHORT) for name in ("a", "b"))
    assert again["digest"] == once["digest"]
    other = train_toy("shapes", tmp_path, recipe=dataclasses.replace(SHORT, seed=1))
    assert other["digest"] != once["digest"]


def test_files_hold_the_model_and_what_was_measured(trained):
    folder, description = trained
    assert json.loads((folder / "shapes.json").read_text()) == json.loads(json.dumps(description))
    weights = read_tensors(folder / "shapes.safetensors", "toy")
    assert tensors_digest(weights) == description["digest"]
    model = ToyViT(**description["model"])
    model.load_state_dict(weights)  # fp16 is cast to the model's fp32
    test = open_world(TINY.world, split="test", n=TINY.n_test)
    assert held_out(model, test, TINY.mean, TINY.std) == description["held_out"]
    assert not (folder / "shapes.training").exists()


@pytest.mark.parametrize("recipe", [SHORT, dataclasses.replace(CLIP, n_images=24 * 12, tested_on={})])
def test_a_run_that_was_killed_goes_on_to_the_same_weights(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(fitting, "SAVE_EVERY", 5)
    whole = train_toy("x", tmp_path / "whole", recipe=recipe)
    rendered = fitting.scene_coverage
    left = [24 * 8 + 3]

    def dying(*arguments):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return rendered(*arguments)

    monkeypatch.setattr(fitting, "scene_coverage", dying)
    with pytest.raises(KeyboardInterrupt):
        train_toy("x", tmp_path / "killed", recipe=recipe)
    assert not (tmp_path / "killed" / "x.json").exists()
    left[0] = 24 * 7 + 1  # enough for the 7 steps after the 5 that were saved, not for all 12
    resumed = train_toy("x", tmp_path / "killed", recipe=recipe)
    assert resumed["digest"] == whole["digest"]
    assert resumed["losses"] == whole["losses"]


def test_a_state_of_another_recipe_is_not_gone_on_with(tmp_path, monkeypatch):
    monkeypatch.setattr(fitting, "SAVE_EVERY", 5)
    monkeypatch.setattr(fitting.nn.utils, "clip_grad_norm_", _fails_after(7))
    with pytest.raises(RuntimeError, match="enough"):
        train_toy("x", tmp_path, recipe=SHORT)
    with pytest.raises(ValueError, match=r"is of another recipe\. Delete .*x\.training"):
        train_toy("x", tmp_path, recipe=dataclasses.replace(SHORT, seed=3))


def _fails_after(n):
    calls = []

    def clip(*_arguments):
        calls.append(1)
        if len(calls) > n:
            raise RuntimeError("enough")

    return clip


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    with pytest.raises(ArithmeticError, match="the loss at step .* is nan: lower muon_rate"):
        train_toy("x", tmp_path, recipe=dataclasses.replace(SHORT, patch_weight=float("nan")))


def test_weights_on_the_way_are_kept_and_load_by_step(tmp_path):
    recipe = dataclasses.replace(SHORT, n_kept=6)
    # 12 steps: 0, then 5 from 1 to 12. Ratio 12^(1/4) = 1.86 gives 1, 2, 3.46, 6.45, 12, rounded.
    assert recipe.kept_steps == (0, 1, 2, 3, 6, 12)
    description = train_toy("x", tmp_path, recipe=recipe)
    assert [kept["step"] for kept in description["steps"]] == [0, 1, 2, 3, 6, 12]
    path = tmp_path / "x.safetensors"
    last, final = (load(name, weights=path).module.state_dict() for name in ("toy/x@12", "toy/x"))
    assert all(torch.equal(last[key], final[key]) for key in final)
    first = load("toy/x@0", weights=path)
    assert first.name == "toy/x@0"
    assert first.digest != load("toy/x@1", weights=path).digest
    with pytest.raises(KeyError, match=r"kept its weights after 0, 1, 2, 3, 6, 12 steps, not after '4'"):
        load("toy/x@4", weights=path)


@pytest.mark.parametrize(("n_steps", "n_kept"), [(30, 20), (937, 24), (5000, 2), (19, 20)])
def test_kept_steps_are_as_many_as_asked_and_spread_in_the_logarithm(n_steps, n_kept):
    steps = dataclasses.replace(TINY, n_images=24 * n_steps, n_kept=n_kept).kept_steps
    assert len(steps) == n_kept
    assert (steps[0], steps[-1]) == (0, n_steps)
    gaps = np.diff(np.log(steps[1:]))
    assert (gaps > 0).all()
    if len(gaps) > 2 and n_steps > 100:
        assert gaps[-6:].max() / gaps[-6:].min() < 1.5


def test_weights_that_were_not_kept_are_not_looked_for(trained):
    with pytest.raises(ValueError, match="kept no weights of its training"):
        load("toy/shapes@4", weights=trained[0] / "shapes.safetensors")


@pytest.fixture(scope="module")
def trained_clip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    return folder, train_toy(
        "clip", folder, recipe=dataclasses.replace(CLIP, n_test=480, tested_on={"held out": CLIP.world})
    )


def test_a_toy_clip_learns_words(trained_clip):
    folder, description = trained_clip
    assert description["losses"][-1] < description["losses"][0] - 0.3
    backbone = load("toy/clip", weights=folder / "clip.safetensors")
    assert backbone.text is not None
    assert backbone.d_embed == 16
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(backbone(images), backbone.module(images))
    found = description["held_out"]["held out"]
    assert set(found) == {"source", "class", "shape", "texture", "colour", "size", "position", "background"}
    # Backgrounds are 6, and the easiest thing to see: 40 steps learn more of them than chance, 1/6.
    assert found["background"]["low"] > 0.25


def test_a_toy_may_start_from_another_and_hear_what_is_written(trained_clip, tmp_path):
    folder, _ = trained_clip
    for end in ("safetensors", "json"):
        (tmp_path / f"clip.{end}").write_bytes((folder / f"clip.{end}").read_bytes())
    words = "world:shapes?seed=7&words=1.0&wrong_words=1.0"
    recipe = dataclasses.replace(CLIP, start="clip", n_images=24 * 2, learning_rate=1e-9, muon_rate=1e-9, tested_on={})
    with pytest.raises(ValueError, match=r"toy/x, from clip"):  # 64 pixels have other positions than 32
        train_toy("x", tmp_path, recipe=dataclasses.replace(recipe, world=words))
    train_toy("x", tmp_path, recipe=recipe)
    before, after = (read_tensors(tmp_path / f"{name}.safetensors", "toy") for name in ("clip", "x"))
    weights = [name for name in before if "running" not in name and "num_batches" not in name]
    assert all(torch.allclose(before[name], after[name], atol=1e-3) for name in weights)
    # What is written takes the shape's place in the captions, and only there.
    told: list = []
    told_of = clip.draw_captions
    recipe = dataclasses.replace(CLIP, written_shapes=True)
    world = open_world(words, n=400)
    objective = make_objective(world, recipe)
    batch = next(fitting.batches(world, dataclasses.replace(recipe, n_images=24), 8))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clip, "draw_captions", lambda values, *rest: told.extend(values) or told_of(values, *rest))
        objective.loss(torch.zeros(24, 65, 24), batch)
    assert all(
        heard["shape"] == seen["word"] != seen["shape"] for heard, seen in zip(told, batch.attributes, strict=True)
    )


def test_a_toy_clip_is_told_of_the_world_of_shapes_only(tmp_path):
    with pytest.raises(ValueError, match="is told of the world shapes and its dials, not of 'moving'"):
        train_toy("x", tmp_path, recipe=dataclasses.replace(CLIP, world="world:moving"))


def test_recipes_that_cannot_be_followed():
    with pytest.raises(ValueError, match=r"there is no toy 'shpes'\. Nearest: shapes"):
        toy_recipe("shpes")
    with pytest.raises(ValueError, match="must hold at least one batch"):
        ToyRecipe(world="world:shapes", n_images=3)
    with pytest.raises(ValueError, match="n_kept must be 0 or in 2"):
        ToyRecipe(world="world:shapes", n_kept=1)


def test_a_toy_is_fetched_whole_or_not_at_all(trained, tmp_path, monkeypatch):
    assert get_toy("vit-1l-p8").is_file(), "what ships needs no fetching"
    monkeypatch.setattr(fetch, "WEIGHTS", tmp_path / "nothing ships")
    folder, description = trained
    for end in ("safetensors", "json"):
        (tmp_path / f"vit-1l-p8.{end}").write_bytes((folder / f"shapes.{end}").read_bytes())
    path = get_toy("vit-1l-p8", source=f"file:{tmp_path}")
    assert load("toy/vit-1l-p8", weights=path).n_classes == 48
    (tmp_path / "vit-1l-p8.json").write_text(json.dumps(description | {"digest": "0" * 64}))
    with pytest.raises(ValueError, match="000000000000 is recorded. It was altered or cut short"):
        get_toy("vit-1l-p8", source=f"file:{tmp_path}")
    (tmp_path / "vit-1l-p8.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no vit-1l-p8\.json"):
        get_toy("vit-1l-p8", source=f"file:{tmp_path}")


def test_accuracy_has_the_wilson_interval():
    # 9 of 10 by hand, z = 1.96, z^2 = 3.8415: centre (0.9 + 0.19207) / 1.38415 = 0.78899,
    # half width 1.96 * sqrt(0.009 + 0.0096036) / 1.38415 = 0.19314.
    assert accuracy([True] * 9 + [False]) == {"accuracy": 0.9, "low": 0.5958, "high": 0.9821, "n": 10}
    assert accuracy([True] * 5)["high"] == 1.0


def test_normalized_pixel_by_hand():
    x = normalized(np.full((1, 2, 2, 3), 255, dtype=np.uint8), (0.5, 0.25, 0.0), (0.25, 0.25, 0.5))
    assert torch.equal(x[0, :, 0, 0], torch.tensor([2.0, 3.0, 2.0]))
