"""vitrail world list | show | make"""

import inspect
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from vitrail.images import WORLDS, World, contact_sheet, open_images, open_world
from vitrail.images.worlds.export import write_world
from vitrail.images.worlds.named import NAMED
from vitrail.progress import Terminal

WIDTH = 120
# options of several worlds, whose docstrings do not say them again
COMMON = {
    "n": "how many pictures; in a world of clips, how many clips.",
    "n_frames": "pictures of a clip.",
    "seed": "another seed draws other pictures.",
    "split": "train, val or test, which share no picture.",
    "image_px": "side of the pictures, 16 to 1024; they show the same thing at any size.",
}


def run(arguments: Sequence[str]) -> None:
    """ "vitrail world" lists; "vitrail world SPEC ..." shows."""
    verbs = {"list": list_verb, "show": show_verb, "make": make_verb}
    arguments = list(arguments) or ["list"]
    if arguments[0] not in (*verbs, "-h", "--help"):
        arguments = ["show", *arguments]
    tyro.extras.subcommand_cli_from_dict(
        verbs,
        args=arguments,
        prog="vitrail world",
        description="Pictures of which everything is known.",
    )


def list_verb() -> None:
    """The worlds, what they are for, and every option with its default."""
    lines = ["worlds with a name (world:NAME; options that you add go over theirs)", ""]
    for name, named in NAMED.items():
        lines += [f"  {name:<20}{_wrapped(named.purpose, 22)}", f"{'':<22}world:{named.spec}"]
    for name, world in WORLDS.items():
        lines += ["", f"world:{name}?OPTION=VALUE&OPTION=VALUE", ""]
        told = _told(world)
        for option, parameter in inspect.signature(world).parameters.items():
            default = f"{option}={parameter.default}"
            meaning = _wrapped(told.get(option, ""), 29)
            lines.append(f"  {default:<26} {meaning}".rstrip())
    print("\n".join(lines))


def show_verb(
    world: tyro.conf.Positional[str] = "world:shapes",
    out: Path = Path("world.png"),
    n: Annotated[int, tyro.conf.arg(aliases=["-n"])] = 48,
) -> None:
    """Draw a contact sheet of a world's first pictures.

    Args:
        world: "world:shapes?seed=0&split=train"
        out: the PNG to write
        n: how many pictures
    """
    source = open_images(world)
    n = min(n, len(source))
    contact_sheet(source, range(n)).save(out)
    print(f"{source.spec}: {len(source):,} pictures, {len(source.classes)} classes; the first {n} are in {out}")


def make_verb(world: tyro.conf.Positional[str], out: Path) -> None:
    """Write a world as a folder of pictures with masks, attributes and captions. Run again, it goes on where it was.

    Args:
        world: "world:waterbirds?n=500&split=test"
        out: the folder: SPLIT/CLASS/ID.png, images.csv, truth.jsonl, masks, world.json
    """
    opened = open_world(world)
    write_world(opened, out, Terminal())
    print(f"{out}: {len(opened):,} pictures of {opened.spec}; {out / 'images.csv'} opens them in their order")


def _told(world: type[World]) -> dict[str, str]:
    """What the world's docstring says of each option: paragraphs that begin with its name and a colon."""
    told = dict(COMMON)
    for documented in reversed(world.__mro__):
        for entry in re.split(r"\n(?=\S)", inspect.cleandoc(documented.__doc__ or "")):
            names, colon, meaning = entry.partition(": ")
            if colon and re.fullmatch(r"\w+(, \w+)*", names):
                told |= dict.fromkeys(names.split(", "), " ".join(meaning.split("\n\n")[0].split()))
    return told


def _wrapped(words: str, indent: int) -> str:
    lines = [""]
    for word in words.split():
        if len(lines[-1]) + len(word) + 1 > WIDTH - indent:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return ("\n" + " " * indent).join(lines)
