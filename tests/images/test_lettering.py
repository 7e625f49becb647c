"""Letters from our own table: every one is another, in every font, and a word is its letters side by side."""

import string
from itertools import combinations

import numpy as np
import pytest

from vitrail.images.worlds.lettering import FONTS, LETTERS, lettered


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


def shown(pixels: np.ndarray) -> list[str]:
    return ["".join("#" if pixel else "." for pixel in row) for row in pixels]
