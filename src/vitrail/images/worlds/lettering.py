"""Words as pixels, from tables of letters: a font library's pixels differ between its versions.

Three fonts are our own, in capitals: "regular" is the table below, "bold" has strokes twice as wide, "slanted" leans to
the right. The others are letters of common fonts, drawn once (letters.txt, by scripts/letters.py): "aileron" and
"aileron-large" in lower case, "aileron-capitals", and "dejavu-serif" and "dejavu-mono" in lower case. The words of a
name stand one below the other.
"""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool

OWN_FONTS = ("regular", "bold", "slanted")
FONTS = (*OWN_FONTS, "aileron", "aileron-large", "aileron-capitals", "dejavu-serif", "dejavu-mono")
MOST_WORD_PX = 62  # widest and highest that a 64-pixel picture takes
MOST_WORDS = 3  # of a name

_ROWS, _LEADING = 7, 2
_TABLE = """
A     B     C     D     E     F     G     H     I    J     K     L
.##.  ###.  .##.  ###.  ####  ####  .##.  #..#  ###  ..##  #..#  #...
#..#  #..#  #..#  #..#  #...  #...  #..#  #..#  .#.  ...#  #..#  #...
#..#  #..#  #...  #..#  #...  #...  #...  #..#  .#.  ...#  #.#.  #...
####  ###.  #...  #..#  ###.  ###.  #.##  ####  .#.  ...#  ##..  #...
#..#  #..#  #...  #..#  #...  #...  #..#  #..#  .#.  ...#  #.#.  #...
#..#  #..#  #..#  #..#  #...  #...  #..#  #..#  .#.  #..#  #..#  #...
#..#  ###.  .##.  ###.  ####  #...  .###  #..#  ###  .##.  #..#  ####

M      N     O     P     Q     R     S     T      U     V      W      X
#...#  #..#  .##.  ###.  .##.  ###.  .###  #####  #..#  #...#  #...#  #..#
##.##  ##.#  #..#  #..#  #..#  #..#  #...  ..#..  #..#  #...#  #...#  #..#
#.#.#  ##.#  #..#  #..#  #..#  #..#  #...  ..#..  #..#  #...#  #...#  .##.
#.#.#  #.##  #..#  ###.  #..#  ###.  .##.  ..#..  #..#  #...#  #.#.#  .##.
#...#  #.##  #..#  #...  #..#  #.#.  ...#  ..#..  #..#  .#.#.  #.#.#  .##.
#...#  #..#  #..#  #...  #.#.  #.#.  ...#  ..#..  #..#  .#.#.  ##.##  #..#
#...#  #..#  .##.  #...  .#.#  #..#  ###.  ..#..  .##.  ..#..  #...#  #..#

Y      Z     0     1    2     3     4     5     6     7     8     9     -
#...#  ####  .##.  .#.  .##.  ###.  #..#  ####  .##.  ####  .##.  .##.  ...
#...#  ...#  #..#  ##.  #..#  ...#  #..#  #...  #...  ...#  #..#  #..#  ...
.#.#.  ..#.  #.##  .#.  ...#  ...#  #..#  ###.  #...  ..#.  #..#  #..#  ...
..#..  .##.  #.##  .#.  ..#.  .##.  ####  ...#  ###.  ..#.  .##.  .###  ###
..#..  .#..  ##.#  .#.  .#..  ...#  ...#  ...#  #..#  .#..  #..#  ...#  ...
..#..  #...  #..#  .#.  #...  ...#  ...#  #..#  #..#  .#..  #..#  ...#  ...
..#..  ####  .##.  ###  ####  ###.  ...#  .##.  .##.  .#..  .##.  .##.  ...
"""


Bits = Bool[np.ndarray, "rows w"]


class Font(NamedTuple):
    letters: dict[str, Bits]  # all as high
    gap: int  # columns between two letters

    @property
    def rows(self) -> int:
        return next(iter(self.letters.values())).shape[0]


