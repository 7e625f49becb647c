"""Worlds: the same pictures everywhere and always, and a truth about them that the pixels bear out."""

import hashlib
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch

from vitrail.images import WORLDS, contact_sheet, open_images, open_world
from vitrail.images.worlds.shapes import COLOURS, POSITIONS, ShapesWorld
from vitrail.images.worlds.silhouettes import SILHOUETTES

# Over label, caption and pixels of the first 64 scenes of "world:<name>". If a change moves them on purpose, raise the
# world's `version` with the digest: stores and weights made from the old pictures must not pass for the new ones.
FROZEN = {
    "shapes": (1, "1fb7376d51aad1751f520c40fe9266d53b54d05be4bf1775e6709b8165685bc4"),
    "moving": (1, "b91a314f5c92f56b819690aab279d9fc27f9cb696a902ab9ae9280f000660c5f"),
}


def scenes_digest(name: str) -> str:
    world, digest = open_world(name), hashlib.sha256()
    for i in range(64):
        scene = world.scene(i)
        digest.update(f"{scene.label}|{scene.caption}|".encode() + scene.image.tobytes())
    return digest.hexdigest()


@pytest.mark.parametrize("name", WORLDS)
def test_the_first_64_scenes_are_what_they_always_were(name):
    assert (WORLDS[name].version, scenes_digest(name)) == FROZEN[name]


def test_two_processes_render_the_same_scene():
    code = (
        "import hashlib; from vitrail.images import open_world\n"
        "print(hashlib.sha256(open_world('shapes?seed=5&split=val').scene(1234).image.tobytes()).hexdigest())"
    )
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    world = open_world("shapes?seed=5&split=val")
    world.scene(7)  # what was rendered before does not matter
    assert hashlib.sha256(world.scene(1234).image.tobytes()).hexdigest() == other


@pytest.mark.parametrize("name", WORLDS)
def test_a_scene_does_not_depend_on_how_many_there_are(name):
    assert np.array_equal(open_world(f"{name}?n=10").scene(9).image, open_world(f"{name}?n=5000").scene(9).image)


@pytest.mark.parametrize("name", WORLDS)
def test_splits_and_seeds_share_no_scene(name):
    specs = [f"{name}?split={split}&seed={seed}&n=60" for split in ("train", "val", "test") for seed in (0, 1)]
    images = [open_world(spec).scene(i).image.tobytes() for spec in specs for i in range(60)]
    assert len(set(images)) == len(images)
    # Nor the same things under other noise: what is drawn differs, not only its grain.
    captions = [[open_world(spec).record(i).caption for i in range(60)] for spec in specs]
    for this in range(len(specs)):
        for that in range(this):
            equal = sum(a == b for a, b in zip(captions[this], captions[that], strict=True))
            assert equal <= 2


@pytest.mark.parametrize("name", WORLDS)
def test_every_class_comes_once_in_each_run_of_all_classes(name):
    world = open_world(f"{name}?n=480")
    n_classes, n_frames = len(world.classes), len(world) // world.n
    labels = [world.record(i * n_frames).label for i in range(480)]
    for start in range(0, 480 - n_classes + 1, n_classes):
        assert sorted(labels[start : start + n_classes]) == list(range(n_classes))
    assert labels[:n_classes] != labels[n_classes : 2 * n_classes]  # in another order each time


@pytest.mark.parametrize("name", WORLDS)
def test_record_and_scene_say_the_same(name):
    world = open_world(f"{name}?n=50&split=val")
    for i in range(50):
        record, scene = world.record(i), world.scene(i)
        assert (record.label, record.caption, record.split) == (scene.label, scene.caption, "val")
        assert record.class_name == world.classes[scene.label]
        assert set(scene.masks) <= set(world.concepts)
        assert all(f"{family}:{value}" in scene.masks for family, value in scene.attributes.items())


@pytest.mark.parametrize("name", WORLDS)
def test_sibling_groups_part_the_classes(name):
    world = open_world(name)
    labels = [label for group in world.groups.values() for label in group]
    assert sorted(labels) == list(range(len(world.classes)))
    assert len(world.classes) >= 40
    assert len(world.groups) >= 12
    assert min(len(group) for group in world.groups.values()) >= 3


def test_attributes_are_drawn_evenly_and_apart_from_each_other():
    world = open_world("shapes?n=4800")
    seen = [world.factors(i) for i in range(4800)]
    for family, n_values in (("colour", 8), ("size", 3), ("position", 9), ("background", 6), ("shape", 12)):
        counts = Counter(getattr(factors, family) for factors in seen)
        expected = 4800 / n_values
        assert len(counts) == n_values
        # Five standard deviations of a binomial count.
        assert max(abs(count - expected) for count in counts.values()) < 5 * (expected * (1 - 1 / n_values)) ** 0.5
    # 48 shape x (2 grounds) ... pairs: a colour is as frequent on water as on land.
    on_water = Counter(factors.colour for factors in seen if factors.attributes["ground"] == "water")
    assert all(abs(on_water[colour] - 300) < 5 * 300**0.5 for colour in COLOURS)


