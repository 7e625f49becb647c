"""vitrail attack"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from vitrail.concepts.vocabulary import read_words
from vitrail.images import contact_sheet, open_images
from vitrail.images.attacked import BANDS, BUILT_IN, COLOURS, Attack, AttackedImages, save_attacked


def run(arguments: Sequence[str]) -> None:
    tyro.cli(attack_verb, args=arguments, prog="vitrail attack")


def attack_verb(
    images: Annotated[str, tyro.conf.Positional],
    out: Path,
    words: str | None = None,
    fonts: tuple[str, ...] = (BUILT_IN,),
    sizes: tuple[int, int] = (20, 40),
    places: tuple[str, ...] = BANDS,
    colours: tuple[str, ...] = tuple(COLOURS),
    outline: float = 0.5,
    share: float = 1.0,
    seed: int = 0,
    split: str | None = None,
    sheet: bool = False,
) -> None:
    """A wrong word written on each picture: the pictures, and a table of what was written where.

    Args:
        images: any collection of pictures
        out: a folder: pictures/*.png and attack.csv, which opens as a collection with the true labels
        words: a file with a word a line (default: the names of the collection's classes)
        fonts: built-in, fonts of bits (regular, bold, dejavu-serif...), or TrueType files
        sizes: smallest and largest line, in pixels of a picture whose shorter side is 224
        places: of top, middle, bottom
        colours: of the eight
        outline: share of the words with an outline
        share: share of the pictures that are written on
        sheet: also sheet.png, the first pictures on one
    """
    source = open_images(images, split=split)
    listed = source.classes if words is None else read_words(words)
    if not listed:
        raise ValueError(f"{images} has no classes whose names could be written: give --words.")
    attack = Attack(tuple(listed), fonts, sizes, places, colours, outline, share, seed)
    attacked = AttackedImages(source, attack)
    rows = save_attacked(attacked, out)
    n = sum("word" in row for row in rows)
    print(f"{out / 'attack.csv'}: a word on {n} of {len(rows)} pictures, of {len(listed)} words in {len(fonts)} fonts")
    if sheet:
        contact_sheet(attacked, list(range(min(32, len(attacked))))).save(out / "sheet.png")
        print(out / "sheet.png")
