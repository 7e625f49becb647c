import hashlib
import json
import pickle

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from vitrail.images import Scene, open_images
from vitrail.images.folder import FolderImages
from vitrail.images.part import PartOfImages, share_of, split_spec
from vitrail.metrics.truth import Scenes, Truth

WORLD = "world:shapes?n=200&image_px=32"


def ids(spec):
    source = open_images(spec)
    return [source.record(i).id for i in range(len(source))]


def test_parts_are_disjoint_and_make_up_the_whole():
    parts = [ids(f"{WORLD}@{part}") for part in ("0:0.8", "0.8:0.85", "0.85:1")]
    assert sum(map(len, parts)) == 200
    assert set().union(*parts) == set(ids(WORLD))
    assert 140 <= len(parts[0]) <= 180  # 160 expected, standard deviation 5.7


def test_a_picture_stays_in_its_part_when_others_are_added():
    more = set(ids("world:shapes?n=300&image_px=32@0:0.5"))
    assert set(ids(f"{WORLD}@0:0.5")) <= more


def test_a_part_is_the_same_pictures_and_knows_its_own_spec():
    part, whole = open_images(f"{WORLD}@0.5:1"), open_images(WORLD)
    again = open_images(part.spec)
    position = ids(WORLD).index(part.record(3).id)
    assert part.load(3).tobytes() == whole.load(position).tobytes() == again.load(3).tobytes()
    assert part.fingerprint() == again.fingerprint() == pickle.loads(pickle.dumps(part)).fingerprint()
    assert part.fingerprint() != whole.fingerprint()
    assert part.classes == whole.classes
    with pytest.raises(IndexError, match="position must be in"):
        part.record(len(part))


@settings(max_examples=50, deadline=None)
@given(st.text(max_size=20))
def test_shares_lie_in_0_to_1(image_id):
    assert 0 <= share_of(image_id) < 1


def test_a_bad_part_says_what_is_right():
    with pytest.raises(ValueError, match=r"START:STOP with 0 <= START < STOP <= 1, got 'photos@0.8:0.2'"):
        split_spec("photos@0.8:0.2")
    with pytest.raises(ValueError, match="no picture of world:shapes"):
        open_images("world:shapes?n=3&image_px=32@0.999999:1")
    assert split_spec("a@b.com/photos") is None


def test_a_folder_whose_name_looks_like_a_part_is_a_folder(tmp_path):
    folder = tmp_path / "photos@0:1"
    folder.mkdir()
    open_images(WORLD).load(0).save(folder / "a.png")
    assert len(open_images(folder)) == 1


# -- what the whole knows of its pictures


def positions(part, whole):
    at = {whole.record(i).id: i for i in range(len(whole))}
    return [at[part.record(i).id] for i in range(len(part))]


def equal_scenes(one, other) -> bool:
    return (
        np.array_equal(one.image, other.image)
        and (one.label, one.caption, one.attributes) == (other.label, other.caption, other.attributes)
        and one.masks.keys() == other.masks.keys()
        and all(np.array_equal(one.masks[concept], other.masks[concept]) for concept in one.masks)
    )


def test_a_part_of_a_world_has_its_scenes():
    whole, part = open_images(WORLD + "&clutter=2"), open_images(WORLD + "&clutter=2@0.2:0.5")
    assert isinstance(part, Scenes)
    assert part.concepts == whole.concepts
    assert part.groups == whole.groups
    for i, at in list(enumerate(positions(part, whole)))[:20]:
        assert equal_scenes(part.scene(i), whole.scene(at))
        assert torch.equal(part.patch_coverage(i, 8), whole.patch_coverage(at, 8))
        assert part.factors(i) == whole.factors(at)
        assert part.label(i) == part.true_label(i) == whole.true_label(at)
    for call in (part.scene, part.factors, part.label, part.true_label):
        with pytest.raises(IndexError, match=rf"position must be in 0\.\.{len(part) - 1}, got {len(part)}"):
            call(len(part))


def test_the_truth_about_a_part_is_the_wholes_about_its_pictures():
    whole, part = open_images(WORLD), open_images(f"{WORLD}@0:0.3")
    truth = Truth.of_world(part, range(len(part)), grid=(4, 4))
    expected = Truth.of_world(whole, positions(part, whole), grid=(4, 4))
    assert truth.concepts == expected.concepts
    assert np.array_equal(truth.images, expected.images)
    assert np.array_equal(truth.shown, expected.shown)


def test_a_part_has_scenes_exactly_when_the_whole_has(specs):
    for kind in ("world", "factors", "folder", "table", "tar"):
        whole, part = open_images(specs[kind]), open_images(f"{specs[kind]}@0:0.9")
        assert isinstance(part, PartOfImages)
        assert isinstance(part, Scenes) == isinstance(whole, Scenes) == (kind in ("world", "factors"))
        assert isinstance(pickle.loads(pickle.dumps(part)), Scenes) == isinstance(whole, Scenes)
    folder = open_images(f"{specs['folder']}@0:0.9")
    with pytest.raises(AttributeError, match="'PartOfImages' object has no attribute 'scene'"):
        _ = folder.scene


