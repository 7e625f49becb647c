"""What may be seen in a scene of the world "shapes", and what it is called."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from vitrail.images.worlds.backgrounds import BACKGROUNDS
from vitrail.images.worlds.draws import Draws, spread
from vitrail.images.worlds.fills import FILLS
from vitrail.images.worlds.silhouettes import SILHOUETTES

Spot = tuple[float, float]

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
# Both sides have as many round and angular shapes, as many of each kind of orientation, and all own colours evenly.
_LAND = {"circle", "heart", "star", "drop", "square", "hourglass"}
HOMES = {shape: "land" if shape in _LAND else "water" for shape in SILHOUETTES}
COPY_RADIUS = 5.0
_SPOTS = [(8.5 + 9.4 * column, 8.5 + 9.4 * row) for row in range(6) for column in range(6)]  # where copies may lie
COUNTS = ("one", "two", "three", "four")
# Orientations that can be told apart though every thing wanders by 15 degrees: name -> quarter turns, clockwise.
# A circle, ring, square or cross has none. A star turned by a quarter is a star turned by 18 degrees.
_FOUR = {"upright": 0, "right": 1, "upside down": 2, "left": 3}
_FLIPPED, _LYING = {"upright": 0, "upside down": 2}, {"upright": 0, "sideways": 1}
ORIENTATIONS: dict[str, dict[str, int]] = {
    "crescent": _FOUR,
    "drop": _FOUR,
    "heart": _FOUR,
    "arrow": _FOUR,
    "star": _FLIPPED,
    "triangle": _FLIPPED,
    "diamond": _LYING,
    "hourglass": _LYING,
}
CLASSES = tuple(f"{texture} {shape}" for shape in SILHOUETTES for texture in FILLS)


def own_colour(shape: str, texture: str) -> str:
    """The colour that `colour_bias` gives a class: each colour 6 of the 48 classes, siblings four different ones."""
    return list(COLOURS)[(list(SILHOUETTES).index(shape) + 2 * list(FILLS).index(texture)) % len(COLOURS)]


class Copy(NamedTuple):
    x: float
    y: float
    turn: float


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
    orientation: str | None = None
    copies: tuple[Copy, ...] = ()
    bar: tuple[float, float, float] | None = None  # share hidden, place of the bar 0..1, its turn 0..1
    word: str | None = None
    font: str | None = None
    word_x: int = 0
    word_y: int = 0
    word_scale: int = 1
    word_is_wrong: bool = False  # names another thing than the one that is there
    told: tuple[str, ...] = ()  # families that `attributes` tells
    look: str = ""  # "grey picture", "drawing", "pastel drawing", ...: how the caption begins

    @property
    def ground(self) -> str:
        return BACKGROUNDS[self.background].ground

    @property
    def home(self) -> str:
        """The ground that `background_bias` gives the shape: "land" or "water"."""
        return HOMES[self.shape]

    @property
    def group(self) -> str:
        """One of four, for worst-group accuracy: "land thing on water"."""
        return f"{self.home} thing on {self.ground}"

    @property
    def minority(self) -> bool:
        """Whether the ground is not the home: the groups that `background_bias` makes rare."""
        return self.home != self.ground

    @property
    def own_colour(self) -> str:
        return own_colour(self.shape, self.texture)

    @property
    def colour_minority(self) -> bool:
        """Whether the colour is not the class's own: what `colour_bias` makes rare."""
        return self.colour != self.own_colour

    @property
    def class_name(self) -> str:
        return f"{self.texture} {self.shape}"

    @property
    def caption(self) -> str:
        """All that is told: "a large red striped star at the top left on sand", and what the dials add."""
        turned = {None: "", "left": " turned left", "right": " turned right"}.get(
            self.orientation, f" {self.orientation}"
        )
        copies = ("", " with a small copy", " with two small copies", " with three small copies")[len(self.copies)]
        words = f"{self._thing}{turned} at the {self.position}{copies}"
        words += f" on {BACKGROUNDS[self.background].phrase}"
        words += ", behind a bar" if self.bar else ""
        words += f', with the word "{self.word}" written over it' if self.word else ""
        return f"a {self.look} of {words}" if self.look else words

    @property
    def short_caption(self) -> str:
        """Of the thing and the ground alone."""
        return f"{self._thing} at the {self.position} on {BACKGROUNDS[self.background].phrase}"

    @property
    def _thing(self) -> str:
        colour = f"{self.colour} " if "colour" in self.told else ""
        return f"a {self.size} {colour}{self.texture} {self.shape}"

    @property
    def attributes(self) -> dict[str, str]:
        """Family to value, for each family that is told and has one here."""
        known = {
            "shape": self.shape,
            "texture": self.texture,
            "colour": self.colour,
            "size": self.size,
            "position": self.position,
            "background": self.background,
            "ground": self.ground,
            "home": self.home,
            "class": self.class_name,
            "orientation": self.orientation,
            "count": COUNTS[len(self.copies)],
            "word": self.word,
            "font": self.font,
        }
        return {family: value for family in self.told if (value := known[family]) is not None}


def copies_beside(x: float, y: float, radius: float, most: int, draws: Draws) -> tuple[Copy, ...]:
    """Places for 0..most - 1 copies that touch neither the thing nor each other, in shuffled order of places."""
    n_copies = int(draws.uniform(1)[0] * most)
    order, wander = draws.uniform(len(_SPOTS)), draws.uniform(3 * (most - 1))
    # 1.25 radii is the farthest corner of any outline, 2 pixels are room for wandering.
    beside, apart = 1.25 * (radius + COPY_RADIUS) + 2.0, 1.25 * (COPY_RADIUS + COPY_RADIUS) + 2.0
    shuffled = [_SPOTS[spot] for spot in sorted(range(len(_SPOTS)), key=order.__getitem__)]
    free = [spot for spot in shuffled if _distance(spot, (x, y)) >= beside]
    # There is always room for three: the corners about a thing in the middle, the far side of any other.
    spots = _first_apart(free, n_copies, apart)
    assert spots is not None
    wandering = (wander[place : place + 3] for place in range(0, 3 * n_copies, 3))
    return tuple(
        Copy(x + spread(across, 1.0), y + spread(down, 1.0), spread(turn, 1.0))
        for (x, y), (across, down, turn) in zip(spots, wandering, strict=True)
    )


def _first_apart(spots: Sequence[Spot], n: int, apart: float) -> list[Spot] | None:
    """n of the spots that are `apart` from each other, the earliest that are; None if there are no such."""
    if n == 0:
        return []
    for place, spot in enumerate(spots):
        rest = _first_apart([later for later in spots[place + 1 :] if _distance(spot, later) >= apart], n - 1, apart)
        if rest is not None:
            return [spot, *rest]
    return None


def _distance(this: Spot, that: Spot) -> float:
    across, down = this[0] - that[0], this[1] - that[1]
    return math.sqrt(across * across + down * down)
