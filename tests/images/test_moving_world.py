"""The world "moving": what is said of a clip's motion is what the masks do, and the ground does not move."""

import hashlib
import pickle
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2_contingency

from vitrail.images import open_images, open_world
from vitrail.images.worlds import clip_sheet
from vitrail.images.worlds.moving import MOTIONS, Clip, MovingWorld, clip_coverage
from vitrail.metrics.truth import Scenes, Truth

# Over label, caption, attributes, frames, masks and way of the first 6 clips. See FROZEN in test_worlds.py.
FROZEN = {
    "moving": "02a1d9c8457f075e38023b914bc73039fd90f8b3d52a256bf12767c2c99f440d",
    "moving?seed=3&split=val&image_px=96&fast=3": "0fd6a700e6555bfa9df63346e4b488bcd0e18905c756f44afb3e610cf84d00d2",
}
N_FRAMES = 8


def clips_digest(spec: str) -> str:
    world, digest = open_world(spec), hashlib.sha256()
    for j in range(6):
        clip = world.clip(j)
        digest.update(f"{clip.label}|{clip.caption}|{dict(clip.attributes)}|".encode() + clip.frames.tobytes())
        for concept, mask in clip.masks.items():
            digest.update(concept.encode() + mask.tobytes())
        digest.update(clip.centre.tobytes() + clip.radius.tobytes() + repr(clip.velocity).encode())
    return digest.hexdigest()


@pytest.mark.parametrize("spec", FROZEN)
def test_the_first_clips_are_what_they_always_were(spec):
    assert clips_digest(spec) == FROZEN[spec]


def centroids(mask: np.ndarray) -> np.ndarray:
    """(t, 2): mean x and y of the pixels of each frame's mask."""
    y, x = (np.arange(side) + 0.5 for side in mask.shape[1:])
    area = mask.sum(axis=(1, 2))
    return np.stack([(mask.sum(axis=1) * x).sum(1) / area, (mask.sum(axis=2) * y).sum(1) / area], axis=1)


