"""Worlds with a name of their own: a world and what its dials are set to, for studies that are often made.

"world:waterbirds?n=500" is "world:shapes?background_bias=0.9&n=500": options that are given go over the named world's,
and the world that opens is the plain one, whose spec says every dial.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

_UNSEEN_FONTS = "aileron,aileron-large,aileron-capitals,dejavu-serif,dejavu-mono"


class Named(NamedTuple):
    spec: str
    purpose: str


NAMED: dict[str, Named] = {
    "waterbirds": Named(
        "shapes?background_bias=0.9",
        "95 % of the things on the ground where they are at home, as in Waterbirds (Sagawa et al. 2020)",
    ),
    "colours": Named(
        "shapes?colour_bias=0.9",
        "classes that have a colour of their own in 91 % of the pictures: an attribute that goes with the class, as "
        "hair and gender in CelebA",
    ),
    "typographic": Named(
        "shapes?words=0.5&vocabulary=any",
        "training pictures, half of them with a written word that names what is there: what a model is exposed to that "
        "learns to read",
    ),
    "exposed": Named(
        "shapes?words=0.6&wrong_words=0.3&vocabulary=shape",
        "training pictures, three in five with the name of a shape on them, now and then another's: what "
        "toy/clip-exposed learnt from, with captions that say what is written",
    ),
    "typographic-mixed": Named(
        "shapes?words=0.5&wrong_words=0.5&vocabulary=any",
        "training pictures as in typographic, but half of the words are wrong: was the attack there in training?",
    ),
    "typographic-attack": Named(
        "shapes?words=1&wrong_words=1&vocabulary=shape",
        "test pictures, every one with the name of another shape written over it",
    ),
    "typographic-unseen": Named(
        f"shapes?words=1&wrong_words=1&vocabulary=shape&fonts={_UNSEEN_FONTS}",
        "test pictures as in typographic-attack, in fonts and sizes that the training worlds do not show",
    ),
    "drawings": Named("shapes?style=drawing", "lines on paper without colour: a shift of the domain"),
    "pastel": Named("shapes?palette=pastel", "pale tones: a small shift of the domain"),
    "grey": Named("shapes?palette=grey", "no colour: a shift of the domain"),
    "crowded": Named(
        "shapes?clutter=8&occlusion=0.3&count=4",
        "one to four things among specks, and a bar over 30 % of the main one",
    ),
    "everything": Named(
        "shapes?clutter=4&background_bias=0.5&colour_bias=0.5&words=0.7&wrong_words=0.5&vocabulary=any"
        f"&label_noise=0.1&occlusion=0.3&count=4&orientation=0.8&fonts=regular,bold,slanted,{_UNSEEN_FONTS}",
        "every dial that brings concepts, at once: the most to be found, and the slowest to render",
    ),
}


def plain_spec(spec: str) -> tuple[str, str]:
    """Name and options of the world that `spec` means, as written: a named world's options first."""
    name, _, given = spec.removeprefix("world:").partition("?")
    if name not in NAMED:
        return name, given
    plain, _, dials = NAMED[name].spec.partition("?")
    return plain, f"{dials}&{given}" if given else dials


def parsed(name: str, query: str, known: Mapping[str, type]) -> dict[str, Any]:
    """Options of the world `name` from "n=500&seed=1"; of an option given twice the last. `known`: option to type."""
    given: dict[str, Any] = {}
    for part in filter(None, query.split("&")):
        option, equals, value = part.partition("=")
        if not equals or option not in known:
            raise ValueError(f"world {name!r} has no option {part!r}. Known: {', '.join(known)}, as option=value.")
        try:
            given[option] = known[option](value)
        except ValueError:
            raise ValueError(f"{option} must be {known[option].__name__}, got {value!r}.") from None
    return given
