"""Rendered pictures with known concepts, masks and captions."""

import inspect
from typing import Any

from vitrail.images.worlds.base import Scene, World
from vitrail.images.worlds.export import read_masks, write_world
from vitrail.images.worlds.moving import MovingWorld
from vitrail.images.worlds.named import NAMED, Named, parsed, plain_spec
from vitrail.images.worlds.shapes import ShapesWorld
from vitrail.images.worlds.sheet import clip_sheet, contact_sheet, mask_sheet

WORLDS: dict[str, type[World]] = {"shapes": ShapesWorld, "moving": MovingWorld}

__all__ = [
    "NAMED",
    "WORLDS",
    "Named",
    "Scene",
    "World",
    "clip_sheet",
    "contact_sheet",
    "mask_sheet",
    "open_world",
    "read_masks",
    "write_world",
]


def open_world(spec: str, **overrides: Any) -> World:
    """ "world:shapes?n=2000&seed=0", "shapes?n=2000" or "waterbirds?n=2000" (NAMED). `overrides` go over the spec."""
    name, query = plain_spec(spec)
    if name not in WORLDS:
        raise ValueError(f"there is no world {name!r}. Known: {', '.join(WORLDS)}; named: {', '.join(NAMED)}.")
    world = WORLDS[name]
    kinds = {option: parameter.annotation for option, parameter in inspect.signature(world).parameters.items()}
    return world(**{**parsed(name, query, kinds), **overrides})