def _letters(blocks: Sequence[str]) -> dict[str, Bits]:
    letters = {}
    for block in blocks:
        names, *rows = (line.split() for line in block.splitlines())
        for place, name in enumerate(names):
            letters[name.lower()] = np.array([[mark == "#" for mark in row[place]] for row in rows])
    return letters


LETTERS = _letters(_TABLE.strip().split("\n\n"))


@cache
def _drawn_fonts() -> dict[str, Font]:
    """The fonts of letters.txt. Lines that begin with ; are remarks; "font NAME gap N" begins a font."""
    text = Path(__file__).with_name("letters.txt").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if not line.startswith(";")]
    fonts = {}
    for section in "\n".join(lines).split("\nfont ")[1:]:
        head, *blocks = section.strip().split("\n\n")
        name, _, gap = head.split()
        fonts[name] = Font(_letters(blocks), int(gap))
    return fonts


@cache
def _font(name: str) -> Font:
    if name not in OWN_FONTS:
        return _drawn_fonts()[name]
    if name != "bold":
        return Font(LETTERS, 2 if name == "slanted" else 1)
    beside = np.zeros((_ROWS, 1), dtype=bool)
    return Font({sign: np.hstack([bits, beside]) | np.hstack([beside, bits]) for sign, bits in LETTERS.items()}, 1)


@cache
def lettered(text: str, font: str, scale: int = 1) -> Bits:
    """The pixels of `text`, a word to a line, each pixel `scale` wide and high. Read-only."""
    rows = _font(font).rows
    lines = [_line(word, font) for word in text.split(" ")]
    height, width = len(lines) * (rows + _LEADING) - _LEADING, max(line.shape[1] for line in lines)
    pixels = np.zeros((height, width), dtype=bool)
    for place, line in enumerate(lines):
        top, left = place * (rows + _LEADING), (width - line.shape[1]) // 2
        pixels[top : top + rows, left : left + line.shape[1]] = line
    pixels = pixels.repeat(scale, axis=0).repeat(scale, axis=1)
    pixels.flags.writeable = False
    return pixels


def _line(word: str, font: str) -> Bits:
    letters, gap = _font(font)
    columns: list[np.ndarray] = []
    for letter in word:
        columns += [letters[letter], np.zeros((len(letters[letter]), gap), dtype=bool)]
    line = np.hstack(columns[:-1])
    if font != "slanted":
        return line
    leaning = np.zeros((_ROWS, line.shape[1] + 2), dtype=bool)
    for row in range(_ROWS):
        shift = (_ROWS - 1 - row) // 3
        leaning[row, shift : shift + line.shape[1]] = line[row]
    return leaning


def check_fonts(fonts: tuple[str, ...]) -> None:
    """Raises ValueError for a font that there is not, or twice."""
    for font in fonts:
        if font not in FONTS:
            raise ValueError(f"there is no font {font!r}. Known: {', '.join(FONTS)}; several with commas between.")
    if len(set(fonts)) < len(fonts):
        raise ValueError(f"every font must be another, got {', '.join(fonts)}.")


def check_words(words: tuple[str, ...], fonts: tuple[str, ...] = OWN_FONTS, scale: int = 1) -> None:
    """Raises ValueError for what cannot be written in each of `fonts`."""
    if len(set(words)) < len(words):
        raise ValueError(f"every word of a vocabulary must be another, got {', '.join(words)}.")
    for word in words:
        lines = word.split(" ")
        if not all(lines) or len(lines) > MOST_WORDS or not set(word) <= {*LETTERS, " "}:
            raise ValueError(f"words are made of a to z, 0 to 9 and hyphens, at most three to a name, got {word!r}.")
        for font in fonts:
            height, width = lettered(word, font, scale).shape
            if max(height, width) > MOST_WORD_PX:
                at = f" at word_scale={scale}" if scale > 1 else ""
                raise ValueError(
                    f"a written word may be {MOST_WORD_PX} pixels wide and high; in {font} letters{at} {word!r} is "
                    f"{width} wide and {height} high."
                )
