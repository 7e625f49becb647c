"""Fetch a toy that does not ship with the package: its weights, its JSON and, where it has some, its kept steps.

What is fetched is data. It is taken only if its digest is the one that its JSON says.
"""

from pathlib import Path
from typing import Any

from vitrail.backbones.toys import WEIGHTS
from vitrail.files import read_json, read_tensors, tensors_digest
from vitrail.hub import download_folder
from vitrail.toys.recipes import toy_recipe

REPOSITORY = "hub:vitrail/toys"


def get_toy(name: str, *, source: str = REPOSITORY, cache: Path | None = None) -> Path:
    """The path of NAME.safetensors, with NAME.json beside it: the package's own, or from `source`.

    `source`: hub:OWNER/NAME[@REVISION][/SUBFOLDER] or file:FOLDER. Load it with load("toy/NAME", weights=path).
    Raises ValueError for a toy that has no recipe, and for files that were altered.
    """
    recipe = toy_recipe(name)
    folder = WEIGHTS
    if not (folder / f"{name}.safetensors").is_file():
        names = [f"{name}.safetensors", f"{name}.json", *([f"{name}-steps.safetensors"] if recipe.n_kept else [])]
        folder = download_folder(source, names, cache=cache)
    path = folder / f"{name}.safetensors"
    check_toy(path)
    return path


def check_toy(path: Path) -> dict[str, Any]:
    """What the JSON beside the weights says. Raises ValueError if the weights are not those it describes."""
    about = read_json(path.with_suffix(".json"), "description of a toy model")
    digest = tensors_digest(read_tensors(path, "toy's weights"))
    if digest != about["digest"]:
        raise ValueError(
            f"{path} is not what {path.with_suffix('.json').name} describes: its digest begins {digest[:12]}, "
            f"{str(about['digest'])[:12]} is recorded. It was altered or cut short; fetch it again."
        )
    return about
