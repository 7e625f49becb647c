"""A world as files that other tools read: pictures in folders of classes, a table of them, and the truth beside it.

    world.json              spec, fingerprint, options, classes, groups of siblings, concepts
    SPLIT/CLASS/ID.png      the pictures, pixel for pixel (torchvision's ImageFolder reads SPLIT)
    images.csv              path, id, label, class_name, caption, split: `open_images("FOLDER/images.csv")`
    truth.jsonl             a line a picture: id, label, attributes
    masks/00000.npz         the masks of 256 pictures: `read_masks`

A part is 256 pictures and their masks, the masks written last: a run that was killed goes on behind the last whole part
and ends with the same bytes. images.csv is written when all the rest is there.
"""

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool
from PIL import Image

from vitrail.files import read_json, replacing, write_json
from vitrail.images.base import ImageRecord
from vitrail.images.worlds.base import Scene, World
from vitrail.progress import SILENT, Progress

PART = 256  # pictures
COLUMNS = ("path", "id", "label", "class_name", "caption", "split")


def write_world(world: World, folder: Path, progress: Progress = SILENT) -> None:
    """Write all pictures of `world` and the truth about them. What is there already is kept.

    Raises ValueError if the folder holds another world, or something else.
    """
    _claim(world, folder)
    n = len(world)
    parts = [range(first, min(first + PART, n)) for first in range(0, n, PART)]
    left = [part for part in parts if not _is_written(world, folder, part)]
    with progress.task("writing pictures", n, "pictures", done=n - sum(map(len, left))) as task:
        for part in left:
            scenes = []
            for i in part:
                scenes.append(world.scene(i))
                with replacing(folder / _path(world.record(i))) as temporary:
                    Image.fromarray(scenes[-1].image).save(temporary, format="png")
                task.advance(1)
            _write_masks(_mask_path(folder, part), world, part, scenes)
    _write_truth(world, folder, parts)
    _write_table(world, folder)


def read_masks(path: Path) -> dict[str, dict[str, Bool[np.ndarray, "h w"]]]:
    """Of every picture of a part, by id: concept -> where it is seen. Concepts that are not there have no mask.

    The file holds ids (n,) and concepts (c,); planes (m, ceil(h * w / 8)), the masks that differ, eight pixels a byte,
    row by row (numpy.packbits); plane (n, c), which of them shows a concept, -1 for none; size (h, w); and
    attributes (n,), as JSON.
    """
    with np.load(path, allow_pickle=False) as stored:
        height, width = stored["size"].tolist()
        planes = np.unpackbits(stored["planes"], axis=1, count=height * width).astype(bool).reshape(-1, height, width)
        concepts = stored["concepts"].tolist()
        return {
            name: {concept: planes[at] for concept, at in zip(concepts, row, strict=True) if at >= 0}
            for name, row in zip(stored["ids"].tolist(), stored["plane"].tolist(), strict=True)
        }


def _claim(world: World, folder: Path) -> None:
    """Say in world.json whose folder this is, unless it is said already."""
    path = folder / "world.json"
    if path.exists():
        there = read_json(path, "world")
        if not isinstance(there, dict) or there.get("fingerprint") != world.fingerprint():
            spec = there.get("spec", "one that says no spec") if isinstance(there, dict) else "one that says no spec"
            raise ValueError(f"{folder} holds another world, {spec}. Give another folder, or delete that one.")
        return
    if folder.exists() and any(not entry.name.startswith(".") for entry in folder.iterdir()):
        raise ValueError(f"{folder} is not empty and holds no world. Give an empty folder, or a new one.")
    about: dict[str, Any] = {
        "spec": world.spec,
        "fingerprint": world.fingerprint(),
        "world": world.name,
        "version": world.version,
        "options": world.options,
        "n_pictures": len(world),
        "pictures_per_part": PART,
        "classes": list(world.classes),
        "groups": {name: list(labels) for name, labels in world.groups.items()},
        "concepts": list(world.concepts),
    }
    write_json(path, about)


def _path(record: ImageRecord) -> str:
    return f"{record.split}/{record.class_name}/{record.id}.png"


def _mask_path(folder: Path, part: range) -> Path:
    return folder / "masks" / f"{part.start // PART:05d}.npz"


def _is_written(world: World, folder: Path, part: range) -> bool:
    return _mask_path(folder, part).is_file() and all((folder / _path(world.record(i))).is_file() for i in part)


def _write_masks(path: Path, world: World, part: range, scenes: Sequence[Scene]) -> None:
    column = {concept: place for place, concept in enumerate(world.concepts)}
    plane = np.full((len(scenes), len(column)), -1, dtype=np.int32)
    planes: list[np.ndarray] = []
    for row, scene in enumerate(scenes):
        known: dict[int, int] = {}  # concepts of one thing share one mask
        for concept, mask in scene.masks.items():
            if id(mask) not in known:
                known[id(mask)] = len(planes)
                planes.append(np.packbits(mask))
            plane[row, column[concept]] = known[id(mask)]
    with replacing(path) as temporary, temporary.open("wb") as stream:
        np.savez_compressed(
            stream,
            ids=np.array([world.record(i).id for i in part]),
            concepts=np.array(world.concepts),
            planes=np.stack(planes),
            plane=plane,
            size=np.array(scenes[0].image.shape[:2]),
            attributes=np.array([json.dumps(dict(scene.attributes), ensure_ascii=False) for scene in scenes]),
        )


def _write_truth(world: World, folder: Path, parts: Sequence[range]) -> None:
    with replacing(folder / "truth.jsonl") as temporary, temporary.open("w", encoding="utf-8") as stream:
        for part in parts:
            with np.load(_mask_path(folder, part), allow_pickle=False) as stored:
                attributes = stored["attributes"].tolist()
            for i, known in zip(part, attributes, strict=True):
                record = world.record(i)
                line = {"id": record.id, "label": record.label, "attributes": json.loads(known)}
                stream.write(json.dumps(line, ensure_ascii=False) + "\n")


def _write_table(world: World, folder: Path) -> None:
    with (
        replacing(folder / "images.csv") as temporary,
        temporary.open("w", encoding="utf-8", newline="") as stream,
    ):
        table = csv.writer(stream)
        table.writerow(COLUMNS)
        for i in range(len(world)):
            record = world.record(i)
            table.writerow([_path(record), record.id, record.label, record.class_name, record.caption, record.split])