class _Told(FolderImages):
    """A source of another's making: pictures with concepts and scenes, and nothing else."""

    concepts = ("grey",)

    def scene(self, i):
        image = np.asarray(self.load(i))
        return Scene(image, 0, "", {}, {"grey": image.std(axis=2) < 60})


def test_any_source_with_scenes_passes_them_on(specs):
    whole = _Told(specs["folder"])
    part = PartOfImages(whole, 0.2, 1)
    assert isinstance(part, Scenes)
    assert not hasattr(part, "groups")
    assert equal_scenes(part.scene(1), whole.scene(positions(part, whole)[1]))


def test_a_part_of_a_part_knows_what_a_part_knows(specs):
    whole, part = open_images(WORLD), open_images(f"{WORLD}@0:0.6@0.2:1")
    assert 0 < len(part) < len(open_images(f"{WORLD}@0:0.6"))
    assert equal_scenes(part.scene(2), whole.scene(positions(part, whole)[2]))
    assert not hasattr(open_images(f"{specs['folder']}@0:0.9@0:0.8"), "scene")


def test_a_part_of_factors_has_their_values(specs, tmp_path):
    whole, part = open_images(specs["factors"]), open_images(f"{specs['factors']}@0:0.6")
    assert part.factors == whole.factors == ("animal", "parity")
    assert part.concepts == whole.concepts
    assert part.has_masks is False
    for i, at in enumerate(positions(part, whole)):
        assert part.values(i) == whole.values(at)
        assert part.attributes(i) == whole.attributes(at)
        assert part.present(i) == whole.present(at)
        assert part.masks(i) == {}
    with pytest.raises(ValueError, match="does not say where things are"):
        part.scene(0)

    imgs = (np.arange(12)[:, None, None] > np.arange(16).reshape(4, 4)).astype(np.uint8)
    np.savez(tmp_path / "dots.npz", imgs=imgs, latents_classes=np.arange(12)[:, None] % 3)
    (tmp_path / "dots.json").write_text('{"names": ["kind"]}')
    whole, part = (open_images(f"factors:{tmp_path / 'dots.npz'}?label=kind{end}") for end in ("", "@0:0.5"))
    assert part.has_masks
    assert equal_scenes(part.scene(1), whole.scene(positions(part, whole)[1]))
    assert Truth.of_world(part, range(len(part)), grid=(2, 2)).n == len(part)


def test_a_part_of_clevr_has_its_objects(tmp_path):
    things = [{"size": "small", "color": "red", "shape": "cube", "material": "metal"}]
    scenes = [{"image_filename": f"{i}.png", "objects": things * (i + 1)} for i in range(6)]
    (tmp_path / "scenes.json").write_text(json.dumps({"scenes": scenes}))
    whole, part = open_images(f"factors:{tmp_path}"), open_images(f"factors:{tmp_path}@0:0.7")
    assert [part.objects(i) for i in range(len(part))] == [whole.objects(at) for at in positions(part, whole)]


def test_a_part_of_the_moving_world_has_whole_clips():
    spec = "world:moving?n=60&image_px=32&n_frames=5&fast=2"
    whole, parts = open_images(spec), [open_images(f"{spec}@{part}") for part in ("0:0.5", "0.5:1")]
    assert sum(part.n for part in parts) == 60
    assert 20 <= parts[0].n <= 40  # 30 expected, standard deviation 3.9
    for part in parts:
        at = positions(part, whole)
        assert len(part) == 5 * part.n
        for j in range(part.n):
            assert at[5 * j : 5 * j + 5] == list(range(at[5 * j], at[5 * j] + 5))
            assert at[5 * j] % 5 == 0
            assert part.motion(j) == whole.motion(at[5 * j] // 5)
        assert np.array_equal(part.clip(3).frames, whole.clip(at[15] // 5).frames)
        assert part.factors(16) == whole.factors(at[16])
        assert np.array_equal(part.clip(3).frames[1], part.scene(16).image)
        with pytest.raises(IndexError, match=rf"clip must be in 0\.\.{part.n - 1}, got {part.n}"):
            part.clip(part.n)
    nested = open_images(f"{spec}@0:0.5@0:0.25")
    assert len(nested) == 5 * nested.n
    assert np.array_equal(nested.clip(1).frames[0], nested.scene(5).image)


def test_parts_of_worlds_with_other_options_have_other_fingerprints(specs):
    dials = ("", "&clutter=4", "&style=drawing", "&occlusion=0.5", "&palette=grey")
    parts = [open_images(f"world:shapes?n=40&image_px=32{dial}@0:0.5") for dial in dials]
    # Ids, labels and sizes are the same in all; the pictures are not.
    assert len({tuple(part.record(i).id for i in range(len(part))) for part in parts}) == 1
    assert len({part.fingerprint() for part in parts}) == len(dials)
    one, other = (open_images(f"world:shapes?n=40&image_px=32@{part}") for part in ("0:0.5", "0.5:1"))
    assert one.fingerprint() != other.fingerprint()
    # Of files it is over their ids and sizes, as ever: what lies outside the part does not count.
    folder = open_images(f"{specs['folder']}@0:0.5")
    records = [[folder.record(i).id, folder.record(i).label, folder.size_bytes(i)] for i in range(len(folder))]
    assert folder.fingerprint() == hashlib.sha256(b"".join(json.dumps(r).encode() for r in records)).hexdigest()
