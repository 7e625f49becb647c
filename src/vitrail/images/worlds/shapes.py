"""The world "shapes": one thing per picture, a shape with a texture, lying on a ground.

    class = texture x shape ("striped star"): 4 x 12 = 48; the four textures of a shape are siblings
    attributes = shape, texture, colour (8), size (3), position (3 x 3), background (6), ground (land or water)

By default nothing is correlated with anything: every attribute is drawn on its own, and labels run through all classes
once in every 48 pictures, in an order drawn anew. A thing is turned by up to 15 degrees, its texture by any angle;
place, size, tones and brightness wander a little; pixels carry light noise.

Dials plant what a study wants to find. Each draws from a stream of its own: turning one changes nothing that another
decides, and only the scenes that it takes hold of.
"""

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np

from vitrail.images.base import ImageRecord
from vitrail.images.worlds import painting
from vitrail.images.worlds.backgrounds import BACKGROUNDS
from vitrail.images.worlds.base import Scene, World
from vitrail.images.worlds.draws import Draws, pick, spread
from vitrail.images.worlds.factors import (
    CLASSES,
    COLOURS,
    COUNTS,
    HOMES,
    ORIENTATIONS,
    POSITIONS,
    SIZES,
    Factors,
    copies_beside,
    own_colour,
)
from vitrail.images.worlds.fills import FILLS
from vitrail.images.worlds.lettering import OWN_FONTS, check_fonts, check_words, lettered
from vitrail.images.worlds.painting import Mask
from vitrail.images.worlds.silhouettes import SILHOUETTES

# Purposes of draws. New ones go to the end: the number is part of the stream.
_FACTORS, _GROUND, _CLUTTER, _NOISE, _ORDER = range(5)
_BACKGROUND_BIAS, _COLOUR_BIAS, _WORD, _LABEL_NOISE, _BAR, _COPIES, _ORIENTATION = range(5, 12)

STYLES, CAPTIONS = ("filled", "drawing"), ("full", "short")
# family of a vocabulary -> its words
_NAMES: dict[str, tuple[str, ...]] = {
    "shape": tuple(SILHOUETTES),
    "texture": tuple(FILLS),
    "class": CLASSES,
    "colour": tuple(COLOURS),
    "background": tuple(BACKGROUNDS),
}
_ANY = ("shape", "texture", "colour", "background")  # the families of the vocabulary "any"
_NAMES["any"] = tuple(name for family in _ANY for name in _NAMES[family])


