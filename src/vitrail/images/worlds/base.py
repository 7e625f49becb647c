"""A world: rendered pictures of which everything is known, down to the pixels of every concept."""

import inspect
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from PIL import Image
from torch import Tensor

from vitrail.files import json_digest
from vitrail.images.base import ImageSource
from vitrail.images.worlds.draws import stream_key

SPLITS = ("train", "val", "test")


@dataclass(frozen=True, eq=False)
class Scene:
    """A picture and the truth about it. `masks` has an entry for each concept that is present, and for no other."""

    image: UInt8[np.ndarray, "h w 3"]
    label: int
    caption: str
    attributes: Mapping[str, str]
    masks: Mapping[str, Bool[np.ndarray, "h w"]]


class World(ImageSource):
    """Scene i is a pure function of (world, its options, i): no order, no state, the same on every platform.

    A world's options are the keyword arguments of its constructor, which its spec carries:
    "world:shapes?n=2000&seed=0&split=train". Splits are unrelated random streams. `n` only says where to stop:
    scene i of a longer world is scene i of a shorter one.

    Spec and fingerprint name the options in `always_named`, and others only where they are not at their default. So a
    world may learn new options, and what was made from its pictures before is still known to be made from them.
    """

    name: ClassVar[str]
    version: ClassVar[int]  # raised whenever any pixel of the same options changes
    always_named: ClassVar[tuple[str, ...]] = ("n", "seed", "split", "image_px")
    concepts: tuple[str, ...]  # every concept a scene may show, as "family:value"
    groups: Mapping[str, tuple[int, ...]]  # sibling classes: name of the parent -> labels

    def __init__(self, *, n: int, seed: int, split: str, image_px: int) -> None:
        if n < 1:
            raise ValueError(f"n must be at least 1, got {n}.")
        if seed < 0:
            raise ValueError(f"seed must be 0 or more, got {seed}.")
        if split not in SPLITS:
            raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}.")
        if not 16 <= image_px <= 1024:
            raise ValueError(f"image_px must be in 16..1024, got {image_px}.")
        self.n, self.seed, self.split, self.image_px = n, seed, split, image_px
        self._key = stream_key(seed, SPLITS.index(split), *self.name.encode())

    @property
    def options(self) -> dict[str, Any]:
        """Every option and its value."""
        return {option: getattr(self, option) for option in _defaults(type(self))}

    @property
    def named_options(self) -> dict[str, Any]:
        """The options that tell this world from others: those of `always_named`, and those not at their default."""
        defaults = _defaults(type(self))
        return {
            option: value
            for option, value in self.options.items()
            if option in self.always_named or value != defaults[option]
        }

    @property
    def spec(self) -> str:
        return self._spec

    @cached_property
    def _spec(self) -> str:
        return f"world:{self.name}?" + "&".join(f"{option}={value}" for option, value in self.named_options.items())

    def __len__(self) -> int:
        return self.n

    @abstractmethod
    def scene(self, i: int) -> Scene: ...

    def load(self, i: int) -> Image.Image:
        return Image.fromarray(self.scene(i).image)

    def size_bytes(self, i: int) -> int:
        return 3 * self.image_px**2

    def fingerprint(self) -> str:
        return json_digest({"world": self.name, "version": self.version, **self.named_options})

    def patch_coverage(self, i: int, patch_px: int) -> Float[Tensor, "n_concepts grid_h grid_w"]:
        """Share of each patch's pixels that show each concept, 0..1, in the order of `concepts`."""
        return scene_coverage(self.scene(i), self.concepts, patch_px)


@cache
def _defaults(world: type[World]) -> dict[str, Any]:
    """Default of each option, in the order of the constructor."""
    return {name: option.default for name, option in inspect.signature(world).parameters.items()}


def scene_coverage(scene: Scene, concepts: Sequence[str], patch_px: int) -> Float[Tensor, "n_concepts grid_h grid_w"]:
    """`World.patch_coverage` of a scene that is already rendered."""
    height, width, _ = scene.image.shape
    if patch_px < 1 or height % patch_px or width % patch_px:
        raise ValueError(f"patch_px must divide the picture's sides {height} and {width}, got {patch_px}.")
    coverage = np.zeros((len(concepts), height // patch_px, width // patch_px), dtype=np.float32)
    shares: dict[int, np.ndarray] = {}  # concepts of one thing share one mask
    for row, concept in enumerate(concepts):
        if concept in scene.masks:
            mask = scene.masks[concept]
            if id(mask) not in shares:
                patches = mask.reshape(height // patch_px, patch_px, width // patch_px, patch_px)
                shares[id(mask)] = patches.sum(axis=(1, 3)) / patch_px**2
            coverage[row] = shares[id(mask)]
    return torch.from_numpy(coverage)
