"""Which class each patch of a picture shows, from masks: a PNG a picture, in which a pixel's number is its class.

    FOLDER/{name of the picture, without its suffix}.png     numbers 0..255; 0 is no class, and so is 255 if not listed
    classes.yaml or .json, in FOLDER or beside it            classes: {1: person, 24: zebra, ...}, or {1: person, ...}

Masks are cut as the model sees the picture. A patch shows a class that covers at least half of it; it does not show one
that has no pixel in it; patches in between count for neither, and so, for every class, do those that are mostly
unlabelled. Worlds know their own masks (metrics/truth.py).
"""

import json
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from PIL import Image

from vitrail.backbones.base import Backbone
from vitrail.backbones.grid import Grid
from vitrail.backbones.preprocess import Preprocess
from vitrail.coders.base import SparseCoder
from vitrail.coders.sparse import Codes
from vitrail.images.base import ImageSource
from vitrail.images.loader import load_batches
from vitrail.metrics.truth import Firing, Scenes, Truth
from vitrail.progress import SILENT, Progress
from vitrail.store.tokens import select_tokens, stored_kind

NO_CLASS = 255


def read_mask_classes(path: str | Path) -> dict[int, str]:
    """Number -> name, without 0. `path`: the file, or the folder of masks that has it inside or beside it.

    Raises FileNotFoundError, and ValueError for a file that is no list of numbers 1..255 and names, each once.
    """
    path = Path(path)
    if path.is_dir():
        places = [
            folder / f"classes{suffix}" for folder in (path, path.parent) for suffix in (".yaml", ".yml", ".json")
        ]
        found = next((place for place in places if place.is_file()), None)
        if found is None:
            raise FileNotFoundError(f"there is no classes.yaml or classes.json in {path} or beside it.")
        path = found
    told = _parsed(path)
    listed = told.get("classes", told) if isinstance(told, Mapping) else told
    if not isinstance(listed, Mapping):
        raise ValueError(
            f"{path} must map numbers to names of classes, {{1: person, ...}}, got {type(listed).__name__}."
        )
    out: dict[int, str] = {}
    for number, name in listed.items():
        if not str(number).isdecimal() or int(number) > 255:
            raise ValueError(f"{path}: a class is a number in 0..255, got {number!r}.")
        if int(number):
            out[int(number)] = str(name)
    if not out or len(set(out.values())) < len(out):
        raise ValueError(f"{path} must name classes, each once; it has {len(out)}, {len(set(out.values()))} different.")
    return out


def truth_of_masks(
    pictures: Sequence[str],
    folder: str | Path,
    preprocess: Preprocess,
    grid: Grid,
    *,
    classes: Mapping[int, str] | None = None,
    coverage: float = 0.5,
) -> Truth:
    """The truth about pictures with masks, in this order. `pictures`: their ids; `classes` None: the file's.

    Raises FileNotFoundError for a picture without a mask, ValueError for a number that is in no list of classes.
    """
    if not 0 < coverage <= 1:
        raise ValueError(f"coverage must be above 0 and at most 1, a share of a patch, got {coverage}.")
    if not pictures:
        raise ValueError("pictures is empty: give at least one.")
    folder = Path(folder)
    classes = read_mask_classes(folder) if classes is None else classes
    numbers = np.array(sorted(classes))
    shown, unclear, present = [], [], []
    for picture in pictures:
        path = folder / f"{Path(picture).stem}.png"
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing: {picture} has no mask.")
        with Image.open(path) as mask:
            shares = patch_shares(np.asarray(mask), preprocess, grid)
        seen = set(np.flatnonzero(shares.any(0)).tolist()) - {0, NO_CLASS} - classes.keys()
        if seen:
            raise ValueError(f"{path} has the number {min(seen)}, which is no class of {len(classes)} that are listed.")
        without = shares[:, 0] + (0 if NO_CLASS in classes else shares[:, NO_CLASS])
        shares = shares[:, numbers]
        clear = (without < 0.5)[:, None]
        shown.append(np.packbits((shares >= coverage) & clear, axis=1))
        unclear.append(np.packbits((shares > 0) & (shares < coverage) | ~clear, axis=1))
        present.append(shares.any(0))
    names = tuple(classes[number] for number in numbers.tolist())
    return Truth(names, np.stack(present), (grid.height, grid.width), np.concatenate(shown), np.concatenate(unclear))