@pytest.mark.parametrize("image_px", [64, 128])
def test_masks_move_as_the_velocity_says(image_px):
    world = open_world(f"moving?n=160&image_px={image_px}")
    seen = Counter()
    for j in range(160):
        clip = world.clip(j)
        motion, mask = clip.attributes["motion"], clip.masks["object"]
        if motion in ("growing", "shrinking"):
            continue
        measured, time = centroids(mask), np.arange(N_FRAMES)
        slope = [np.polyfit(time, measured[:, axis], 1)[0] for axis in range(2)]
        assert slope == pytest.approx(clip.velocity, abs=0.06)
        assert np.abs(measured - measured[0] - time[:, None] * np.array(clip.velocity)).max() <= 0.5 + 1e-9
        areas = mask.sum(axis=(1, 2))
        assert areas.max() - areas.min() < 0.08 * areas.mean()  # nothing is clipped
        assert np.allclose(np.diff(clip.centre, axis=0), clip.velocity)
        # By hand: a pixel of 64 a frame is slow and two and a half are fast, x to the right and y down.
        pace = {None: 0, "slow": 1, "fast": 2.5}[clip.attributes.get("speed")] * image_px / 64
        towards = {"still": (0, 0), "left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}[motion]
        assert clip.velocity == (towards[0] * pace, towards[1] * pace)
        seen[motion, clip.attributes.get("speed")] += 1
    assert len(seen) == 9


def test_the_centre_is_where_an_even_thing_is():
    world = open_world("moving?n=240")
    checked = 0
    for j in range(240):
        # Those that look alike from either side. A square that is hardly turned goes by whole pixels.
        if world.factors(j * N_FRAMES).shape in ("circle", "ring", "cross", "diamond", "square"):
            clip = world.clip(j)
            assert np.abs(centroids(clip.masks["object"]) - clip.centre).max() <= 0.5
            checked += 1
    assert checked == 100


def test_masks_grow_and_shrink_as_the_radius_says():
    world = open_world("moving?n=240&image_px=128")
    changed = Counter()
    for j in range(240):
        motion = world.motion(j)
        if motion.d_radius == 0:
            continue
        clip = world.clip(j)
        areas = clip.masks["object"].sum(axis=(1, 2))
        # The side of the square that is as large, against the radius: both by their ratio to the first frame.
        assert np.sqrt(areas / areas[0]) == pytest.approx(clip.radius / clip.radius[0], rel=0.04)
        # The diameter changes by the speed: 7 steps of 1 or 2.5 pixels of 64 are 7 or 17.5, of 128 twice that.
        sign = {"growing": 1, "shrinking": -1}[motion.motion]
        of_diameter = {"slow": 14.0, "fast": 35.0}[motion.speed or ""] * sign
        assert 2 * (clip.radius[-1] - clip.radius[0]) == pytest.approx(of_diameter)
        assert clip.velocity == (0, 0)
        changed[motion.motion, motion.speed] += 1
    assert len(changed) == 4


def test_a_still_thing_differs_by_noise_alone_and_so_does_the_ground():
    world = open_world("moving?n=60")
    n_still = 0
    for j in range(60):
        clip = world.clip(j)
        things = clip.masks["object"].any(axis=0)
        padded = np.pad(things, 2)  # the softened edge of a sharp tip reaches two pixels
        never = ~np.logical_or.reduce([padded[y : y + 64, x : x + 64] for y in range(5) for x in range(5)])
        frames = clip.frames.astype(int)
        # Noise is within 8 grey levels: two frames are within 16, and rounding.
        assert np.ptp(frames[:, never], axis=0).max() <= 17
        assert len({frame.tobytes() for frame in clip.frames}) == N_FRAMES
        if clip.attributes["motion"] == "still":
            n_still += 1
            assert np.ptp(frames, axis=0).max() <= 17
            assert all(np.array_equal(mask[0], mask[t]) for mask in clip.masks.values() for t in range(N_FRAMES))
            assert set(clip.attributes) == {"shape", "texture", "colour", "size", "position", "background"} | {
                "ground",
                "motion",
            }
        else:
            assert np.ptp(frames, axis=0).max() > 30
    assert n_still >= 4


def test_a_frame_is_that_of_its_clip_whatever_was_read_before():
    world = open_world("moving?n=12")
    order = np.random.default_rng(0).permutation(len(world))
    frames = {int(i): world.scene(int(i)) for i in order}
    for j in reversed(range(12)):
        clip = open_world("moving?n=500").clip(j)
        for t in range(N_FRAMES):
            scene, record = frames[j * N_FRAMES + t], world.record(j * N_FRAMES + t)
            assert np.array_equal(clip.frames[t], scene.image)
            assert np.array_equal(np.asarray(world.load(j * N_FRAMES + t)), scene.image)
            assert (clip.label, clip.caption) == (scene.label, scene.caption) == (record.label, record.caption)
            assert all(scene.attributes[family] == value for family, value in clip.attributes.items())
            for concept, mask in clip.masks.items():
                assert np.array_equal(mask[t], scene.masks.get(concept, np.zeros_like(mask[t])))
            assert record.id == f"moving-0-train-{j:07d}-{t:02d}"
    assert len(world) == 96


def test_motions_are_drawn_evenly_and_apart_from_what_moves():
    world = open_world("moving?n=2400")
    things, motions = [world.factors(8 * j) for j in range(2400)], [world.motion(j) for j in range(2400)]
    counts = Counter(motion.motion for motion in motions)
    assert set(counts) == set(MOTIONS)
    # Five standard deviations of a binomial count.
    assert all(abs(count - 2400 / 7) < 5 * (2400 / 7 * 6 / 7) ** 0.5 for count in counts.values())
    n_moving = 2400 - counts["still"]
    assert abs(sum(motion.speed == "slow" for motion in motions) - n_moving / 2) < 5 * (n_moving / 4) ** 0.5
    assert all((motion.speed is None) == (motion.motion == "still") for motion in motions)
    for family in ("shape", "texture", "class_name", "colour", "background"):
        for told in ("motion", "speed"):
            assert _p_value([getattr(f, family) for f in things], [str(getattr(m, told)) for m in motions]) > 1e-4
    # The witness sees what is tied: where a thing starts has to do with where it goes.
    assert _p_value([f.position for f in things], [m.motion for m in motions]) < 1e-9


def _p_value(these, those) -> float:
    rows, columns = sorted(set(these)), sorted(set(those))
    counts = Counter(zip(these, those, strict=True))
    return float(chi2_contingency([[counts[row, column] for column in columns] for row in rows]).pvalue)


def test_splits_and_seeds_share_no_clip_and_nothing_with_shapes():
    specs = [f"moving?n=20&seed={seed}&split={split}" for split in ("train", "val", "test") for seed in (0, 1)]
    clips = [open_world(spec).clip(j) for spec in specs for j in range(20)]
    frames = [frame.tobytes() for clip in clips for frame in clip.frames]
    assert len(set(frames)) == len(frames)
    captions = [clip.caption for clip in clips]
    assert len(set(captions)) == len(captions)
    labels = {tuple(open_world(spec).record(8 * j).label for j in range(20)) for spec in specs}
    labels |= {tuple(open_world(spec.replace("moving", "shapes")).record(j).label for j in range(20)) for spec in specs}
    assert len(labels) == 12


def test_labels_run_through_all_classes_once_in_48_clips():
    world = open_world("moving?n=96")
    labels = [world.record(i).label for i in range(96 * 8)]
    assert labels == [label for label in labels[::8] for _ in range(8)]
    assert sorted(labels[: 48 * 8 : 8]) == sorted(labels[48 * 8 :: 8]) == list(range(48))


OPTIONS = st.fixed_dictionaries(
    {"n_frames": st.integers(2, 12), "image_px": st.sampled_from([32, 64, 80]), "seed": st.integers(0, 99)},
    optional={"slow": st.floats(0.05, 0.5), "split": st.sampled_from(["train", "val", "test"])},
)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(options=OPTIONS, share=st.floats(0.05, 1), j=st.integers(0, 10**6))
def test_whatever_the_options_the_thing_stays_inside(options, share, j):
    fast = max(0.51, share * 22.0 / (options["n_frames"] - 1) - 1e-9)
    world = MovingWorld(n=10**6 + 1, **({"slow": 0.5} | options | {"fast": fast}))
    again = open_world(world.spec)
    assert again.options == world.options
    assert again.fingerprint() == world.fingerprint()
    clip = world.clip(j)
    assert np.array_equal(again.clip(j).frames, clip.frames)
    mask = clip.masks["object"]
    assert mask.any(axis=(1, 2)).all()
    assert not mask[:, [0, -1]].any()
    assert not mask[:, :, [0, -1]].any()
    assert set(clip.masks) <= set(world.concepts)
    assert all(f"{family}:{value}" in clip.masks for family, value in clip.attributes.items())
    assert np.array_equal(mask, ~clip.masks[f"ground:{clip.attributes['ground']}"])
    for family in ("position", "size"):  # each frame has one of each
        each = [mask for concept, mask in clip.masks.items() if concept.startswith(f"{family}:")]
        assert np.array_equal(np.sum(each, axis=0), mask)


def test_the_things_that_reach_farthest_stay_inside_on_the_longest_ways():
    world = open_world("moving?n=1200&fast=3.14")
    checked = 0
    for j in range(1200):
        factors = world.factors(8 * j + 4)
        if factors.shape in ("triangle", "hourglass") and factors.radius > 15:
            for t in (0, 7):
                mask = world.scene(8 * j + t).masks["object"]
                assert not mask[[0, -1]].any()
                assert not mask[:, [0, -1]].any()
            checked += 1
    assert checked > 50


def test_positions_and_sizes_are_those_of_the_frame():
    world = open_world("moving?n=60")
    positions, sizes = set(), set()
    for j in range(60):
        motion = world.motion(j)
        for t in range(N_FRAMES):
            factors, (x, y, radius) = world.factors(8 * j + t), motion.at(t)
            # By hand: thirds of the picture end half way between centres 20, 32, 44, radii between 10, 13.5, 16.5.
            row = "top" if y < 26 else "bottom" if y > 38 else ""
            column = "left" if x < 26 else "right" if x > 38 else ""
            assert factors.position == (f"{row} {column}".strip() or "centre")
            assert factors.size == ("small" if radius < 11.75 else "medium" if radius < 15 else "large")
        positions.add(len({world.factors(8 * j + t).position for t in range(N_FRAMES)}))
        sizes.add(len({world.factors(8 * j + t).size for t in range(N_FRAMES)}))
    assert max(positions) >= 2
    assert max(sizes) == 3


def test_captions_tell_what_stays():
    world = open_world("moving?n=60")
    said = {world.record(8 * j).caption for j in range(60)}
    assert world.record(8).caption == "a large orange plain cross moving left fast on rock"
    assert any("an orange" in caption for caption in said) or not any("a orange" in caption for caption in said)
    for j in range(60):
        clip = world.clip(j)
        words = [clip.attributes.get(family) for family in ("size", "colour", "texture", "shape")]
        thing = " ".join(word for word in words if word)
        assert f" {thing} " in clip.caption
        assert clip.caption.split()[0] == ("an" if thing[0] in "aeiou" else "a")
        assert {"slow": "slowly", "fast": "fast", None: "lying still"}[clip.attributes.get("speed")] in clip.caption


def four_frames() -> Clip:
    """4 frames of 8 x 8: the thing is the left half in frames 0 and 1, one pixel at the top left in frame 2."""
    mask = np.zeros((4, 8, 8), dtype=bool)
    mask[:2, :, :4] = True
    mask[2, 0, 0] = True
    masks = {"object": mask, "colour:red": mask, "ground:land": ~mask}
    frames = np.zeros((4, 8, 8, 3), dtype=np.uint8)
    return Clip(frames, 0, "", {}, masks, np.zeros((4, 2)), np.ones(4), (0.0, 0.0))


def test_clip_coverage_worked_by_hand():
    concepts = ("object", "colour:red", "ground:land", "colour:blue")
    coverage = clip_coverage(four_frames(), concepts, 4, 2)
    assert coverage.shape == (4, 2, 2, 2)
    # The first tubelet: the left patches whole. The second: one pixel of the 2 * 4 * 4 of the first patch.
    expected = torch.tensor([[[1, 0], [1, 0]], [[1 / 32, 0], [0, 0]]])
    assert torch.equal(coverage[0], expected)
    assert torch.equal(coverage[1], expected)
    assert torch.equal(coverage[2], 1 - expected)
    assert not coverage[3].any()
    for wrong, sentence in (
        ((3, 2), "patch_px must divide the frames' sides 8 and 8, got 3"),
        ((4, 3), "tubelet must"),
    ):
        with pytest.raises(ValueError, match=sentence):
            clip_coverage(four_frames(), concepts, *wrong)


def test_clip_coverage_of_single_frames_is_the_patch_coverage_of_each():
    world = open_world("moving?n=5")
    for j in range(5):
        coverage = clip_coverage(world.clip(j), world.concepts, 8, 1)
        each = torch.stack([world.patch_coverage(8 * j + t, 8) for t in range(8)], dim=1)
        assert torch.equal(coverage, each)
        assert torch.allclose(clip_coverage(world.clip(j), world.concepts, 8, 4)[:, 1], each[:, 4:].mean(dim=1))


def test_truth_is_told_of_frames():
    world = open_images("world:moving?n=6")
    assert isinstance(world, Scenes)
    truth = Truth.of_world(world, range(len(world)), grid=(8, 8))
    column = truth.concepts.index("motion:left")
    assert truth.images[:, column].tolist() == [world.motion(i // 8).motion == "left" for i in range(48)]
    assert truth.images[:, column].any()


def test_spec_and_pickle_open_the_same_world_again():
    world = open_images("world:moving?seed=2&n=7&fast=3", split="test")
    assert world.spec == "world:moving?n=7&seed=2&split=test&image_px=64&n_frames=8&fast=3.0"
    for again in (open_images(world.spec), pickle.loads(pickle.dumps(world))):
        assert again.fingerprint() == world.fingerprint()
        assert np.array_equal(np.asarray(again.load(50)), np.asarray(world.load(50)))
    assert len({open_world(f"moving?{o}").fingerprint() for o in ("", "n_frames=4", "slow=0.5", "fast=2", "n=9")}) == 5


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        ("n_frames=1", r"n_frames must be in 2\.\.64, got 1"),
        ("slow=0", r"slow must be above 0 and below fast, got slow=0\.0 and fast=2\.5"),
        ("slow=3", "slow must be above 0 and below fast, got slow=3"),
        ("fast=nan", "slow must be above 0 and below fast"),
        ("fast=4", r"for 22 pixels of 64, but fast=4 for 7 steps is 28: fast may be 3\.14 at most"),
        ("n_frames=16", r"fast=2\.5 for 15 steps is 37\.5: fast may be 1\.46 at most"),
        (
            "clutter=3",
            "world 'moving' has no option 'clutter=3'. Known: n, seed, split, image_px, n_frames, slow, fast",
        ),
        ("n=0", "n must be at least 1"),
    ],
)
def test_bad_options_get_a_sentence(spec, sentence):
    with pytest.raises(ValueError, match=sentence):
        open_world(f"moving?{spec}")
    if "fast may be" in sentence:
        most = sentence.split("fast may be ")[1].split()[0].replace("\\", "")
        assert len(open_world(f"moving?{spec.replace('fast=4', '')}".rstrip("?&"), fast=float(most))) > 0


def test_clips_and_frames_outside_are_refused():
    world = open_world("moving?n=3")
    for call in (world.scene, world.load, world.record, world.factors, world.part_id):
        for i in (-1, 24):
            with pytest.raises(IndexError, match=rf"position must be in 0\.\.23, got {i}"):
                call(i)
    for call in (world.clip, world.motion):
        for j in (-1, 3):
            with pytest.raises(IndexError, match=rf"clip must be in 0\.\.2, got {j}"):
                call(j)


def test_clip_sheet_has_a_row_for_each_clip():
    world = open_world("moving?n=5")
    sheet = clip_sheet(world, [4, 1], tile_px=64)
    assert sheet.size == (130 + 8 * 68 + 4, 2 * 68 + 4)
    for row, j in enumerate((4, 1)):
        frames, top = world.clip(j).frames, 4 + 68 * row
        for t in range(8):
            tile = np.asarray(sheet)[top : top + 64, 130 + 68 * t : 130 + 68 * t + 64]
            assert np.array_equal(tile, frames[t])
        assert (np.asarray(sheet)[top : top + 64, :120] < 128).any()  # the caption
    with pytest.raises(ValueError, match="clips must name at least one clip"):
        clip_sheet(world, [])
