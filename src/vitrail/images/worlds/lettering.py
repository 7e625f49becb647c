"""Words as pixels, from a table of letters of our own: a font library's pixels differ between its versions.

Three fonts: "regular" is the table, "bold" has strokes twice as wide, "slanted" leans to the right. All is in capitals,
the words of a name one below the other.
"""

from functools import cache

import numpy as np
from jaxtyping import Bool

FONTS = ("regular", "bold", "slanted")
MOST_WORD_PX = 62  # widest line that a 64-pixel picture takes

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


def _letters() -> dict[str, Bool[np.ndarray, "7 w"]]:
    letters = {}
    for block in _TABLE.strip().split("\n\n"):
        names, *rows = (line.split() for line in block.splitlines())
        for place, name in enumerate(names):
            letters[name.lower()] = np.array([[mark == "#" for mark in row[place]] for row in rows])
    return letters


LETTERS = _letters()


@cache
def lettered(text: str, font: str) -> Bool[np.ndarray, "h w"]:
    """The pixels of `text`, a word to a line, one pixel between letters (slanted: two). Read-only."""
    lines = [_line(word, font) for word in text.split(" ")]
    height, width = len(lines) * (_ROWS + _LEADING) - _LEADING, max(line.shape[1] for line in lines)
    pixels = np.zeros((height, width), dtype=bool)
    for place, line in enumerate(lines):
        top, left = place * (_ROWS + _LEADING), (width - line.shape[1]) // 2
        pixels[top : top + _ROWS, left : left + line.shape[1]] = line
    pixels.flags.writeable = False
    return pixels


def _line(word: str, font: str) -> Bool[np.ndarray, "7 w"]:
    gap = np.zeros((_ROWS, 2 if font == "slanted" else 1), dtype=bool)
    columns: list[np.ndarray] = []
    for letter in word:
        strokes = LETTERS[letter]
        if font == "bold":
            strokes = np.hstack([strokes, gap]) | np.hstack([gap, strokes])
        columns += [strokes, gap]
    line = np.hstack(columns[:-1])
    if font != "slanted":
        return line
    leaning = np.zeros((_ROWS, line.shape[1] + 2), dtype=bool)
    for row in range(_ROWS):
        shift = (_ROWS - 1 - row) // 3
        leaning[row, shift : shift + line.shape[1]] = line[row]
    return leaning


def check_words(words: tuple[str, ...]) -> None:
    """Raises ValueError for what cannot be written."""
    if len(set(words)) < len(words):
        raise ValueError(f"every word of a vocabulary must be another, got {', '.join(words)}.")
    for word in words:
        lines = word.split(" ")
        if not all(lines) or len(lines) > 3 or not set(word) <= {*LETTERS, " "}:
            raise ValueError(f"words are made of a to z, 0 to 9 and hyphens, at most three to a name, got {word!r}.")
        width = max(lettered(word, font).shape[1] for font in FONTS)
        if width > MOST_WORD_PX:
            raise ValueError(f"a written word may be {MOST_WORD_PX} pixels wide in bold letters; {word!r} is {width}.")