def patch_shares(
    mask: Shaped[np.ndarray, "..."], preprocess: Preprocess, grid: Grid
) -> Float[np.ndarray, "n_patches 256"]:
    """Of each number the share of each patch's pixels, patches row by row. Raises ValueError for no mask of 0..255."""
    if mask.ndim != 2 or mask.min() < 0 or mask.max() > 255:
        raise ValueError(
            f"a mask has a class of 0..255 for each pixel, got shape {mask.shape}, values to {mask.max()}."
        )
    grey = Image.fromarray(mask.astype(np.uint8), mode="L")
    seen = np.asarray(replace(preprocess, interpolation="nearest").crop(grey))[..., 0]
    rows, columns, px = grid.height, grid.width, grid.patch_px
    cells = seen[: rows * px, : columns * px].reshape(rows, px, columns, px).swapaxes(1, 2).reshape(-1, px * px)
    at = np.arange(len(cells))[:, None] * 256 + cells
    return np.bincount(at.ravel(), minlength=len(cells) * 256).reshape(-1, 256) / px**2


def truth_of_labels(labels: Int[np.ndarray, " n"], classes: Sequence[str]) -> Truth:
    """Pictures with a class each, as truth of one patch a picture: what mask_check.py compares whole pictures with.

    A picture labelled -1 counts for no class.
    """
    if len(labels) and not -1 <= labels.min() <= labels.max() < len(classes):
        raise ValueError(f"labels must be -1 or in 0..{len(classes) - 1}, got {labels.min()}..{labels.max()}.")
    shown = labels[:, None] == np.arange(len(classes))
    unknown = np.broadcast_to(labels[:, None] < 0, shown.shape)
    return Truth(tuple(classes), shown, (1, 1), np.packbits(shown, axis=1), np.packbits(unknown, axis=1))


@torch.inference_mode()
def patch_codes(
    backbone: Backbone,
    coder: SparseCoder,
    images: ImageSource,
    point: str,
    tokens: str,
    *,
    batch_size: int = 64,
    n_workers: int = 0,
    progress: Progress = SILENT,
) -> tuple[Codes, list[int]]:
    """Codes of every patch of every picture that can be read, and which pictures these are.

    Raises ValueError where the coder does not read patches.
    """
    kind = stored_kind(tokens, has_tokens=backbone.point(point).has_tokens)
    if kind not in ("all", "spatial"):
        raise ValueError(f"masks are compared with patches: the coder must read all or spatial tokens, not {kind!r}.")
    found: list[Codes] = []
    positions: list[int] = []
    device = next(backbone.parameters()).device
    batches = load_batches(images, range(len(images)), backbone.preprocess, batch_size=batch_size, n_workers=n_workers)
    with closing(batches), progress.task("pictures with masks", len(images), "images") as task:
        for batch in batches:
            if batch.positions:
                x = select_tokens(backbone.activations(batch.images.to(device), [point])[point], backbone.grid, kind)
                every = x.shape[1] == backbone.grid.n_patches
                patches = slice(None) if every else backbone.grid.tokens("spatial")
                firing = Firing.of_codes(coder.encode_sparse(x.float().flatten(0, 1)), x.shape[1], patches)
                assert firing.patches is not None
                found.append(firing.patches)
                positions += batch.positions
            task.advance(len(batch.positions) + len(batch.skipped))
    if not positions:
        raise ValueError(f"none of the {len(images)} images of {images.spec} could be read.")
    return Codes.cat(found), positions


def truth_of_pictures(
    images: ImageSource, positions: Sequence[int], backbone: Backbone, masks: str | Path | None
) -> Truth:
    """From a folder of masks, or from a world. Raises ValueError where there is neither."""
    if masks is not None:
        ids = [images.record(position).id for position in positions]
        return truth_of_masks(ids, masks, backbone.preprocess, backbone.grid)
    if isinstance(images, Scenes) and images.concepts and bool(getattr(images, "has_masks", True)):
        return Truth.of_world(images, positions, grid=(backbone.grid.height, backbone.grid.width), classes=False)
    raise ValueError(f"{images.spec} knows of no masks: give the folder that holds a PNG for each picture.")


def _parsed(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: it should name the classes of the masks.")
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        try:
            return json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is not JSON: {error}.") from error
    try:
        import yaml
    except ImportError as error:
        raise ImportError('classes in YAML need pyyaml: pip install "vitrail[study]". JSON does not.') from error
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}.") from error
