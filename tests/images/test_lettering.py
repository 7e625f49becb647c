"""Letters from tables: every one is another, in every font, and a word is its letters side by side."""

import hashlib
import string
from itertools import combinations

import numpy as np
import pytest

from vitrail.images.worlds.lettering import FONTS, LETTERS, OWN_FONTS, check_words, lettered


def test_the_table_has_every_letter_and_digit_seven_pixels_high():
    assert set(LETTERS) == {*string.ascii_lowercase, *string.digits, "-"}
    for letter in LETTERS.values():
        assert letter.shape[0] == 7
        assert letter[:, 0].any()
        assert letter[:, -1].any()


@pytest.mark.parametrize("font", FONTS)
def test_no_two_letters_look_alike(font):
    for this, that in combinations(LETTERS, 2):
        a, b = lettered(this, font), lettered(that, font)
        assert a.shape != b.shape or (a != b).sum() >= 2


def test_a_word_worked_by_hand():
    assert shown(lettered("lt", "regular")) == [
        "#....#####",
        "#......#..",
        "#......#..",
        "#......#..",
        "#......#..",
        "#......#..",
        "####...#..",
    ]
    assert shown(lettered("l", "bold")) == ["##...", "##...", "##...", "##...", "##...", "##...", "#####"]
    assert shown(lettered("l", "slanted")) == ["..#...", ".#....", ".#....", ".#....", "#.....", "#.....", "####.."]


def test_two_words_stand_one_below_the_other_in_the_middle():
    pixels = lettered("i il", "regular")
    assert pixels.shape == (16, 8)
    assert shown(pixels)[0] == "..###..."
    assert not pixels[7:9].any()
    assert np.array_equal(pixels[9:], lettered("il", "regular"))


# Over the bits of every letter. Letters that move are another world: see FROZEN in test_worlds.py.
DRAWN = {
    "aileron": "7ef3183cf54badcb322291f47a3cc517fbb0b6f467daeb5fd71681f320e1babe",
    "aileron-large": "6edd51e7d3edbde27a9e98d339f0fb9616d1506d4816473111cc5668e7e625b4",
    "aileron-capitals": "410d5e8ad91b8bbafd7bf3c8bf8f9d5d52629cb1cb648480ed0b691d6a3b37e2",
    "dejavu-serif": "2911f68aebee7f7dc44dfe63f81116151ac41749fc67c7726e841e0319366ed0",
    "dejavu-mono": "a1d6724a6fb326b6d275cd5f0d52759fbf68c2eb6e4fdc013614280000c006c6",
}


@pytest.mark.parametrize("font", sorted(set(FONTS) - set(OWN_FONTS)))
def test_drawn_fonts_have_every_sign_and_the_letters_they_always_had(font):
    digest = hashlib.sha256()
    for sign in sorted(LETTERS):
        bits = lettered(sign, font)
        assert bits.any(axis=0).sum() > 0
        digest.update(f"{sign}{bits.shape}".encode() + bits.tobytes())
    assert digest.hexdigest() == DRAWN[font]


def test_a_drawn_word_worked_by_hand():
    """ "it" of aileron, read from letters.txt by eye: i with a dot, a gap, t with a foot; four rows are for tails."""
    rows = ["#..#.", "...#.", "#.###", "#..#.", "#..#.", "#..#.", "#..#.", "#..#.", "#..##", *["....."] * 3]
    assert shown(lettered("it", "aileron")) == rows


def test_letters_of_dejavu_mono_are_equally_wide():
    assert {lettered(sign, "dejavu-mono").shape[1] for sign in LETTERS} == {6}
    assert lettered("iw", "dejavu-mono").shape[1] == lettered("mm", "dejavu-mono").shape[1] == 12


def test_every_font_but_the_capitals_has_letters_that_hang_below_the_line():
    for font in FONTS:
        hangs = lettered("p", font).any(axis=1).nonzero()[0].max() > lettered("n", font).any(axis=1).nonzero()[0].max()
        assert hangs == (font not in (*OWN_FONTS, "aileron-capitals"))


@pytest.mark.parametrize("font", FONTS)
def test_a_scaled_word_has_every_pixel_as_a_square(font):
    once, twice = lettered("to be", font), lettered("to be", font, 2)
    assert np.array_equal(twice, np.kron(once, np.ones((2, 2), dtype=bool)))


def test_words_must_fit_in_the_fonts_and_at_the_scale_that_are_used():
    check_words(("hourglass",), FONTS)
    with pytest.raises(ValueError, match="in regular letters at word_scale=2 'hourglass' is 88 wide and 14 high"):
        check_words(("hourglass",), FONTS, 2)
    with pytest.raises(ValueError, match="in aileron-large letters at word_scale=2 'a b c' is 14 wide and 92 high"):
        check_words(("a b c",), ("regular", "aileron-large"), 2)  # 3 lines of 14 and 2 gaps of 2, doubled


def shown(pixels: np.ndarray) -> list[str]:
    return ["".join("#" if pixel else "." for pixel in row) for row in pixels]
