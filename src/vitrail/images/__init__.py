"""Where pictures come from: folders, CSV tables, WebDataset tars, factor tables and worlds, behind one face."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from vitrail.images.base import BadImage, ImageRecord, ImageSource
from vitrail.images.factors import FactorImages, open_factors
from vitrail.images.folder import FolderImages
from vitrail.images.loader import ImageBatch, load_batches
from vitrail.images.part import PartOfImages, split_spec
from vitrail.images.table import TableImages
from vitrail.images.tar import TarImages
from vitrail.images.worlds import WORLDS, Scene, World, contact_sheet, open_world

__all__ = [
    "IMAGE_SOURCES",
    "WORLDS",
    "BadImage",
    "FactorImages",
    "ImageBatch",
    "ImageRecord",
    "ImageSource",
    "Scene",
    "World",
    "contact_sheet",
    "load_batches",
    "open_images",
    "open_world",
]


def _open_world(spec: str, *, split: str | None = None) -> World:
    overrides: dict[str, Any] = {} if split is None else {"split": split}
    return open_world(spec, **overrides)


# kind -> (does it take this spec?, open it); the first that takes it opens it.
IMAGE_SOURCES: dict[str, tuple[Callable[[str], bool], Callable[..., ImageSource]]] = {
    "world": (lambda spec: spec.startswith("world:"), _open_world),
    "factors": (lambda spec: spec.startswith("factors:"), open_factors),
    "table": (lambda spec: spec.lower().endswith(".csv"), TableImages),
    "tar": (lambda spec: spec.lower().endswith(".tar"), TarImages),
    "folder": (lambda spec: Path(spec).is_dir(), FolderImages),
}


def open_images(spec: str | Path, *, split: str | None = None) -> ImageSource:
    """Pictures from "world:shapes?n=2000&seed=0", a folder, a table.csv, "train-{000..003}.tar", or
    "factors:dsprites.npz?label=shape".

    "photos@0:0.8" is a part of any of these: parts with other ranges share no picture (part.py).

    `split` keeps the pictures of one split, where the source knows of splits; a world renders that split.
    "photos#split=val" is the same in one word.
    """
    text = str(spec)
    before, marked, named = text.rpartition("#split=")
    if marked and not Path(text).exists():
        return open_images(before, split=named)
    part = split_spec(text)
    if part is not None and not Path(text).exists():
        whole, start, stop = part
        return PartOfImages(open_images(whole, split=split), start, stop)
    for takes, opened in IMAGE_SOURCES.values():
        if takes(text):
            return opened(text, split=split)
    if Path(text).exists():
        raise ValueError(f"{text} is neither a folder of pictures nor a .csv or .tar file.")
    raise FileNotFoundError(
        f"{text} is missing. Pictures come from a folder, a .csv, a .tar, factors:PATH or world:NAME."
    )
