"""WebDataset tars: read as the webdataset package would group them, and honest about damage."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from image_examples import encoded, write_tar

from vitrail.images import BadImage, open_images
from vitrail.images.tar import expand


def records(source):
    return [source.record(i) for i in range(len(source))]


def test_members_of_one_key_make_one_sample(tmp_path):
    write_tar(
        tmp_path / "t.tar",
        [
            ("a/1.cls", b"1"),
            ("a/1.jpg", encoded(1, "JPEG")),
            ("a/1.txt", "ein Bär\n".encode()),
            ("b/1.png", encoded(2)),
            ("b/1.json", json.dumps({"label": 0, "class_name": "bee", "split": "val"}).encode()),
            ("c.seg.png", encoded(3)),  # the key ends at the first dot
            ("readme", b"no dot, no sample"),
            ("only.json", b"{}"),
        ],
    )
    found = records(open_images(tmp_path / "t.tar"))
    assert [r.id for r in found] == ["t/a/1", "t/b/1", "t/c"]
    assert [(r.label, r.class_name, r.caption, r.split) for r in found] == [
        (1, "1", "ein Bär", None),
        (0, "bee", None, "val"),
        (None, None, None, None),
    ]


def test_the_picture_itself_goes_before_a_mask_of_it(tmp_path):
    write_tar(tmp_path / "t.tar", [("1.seg.png", encoded(3)), ("1.png", encoded(4)), ("1.z.jpg", encoded(5, "JPEG"))])
    source = open_images(tmp_path / "t.tar")
    expected = np.random.default_rng(4).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    assert len(source) == 1
    assert np.array_equal(np.asarray(source.load(0)), expected)


def test_a_member_twice_is_refused(tmp_path):
    write_tar(tmp_path / "t.tar", [("1.png", encoded(3)), ("1.png", encoded(4))])
    with pytest.raises(ValueError, match=r"t\.tar holds 1\.png twice"):
        open_images(tmp_path / "t.tar")


def test_pictures_are_read_in_any_order(tmp_path):
    write_tar(tmp_path / "t.tar", [(f"{seed}.png", encoded(seed)) for seed in range(9)])
    source = open_images(tmp_path / "t.tar")
    for seed in (8, 0, 5, 5, 1):
        expected = np.random.default_rng(seed).integers(0, 256, (12, 16, 3), dtype=np.uint8)
        assert np.array_equal(np.asarray(source.load(seed)), expected)


def test_patterns_name_tars(tmp_path):
    for number in (0, 1, 2, 10):
        write_tar(tmp_path / f"x-{number:02d}.tar", [("k.png", encoded(number))])

    def names(pattern):
        return [tar.name for tar in expand(str(tmp_path / pattern))]

    assert names("x-{00..02}.tar") == ["x-00.tar", "x-01.tar", "x-02.tar"]
    assert names("x-*.tar") == ["x-00.tar", "x-01.tar", "x-02.tar", "x-10.tar"]
    assert names("x-{0..1}{0..0}.tar") == ["x-00.tar", "x-10.tar"]
    with pytest.raises(FileNotFoundError, match=r"x-03\.tar is missing"):
        expand(str(tmp_path / "x-{00..03}.tar"))
    with pytest.raises(FileNotFoundError, match=r"y-\*\.tar is missing"):
        expand(str(tmp_path / "y-*.tar"))
    with pytest.raises(ValueError, match="counts down"):
        expand(str(tmp_path / "x-{03..00}.tar"))
    assert [r.id for r in records(open_images(str(tmp_path / "x-{00..01}.tar")))] == ["x-00/k", "x-01/k"]


@pytest.mark.parametrize("cut", ["in a picture", "in a header", "at a boundary"])
def test_a_tar_cut_short_gives_what_is_whole_and_one_record_for_the_rest(tmp_path, cut):
    tar = tmp_path / "t.tar"
    write_tar(tar, [(f"{seed}.png", encoded(seed)) for seed in range(4)])
    block = 512 * (1 + -(-len(encoded(0)) // 512))  # every picture is noise of one size: header and data
    assert {len(encoded(seed)) for seed in range(4)} == {len(encoded(0))}
    at = {"in a picture": 2 * block + 512 + 100, "in a header": 2 * block + 200, "at a boundary": 2 * block}[cut]
    tar.write_bytes(tar.read_bytes()[:at])
    source = open_images(tar)
    assert [r.id for r in records(source)] == ["t/0", "t/1", "t/(damaged at the end)"]
    assert source.load(1).size == (16, 12)
    with pytest.raises(BadImage, match=r"t\.tar .*what followed is lost"):
        source.load(2)
    assert len(source.fingerprint()) == 64


def test_garbage_after_good_samples_is_reported(tmp_path):
    tar = tmp_path / "t.tar"
    write_tar(tar, [("0.png", encoded(0)), ("1.png", encoded(1))])
    data = bytearray(tar.read_bytes())
    second = 512 * (1 + -(-len(encoded(0)) // 512))
    data[second : second + 512] = b"\xff" * 512
    tar.write_bytes(bytes(data))
    source = open_images(tar)
    assert len(source) == 2
    with pytest.raises(BadImage, match="lost"):
        source.load(1)


def test_a_whole_tar_has_no_record_of_damage(tmp_path):
    write_tar(tmp_path / "t.tar", [("0.png", encoded(0))])
    assert [r.id for r in records(open_images(tmp_path / "t.tar"))] == ["t/0"]


def test_a_tar_cut_after_it_was_opened_is_a_bad_image(tmp_path):
    tar = tmp_path / "t.tar"
    write_tar(tar, [("0.png", encoded(0)), ("1.png", encoded(1))])
    source = open_images(tar)
    tar.write_bytes(tar.read_bytes()[:600])
    with pytest.raises(BadImage, match="ends inside this picture, at byte 600"):
        source.load(0)


def test_what_is_not_a_tar_is_refused_by_name(tmp_path):
    (tmp_path / "t.tar").write_bytes(b"hello" * 1000)
    with pytest.raises(ValueError, match=r"t\.tar is not a readable, uncompressed tar"):
        open_images(tmp_path / "t.tar")
    write_tar(tmp_path / "e.tar", [("x.txt", b"no picture")])
    with pytest.raises(ValueError, match="holds no pictures"):
        open_images(tmp_path / "e.tar")


@pytest.mark.parametrize(
    ("member", "data", "sentence"),
    [
        ("0.json", b"[1]", "must hold a JSON object, got list"),
        ("0.json", b"{", "not a readable .json member"),
        ("0.json", b'{"label": 1.5}', "label must be a whole number or text, got 1.5"),
        ("0.json", b'{"caption": 3}', "caption must be text, got 3"),
        ("0.cls", b"one", "not a readable .cls member"),
    ],
)
def test_bad_members_get_a_sentence(tmp_path, member, data, sentence):
    write_tar(tmp_path / "t.tar", [("0.png", encoded(0)), (member, data)])
    with pytest.raises(ValueError, match=sentence):
        open_images(tmp_path / "t.tar")


_KEY = st.text(st.characters(codec="utf-8", exclude_characters="./\\\0", exclude_categories=("Cc", "Cs")), min_size=1)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(samples=st.dictionaries(_KEY, st.tuples(st.integers(0, 20), st.text(min_size=1)), min_size=1, max_size=5))
def test_any_keys_labels_and_captions_survive_a_tar(tmp_path, samples):
    members = []
    for seed, (key, (label, caption)) in enumerate(samples.items()):
        said = {"label": label, "caption": caption}
        members += [(f"{key}.png", encoded(seed)), (f"{key}.json", json.dumps(said).encode())]
    write_tar(tmp_path / "t.tar", members)
    found = records(open_images(tmp_path / "t.tar"))
    assert [r.id for r in found] == [f"t/{key}" for key in samples]
    assert [(r.label, r.caption) for r in found] == list(samples.values())


@pytest.mark.shared
def test_the_tiny_imagenet_on_this_machine_opens():
    folder = Path(os.environ.get("VITRAIL_SHARED", "../shared")) / "data" / "tiny_imagenet"
    if not folder.exists():
        pytest.skip(f"{folder} is not here")
    source = open_images(folder / "val-000.tar")
    assert len(source) == 1600
    assert len(source.classes) == 200
    names = {entry["label"]: entry["name"] for entry in json.loads((folder / "classes.json").read_text())}
    assert all(source.classes[label] == name for label, name in names.items())
    assert source.load(1599).size == (64, 64)
