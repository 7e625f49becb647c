"""Masks of the world "shapes" against plain geometry: discs and even-odd polygons, sampled 8 x 8 points a pixel.

Nothing here is the renderer's: outlines are written down as corners and radii, turns as angles, coverage is counted.
"""

from itertools import pairwise

import numpy as np
import pytest

from vitrail.images import open_world
from vitrail.images.worlds import mask_sheet
from vitrail.images.worlds.factors import COLOURS, ORIENTATIONS
from vitrail.images.worlds.sheet import LAYER_TINTS

FINE = 8
TOOTH = [(0.46 if k % 2 else 1.06, np.pi * k / 5) for k in range(10)]  # the star: valleys and tips, clockwise
# In units of the radius, y down: each part is (corners) or (x, y, radius of a disc); parts after None are cut out.
OUTLINES = {
    "circle": [(0, 0, 0.95)],
    "ring": [(0, 0, 0.99), None, (0, 0, 0.45)],
    "crescent": [(0.19, 0, 0.98), None, (0.69, 0, 0.78)],
    "drop": [(0, 0.33, 0.65), [(0, -1.05), (0.575, 0.02), (-0.575, 0.02)]],
    "heart": [(-0.46, -0.36, 0.5), (0.46, -0.36, 0.5), [(0, -0.556), (0.951, -0.151), (0, 0.8), (-0.951, -0.151)]],
    "square": [[(-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)]],
    "diamond": [[(0, -1), (0.72, 0), (0, 1), (-0.72, 0)]],
    "triangle": [[(0, -1), (0.95, 0.72), (-0.95, 0.72)]],
    "star": [[(r * np.sin(angle), -r * np.cos(angle)) for r, angle in TOOTH]],
    "cross": [
        [(-0.95, -0.34), (0.95, -0.34), (0.95, 0.34), (-0.95, 0.34)],
        [(-0.34, -0.95), (0.34, -0.95), (0.34, 0.95), (-0.34, 0.95)],
    ],
    "arrow": [
        [(0.05, -0.95), (1, 0), (0.05, 0.95)],
        [(-0.95, -0.36), (0.6, -0.36), (0.6, 0.36), (-0.95, 0.36)],
    ],
    "hourglass": [[(-0.85, -0.9), (0.85, -0.9), (0, 0.12)], [(0, -0.12), (0.85, 0.9), (-0.85, 0.9)]],
}


def in_polygon(x, y, corners) -> np.ndarray:
    """Even-odd: a ray to the right crosses the outline an odd number of times."""
    inside = np.zeros(np.broadcast(x, y).shape, dtype=bool)
    for (x0, y0), (x1, y1) in pairwise([*corners, corners[0]]):
        if y0 != y1:
            inside ^= ((y0 > y) != (y1 > y)) & (x < x0 + (y - y0) * (x1 - x0) / (y1 - y0))
    return inside


