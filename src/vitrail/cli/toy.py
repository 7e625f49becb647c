"""vitrail toy list | train | measure | get"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import tyro

from vitrail.backbones import load
from vitrail.backbones.toy import ToyViT
from vitrail.backbones.toy_clip import ToyCLIP
from vitrail.backbones.toys import WEIGHTS
from vitrail.progress import Terminal
from vitrail.toys import TOYS, measured, toy_recipe, train_toy
from vitrail.toys.fetch import REPOSITORY, get_toy


def run(arguments: Sequence[str]) -> None:
    tyro.extras.subcommand_cli_from_dict(
        {"list": list_verb, "train": train_verb, "measure": measure_verb, "get": get_verb},
        args=arguments,
        prog="vitrail toy",
        description="The project's own small models (docs/toys.md).",
        config=(tyro.conf.PositionalRequiredArgs,),
    )


def list_verb() -> None:
    """Every toy, and whether its weights are in the package."""
    width = max(map(len, TOYS))
    for name, recipe in TOYS.items():
        shipped = "in the package" if (WEIGHTS / f"{name}.safetensors").is_file() else "toy get, toy train"
        print(f"{name:<{width}}  {shipped:<18}  {recipe.about}")


def train_verb(name: str, out: Path = Path("toys")) -> None:
    """Train a toy by its recipe and write NAME.safetensors and NAME.json. Killed and run again, it goes on.

    Args:
        name: one of `vitrail toy list`
        out: the folder to write to
    """
    told = train_toy(name, out, progress=Terminal())
    _say(told["held_out"])
    for kept in told.get("steps", []):
        print(f"  after {kept['step']:>6,} steps: {_share(kept['top1'])}")
    print(f"{out / name}.safetensors")


def measure_verb(name: str, weights: Path | None = None, n: int = 4800, seed: int = 1) -> None:
    """Measure a toy's accuracy on pictures that nobody used: of the test split, of a seed of your own.

    Args:
        name: one of `vitrail toy list`
        weights: a safetensors file with its JSON beside it, instead of the package's
        n: how many pictures
        seed: of the world; 0 is what the toy's own JSON was measured on
    """
    recipe, module = toy_recipe(name), load(f"toy/{name}", weights=weights).module
    assert isinstance(module, ToyViT | ToyCLIP)
    _say(measured(module, recipe, Terminal(), n=n, seed=seed))


def get_verb(name: str, source: str = REPOSITORY, cache: Path | None = None) -> None:
    """Fetch a toy that is not in the package, and print where its weights are.

    Args:
        name: one of `vitrail toy list`
        source: hub:OWNER/NAME[@REVISION][/SUBFOLDER] or file:FOLDER
        cache: instead of huggingface_hub's own
    """
    path = get_toy(name, source=source, cache=cache)
    print(f'{path}\nload("toy/{name}", weights="{path}")')


def _say(found: dict[str, Any]) -> None:
    for line in told(found):
        print(line)


def told(found: dict[str, Any]) -> Iterator[str]:
    """A line for each accuracy, under the world it was measured on."""
    if "top1" in found:
        yield found["source"]
        yield f"  top-1 {_share(found['top1'])}"
        return
    for name, one in found.items():
        yield f"{name}: {one['source']}"
        yield from (f"  {what:<14}{_share(share)}" for what, share in one.items() if what != "source")


def _share(found: dict[str, Any]) -> str:
    return f"{found['accuracy']:.1%} ({found['low']:.1%} to {found['high']:.1%}, n = {found['n']:,})"
