"""The dials of the world "shapes": each plants what it says, as often as it says, and nothing else."""

import hashlib
from collections import Counter
from itertools import combinations, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import label as connected_parts
from scipy.stats import binomtest, chi2_contingency
from scipy.stats.contingency import association

from vitrail.images import open_world
from vitrail.images.worlds.draws import Draws
from vitrail.images.worlds.factors import CLASSES, COLOURS, HOMES, ORIENTATIONS, copies_beside, own_colour
from vitrail.images.worlds.silhouettes import SILHOUETTES

ALL_ON = (
    "shapes?clutter=4&background_bias=0.5&colour_bias=0.5&words=0.7&wrong_words=0.5&label_noise=0.3&occlusion=0.3"
    "&count=4&orientation=0.8"
)
OTHER_FONTS = "shapes?words=1&fonts=aileron,aileron-large,aileron-capitals,dejavu-serif,dejavu-mono"
# Over label, caption, attributes, pixels and masks of the first 24 scenes. See FROZEN in test_worlds.py.
FROZEN = {
    "shapes?background_bias=0.9": "638dfc8c06fcaa3109185b10ddead314c41ded6eb92e1dd70b44f300f14a06ab",
    "shapes?colour_bias=0.9": "aefffa63a3985456b8173aea1519d0dceab889ede79bd13f2cba22cc6bb2081a",
    "shapes?words=0.8&wrong_words=0.5": "e127c8a2a4b7cc1fae867bf518cfe422441095a6aa3ae662621ec70b5fcac869",
    "shapes?words=1&vocabulary=class&image_px=96": "93b520c97332b4b3e7a49d5beb53d6d0c33a6d903869a72797c94e566bf5a15b",
    "shapes?words=1&vocabulary=cat,dog": "315dd70053060479e99a189233082aa6b73a2c16df9953f7498bbd1b33bbac3f",
    "shapes?words=1&wrong_words=0.5&vocabulary=any": "391acc0899173652ce67c1cc40bfc952cc0cd7b5310001e2e6cb6df7ad015ab0",
    OTHER_FONTS: "778338edd9b9d2f2088d7974e6b906b9855522a80671e3530d0458be65589379",
    "shapes?words=1&vocabulary=to,be&word_scale=2": "5ae32c33dc47bf871172b2082b40e36343a41796acfff264dd46f3c3313d97db",
    "shapes?label_noise=0.3": "9158e04da4093bd3a3512b697075e9c0244b7762ae00677bf019946e1a935b3b",
    "shapes?occlusion=0.4": "f074dab683769de29623a57c25abb21fe9bdb03960bbd514e50acb53eee0921a",
    "shapes?count=4": "247b61ccff230426c2b8c7d4d19e0ad41c661d91153c5562894ffdeaa3541af1",
    "shapes?orientation=1": "39deb61111364799204f160f42b1e5ff368c130c991bc7fc8581e782704edf6f",
    "shapes?palette=pastel": "dc33f6a0d676e4c98c81a1f0aaf82423683974a2a8f5f7cbe13de3ba9dd0e75c",
    "shapes?palette=grey": "02140557b951b6d1d3a1880c362f03b1abc4d3e53fcfc76a5bc8ac0b0b398313",
    "shapes?style=drawing": "607f1e1d26b04ab0de243e6f7db2c93735f0c741dfc82c0c7170d17af3cdb612",
    "shapes?words=1&captions=short": "1ac9f7966645f9cc53b5a906a655b66a542ef63070f947e8ee29d2274e6ecaf0",
    ALL_ON: "7317b9aedfeec7e3e800f631e2824cdbfd22eedc1a46313ee4d86b876a12be34",
    ALL_ON + "&style=drawing&palette=pastel": "0f1f0fbbf9d39864782133417b19998d322394995d1fbebf0034b94688481722",
}
# "shapes" before it had dials: stores made then must be known again.
FINGERPRINTS = {
    "shapes": "2821fcfd36b28a92618a8740b29b7c34f32aaf60793d59e218ccbc4ae1766c24",
    "shapes?n=48&seed=3&split=test&image_px=32": "8bbd3ce6af73be0f98dc1df690583b908a58e155bef9d0fb8199a82cc3d747e6",
    "shapes?clutter=5": "5413696ec2541e0a28086ba5872809fa63ffb529c732845c4eacbe0b625f5ee3",
}


