"""vitrail world"""

from collections.abc import Sequence
from pathlib import Path

import tyro

from vitrail.images import contact_sheet, open_images


def run(arguments: Sequence[str]) -> None:
    tyro.cli(world_verb, args=arguments, prog="vitrail world", config=(tyro.conf.PositionalRequiredArgs,))


def world_verb(world: tyro.conf.Positional[str] = "world:shapes", out: Path = Path("world.png"), n: int = 48) -> None:
    """Draw a contact sheet of a world's first pictures.

    Args:
        world: "world:shapes?seed=0&split=train"
        out: the PNG to write
    """
    source = open_images(world)
    contact_sheet(source, range(min(n, len(source)))).save(out)
    print(f"{source.spec}: {len(source):,} pictures, {len(source.classes)} classes; the first {n} are in {out}")