def coverage(shape: str, x: float, y: float, radius: float, degrees: float, image_px: int) -> np.ndarray:
    """Share of each pixel inside the outline; x, y, radius in pixels of 64, degrees clockwise."""
    columns, rows = (
        slice(max(0, int((at - 1.3 * radius) * image_px / 64)), int((at + 1.3 * radius) * image_px / 64) + 1)
        for at in (x, y)
    )
    points = (np.arange(image_px * FINE) + 0.5) * 64 / (image_px * FINE)
    points_x, points_y = (points[part.start * FINE : part.stop * FINE] for part in (columns, rows))
    cos, sin = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    across, down = (points_x[None, :] - x) / radius, (points_y[:, None] - y) / radius
    u, v = across * cos + down * sin, down * cos - across * sin
    inside, keep = np.zeros(u.shape, dtype=bool), True
    for part in OUTLINES[shape]:
        if part is None:
            keep = False
            continue
        within = in_polygon(u, v, part) if isinstance(part, list) else np.hypot(u - part[0], v - part[1]) <= part[2]
        inside = inside | within if keep else inside & ~within
    page = np.zeros((image_px, image_px))
    shares = inside.reshape(inside.shape[0] // FINE, FINE, inside.shape[1] // FINE, FINE).mean(axis=(1, 3))
    page[rows, columns] = shares
    return page


def agreement(mask: np.ndarray, share: np.ndarray) -> float:
    """Intersection over union. An edge along a row of pixel centres covers just half of them: those do not count."""
    decided, expected = np.abs(share - 0.5) > 1 / 16, share > 0.5
    return (mask & expected & decided).sum() / ((mask | expected) & decided).sum()


def angle(factors, turn: float) -> float:
    quarters = 0 if factors.orientation is None else ORIENTATIONS[factors.shape][factors.orientation]
    return 15.0 * round(turn * 32) / 32 + 90.0 * quarters  # turns are steps of a table


def whole_coverage(factors, image_px: int) -> np.ndarray:
    return coverage(factors.shape, factors.x, factors.y, factors.radius, angle(factors, factors.turn), image_px)


def test_the_witness_on_a_square_worked_by_hand():
    # Radius 10 at the centre, not turned: 16 x 16 pixels from 24 to 40, each whole.
    expected = np.zeros((64, 64))
    expected[24:40, 24:40] = 1
    assert np.array_equal(coverage("square", 32, 32, 10, 0, 64), expected)
    # A quarter to the right takes the tip of the arrow from the right, x = 32 + 10, to the bottom.
    to_the_right, down = coverage("arrow", 32, 32, 10, 0, 64), coverage("arrow", 32, 32, 10, 90, 64)
    assert to_the_right[31:33, 41].min() > 0.4
    assert down[41, 31:33].min() > 0.4
    assert to_the_right[:, 42:].max() == down[42:].max() == 0


@pytest.mark.parametrize("image_px", [64, 128])
@pytest.mark.parametrize("shape", OUTLINES)
def test_masks_are_what_plain_geometry_covers(shape, image_px):
    sizes, checked = set(), 0
    for seed in range(3):
        world = open_world(f"shapes?n=480&seed={seed}&image_px={image_px}&orientation=0.5")
        of_shape = [i for i in range(480) if world.factors(i).shape == shape][:6]
        for i in of_shape:
            factors, mask = world.factors(i), world.scene(i).masks[f"shape:{shape}"]
            share = whole_coverage(factors, image_px)
            assert agreement(mask, share) >= 0.97, (seed, i)
            # Where they differ the outline runs through the middle of the pixel, or a corner lies in it.
            assert np.abs(share[mask != (share > 0.5)] - 0.5).max(initial=0) < 0.36, (seed, i)
            # The area is that of the pixels' shares, to within a quarter of the pixels along the outline.
            assert abs(mask.sum() - share.sum()) < 0.25 * (mask & ~shrunk(mask)).sum(), (seed, i)
            sizes.add(factors.size)
            checked += 1
    assert checked == 18
    assert len(sizes) == 3


def test_masks_of_copies_are_what_plain_geometry_covers():
    world = open_world("shapes?n=48&count=4&orientation=1&image_px=128")
    checked = 0
    for i in range(48):
        factors, masks = world.factors(i), world.scene(i).masks
        thing = whole_coverage(factors, 128)
        copies = [coverage(factors.shape, c.x, c.y, 5.0, angle(factors, c.turn), 128) for c in factors.copies]
        for mask, share in ((masks["object"], sum(copies, thing)), (masks[f"size:{factors.size}"], thing)):
            assert agreement(mask, share) >= 0.95, i  # copies have a radius of 10 pixels
        checked += len(copies)
    assert checked > 40


def shrunk(mask: np.ndarray) -> np.ndarray:
    """Without the pixels that have a neighbour outside."""
    padded = np.pad(mask, 1, mode="edge")
    h, w = mask.shape
    return np.logical_and.reduce([padded[y : y + h, x : x + w] for y in range(3) for x in range(3)])


@pytest.mark.parametrize("image_px", [64, 128])
def test_pixels_have_the_tone_of_a_plain_thing_inside_its_mask_and_nowhere_else(image_px):
    world = open_world(f"shapes?n=480&seed=4&image_px={image_px}")
    checked, strays, outside = 0, 0, 0
    for i in range(480):
        factors = world.factors(i)
        if factors.texture != "plain":
            continue
        scene = world.scene(i)
        tone = (np.array(COLOURS[factors.colour][0]) + factors.tone_jitter) * factors.brightness
        # Noise is 8 grey levels at most, rounding a half.
        of_tone = (np.abs(scene.image - np.clip(tone, 0, 255)) <= 8.5).all(axis=2)
        mask = scene.masks["object"]
        assert of_tone[shrunk(shrunk(mask))].all()  # the heart's notch reaches between two pixels of the edge
        far = shrunk(~mask)
        strays += int((of_tone & far).sum())
        outside += int(far.sum())
        checked += 1
    assert checked == 120
    assert strays < 0.001 * outside


NO_CLUTTER = "shapes?words=0.7&wrong_words=0.5&occlusion=0.3&count=4&orientation=0.8&background_bias=0.5"


@pytest.mark.parametrize("spec", ["shapes?", NO_CLUTTER, NO_CLUTTER + "&style=drawing", NO_CLUTTER + "&clutter=6"])
def test_masks_part_the_picture(spec):
    world = open_world(f"{spec}&n=60")
    for i in range(60):
        masks = world.scene(i).masks
        layers = [masks["object"], *(m for c, m in masks.items() if c.partition(":")[0] == "background")]
        layers += [masks[layer] for layer in ("clutter", "occluder", "written") if layer in masks]
        assert (np.sum(layers, axis=0) == 1).all()
        assert spec != "shapes?" or len(layers) == 2  # thing and ground are all there is
        ground = next(mask for concept, mask in masks.items() if concept.startswith("ground:"))
        assert np.array_equal(ground, layers[1])
        the_thing = next(mask for concept, mask in masks.items() if concept.startswith("position:"))
        assert not (the_thing & ~masks["object"]).any()


def test_mask_sheet_tints_every_pixel_by_what_it_shows():
    world = open_world("shapes?n=8&clutter=4&words=1&occlusion=0.3&count=4")
    sheet = np.asarray(mask_sheet(world, range(8), columns=4, tile_px=64)).astype(float)
    assert sheet.shape == (22 + 2 * 110, 4 * 140 + 6, 3)
    for i in range(8):
        row, column = divmod(i, 4)
        left, top = 6 + column * 140, 22 + row * 110
        scene = world.scene(i)
        assert np.array_equal(sheet[top : top + 64, left : left + 64], scene.image)
        tinted = sheet[top : top + 64, left + 66 : left + 66 + 64]
        tint = (tinted - 0.35 * scene.image.mean(axis=2, keepdims=True)) / 0.65
        shown = np.argmin([np.abs(tint - other).sum(axis=2) for other in LAYER_TINTS.values()], axis=0)
        assert np.array_equal(shown == list(LAYER_TINTS).index("position"), scene.masks[position_of(scene)])
        for layer in ("written", "occluder", "clutter"):
            assert np.array_equal(shown == list(LAYER_TINTS).index(layer), scene.masks[layer])
    with pytest.raises(ValueError, match="positions must name at least one picture"):
        mask_sheet(world, [])


def position_of(scene) -> str:
    return f"position:{scene.attributes['position']}"
