"""Draw the letters of fonts once, as bits: python scripts/letters.py > src/vitrail/images/worlds/letters.txt

A font library's pixels differ between its versions, so worlds read the table and never a font. Run it again only to add
a font: letters that move are another world.
"""

import string
import textwrap
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import PIL
from jaxtyping import Bool
from PIL import Image, ImageDraw, ImageFont

SIGNS = string.ascii_lowercase + string.digits + "-"
TTF = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
WIDTH = 110

Bits = Bool[np.ndarray, "h w"]


class Drawn(NamedTuple):
    """A font at a size. `capitals`: a to z are drawn as A to Z. `even`: every letter is as wide as the widest, with no
    column between two."""

    font: Callable[[], ImageFont.FreeTypeFont | ImageFont.ImageFont]
    capitals: bool = False
    even: bool = False


FONTS = {
    "aileron": Drawn(partial(ImageFont.load_default, 12)),
    "aileron-large": Drawn(partial(ImageFont.load_default, 15)),
    "aileron-capitals": Drawn(partial(ImageFont.load_default, 10), capitals=True),
    "dejavu-serif": Drawn(partial(ImageFont.truetype, TTF / "DejaVuSerif.ttf", 11)),
    "dejavu-mono": Drawn(partial(ImageFont.truetype, TTF / "DejaVuSansMono.ttf", 10), even=True),
}

HEAD = f"""
Letters of fonts as bits, from scripts/letters.py (Pillow {PIL.__version__}, matplotlib {matplotlib.__version__}).
aileron: Aileron Regular by Sora Sagano, as Pillow ships it; CC0 1.0, no rights reserved.
dejavu: DejaVu Serif and DejaVu Sans Mono, as matplotlib ships them; their notice:
"""


def main() -> None:
    print("\n".join(f"; {line}".rstrip() for line in [*HEAD.strip().splitlines(), *_notice()]))
    for name, drawn in FONTS.items():
        print(f"\nfont {name} gap {0 if drawn.even else 1}\n\n" + "\n\n".join(_blocks(_letters(drawn))))


def _notice() -> list[str]:
    return (TTF / "LICENSE_DEJAVU").read_text(encoding="utf-8").splitlines()


def _letters(drawn: Drawn) -> dict[str, Bits]:
    """Cut to the rows that any letter needs, and to the columns of the letter's own."""
    font = drawn.font()
    pages = {sign: _page(font, sign.upper() if drawn.capitals else sign) for sign in SIGNS}
    any_ink: Bits = np.max(list(pages.values()), axis=0)
    rows, widest = _extent(any_ink.T), _extent(any_ink)
    return {sign: page[rows, widest if drawn.even else _extent(page)] for sign, page in pages.items()}


def _page(font: ImageFont.FreeTypeFont | ImageFont.ImageFont, sign: str) -> Bits:
    page = Image.new("L", (48, 48))
    draw = ImageDraw.Draw(page)
    draw.fontmode = "1"  # pixels are ink or not: a threshold over grey breaks thin strokes
    draw.text((16, 8), sign, 255, font)
    return np.asarray(page) > 0


def _extent(ink: Bits) -> slice:
    """From the first column with ink to the last."""
    found = np.nonzero(ink)[1]
    return slice(int(found.min()), int(found.max()) + 1)


def _blocks(letters: dict[str, Bits]) -> list[str]:
    """As many letters side by side as a line takes, the names above."""
    names = textwrap.wrap(" ".join(sign.ljust(bits.shape[1], "_") for sign, bits in letters.items()), WIDTH)
    blocks, left = [], list(letters)
    for line in names:
        here, left = left[: len(line.split())], left[len(line.split()) :]
        rows = zip(*(_marks(letters[sign]) for sign in here), strict=True)
        heads = " ".join(sign.ljust(letters[sign].shape[1]) for sign in here).rstrip()
        blocks.append("\n".join([heads, *(" ".join(row) for row in rows)]))
    return blocks


def _marks(bits: Bits) -> list[str]:
    return ["".join("#" if bit else "." for bit in row) for row in bits]


if __name__ == "__main__":
    main()