def scenes_digest(spec: str, n: int = 24) -> str:
    world, digest = open_world(spec), hashlib.sha256()
    for i in range(n):
        scene = world.scene(i)
        digest.update(f"{scene.label}|{scene.caption}|{dict(scene.attributes)}|".encode() + scene.image.tobytes())
        for concept, mask in scene.masks.items():
            digest.update(concept.encode() + mask.tobytes())
    return digest.hexdigest()


@pytest.mark.parametrize("spec", FROZEN)
def test_dialled_scenes_are_what_they_always_were(spec):
    assert scenes_digest(spec) == FROZEN[spec]


@pytest.mark.parametrize("spec", FINGERPRINTS)
def test_dials_that_are_off_leave_spec_and_fingerprint_alone(spec):
    world = open_world(spec)
    assert world.fingerprint() == FINGERPRINTS[spec]
    named = [part.split("=")[0] for part in world.spec.partition("?")[2].split("&")]
    assert named == ["n", "seed", "split", "image_px", "clutter"]


def test_spec_names_the_dials_that_are_on():
    world = open_world("shapes?n=5&words=1&background_bias=0.9&palette=plain")
    assert world.spec == "world:shapes?n=5&seed=0&split=train&image_px=64&clutter=0&background_bias=0.9&words=1.0"
    assert world.fingerprint() == open_world("shapes", n=5, background_bias=0.9, words=1).fingerprint()
    prints = {open_world(f"shapes?{dial}").fingerprint() for dial in ("", "words=1", "words=0.5", "style=drawing")}
    assert len(prints) == 4


def seen(spec: str, n: int = 4800):
    world = open_world(spec, n=n)
    return [world.factors(i) for i in range(n)]


def likely(hits: int, n: int, share: float) -> bool:
    return binomtest(hits, n, share).pvalue > 1e-4


@pytest.mark.parametrize("bias", [0.0, 0.5, 0.9, 1.0])
def test_background_bias_is_the_correlation_of_home_and_ground(bias):
    factors = seen(f"shapes?background_bias={bias}")
    at_home = sum(f.home == f.ground for f in factors)
    assert likely(at_home, len(factors), 0.5 + 0.5 * bias)
    assert at_home == sum(not f.minority for f in factors)
    table = np.array(
        [
            [sum(f.home == home and f.ground == ground for f in factors) for ground in ("land", "water")]
            for home in HOMES_OF
        ]
    )
    assert association(table, "cramer") == pytest.approx(bias, abs=0.04)
    # Which land, which water, is as even as before: three backgrounds of a sixth each.
    counts = Counter(f.background for f in factors)
    assert len(counts) == 6
    assert all(likely(count, len(factors), 1 / 6) for count in counts.values())


HOMES_OF = ("land", "water")


def test_groups_of_a_dialled_world():
    factors = seen("shapes?background_bias=0.9")
    groups = Counter(f.group for f in factors)
    # Waterbirds: 95 % of either kind at home.
    for home in HOMES_OF:
        for ground in HOMES_OF:
            share = 0.5 * (0.95 if home == ground else 0.05)
            assert likely(groups[f"{home} thing on {ground}"], len(factors), share)
    assert sum(groups.values()) == len(factors)


@pytest.mark.parametrize("bias", [0.0, 0.6, 1.0])
def test_colour_bias_gives_classes_their_own_colour(bias):
    factors = seen(f"shapes?colour_bias={bias}")
    own = sum(not f.colour_minority for f in factors)
    assert likely(own, len(factors), bias + (1 - bias) / 8)
    assert all(likely(count, len(factors), 1 / 8) for count in Counter(f.colour for f in factors).values())


def test_homes_and_own_colours_are_spread_evenly():
    assert Counter(HOMES.values()) == {"land": 6, "water": 6}
    colours = Counter(own_colour(*name.split()[::-1]) for name in CLASSES)
    assert colours == dict.fromkeys(COLOURS, 6)
    at_home = Counter((own_colour(shape, texture), HOMES[shape]) for texture, shape in map(str.split, CLASSES))
    assert set(at_home.values()) == {3}  # a planted colour says nothing of the home
    kinds = [Counter(len(ORIENTATIONS.get(s, ())) for s in SILHOUETTES if HOMES[s] == home) for home in HOMES_OF]
    assert kinds[0] == kinds[1]
    for shape in SILHOUETTES:
        assert len({own_colour(shape, texture) for texture in ("plain", "striped", "dotted", "checked")}) == 4


