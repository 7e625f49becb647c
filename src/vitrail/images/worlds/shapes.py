"""The world "shapes": one thing per picture, a shape with a texture, lying on a ground.

    class = texture x shape ("striped star"): 4 x 12 = 48; the four textures of a shape are siblings
    attributes = shape, texture, colour (8), size (3), position (3 x 3), background (6), ground (land or water)

Nothing is correlated with anything: every attribute is drawn on its own, and labels run through all classes once in
every 48 pictures, in an order drawn anew. A thing is turned by up to 15 degrees, its texture by any angle; place, size,
tones and brightness wander a little; pixels carry light noise.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import ClassVar

import numpy as np
from jaxtyping import Bool, Float, UInt8

from vitrail.images.base import ImageRecord
from vitrail.images.worlds.backgrounds import BACKGROUNDS
from vitrail.images.worlds.base import Scene, World
from vitrail.images.worlds.draws import Draws
from vitrail.images.worlds.fills import FILLS
from vitrail.images.worlds.silhouettes import SILHOUETTES

Plane = Float[np.ndarray, "h w"]
Picture = Float[np.ndarray, "3 h w"]

# name -> (tone, second tone of a texture)
COLOURS: dict[str, tuple[tuple[int, int, int], tuple[int, int, int]]] = {
    "red": ((214, 34, 34), (92, 8, 8)),
    "orange": ((246, 136, 24), (130, 58, 0)),
    "yellow": ((248, 222, 46), (140, 112, 0)),
    "green": ((30, 184, 70), (0, 70, 22)),
    "blue": ((44, 92, 232), (8, 22, 96)),
    "purple": ((150, 56, 186), (58, 8, 80)),
    "white": ((244, 244, 244), (120, 120, 120)),
    "black": ((24, 24, 24), (128, 128, 128)),
}
SIZES = {"small": 10.0, "medium": 13.5, "large": 16.5}  # radius in pixels of a 64-pixel image
POSITIONS = {
    f"{row} {column}".strip() or "centre": (x, y)
    for row, y in (("top", 20.0), ("", 32.0), ("bottom", 44.0))
    for column, x in (("left", 20.0), ("", 32.0), ("right", 44.0))
}
_FACTORS, _GROUND, _CLUTTER, _NOISE, _ORDER = range(5)  # purposes of draws


@dataclass(frozen=True)
class Factors:
    """All that decides a scene but its noise. Lengths in pixels of a 64-pixel image, turns as steps of a table."""

    shape: str
    texture: str
    colour: str
    size: str
    position: str
    background: str
    x: float
    y: float
    radius: float
    turn: float  # -1..1 of the largest turn
    texture_turn: float  # 0..1 of a half circle
    phase: tuple[float, float]
    tone_jitter: tuple[float, ...]
    ground_jitter: tuple[float, ...]
    brightness: float

    @property
    def caption(self) -> str:
        article = "an" if self.size[0] in "aeiou" else "a"
        return (
            f"{article} {self.size} {self.colour} {self.texture} {self.shape} "
            f"at the {self.position} on {BACKGROUNDS[self.background].phrase}"
        )

    @property
    def attributes(self) -> dict[str, str]:
        families = ("shape", "texture", "colour", "size", "position", "background")
        return {family: getattr(self, family) for family in families} | {"ground": BACKGROUNDS[self.background].ground}


class ShapesWorld(World):
    """`clutter`: number of small stray specks that lie under the thing."""

    name: ClassVar[str] = "shapes"
    version: ClassVar[int] = 1

    def __init__(
        self, *, n: int = 2000, seed: int = 0, split: str = "train", image_px: int = 64, clutter: int = 0
    ) -> None:
        super().__init__(n=n, seed=seed, split=split, image_px=image_px)
        if not 0 <= clutter <= 64:
            raise ValueError(f"clutter must be in 0..64, got {clutter}.")
        self.clutter = clutter
        self.classes = tuple(f"{texture} {shape}" for shape in SILHOUETTES for texture in FILLS)
        self.groups = {
            shape: tuple(range(first * len(FILLS), (first + 1) * len(FILLS))) for first, shape in enumerate(SILHOUETTES)
        }
        families = {
            "shape": SILHOUETTES,
            "texture": FILLS,
            "colour": COLOURS,
            "size": SIZES,
            "position": POSITIONS,
            "background": BACKGROUNDS,
            "ground": ("land", "water"),
        }
        self.concepts = ("object", *(f"{family}:{value}" for family, values in families.items() for value in values))
        self.concepts += ("clutter",) if clutter else ()

    def label(self, i: int) -> int:
        block, place = divmod(self._check(i), len(self.classes))
        return _order(self._key, block, len(self.classes))[place]

    def record(self, i: int) -> ImageRecord:
        label = self.label(i)
        return ImageRecord(
            id=f"{self.name}-{self.seed}-{self.split}-{i:07d}",
            uri=f"{self.spec}#{i}",
            label=label,
            class_name=self.classes[label],
            caption=self.factors(i).caption,
            split=self.split,
        )

    def factors(self, i: int) -> Factors:
        """What will be drawn, without drawing it."""
        shape, texture = divmod(self.label(i), len(FILLS))
        draw = iter(Draws(self._key, i, _FACTORS).uniform(32))
        size, position = _pick(SIZES, next(draw)), _pick(POSITIONS, next(draw))
        x, y = POSITIONS[position]
        return Factors(
            shape=list(SILHOUETTES)[shape],
            texture=list(FILLS)[texture],
            colour=_pick(COLOURS, next(draw)),
            size=size,
            position=position,
            background=_pick(BACKGROUNDS, next(draw)),
            x=x + _spread(next(draw), 1.5),
            y=y + _spread(next(draw), 1.5),
            radius=SIZES[size] * (1.0 + _spread(next(draw), 0.05)),
            turn=_spread(next(draw), 1.0),
            texture_turn=next(draw),
            phase=(next(draw) * 18.0, next(draw) * 18.0),
            tone_jitter=tuple(_spread(next(draw), 14.0) for _ in range(3)),
            ground_jitter=tuple(_spread(next(draw), 12.0) for _ in range(3)),
            brightness=1.0 + _spread(next(draw), 0.15),
        )

    def scene(self, i: int) -> Scene:
        factors = self.factors(i)
        picture = self._ground(factors, i)
        strays = self._strays(picture, i) if self.clutter else None
        inside = self._thing(picture, factors)
        attributes = factors.attributes
        masks: dict[str, Bool[np.ndarray, "h w"]] = {"object": inside}
        ground = ~inside if strays is None else ~(inside | strays)
        for family, value in attributes.items():
            masks[f"{family}:{value}"] = ground if family in ("background", "ground") else inside
        if strays is not None:
            masks["clutter"] = strays & ~inside
        image = self._photograph(picture, factors, i)
        return Scene(image, self.label(i), factors.caption, attributes, masks)

    def _ground(self, factors: Factors, i: int) -> Picture:
        background = BACKGROUNDS[factors.background]
        field = background.field(Draws(self._key, i, _GROUND), self.image_px)
        picture = np.empty((3, *field.shape), dtype=np.float32)
        for channel, jitter in enumerate(factors.ground_jitter):
            dark, light = background.dark[channel], background.light[channel]
            picture[channel] = field * float(light - dark) + (dark + jitter)
        return picture

    def _thing(self, picture: Picture, factors: Factors) -> Bool[np.ndarray, "h w"]:
        """Paints the thing over the picture; returns its mask: pixels that it covers at least half."""
        scale = 64.0 / self.image_px
        x, y = _centres(self.image_px)
        u, v = _turned(x - factors.x, y - factors.y, *_TURNS[round((factors.turn + 1.0) * 32.0)])
        distance = SILHOUETTES[factors.shape](u * (1.0 / factors.radius), v * (1.0 / factors.radius))
        distance *= factors.radius / scale  # in pixels of this image
        covered = np.clip(0.5 - distance, 0.0, 1.0)
        across, down = _turned(u, v, *_HALF_CIRCLE[int(factors.texture_turn * 64.0)])
        second = FILLS[factors.texture](across + factors.phase[0], down + factors.phase[1])
        first_tone, second_tone = COLOURS[factors.colour]
        for channel, jitter in enumerate(factors.tone_jitter):
            first, other = first_tone[channel] + jitter, second_tone[channel] + jitter
            tone = second * float(other - first) + float(first)
            picture[channel] += covered * (tone - picture[channel])
        return distance <= 0.0

    def _strays(self, picture: Picture, i: int) -> Bool[np.ndarray, "h w"]:
        draws = Draws(self._key, i, _CLUTTER)
        x, y = _centres(self.image_px)
        mask = np.zeros(picture.shape[1:], dtype=bool)
        for _ in range(self.clutter):
            centre_x, centre_y, size, colour = draws.uniform(4)
            across, down = x - 64.0 * centre_x, y - 64.0 * centre_y
            inside = across * across + down * down <= (1.2 + 1.8 * size) ** 2
            tone, _ = COLOURS[_pick(COLOURS, colour)]
            picture[:, inside] = np.array(tone, dtype=np.float32)[:, None]
            mask |= inside
        return mask

    def _photograph(self, picture: Picture, factors: Factors, i: int) -> UInt8[np.ndarray, "h w 3"]:
        # The sum of two bytes is triangular noise: -8..8 grey levels, standard deviation 3.3.
        grain = Draws(self._key, i, _NOISE).bytes(2, *picture.shape).astype(np.float32)
        picture = picture * factors.brightness + (grain[0] + grain[1] - 255.0) * (1.0 / 32.0)
        return np.ascontiguousarray(np.rint(np.clip(picture, 0.0, 255.0)).astype(np.uint8).transpose(1, 2, 0))


def _pick(names: Iterable[str], share: float) -> str:
    listed = list(names)
    return listed[int(share * len(listed))]


def _spread(share: float, most: float) -> float:
    return (2.0 * share - 1.0) * most


def _cos_sin(degrees: float) -> tuple[float, float]:
    """Rounded to 1/4096: the last digits of cos and sin differ between platforms."""
    radians = math.radians(degrees)
    return round(math.cos(radians) * 4096) / 4096, round(math.sin(radians) * 4096) / 4096


_TURNS = [_cos_sin(15.0 * (step - 32) / 32) for step in range(65)]
_HALF_CIRCLE = [_cos_sin(180.0 * step / 64) for step in range(64)]


def _turned(
    u: Float[np.ndarray, "#h #w"], v: Float[np.ndarray, "#h #w"], cos: float, sin: float
) -> tuple[Plane, Plane]:
    return u * cos + v * sin, v * cos - u * sin


@cache
def _centres(image_px: int) -> tuple[Float[np.ndarray, "1 w"], Float[np.ndarray, "h 1"]]:
    """x and y of the pixel centres, in pixels of a 64-pixel image."""
    centres = ((np.arange(image_px) * 2 + 1) * (32.0 / image_px)).astype(np.float32)
    return centres[None, :], centres[:, None]


@lru_cache(maxsize=64)
def _order(key: tuple[int, int], block: int, n_classes: int) -> tuple[int, ...]:
    """The labels of one block of n_classes pictures: each class once."""
    draws = Draws(key, block, _ORDER).uniform(n_classes)
    return tuple(sorted(range(n_classes), key=draws.__getitem__))
