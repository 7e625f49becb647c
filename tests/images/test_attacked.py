"""Wrong words on pictures: reproducible, wrong, where the record says they are."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageChops

from vitrail.images.attacked import Attack, AttackedImages, AttackSplits, glyphs, halves, save_attacked
from vitrail.images.base import ImageRecord, ImageSource
from vitrail.images.table import TableImages

NAMES = ("dog", "cat", "traffic light", "zebra")


class Grey(ImageSource):
    classes = NAMES
    spec = "grey"

    def __init__(self, n: int = 12, size: tuple[int, int] = (300, 224)) -> None:
        self.n, self.size = n, size

    def __len__(self) -> int:
        return self.n

    def record(self, i: int) -> ImageRecord:
        return ImageRecord(f"p{self._check(i)}.jpg", f"p{i}", i % 4, NAMES[i % 4])

    def load(self, i: int) -> Image.Image:
        return Image.new("RGB", self.size, (120, 120, 120))

    def size_bytes(self, i: int) -> int:
        return 7


def attack(**others) -> Attack:
    return Attack(**{"words": NAMES, "fonts": ("built-in", "bold"), **others})


def test_one_seed_and_id_give_one_picture_and_other_fonts_move_no_word() -> None:
    one, again, other = (AttackedImages(Grey(), attack(seed=seed)) for seed in (3, 3, 4))
    assert [one.written(i) for i in range(12)] == [again.written(i) for i in range(12)]
    assert one.load(5).tobytes() == again.load(5).tobytes()
    assert [one.written(i) for i in range(12)] != [other.written(i) for i in range(12)]
    plain = AttackedImages(Grey(), attack(seed=3, fonts=("built-in",)))
    for i in range(12):
        here, there = one.written(i), plain.written(i)
        assert here
        assert there
        assert (here.word, here.colour) == (there.word, there.colour)


def test_no_true_word_is_written() -> None:
    source = AttackedImages(Grey(40), attack(), present={"p1.jpg": {"dog", "zebra"}})
    words = [source.written(i).word for i in range(40)]
    assert all(word != NAMES[i % 4] for i, word in enumerate(words))
    assert len(set(words)) == 4
    assert words[1] == "traffic light"  # cat is its class; dog and zebra are there as well
    all_true = AttackedImages(Grey(1), attack(), present={"p0.jpg": set(NAMES)})
    assert all_true.written(0) is None
    assert all_true.load(0).tobytes() == Grey().load(0).tobytes()
    striped = AttackedImages(Grey(4), replace(attack(), words=("traffic", "cat", "zebra")))
    assert all(striped.written(2).word != "traffic" for _ in range(3))  # a word of its class's name


def test_a_picture_differs_where_its_record_says_and_nowhere_else() -> None:
    for i in range(12):
        source = AttackedImages(Grey(), attack(outline=0.0))
        clean, after, written = Grey().load(i), source.load(i), source.written(i)
        box = ImageChops.difference(clean, after).getbbox()
        assert box is not None
        assert written is not None
        left, top, right, bottom = written.box
        assert left <= box[0]
        assert top <= box[1]
        assert box[2] <= right
        assert box[3] <= bottom
        assert left >= 38
        assert right <= 262
        mask, changed = source.mask(i), np.abs(np.asarray(after, int) - 120).max(2) > 0
        assert mask.any()
        assert (changed | ~mask).all()


def test_sizes_are_of_224_and_places_are_thirds() -> None:
    for side in (64, 224, 448):
        source = AttackedImages(Grey(8, (side, side)), attack(sizes=(30, 30), places=("middle",), fonts=("bold",)))
        for i in range(8):
            written = source.written(i)
            assert written is not None
            assert written.size_px <= 30.2
            _, top, _, bottom = written.box
            assert side / 3 - 2 <= (top + bottom) / 2 <= 2 * side / 3 + 2
            # one line of bits is 0.75 of a line: 0.75 * 30 / 224 of the side
            if written.size_px > 29 and " " not in written.word:
                assert abs((bottom - top) - 0.75 * 30 / 224 * side) <= 1


def test_halves_and_splits_share_nothing() -> None:
    names = tuple(f"w{i}" for i in range(9))
    seen, new = halves(names, seed=1)
    assert set(seen) | set(new) == set(names)
    assert not set(seen) & set(new)
    assert len(seen) == 5
    splits = AttackSplits.of(names, ("built-in", "bold"))
    hard = splits.unseen["all unseen"]
    for field in ("words", "fonts", "places"):
        assert not set(getattr(splits.selection, field)) & set(getattr(hard, field))
    assert splits.selection.sizes[1] <= hard.sizes[0]
    assert splits.unseen["unseen fonts"].words == splits.selection.words


def test_bits_are_drawn_as_the_table_has_them() -> None:
    from vitrail.images.worlds.lettering import lettered

    # 7 rows of "I", 0.75 of a line: at 7 / 0.75 px a line, a bit is a pixel.
    assert np.array_equal(glyphs("i", "regular", 7 / 0.75) > 127, lettered("i", "regular"))


def test_the_saved_folder_opens_with_the_same_pictures_and_labels(tmp_path) -> None:
    source = AttackedImages(Grey(3), attack(share=0.6, seed=2))
    rows = save_attacked(source, tmp_path)
    back = TableImages(tmp_path / "attack.csv")
    assert len(back) == 3
    assert {("word" in row) for row in rows} == {True, False}
    for i in range(3):
        assert back.record(i).id == source.record(i).id
        assert back.record(i).class_name == NAMES[i]
        assert back.load(i).tobytes() == source.load(i).tobytes()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"words": ()}, "at least one"),
        ({"fonts": ("comic",)}, "no font 'comic'"),
        ({"fonts": ("bold",), "words": ("é",)}, "cannot write"),
        ({"places": ("left",)}, "top, middle, bottom"),
        ({"sizes": (40, 20)}, "smallest, largest"),
        ({"share": 1.5}, "0..1"),
    ],
)
def test_what_cannot_be_written_is_refused(wrong, message) -> None:
    with pytest.raises(ValueError, match=message):
        attack(**wrong)
