"""Folders: classes from the first folder, splits where every top folder is one."""

import pytest
from image_examples import encoded

from vitrail.images import open_images


def put(root, *paths):
    for seed, path in enumerate(paths):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(encoded(seed))


def ids(source):
    return [source.record(i).id for i in range(len(source))]


def test_classes_are_the_first_folders_and_nesting_below_them_is_fine(tmp_path):
    put(tmp_path, "b/x.png", "a/deep/er/y.PNG", "a/z.jpeg", "c/.hidden.png", ".git/w.png")
    source = open_images(tmp_path)
    assert ids(source) == ["a/deep/er/y.PNG", "a/z.jpeg", "b/x.png"]
    assert source.classes == ("a", "b")
    assert [source.record(i).label for i in range(3)] == [0, 0, 1]


def test_a_flat_folder_has_no_classes(tmp_path):
    put(tmp_path, "2.png", "10.png")
    source = open_images(tmp_path)
    assert ids(source) == ["10.png", "2.png"]
    assert source.classes == ()
    assert source.record(0).label is None
    assert source.record(0).class_name is None


def test_pictures_beside_class_folders_have_no_label(tmp_path):
    put(tmp_path, "a/x.png", "loose.png")
    source = open_images(tmp_path)
    assert [source.record(i).class_name for i in range(2)] == ["a", None]


def test_folders_named_like_splits_are_splits_and_share_their_labels(tmp_path):
    put(tmp_path, "train/ape/1.png", "train/bee/2.png", "val/bee/3.png")
    source = open_images(tmp_path)
    assert [source.record(i).split for i in range(3)] == ["train", "train", "val"]
    val = open_images(tmp_path, split="val")
    assert ids(val) == ["val/bee/3.png"]
    assert val.record(0).label == 1  # as in train, although val has no ape
    assert val.fingerprint() != source.fingerprint()
    with pytest.raises(ValueError, match=r"no split 'test'\. Found: train, val"):
        open_images(tmp_path, split="test")


def test_a_split_cannot_be_chosen_where_none_is_known(tmp_path):
    put(tmp_path, "a/x.png")
    with pytest.raises(ValueError, match="says of no picture which split it is in"):
        open_images(tmp_path, split="train")


def test_an_empty_folder_says_what_was_looked_for(tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(ValueError, match=r"holds no pictures\. Looked in it and below for \.jpg"):
        open_images(tmp_path)


def test_a_link_back_up_is_not_followed_for_ever(tmp_path):
    put(tmp_path, "a/x.png")
    (tmp_path / "a" / "again").symlink_to(tmp_path)
    (tmp_path / "b").symlink_to(tmp_path / "a")  # a link to elsewhere is a class of its own
    assert ids(open_images(tmp_path)) == ["a/x.png", "b/x.png"]
