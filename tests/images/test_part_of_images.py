import pickle

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from vitrail.images import open_images
from vitrail.images.part import share_of, split_spec

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