def test_mean_colour_inside_the_mask_is_nearest_to_the_named_colour():
    world = open_world("shapes?n=480")
    names = list(COLOURS)
    palette = np.array([COLOURS[name][0] for name in names], dtype=float)
    right = total = 0
    for i in range(480):
        scene = world.scene(i)
        if scene.attributes["texture"] != "plain":
            continue
        mean = scene.image[scene.masks["object"]].mean(axis=0)
        total += 1
        right += names[int(((palette - mean) ** 2).sum(1).argmin())] == scene.attributes["colour"]
    assert total == 120
    assert right == total


def test_outside_the_mask_the_picture_is_the_ground_alone():
    """The ground's tones lie on a line between two colours; the thing's do not. Checked without the renderer: pixels
    two or more away from the mask are far less saturated in red than a red thing."""
    world = open_world("shapes?n=2000")
    for i in range(2000):
        scene = world.scene(i)
        if scene.attributes["colour"] != "red" or scene.attributes["texture"] != "plain":
            continue
        image = scene.image.astype(int)
        red = (image[..., 0] - image[..., 1:].max(axis=2)) > 100
        inside = scene.masks["object"]
        wrong = red != inside
        # Only the softened edge may disagree: pixels with both kinds among their neighbours.
        near = np.zeros_like(inside)
        padded = np.pad(inside, 1, mode="edge")
        around = [padded[y : y + 64, x : x + 64] for y in range(3) for x in range(3)]
        near = np.logical_or.reduce(around) & ~np.logical_and.reduce(around)
        assert not (wrong & ~near).any()


# Areas of the outlines by plain geometry, radius 1: a witness that shares no code with the signed distances.
AREAS = {
    "circle": np.pi * 0.95**2,
    "ring": np.pi * (0.99**2 - 0.45**2),
    "square": 1.6**2,
    "diamond": 2 * 0.72,
    "triangle": 0.95 * 1.72,
    "cross": 2 * (1.9 * 0.68) - 0.68**2,
    "hourglass": 2 * (0.85 * 1.02) - 0.12**2 * 0.85 / 1.02,
    "star": 5 * 1.06 * 0.46 * np.sin(np.pi / 5),
    "arrow": 0.5 * 1.9 * 0.95 + 0.72 * 1.0,
}


@pytest.mark.parametrize("shape", AREAS)
def test_masks_have_the_area_that_geometry_gives(shape):
    world = open_world("shapes?n=4800&image_px=256")
    checked = 0
    for i in range(4800):
        factors = world.factors(i)
        if factors.shape != shape or factors.size != "large":
            continue
        expected = AREAS[shape] * (factors.radius * 256 / 64) ** 2
        assert world.scene(i).masks["object"].sum() == pytest.approx(expected, rel=0.02)
        checked += 1
        if checked == 3:
            return


@pytest.mark.parametrize("shape", SILHOUETTES)
@pytest.mark.parametrize("radius", [10.0, 13.5, 16.5])
def test_no_ground_shows_through_the_inside_of_a_thing(shape, radius):
    centres = np.arange(-24, 24, dtype=np.float32) + 0.37
    u, v = np.meshgrid(centres, centres)
    distance = SILHOUETTES[shape](u / radius, v / radius) * radius
    covered = np.clip(0.5 - distance, 0, 1)
    inside = (distance <= 0) & ~_edge(distance <= 0)
    assert inside.any()
    assert covered[inside].min() == 1


def test_the_object_lies_where_the_position_says_and_inside_the_picture():
    world = open_world("shapes?n=960")
    for i in range(960):
        scene = world.scene(i)
        mask = scene.masks["object"]
        ys, xs = np.nonzero(mask)
        x, y = POSITIONS[scene.attributes["position"]]
        box_x, box_y = (xs.min() + xs.max() + 1) / 2, (ys.min() + ys.max() + 1) / 2
        assert abs(box_x - x) < 6
        assert abs(box_y - y) < 6
        assert not mask[[0, -1]].any()
        assert not mask[:, [0, -1]].any()
        assert np.array_equal(~mask, scene.masks[f"background:{scene.attributes['background']}"])


def test_sizes_do_not_overlap_in_area():
    world = open_world("shapes?n=2400")
    areas: dict[tuple[str, str], list[int]] = {}
    for i in range(2400):
        scene = world.scene(i)
        areas.setdefault((scene.attributes["shape"], scene.attributes["size"]), []).append(scene.masks["object"].sum())
    for shape in SILHOUETTES:
        assert max(areas[shape, "small"]) < min(areas[shape, "medium"])
        assert max(areas[shape, "medium"]) < min(areas[shape, "large"])


