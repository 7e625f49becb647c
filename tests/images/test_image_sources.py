"""The contract of every image source, run on each entry of the table by itself."""

import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from image_examples import encoded, write_tar

from vitrail.images import IMAGE_SOURCES, BadImage, ImageRecord, open_images

KINDS = pytest.mark.parametrize("kind", IMAGE_SOURCES)


@KINDS
def test_every_picture_has_a_record_with_a_unique_id_and_loads_as_rgb(kind, specs):
    source = open_images(specs[kind])
    assert len(source) == 12
    records = [source.record(i) for i in range(12)]
    assert all(isinstance(record, ImageRecord) for record in records)
    assert len({record.id for record in records}) == 12
    for i, record in enumerate(records):
        assert record.label is not None
        assert record.class_name == source.classes[record.label]
        image = source.load(i)
        assert image.mode == "RGB"
        assert source.size_bytes(i) > 0


@KINDS
def test_positions_outside_raise_index_error(kind, specs):
    source = open_images(specs[kind])
    for call in (source.record, source.load, source.size_bytes if kind != "world" else source.record):
        for i in (-1, 12):
            with pytest.raises(IndexError, match=r"position must be in 0\.\.11"):
                call(i)


@KINDS
def test_a_pickled_source_gives_the_same_pictures(kind, specs):
    source = open_images(specs[kind])
    source.load(0)
    copy = pickle.loads(pickle.dumps(source))
    assert copy.fingerprint() == source.fingerprint()
    for i in range(12):
        assert copy.record(i) == source.record(i)
        assert np.array_equal(np.asarray(copy.load(i)), np.asarray(source.load(i)))


@KINDS
def test_opening_the_same_spec_again_gives_the_same_fingerprint(kind, specs):
    source = open_images(specs[kind])
    assert open_images(source.spec).fingerprint() == source.fingerprint()
    assert len(source.fingerprint()) == 64


@KINDS
def test_fingerprint_moves_when_the_pictures_do(kind, specs):
    before = open_images(specs[kind]).fingerprint()
    assert open_images(_altered(kind, specs[kind])).fingerprint() != before


def _altered(kind: str, spec: str) -> str:
    """The same source with one picture of other bytes."""
    if kind == "world":
        return spec.replace("image_px=32", "image_px=32&seed=1")
    if kind == "tar":
        tar = Path(spec.replace("{000..001}", "000"))
        write_tar(tar, [("00.png", encoded(99) + b"x"), ("00.json", b'{"label": 0, "name": "ape"}')])
        return spec
    root = Path(spec) if kind == "folder" else Path(spec.removeprefix("factors:")).parent
    picture = root / "ape" / "00.png"
    picture.write_bytes(picture.read_bytes() + b"x")
    return spec


@pytest.mark.parametrize("kind", ["folder", "table"])
def test_fingerprint_does_not_know_where_or_when_the_files_are(kind, specs, tmp_path):
    before = open_images(specs[kind]).fingerprint()
    moved = tmp_path / "elsewhere"
    shutil.copytree(tmp_path / kind, moved, copy_function=shutil.copyfile)  # new times, too
    spec = moved if kind == "folder" else moved / "pictures.csv"
    assert open_images(spec).fingerprint() == before


@pytest.mark.parametrize("kind", ["folder", "table", "tar"])
def test_the_same_pictures_are_read_from_folder_table_and_tar(kind, specs):
    source = open_images(specs[kind])
    by_name = {source.record(i).id.split("/")[-1].removesuffix(".png"): i for i in range(12)}
    for seed in range(12):
        i = by_name[f"{seed:02d}"]
        expected = np.random.default_rng(seed).integers(0, 256, (12, 16, 3), dtype=np.uint8)
        assert np.array_equal(np.asarray(source.load(i)), expected)
        assert source.record(i).class_name == ("ape", "bee", "cat")[seed % 3]
        assert source.record(i).label == seed % 3


def test_what_is_missing_or_unknown_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere is missing\. Pictures come from a folder"):
        open_images(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"nowhere\.csv is missing"):
        open_images(tmp_path / "nowhere.csv")
    with pytest.raises(FileNotFoundError, match=r"nowhere\.tar is missing"):
        open_images(tmp_path / "nowhere.tar")
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(ValueError, match=r"notes\.txt is neither a folder of pictures nor a \.csv or \.tar file"):
        open_images(tmp_path / "notes.txt")


def test_a_file_that_vanishes_is_a_bad_image_not_a_crash(specs, tmp_path):
    source = open_images(specs["folder"])
    (tmp_path / "folder" / "ape" / "00.png").unlink()
    with pytest.raises(BadImage, match="missing"):
        source.load(0)
    assert source.size_bytes(0) == -1
    assert source.load(1).size == (16, 12)