def test_a_dial_takes_hold_of_its_scenes_only():
    plain, half, full = (seen(f"shapes?background_bias={bias}", 600) for bias in (0, 0.5, 1))
    for a, b, c in zip(plain, half, full, strict=True):
        assert c.home == c.ground
        if not a.minority:
            assert a.background == b.background == c.background
        assert b.background in (a.background, c.background)
    # The others decide what they decided, whatever else is on.
    on = seen(ALL_ON, 600)
    alone = {dial: seen(f"shapes?{dial}", 600) for dial in ("background_bias=0.5", "colour_bias=0.5", "count=4")}
    assert [f.background for f in on] == [f.background for f in alone["background_bias=0.5"]]
    assert [f.colour for f in on] == [f.colour for f in alone["colour_bias=0.5"]]
    assert [f.copies for f in on] == [f.copies for f in alone["count=4"]]
    assert [(f.size, f.position, f.x, f.turn) for f in on] == [(f.size, f.position, f.x, f.turn) for f in plain]


def test_words_are_as_frequent_and_as_wrong_as_dialled():
    factors = seen("shapes?words=0.6&wrong_words=0.25")
    written = [f for f in factors if f.word]
    assert likely(len(written), len(factors), 0.6)
    assert likely(sum(f.word_is_wrong for f in written), len(written), 0.25)
    assert all((f.word != f.shape) == f.word_is_wrong for f in written)
    wrong = Counter(f.word for f in written if f.word_is_wrong)
    assert all(likely(wrong[shape], sum(wrong.values()), 1 / 12) for shape in SILHOUETTES)
    fonts = Counter(f.font for f in written)
    assert all(likely(count, len(written), 1 / 3) for count in fonts.values())
    assert not any(f.word_is_wrong for f in factors if not f.word)


def test_vocabularies():
    right = seen("shapes?words=1&vocabulary=class", 200)
    assert all(f.word == f.class_name for f in right)
    wrong = seen("shapes?words=1&vocabulary=class&wrong_words=1", 200)
    assert all(f.word in CLASSES and f.word != f.class_name for f in wrong)
    assert all(f.word == f.colour for f in seen("shapes?words=1&vocabulary=colour&colour_bias=0.5", 200))
    pets = Counter(f.word for f in seen("shapes?words=1&vocabulary=cat,dog", 1000))
    assert set(pets) == {"cat", "dog"}
    assert likely(pets["cat"], 1000, 0.5)


def test_a_word_of_any_vocabulary_names_one_of_four_things_evenly():
    families = ("shape", "texture", "colour", "background")
    for spec, wrong in (
        ("shapes?words=1&vocabulary=any", False),
        ("shapes?words=1&vocabulary=any&wrong_words=1", True),
    ):
        world, factors = open_world(spec), seen(spec, 2400)
        words = {name: family for family in families for name in {getattr(f, family) for f in factors}}
        counts = Counter(words[f.word] for f in factors)
        assert all(likely(counts[family], 2400, 1 / 4) for family in families)
        assert all((f.word == getattr(f, words[f.word])) != wrong for f in factors)
        assert [c for c in world.concepts if c.startswith("word:")] == [
            f"word:{name}" for name in world.vocabulary_words
        ]
        assert set(world.vocabulary_words) == set(words)  # 12 + 4 + 8 + 6 names
        assert len(words) == 30


def test_fonts_are_those_of_the_list_evenly_and_change_nothing_else():
    spec = "shapes?words=0.7&wrong_words=0.3"
    world, factors = open_world(f"{spec}&fonts=dejavu-serif,aileron"), seen(f"{spec}&fonts=dejavu-serif,aileron")
    written = Counter(f.font for f in factors if f.word)
    assert likely(written["aileron"], sum(written.values()), 1 / 2)
    assert set(written) == {"aileron", "dejavu-serif"}
    assert [c for c in world.concepts if c.startswith("font:")] == ["font:dejavu-serif", "font:aileron"]
    assert [(f.word, f.word_is_wrong, f.colour) for f in factors] == [
        (f.word, f.word_is_wrong, f.colour) for f in seen(spec)
    ]
    assert open_world(world.spec).font_names == ("dejavu-serif", "aileron")