class ShapesWorld(World):
    """Dials; each is off at its default. A share is a probability, drawn for each picture on its own.

    clutter: number of small stray specks that lie under the thing.
    background_bias: share of pictures whose ground (land or water) is made the home of their shape; the others draw it
        evenly. It is the correlation of home and ground: 0.9 puts 95 % at home, as in Waterbirds (Sagawa et al. 2020).
    colour_bias: share of pictures whose colour is made their class's own; it is Cramer's V of class and colour, but for
        what chance adds.
    words: share of pictures with a written word.
    wrong_words: share of those where it names another thing than the one that is there (a typographic attack).
    vocabulary: "shape", "texture", "class", "colour" or "background", whose names are written; "any": one of shape,
        texture, colour and background, drawn evenly for each word; or a list of words ("cat,dog"), drawn evenly.
    fonts: a list of fonts, drawn evenly: regular, bold, slanted; aileron, aileron-large, dejavu-serif, dejavu-mono (in
        lower case), aileron-capitals.
    word_scale: how many times as large letters are, 1 to 4; all words must fit.
    label_noise: share of labels that are another class, drawn evenly from the others.
    occlusion: share of the thing's pixels that a bar hides, in every picture.
    count: most things in a picture, 1 to 4: the thing and small copies of it, as many of each number.
    orientation: share of pictures whose thing is turned by quarters, evenly; the others are upright.
    palette: "plain", "pastel" or "grey". Grey pictures show no colour, and nothing is told of it.
    style: "filled" or "drawing" (lines on paper). Drawings show no colour either.
    captions: "full" tells of all that, "short" of the thing and the ground alone.
    """

    name: ClassVar[str] = "shapes"
    version: ClassVar[int] = 1
    always_named: ClassVar[tuple[str, ...]] = (*World.always_named, "clutter")

    def __init__(
        self,
        *,
        n: int = 2000,
        seed: int = 0,
        split: str = "train",
        image_px: int = 64,
        clutter: int = 0,
        background_bias: float = 0.0,
        colour_bias: float = 0.0,
        words: float = 0.0,
        wrong_words: float = 0.0,
        vocabulary: str = "shape",
        label_noise: float = 0.0,
        occlusion: float = 0.0,
        count: int = 1,
        orientation: float = 0.0,
        palette: str = "plain",
        style: str = "filled",
        captions: str = "full",
        fonts: str = ",".join(OWN_FONTS),
        word_scale: int = 1,
    ) -> None:
        super().__init__(n=n, seed=seed, split=split, image_px=image_px)
        if not 0 <= clutter <= 64:
            raise ValueError(f"clutter must be in 0..64, got {clutter}.")
        if not 1 <= count <= len(COUNTS):
            raise ValueError(f"count must be in 1..{len(COUNTS)}, got {count}.")
        self.clutter, self.count = clutter, count
        self.background_bias = _share("background_bias", background_bias)
        self.colour_bias = _share("colour_bias", colour_bias)
        self.words, self.wrong_words = _share("words", words), _share("wrong_words", wrong_words)
        self.label_noise = _share("label_noise", label_noise)
        self.occlusion, self.orientation = _share("occlusion", occlusion), _share("orientation", orientation)
        self.palette = _one_of("palette", palette, painting.PALETTES)
        self.style = _one_of("style", style, STYLES)
        self.captions = _one_of("captions", captions, CAPTIONS)
        self.vocabulary = vocabulary
        self.vocabulary_words = _NAMES.get(vocabulary) or tuple(vocabulary.split(","))
        if not 1 <= word_scale <= 4:
            raise ValueError(f"word_scale must be in 1..4, got {word_scale}.")
        self.fonts, self.word_scale = fonts, word_scale
        self.font_names = tuple(fonts.split(","))
        check_fonts(self.font_names)
        check_words(self.vocabulary_words, self.font_names, word_scale)
        if wrong_words and vocabulary not in _NAMES:
            raise ValueError(
                f"wrong_words needs a vocabulary that names what is there, one of {', '.join(_NAMES)}; of the words "
                f"{vocabulary!r} none is right or wrong."
            )
        if words and image_px < 64:
            raise ValueError(
                f"words are written in letters 7 pixels high: image_px must be 64 or more, got {image_px}."
            )
        self.classes = CLASSES
        self.groups = {
            shape: tuple(range(first * len(FILLS), (first + 1) * len(FILLS))) for first, shape in enumerate(SILHOUETTES)
        }
        self._look = {"plain": "", "pastel": "pastel ", "grey": "grey "}[palette]
        self._look += "drawing" if style == "drawing" else "picture" if self._look else ""
        always: dict[str, Iterable[str]] = {
            "shape": SILHOUETTES,
            "texture": FILLS,
            "colour": COLOURS,
            "size": SIZES,
            "position": POSITIONS,
            "background": BACKGROUNDS,
            "ground": ("land", "water"),
        }
        if palette == "grey" or style == "drawing":
            del always["colour"]
        dialled = self._dialled_families()
        self._told = (*always, *dialled)
        self.concepts = ("object", *(f"{family}:{value}" for family, values in always.items() for value in values))
        self.concepts += ("clutter",) if clutter else ()
        self.concepts += tuple(f"{family}:{value}" for family, values in dialled.items() for value in values)
        self.concepts += ("written",) if words else ()
        self.concepts += ("occluder",) if occlusion else ()

    def _dialled_families(self) -> dict[str, tuple[str, ...]]:
        """The families that only dials bring, in the order of `concepts`."""
        orientations = dict.fromkeys(name for names in ORIENTATIONS.values() for name in names)
        families: dict[str, tuple[bool, tuple[str, ...]]] = {
            "home": (self.background_bias > 0, ("land", "water")),
            "class": (self.label_noise > 0, CLASSES),
            "orientation": (self.orientation > 0, tuple(orientations)),
            "count": (self.count > 1, COUNTS[: self.count]),
            "word": (self.words > 0, self.vocabulary_words),
            "font": (self.words > 0, self.font_names),
        }
        return {family: values for family, (dialled, values) in families.items() if dialled}

    def true_label(self, i: int) -> int:
        """The class of the thing that is there."""
        block, place = divmod(self._check(i), len(self.classes))
        return _order(self._key, block, len(self.classes))[place]

    def label(self, i: int) -> int:
        """The class that the picture is said to be of: `true_label` but for `label_noise`."""
        label = self.true_label(i)
        if self.label_noise:
            noisy, other = Draws(self._key, i, _LABEL_NOISE).uniform(2)
            if noisy < self.label_noise:
                return (label + 1 + int(other * (len(self.classes) - 1))) % len(self.classes)
        return label

    def record(self, i: int) -> ImageRecord:
        label = self.label(i)
        return ImageRecord(
            id=f"{self.name}-{self.seed}-{self.split}-{i:07d}",
            uri=f"{self.spec}#{i}",
            label=label,
            class_name=self.classes[label],
            caption=self._caption(self.factors(i)),
            split=self.split,
        )

    def factors(self, i: int) -> Factors:
        """What will be drawn, without drawing it."""
        shape, texture = divmod(self.true_label(i), len(FILLS))
        draw = iter(Draws(self._key, i, _FACTORS).uniform(32))
        size, position = pick(SIZES, next(draw)), pick(POSITIONS, next(draw))
        x, y = POSITIONS[position]
        values: dict[str, Any] = {
            "shape": list(SILHOUETTES)[shape],
            "texture": list(FILLS)[texture],
            "colour": pick(COLOURS, next(draw)),
            "size": size,
            "position": position,
            "background": pick(BACKGROUNDS, next(draw)),
            "x": x + spread(next(draw), 1.5),
            "y": y + spread(next(draw), 1.5),
            "radius": SIZES[size] * (1.0 + spread(next(draw), 0.05)),
            "turn": spread(next(draw), 1.0),
            "texture_turn": next(draw),
            "phase": (next(draw) * 18.0, next(draw) * 18.0),
            "tone_jitter": tuple(spread(next(draw), 14.0) for _ in range(3)),
            "ground_jitter": tuple(spread(next(draw), 12.0) for _ in range(3)),
            "brightness": 1.0 + spread(next(draw), 0.15),
            "told": self._told,
            "look": self._look,
        }
        self._dial(values, i)
        return Factors(**values)

    def _dial(self, values: dict[str, Any], i: int) -> None:
        """What the dials make of `values`."""
        shape = values["shape"]
        if self.background_bias:
            sent_home, which = Draws(self._key, i, _BACKGROUND_BIAS).uniform(2)
            if sent_home < self.background_bias and BACKGROUNDS[values["background"]].ground != HOMES[shape]:
                values["background"] = pick(_AT_HOME[HOMES[shape]], which)
        if self.colour_bias and Draws(self._key, i, _COLOUR_BIAS).uniform(1)[0] < self.colour_bias:
            values["colour"] = own_colour(shape, values["texture"])
        if self.orientation and shape in ORIENTATIONS:
            turned, which = Draws(self._key, i, _ORIENTATION).uniform(2)
            values["orientation"] = pick(ORIENTATIONS[shape], which if turned < self.orientation else 0.0)
        if self.occlusion:
            values["bar"] = (self.occlusion, *Draws(self._key, i, _BAR).uniform(2))
        if self.count > 1:
            thing = values["x"], values["y"], values["radius"]
            values["copies"] = copies_beside(*thing, self.count, Draws(self._key, i, _COPIES))
        if self.words:
            written, wrong, *rest = Draws(self._key, i, _WORD).uniform(7)
            if written < self.words:
                values |= self._word(values, wrong < self.wrong_words, *rest)

    def _word(
        self, values: dict[str, Any], wrong: bool, which: float, font: float, across: float, down: float, family: float
    ) -> dict[str, Any]:
        """A word, its font and a place anywhere in the picture."""
        vocabulary, words = self.vocabulary, self.vocabulary_words
        if vocabulary == "any":
            vocabulary = pick(_ANY, family)
            words = _NAMES[vocabulary]
        if vocabulary in _NAMES:
            right = f"{values['texture']} {values['shape']}" if vocabulary == "class" else values[vocabulary]
            words = tuple(word for word in words if word != right) if wrong else (right,)
        word, face = pick(words, which), pick(self.font_names, font)
        height, width = lettered(word, face, self.word_scale).shape
        return {
            "word": word,
            "font": face,
            "word_x": int(across * (65 - width)),
            "word_y": int(down * (65 - height)),
            "word_scale": self.word_scale,
            "word_is_wrong": wrong,
        }

    def _caption(self, factors: Factors) -> str:
        return factors.caption if self.captions == "full" else factors.short_caption

    def scene(self, i: int) -> Scene:
        factors, drawing = self.factors(i), self.style == "drawing"
        picture = painting.ground(factors, Draws(self._key, i, _GROUND), self.image_px, drawing)
        strays = None
        if self.clutter:
            strays = painting.specks(picture, Draws(self._key, i, _CLUTTER), self.clutter, drawing)
        copies = [painting.thing(picture, factors, drawing, copy) for copy in factors.copies]
        thing = painting.thing(picture, factors, drawing)
        over: dict[str, Mask] = {}
        if factors.bar is not None:
            over["occluder"] = painting.bar(picture, factors, thing, drawing)
        if factors.word is not None:
            over["written"] = painting.letters(picture, factors)
        image = painting.photograph(picture, factors.brightness, Draws(self._key, i, _NOISE), self.palette)
        attributes, masks = factors.attributes, _masks(factors, strays, thing, copies, over)
        return Scene(image, self.label(i), self._caption(factors), attributes, masks)


