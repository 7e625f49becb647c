"""A dozen small pictures in three classes, kept in each way that vitrail reads."""

import csv
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


def encoded(seed: int, kind: str = "PNG", mode: str = "RGB") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(stream, kind)
    return stream.getvalue()


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


def write_folder(root: Path) -> None:
    for seed in range(12):
        folder = root / ("ape", "bee", "cat")[seed % 3]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{seed:02d}.png").write_bytes(encoded(seed))


def write_table(root: Path) -> None:
    write_folder(root)
    with (root / "pictures.csv").open("w", newline="") as stream:
        rows = csv.writer(stream)
        rows.writerow(["path", "label", "class_name", "caption", "split"])
        for seed in range(12):
            name = ("ape", "bee", "cat")[seed % 3]
            rows.writerow([f"{name}/{seed:02d}.png", seed % 3, name, f"picture {seed}", ("train", "val")[seed >= 8]])


def write_factors(root: Path) -> None:
    write_folder(root)
    with (root / "factors.csv").open("w", newline="") as stream:
        rows = csv.writer(stream)
        rows.writerow(["file", "animal", "parity"])
        for seed in range(12):
            name = ("ape", "bee", "cat")[seed % 3]
            rows.writerow([f"{name}/{seed:02d}.png", name, ("even", "odd")[seed % 2]])


def write_shards(root: Path) -> None:
    root.mkdir(parents=True, exist_ok=True)
    for shard in range(2):
        members = []
        for seed in range(shard * 6, shard * 6 + 6):
            said = {"label": seed % 3, "name": ("ape", "bee", "cat")[seed % 3]}
            members += [(f"{seed:02d}.png", encoded(seed)), (f"{seed:02d}.json", json.dumps(said).encode())]
        write_tar(root / f"train-{shard:03d}.tar", members)


@pytest.fixture
def specs(tmp_path) -> dict[str, str]:
    """kind of IMAGE_SOURCES -> spec of a source of that kind."""
    write_folder(tmp_path / "folder")
    write_table(tmp_path / "table")
    write_factors(tmp_path / "factors")
    write_shards(tmp_path / "tars")
    return {
        "world": "world:shapes?n=12&image_px=32",
        "factors": f"factors:{tmp_path / 'factors' / 'factors.csv'}?label=animal",
        "folder": str(tmp_path / "folder"),
        "table": str(tmp_path / "table" / "pictures.csv"),
        "tar": str(tmp_path / "tars" / "train-{000..001}.tar"),
    }