def test_scaled_words_are_inside_the_picture_and_four_times_as_many_pixels():
    """Font and word of a picture do not change with the scale, so the counts of pixels compare one by one."""
    spec = "shapes?n=40&words=1&vocabulary=cat,dog"
    for i in range(40):
        small, large = (open_world(f"{spec}&word_scale={scale}").scene(i).masks["written"] for scale in (1, 2))
        assert large.sum() == 4 * small.sum()


def test_label_noise_moves_labels_and_nothing_that_is_shown():
    plain, noisy = open_world("shapes?n=4800"), open_world("shapes?n=4800&label_noise=0.3")
    wrong = [(plain.label(i), noisy.label(i)) for i in range(4800) if plain.label(i) != noisy.label(i)]
    assert likely(len(wrong), 4800, 0.3)
    steps = Counter((b - a) % 48 for a, b in wrong)
    assert set(steps) == set(range(1, 48))  # each of the 47 others
    assert all(likely(count, len(wrong), 1 / 47) for count in steps.values())
    for i in range(60):
        a, b = plain.scene(i), noisy.scene(i)
        assert np.array_equal(a.image, b.image)
        assert a.caption == b.caption
        assert noisy.true_label(i) == plain.label(i)
        assert b.attributes["class"] == CLASSES[plain.label(i)]
        assert noisy.record(i).class_name == CLASSES[b.label]


def test_what_no_dial_ties_together_is_independent():
    factors = seen("shapes?words=0.5&wrong_words=0.5&count=4&orientation=1&occlusion=0.5&label_noise=0.5", 4800)
    columns = {
        "shape": [f.shape for f in factors],
        "colour": [f.colour for f in factors],
        "size": [f.size for f in factors],
        "position": [f.position for f in factors],
        "background": [f.background for f in factors],
        "copies": [len(f.copies) for f in factors],
        "written": [f.word is not None for f in factors],
        "wrong": [f.word_is_wrong for f in factors],
        "bar": [int(4 * f.bar[1]) for f in factors],
        "bar turn": [int(4 * f.bar[2]) for f in factors],
        "label is noisy": [
            world.label(i) != world.true_label(i)
            for world in [open_world("shapes?label_noise=0.5", n=4800)]
            for i in range(4800)
        ],
    }
    tested = 0
    for this, that in combinations(columns, 2):
        if {this, that} == {"written", "wrong"}:
            continue
        assert chi2_contingency(_crossed(columns[this], columns[that])).pvalue > 1e-4, (this, that)
        tested += 1
    assert tested == 54
    drops = [f for f in factors if f.shape in ("drop", "arrow", "heart", "crescent")]
    for family in ("colour", "size", "position", "background"):
        table = _crossed([f.orientation for f in drops], [getattr(f, family) for f in drops])
        assert chi2_contingency(table).pvalue > 1e-4
    # The witness sees what is planted.
    planted = seen("shapes?colour_bias=0.3")
    assert chi2_contingency(_crossed([f.class_name for f in planted], [f.colour for f in planted])).pvalue < 1e-9


def _crossed(these, those) -> np.ndarray:
    rows, columns = sorted(set(these)), sorted(set(those))
    counts = Counter(zip(these, those, strict=True))
    return np.array([[counts[row, column] for column in columns] for row in rows])


def test_letters_lie_where_they_were_placed_by_hand():
    # "hi" in the regular font, from the table by hand: H, a gap, I.
    drawn = ["#..#.###", "#..#..#.", "#..#..#.", "####..#.", "#..#..#.", "#..#..#.", "#..#.###"]
    bitmap = np.array([[mark == "#" for mark in row] for row in drawn])
    world = open_world("shapes?n=60&words=1&vocabulary=hi&occlusion=0.4&clutter=3")
    checked = 0
    for i in range(60):
        factors = world.factors(i)
        if factors.font != "regular":
            continue
        scene = world.scene(i)
        expected = np.zeros((64, 64), dtype=bool)
        expected[factors.word_y : factors.word_y + 7, factors.word_x : factors.word_x + 8] = bitmap
        assert np.array_equal(scene.masks["word:hi"], expected)
        assert np.array_equal(scene.masks["written"], expected)
        tones = scene.image[expected].astype(int)
        assert (tones < 40).all() or (tones > 180).all()
        assert scene.attributes["word"] == "hi"
        assert 'with the word "hi" written over it' in scene.caption
        checked += 1
    assert checked > 10


