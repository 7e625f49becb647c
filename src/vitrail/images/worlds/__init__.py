"""Rendered pictures with known concepts, masks and captions."""

import inspect
from typing import Any

from vitrail.images.worlds.base import Scene, World
from vitrail.images.worlds.shapes import ShapesWorld
from vitrail.images.worlds.sheet import contact_sheet

WORLDS: dict[str, type[World]] = {"shapes": ShapesWorld}

__all__ = ["WORLDS", "Scene", "World", "contact_sheet", "open_world"]


def open_world(spec: str, **overrides: Any) -> World:
    """ "world:shapes?n=2000&seed=0" or "shapes?n=2000". `overrides` go over what the spec says."""
    name, _, query = spec.removeprefix("world:").partition("?")
    if name not in WORLDS:
        raise ValueError(f"there is no world {name!r}. Known: {', '.join(sorted(WORLDS))}.")
    world = WORLDS[name]
    options = inspect.signature(world).parameters
    given: dict[str, Any] = {}
    for part in filter(None, query.split("&")):
        option, equals, value = part.partition("=")
        if not equals or option not in options:
            raise ValueError(f"world {name!r} has no option {part!r}. Known: {', '.join(options)}, as option=value.")
        given[option] = _parsed(option, value, options[option].annotation)
    return world(**{**given, **overrides})


def _parsed(option: str, value: str, kind: type) -> Any:
    try:
        return kind(value)
    except ValueError:
        raise ValueError(f"{option} must be {kind.__name__}, got {value!r}.") from None