def test_caption_of_a_scene_worked_by_hand():
    world = open_world("shapes?n=1")
    assert world.record(0).caption == "a medium purple striped arrow at the left on a pond"
    assert world.record(0).class_name == "striped arrow"


class _Halved(ShapesWorld):
    """The left half and 8 more columns' upper half are the object: coverage can be counted on fingers."""

    def scene(self, i: int):
        scene = super().scene(i)
        for mask in scene.masks.values():
            mask[:] = False
        mask = scene.masks["object"]
        mask[:, :32] = True
        mask[:4, 32:40] = True
        return scene


def test_patch_coverage_worked_by_hand():
    world = _Halved(n=1)
    coverage = world.patch_coverage(0, 8)[world.concepts.index("object")]
    # Columns 0-3 whole; patch (0, 4) has 4 of its 8 rows: one half; everything else empty.
    expected = torch.zeros(8, 8)
    expected[:, :4] = 1
    expected[0, 4] = 0.5
    assert torch.equal(coverage, expected)


def test_patch_coverage_averages_to_the_share_of_pixels():
    world = open_world("shapes?n=20&clutter=4")
    for i in range(20):
        coverage, masks = world.patch_coverage(i, 16), world.scene(i).masks
        assert coverage.shape == (len(world.concepts), 4, 4)
        for row, concept in enumerate(world.concepts):
            share = masks[concept].mean() if concept in masks else 0.0
            assert float(coverage[row].mean()) == pytest.approx(share, abs=1e-6)
    with pytest.raises(ValueError, match="patch_px must divide the picture's sides 64 and 64, got 7"):
        world.patch_coverage(0, 7)


def test_clutter_lies_under_the_thing_and_changes_nothing_else():
    plain, strewn = open_world("shapes?n=30"), open_world("shapes?n=30&clutter=6")
    for i in range(30):
        a, b = plain.scene(i), strewn.scene(i)
        assert np.array_equal(a.masks["object"], b.masks["object"])
        stray = b.masks["clutter"]
        assert stray.any()
        assert not (stray & b.masks["object"]).any()
        ground = f"background:{a.attributes['background']}"
        assert np.array_equal(b.masks[ground], ~(b.masks["object"] | stray))
        untouched = ~stray & ~_edge(b.masks["object"])
        assert np.array_equal(a.image[untouched], b.image[untouched])


def _edge(mask: np.ndarray) -> np.ndarray:
    padded = np.pad(mask, 1, mode="edge")
    h, w = mask.shape
    around = [padded[y : y + h, x : x + w] for y in range(3) for x in range(3)]
    return np.logical_or.reduce(around) & ~np.logical_and.reduce(around)


def test_larger_pictures_show_the_same_scene():
    small, large = open_world("shapes?n=40"), open_world("shapes?n=40&image_px=128")
    for i in range(40):
        assert small.factors(i) == large.factors(i)
        coarse = large.scene(i).masks["object"].reshape(64, 2, 64, 2).mean(axis=(1, 3))
        fine = small.scene(i).masks["object"]
        assert ((coarse > 0.5) != fine).mean() < 0.02


def test_spec_opens_the_same_world_again():
    world = open_images("world:shapes?seed=3&n=77&clutter=2", split="test")
    assert world.spec == "world:shapes?n=77&seed=3&split=test&image_px=64&clutter=2"
    again = open_images(world.spec)
    assert again.fingerprint() == world.fingerprint()
    assert np.array_equal(np.asarray(again.load(5)), np.asarray(world.load(5)))


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        ("world:shpes", "there is no world 'shpes'. Known: shapes"),
        ("world:shapes?size=3", "no option 'size=3'. Known: n, seed, split, image_px, clutter"),
        ("world:shapes?n=many", "n must be int, got 'many'"),
        ("world:shapes?n=0", "n must be at least 1, got 0"),
        ("world:shapes?split=dev", "split must be one of train, val, test, got 'dev'"),
        ("world:shapes?seed=-1", "seed must be 0 or more"),
        ("world:shapes?image_px=4", "image_px must be in 16..1024"),
        ("world:shapes?clutter=99", "clutter must be in 0..64"),
    ],
)
def test_bad_specs_get_a_sentence(spec, sentence):
    with pytest.raises(ValueError, match=sentence.replace("?", r"\?")):
        open_images(spec)


def test_positions_outside_are_refused():
    world = open_world("shapes?n=5")
    for call in (world.scene, world.load, world.record):
        with pytest.raises(IndexError, match=r"0\.\.4, got 5"):
            call(5)


def test_contact_sheet_has_a_tile_for_each_picture():
    sheet = contact_sheet(open_world("shapes?n=10"), range(10), columns=4, tile_px=64)
    assert sheet.size == (4 * 70 + 6, 3 * (64 + 40 + 6) + 6)
    corner = np.asarray(sheet)[6 : 6 + 64, 6 : 6 + 64]
    assert np.array_equal(corner, open_world("shapes?n=10").scene(0).image)