def test_letters_of_larger_pictures_are_whole_squares():
    small, large = open_world("shapes?n=20&words=1"), open_world("shapes?n=20&words=1&image_px=192")
    for i in range(20):
        grown = np.kron(small.scene(i).masks["written"], np.ones((3, 3), dtype=bool))
        assert np.array_equal(large.scene(i).masks["written"], grown)


def test_words_change_only_the_pixels_of_their_letters():
    plain, written = open_world("shapes?n=40"), open_world("shapes?n=40&words=1&wrong_words=1")
    for i in range(40):
        a, b = plain.scene(i), written.scene(i)
        letters = b.masks["written"]
        assert np.array_equal(a.image[~letters], b.image[~letters])
        assert np.array_equal(b.masks["object"], a.masks["object"] & ~letters)


@pytest.mark.parametrize("share", [0.1, 0.35, 0.8])
def test_the_bar_hides_the_share_it_should(share):
    plain, barred = open_world("shapes?n=150"), open_world(f"shapes?n=150&occlusion={share}")
    for i in range(150):
        whole, left = plain.scene(i).masks["object"], barred.scene(i).masks["object"]
        assert not (left & ~whole).any()
        hidden = int(whole.sum()) - int(left.sum())
        assert abs(hidden - share * whole.sum()) <= 2
        occluder = barred.scene(i).masks["occluder"]
        assert np.array_equal(whole & occluder, whole & ~left)
        assert share < 0.3 or connected_parts(occluder)[1] == 1


def test_a_thing_hidden_altogether_is_not_in_the_picture():
    world = open_world("shapes?n=10&occlusion=1")
    for i in range(10):
        scene = world.scene(i)
        assert "object" not in scene.masks
        assert f"shape:{scene.attributes['shape']}" not in scene.masks
        assert "occluder" in scene.masks


def test_counted_things_are_as_many_separate_pieces():
    world = open_world("shapes?n=400&count=4")
    for i in range(400):
        scene = world.scene(i)
        n = ("one", "two", "three", "four").index(scene.attributes["count"]) + 1
        if scene.attributes["shape"] == "crescent":  # whose thin tips may come off
            continue
        assert connected_parts(scene.masks["object"], np.ones((3, 3)))[1] == n
        main = scene.masks[f"size:{scene.attributes['size']}"]
        assert connected_parts(main, np.ones((3, 3)))[1] == 1
        assert not (main & ~scene.masks["object"]).any()
    counts = Counter(len(f.copies) for f in seen("shapes?count=4"))
    assert all(likely(counts[n], 4800, 1 / 4) for n in range(4))
    assert set(Counter(len(f.copies) for f in seen("shapes?count=2", 300))) == {0, 1}


def test_there_is_room_for_three_copies_beside_any_thing():
    """The largest thing at the ends of where it may lie, under many orders of places."""
    for i, (x, y) in product(range(40), product((18.5, 20, 21.5, 30.5, 33.5, 42.5, 45.5), repeat=2)):
        draws = Draws((5, 6), i, 0)
        while not (copies := copies_beside(x, y, 16.5 * 1.05, 4, draws)):
            pass
        for this, that in combinations([(x, y, 16.5 * 1.05), *((c.x, c.y, 5.0) for c in copies)], 2):
            assert np.hypot(this[0] - that[0], this[1] - that[1]) > 1.25 * (this[2] + that[2])


# Where a shape's mass lies, seen from the middle of its box, when it is upright: down or up the screen.
HEAVY = {"drop": (0, 1), "heart": (0, -1), "triangle": (0, 1), "crescent": (-1, 0)}


def test_orientation_turns_the_thing():
    world = open_world("shapes?n=1500&orientation=1&image_px=128")
    checked = Counter()
    for i in range(1500):
        factors = world.factors(i)
        if factors.shape not in HEAVY or checked[factors.shape, factors.orientation] >= 4:
            continue
        ys, xs = np.nonzero(world.scene(i).masks["object"])
        off = np.array([xs.mean() - (xs.min() + xs.max()) / 2, ys.mean() - (ys.min() + ys.max()) / 2])
        down = np.array(HEAVY[factors.shape])
        # Clockwise on the screen, where y runs down: right -> down -> left -> up.
        right = np.array([-down[1], down[0]])
        expected = {"upright": down, "right": right, "upside down": -down, "left": -right}[factors.orientation]
        assert off @ expected > 0.05 * factors.radius
        assert off @ expected > abs(off @ expected[::-1])
        checked[factors.shape, factors.orientation] += 1
    assert len(checked) == 4 + 4 + 2 + 4


