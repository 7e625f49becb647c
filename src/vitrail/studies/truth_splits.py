"""The pictures of a truth recovery: one point's activations and what is there, in the same rows."""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from PIL import Image
from torch import Tensor

from vitrail.backbones.base import Backbone
from vitrail.backbones.preprocess import Preprocess
from vitrail.images.base import ImageSource
from vitrail.images.loader import load_batches
from vitrail.images.worlds.base import Scene
from vitrail.metrics.truth import Firing, Scenes, Truth
from vitrail.progress import SILENT, Progress
from vitrail.store.tokens import select_tokens, stored_kind


@dataclass(frozen=True, eq=False)
class Split:
    """Some pictures: one point's activations, image-major, and what is there."""

    x: Float[Tensor, "rows d_in"]
    n_tokens: int
    patches: slice | None  # which of a picture's rows are its patches
    truth: Truth


def read_split(
    backbone: Backbone,
    images: ImageSource,
    point: str,
    tokens: str,
    *,
    coverage: float = 0.5,
    batch_size: int = 64,
    n_workers: int = 0,
    progress: Progress = SILENT,
) -> Split:
    """Activations and truth of all of these pictures that can be read."""
    check_known(images)
    kind = stored_kind(tokens, has_tokens=backbone.point(point).has_tokens)
    device, positions, parts = next(backbone.parameters()).device, [], []
    batches = load_batches(images, range(len(images)), backbone.preprocess, batch_size=batch_size, n_workers=n_workers)
    with closing(batches), progress.task("pictures", len(images), "images") as task, torch.inference_mode():
        for batch in batches:
            if batch.positions:
                x = backbone.activations(batch.images.to(device), [point])[point]
                parts.append(select_tokens(x, backbone.grid, kind).float().cpu())
                positions += batch.positions
            task.advance(len(batch.positions) + len(batch.skipped))
    if not parts:
        raise ValueError(f"none of the {len(images)} images of {images.spec} could be read.")
    rows = torch.cat(parts)
    n_tokens, grid = rows.shape[1], backbone.grid
    patches = None
    if kind in ("all", "spatial"):
        patches = slice(None) if n_tokens == grid.n_patches else grid.tokens("spatial")
    shape = None if patches is None else (grid.height, grid.width)
    truth = truth_of(images, positions, backbone.preprocess, grid=shape, coverage=coverage)
    return Split(rows.flatten(0, 1), n_tokens, patches, truth)


def check_known(images: ImageSource) -> None:
    """Raises ValueError, saying what would have a truth, for pictures of which nothing is known."""
    if not _has_masks(images) and not hasattr(images, "present"):
        raise ValueError(
            f"{images.spec} does not say what is in its pictures, and truth recovery compares latents with that. Use a "
            "world (world:shapes?n=500&split=test) or pictures with a table of factors (factors:PATH)."
        )


def truth_of(
    images: Any,
    positions: Sequence[int],
    preprocess: Preprocess,
    *,
    grid: tuple[int, int] | None,
    coverage: float = 0.5,
) -> Truth:
    """By masks, as the model sees them; of pictures as wholes where only their factors are known."""
    check_known(images)
    if not _has_masks(images):
        return Truth.of_concepts(images.concepts, [images.present(i) for i in positions])
    first = images.load(positions[0]).convert("RGB")
    whole = np.array_equal(np.asarray(preprocess.crop(first)), np.asarray(first))
    scenes = images if whole else AsSeen(images, preprocess)
    return Truth.of_world(scenes, positions, grid=grid, coverage=coverage)


def _has_masks(images: ImageSource) -> bool:
    return isinstance(images, Scenes) and bool(images.concepts) and bool(getattr(images, "has_masks", True))


class AsSeen:
    """A world whose masks are resized and cropped as the model's pictures are."""

    def __init__(self, world: Scenes, preprocess: Preprocess) -> None:
        self.concepts, self.classes = world.concepts, world.classes
        self._world, self._preprocess = world, preprocess

    def scene(self, i: int) -> Scene:
        scene, seen = self._world.scene(i), {}
        for mask in scene.masks.values():  # concepts of one thing share one mask
            if id(mask) not in seen:
                seen[id(mask)] = self._cropped(mask)
        image = np.asarray(self._preprocess.crop(Image.fromarray(scene.image)))
        return replace(scene, image=image, masks={name: seen[id(mask)] for name, mask in scene.masks.items()})

    def _cropped(self, mask: Bool[np.ndarray, "h w"]) -> Bool[np.ndarray, "h2 w2"]:
        grey = Image.fromarray(mask.astype(np.uint8) * 255)
        return np.asarray(self._preprocess.crop(grey))[..., 0] >= 128


def sample_patches(firing: Firing, truth: Truth, per_image: int | None, *, seed: int = 0) -> tuple[Firing, Truth]:
    """The same, of which only `per_image` patches of each picture count, drawn anew for each picture; None: all.

    Picture labels, and what latents say of pictures, are as before. Where codes are dense, the entries of all patches
    are more than anyone waits for.
    """
    if per_image is not None and per_image < 1:
        raise ValueError(f"patches_per_image must be at least 1, got {per_image}.")
    if per_image is None or per_image >= truth.n_patches or firing.patches is None:
        return firing, truth
    assert truth.shown is not None
    assert truth.unclear is not None
    order = np.random.default_rng(seed).random((truth.n, truth.n_patches)).argsort(1) < per_image
    kept = order.reshape(-1)
    shown, unclear = truth.shown.copy(), truth.unclear.copy()
    shown[~kept], unclear[~kept] = 0, 255  # unclear for every concept: left out of every count
    patches = firing.patches.keep(torch.from_numpy(kept)[firing.patches.rows()])
    return replace(firing, patches=patches), replace(truth, shown=shown, unclear=unclear)