def _masks(
    factors: Factors, strays: Mask | None, thing: Mask, copies: Sequence[Mask], over: dict[str, Mask]
) -> dict[str, Mask]:
    """What is seen of each concept, given what each layer covers; `over` holds those in front, the foremost last."""
    things = np.logical_or.reduce([thing, *copies]) if copies else thing
    front: dict[str, Mask] = {}
    left = None  # where nothing in front lies; None is everywhere
    for layer, mask in reversed(over.items()):
        front[layer] = mask if left is None else mask & left
        left = ~mask if left is None else left & ~mask
    if left is not None:
        things = things & left
        thing = thing & left if copies else things
    left = ~things if left is None else left & ~things
    ground = left if strays is None else left & ~strays
    place = {"background": ground, "ground": ground, "size": thing, "position": thing}
    if "written" in front:
        place |= {"word": front["written"], "font": front["written"]}
    masks = {"object": things}
    masks |= {f"{family}:{value}": place.get(family, things) for family, value in factors.attributes.items()}
    if strays is not None:
        masks["clutter"] = strays & left
    masks |= front
    if not over:
        return masks
    seen = {id(mask): bool(mask.any()) for mask in {id(mask): mask for mask in masks.values()}.values()}
    return {concept: mask for concept, mask in masks.items() if seen[id(mask)]}  # not what is hidden altogether


_AT_HOME = {
    home: tuple(name for name, background in BACKGROUNDS.items() if background.ground == home)
    for home in ("land", "water")
}


def _share(option: str, value: float) -> float:
    if not 0 <= value <= 1:
        raise ValueError(f"{option} must be in 0..1, got {value}.")
    return float(value)


def _one_of(option: str, value: str, known: Iterable[str]) -> str:
    if value not in known:
        raise ValueError(f"{option} must be one of {', '.join(known)}, got {value!r}.")
    return value


@lru_cache(maxsize=64)
def _order(key: tuple[int, int], block: int, n_classes: int) -> tuple[int, ...]:
    """The labels of one block of n_classes pictures: each class once."""
    draws = Draws(key, block, _ORDER).uniform(n_classes)
    return tuple(sorted(range(n_classes), key=draws.__getitem__))