def test_orientations_are_as_frequent_as_dialled():
    factors = seen("shapes?orientation=0.5")
    assert {f.shape for f in factors if f.orientation is None} == {"circle", "ring", "square", "cross"}
    four = [f for f in factors if f.shape in ("crescent", "drop", "heart", "arrow")]
    counts = Counter(f.orientation for f in four)
    assert likely(counts["upright"], len(four), 0.5 + 0.5 / 4)
    assert all(likely(counts[name], len(four), 0.5 / 4) for name in ("right", "left", "upside down"))


def test_palettes_and_drawings_show_the_same_scene_in_other_tones():
    worlds = {dial: open_world(f"shapes?n=30&{dial}") for dial in ("clutter=0", "palette=grey", "palette=pastel")}
    worlds["drawing"] = open_world("shapes?n=30&style=drawing")
    for i in range(30):
        scenes = {dial: world.scene(i) for dial, world in worlds.items()}
        plain = scenes["clutter=0"]
        for scene in scenes.values():
            assert np.array_equal(scene.masks["object"], plain.masks["object"])
            assert scene.label == plain.label
        assert scenes["palette=pastel"].attributes == plain.attributes
        for dial in ("palette=grey", "drawing"):
            colours = [c for c in (*scenes[dial].masks, *worlds[dial].concepts) if c.startswith("colour:")]
            assert colours == []
            assert "colour" not in scenes[dial].attributes
            assert plain.attributes["colour"] not in scenes[dial].caption
        grey = scenes["palette=grey"].image.astype(int)
        assert np.ptp(grey, axis=2).max() <= 16  # nothing but the noise of the three channels
        luma = plain.image @ np.array([0.299, 0.587, 0.114])
        assert np.abs(grey.mean(axis=2) - luma)[(plain.image < 255).all(2)].max() < 14
        assert np.abs(scenes["palette=pastel"].image.astype(int) - plain.image).max() > 10
        drawing = scenes["drawing"].image.astype(int)
        assert (np.ptp(drawing, axis=2) < 32).all()
        edge = plain.masks["object"] & ~_inner(plain.masks["object"])
        assert drawing[edge].mean() < 0.6 * drawing[~plain.masks["object"]].mean()  # an outline


def _inner(mask: np.ndarray) -> np.ndarray:
    padded = np.pad(mask, 1)
    h, w = mask.shape
    return np.logical_and.reduce([padded[y : y + h, x : x + w] for y in range(3) for x in range(3)])


def test_captions_tell_of_the_dials_or_not():
    on = "shapes?n=40&words=1&wrong_words=1&count=4&orientation=1&occlusion=0.2&palette=pastel"
    full, short, plain = open_world(on), open_world(on + "&captions=short"), open_world("shapes?n=40")
    for i in range(40):
        caption, factors = full.record(i).caption, full.factors(i)
        assert caption.startswith("a pastel picture of a ")
        assert f'"{factors.word}"' in caption
        assert ("cop" in caption) == bool(factors.copies)
        assert "behind a bar" in caption
        assert short.record(i).caption == short.scene(i).caption == plain.record(i).caption
        assert np.array_equal(full.scene(i).image, short.scene(i).image)


def test_caption_of_a_dialled_scene_worked_by_hand():
    world = open_world("shapes?n=1&words=1&count=4&orientation=1&occlusion=0.2&style=drawing&palette=pastel")
    assert world.record(0).caption == (
        "a pastel drawing of a medium striped arrow upright at the left with two small copies on a pond, behind a bar, "
        'with the word "arrow" written over it'
    )


DIALS = st.fixed_dictionaries(
    {},
    optional={
        "clutter": st.integers(0, 8),
        "background_bias": st.floats(0, 1),
        "colour_bias": st.floats(0, 1),
        "words": st.floats(0, 1),
        "wrong_words": st.floats(0, 1),
        "vocabulary": st.sampled_from(["shape", "class", "texture", "colour", "background", "any"]),
        "fonts": st.sampled_from(["regular,bold,slanted", "dejavu-mono", "aileron,slanted,dejavu-serif"]),
        "label_noise": st.floats(0, 1),
        "occlusion": st.floats(0, 1),
        "count": st.integers(1, 4),
        "orientation": st.floats(0, 1),
        "palette": st.sampled_from(["plain", "pastel", "grey"]),
        "style": st.sampled_from(["filled", "drawing"]),
        "captions": st.sampled_from(["full", "short"]),
        "seed": st.integers(0, 9),
        "split": st.sampled_from(["train", "val", "test"]),
        "image_px": st.sampled_from([64, 80, 96]),
    },
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(options=DIALS, i=st.integers(0, 10**6))
def test_any_dials_go_together(options, i):
    world = open_world("shapes", n=10**6 + 1, **options)
    again = open_world(world.spec)
    assert again.options == world.options
    assert again.fingerprint() == world.fingerprint()
    scene, record = world.scene(i), world.record(i)
    assert np.array_equal(again.scene(i).image, scene.image)
    assert (record.label, record.caption) == (scene.label, scene.caption)
    layers = ("object", "background", "clutter", "occluder", "written")
    by_layer = {layer: [m for c, m in scene.masks.items() if c.partition(":")[0] == layer] for layer in layers}
    # Every pixel belongs to one layer: what is seen is in front.
    assert (sum(mask.astype(int) for masks in by_layer.values() for mask in masks) == 1).all()
    named = {f"{family}:{value}" for family, value in scene.attributes.items()}
    assert set(scene.masks) - named <= {"object", "clutter", "occluder", "written"}
    assert set(scene.masks) <= set(world.concepts)
    assert len(set(world.concepts)) == len(world.concepts)
    assert named <= set(world.concepts)
    if not options.get("occlusion") and not options.get("words"):  # nothing can hide anything
        assert named <= set(scene.masks)
    assert all(mask.any() for concept, mask in scene.masks.items() if concept != "clutter")
    coverage = world.patch_coverage(i, 16)
    assert coverage.shape == (len(world.concepts), world.image_px // 16, world.image_px // 16)
    for row, concept in enumerate(world.concepts):
        share = scene.masks[concept].mean() if concept in scene.masks else 0.0
        assert float(coverage[row].mean()) == pytest.approx(share, abs=1e-6)


def test_dialled_splits_share_no_scene():
    worlds = [open_world(f"{ALL_ON}&split={split}&n=80") for split in ("train", "val", "test")]
    images = [world.scene(i).image.tobytes() for world in worlds for i in range(80)]
    assert len(set(images)) == len(images)
    captions = [[world.record(i).caption for i in range(80)] for world in worlds]
    for this, that in combinations(captions, 2):
        assert sum(a == b for a, b in zip(this, that, strict=True)) == 0
    assert len({tuple(world.label(i) for i in range(48)) for world in worlds}) == 3


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        ("background_bias=1.5", "background_bias must be in 0..1, got 1.5"),
        ("words=nan", "words must be in 0..1, got nan"),
        ("colour_bias=-0.1", "colour_bias must be in 0..1, got -0.1"),
        ("occlusion=some", "occlusion must be float, got 'some'"),
        ("count=5", "count must be in 1..4, got 5"),
        ("palette=neon", "palette must be one of plain, pastel, grey, got 'neon'"),
        ("style=oil", "style must be one of filled, drawing, got 'oil'"),
        ("captions=none", "captions must be one of full, short, got 'none'"),
        ("words=1&image_px=32", "image_px must be 64 or more, got 32"),
        ("vocabulary=cat,dog&wrong_words=0.5", "of the words 'cat,dog' none is right or wrong"),
        ("vocabulary=Cat", "words are made of a to z, 0 to 9 and hyphens, at most three to a name, got 'Cat'"),
        ("vocabulary=cat,,dog", "words are made of a to z"),
        ("vocabulary=cat,cat", "every word of a vocabulary must be another, got cat, cat"),
        ("vocabulary=typographical", "in regular letters 'typographical' is 65 wide and 7 high"),
        ("fonts=gothic", "there is no font 'gothic'. Known: regular, bold, slanted, aileron"),
        ("fonts=", "there is no font ''"),
        ("fonts=bold,bold", "every font must be another, got bold, bold"),
        ("word_scale=5", "word_scale must be in 1..4, got 5"),
        ("word_scale=2", "62 pixels wide and high; in bold letters at word_scale=2 'circle' is 68 wide and 14 high"),
        ("fonts=aileron-large&vocabulary=hourglasses", "in aileron-large letters 'hourglasses' is"),
    ],
)
def test_bad_dials_get_a_sentence(spec, sentence):
    with pytest.raises(ValueError, match=sentence):
        open_world(f"shapes?{spec}")
