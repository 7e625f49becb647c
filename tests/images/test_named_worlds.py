"""Worlds with a name: what they always showed, and what options given beside the name make of them."""

import hashlib

import numpy as np
import pytest

from vitrail.images import open_images, open_world
from vitrail.images.worlds import NAMED
from vitrail.images.worlds.shapes import ShapesWorld

# Over spec, label, caption and pixels of the first 12 scenes. A named world that moves needs another name: results that
# were told of it are told of these pictures.
FROZEN = {
    "waterbirds": "21db738c327ac000b73e84dfe493911d4a9dc11a3c59ee31b8d8bf22192765cb",
    "colours": "90725981070ba0e66718c529fe9ef2e028942b6fa64289506d2e7a5c8cf1e932",
    "typographic": "07d93e4ee297020e7f35275e22600121b38e66f1ac593c7dc966548105481efb",
    "exposed": "148f5dafd597df61c30905dfe10d063747bde793ea408e01beeaf805159adf6f",
    "typographic-mixed": "5fb150c8f90083dc14390bfcd4313a48a16d6ed46bd4018eb3620616b8d2ac30",
    "typographic-attack": "6ec34c418234e2e9e831d3240ba25cdf0b675214a6519afd1f3e1d82b5f42466",
    "typographic-unseen": "c960ea739994ef44c9fb5ce912c954de9927859323c1fdc2e53c1cbdee2087cf",
    "drawings": "b35d6bafcaa49e58ec0e78eb011b88351c42e3b8cbfc907214c9c3696e4f64fc",
    "pastel": "0a9fd5bd6b0352088ae05a915a6185638b1285d30009f89da11d6df3f58952cc",
    "grey": "c8c08640ff900cd3a37e7c06cda9934f83b26918b1e0cff104b6b05dd7dacde7",
    "crowded": "43a4c467a0d849f3294a7afe92134391f310ba2cb4f76bd9a4f4d6f63c22ceb6",
    "everything": "90f102e55ce7a391f9462988ce80ebafc0b06636ae44ac063d1937a66af2f38c",
}


def scenes_digest(name: str) -> str:
    world = open_world(name)
    digest = hashlib.sha256(world.spec.encode())
    for i in range(12):
        scene = world.scene(i)
        digest.update(f"{scene.label}|{scene.caption}|".encode() + scene.image.tobytes())
    return digest.hexdigest()


@pytest.mark.parametrize("name", NAMED)
def test_named_worlds_are_what_they_always_were(name):
    assert scenes_digest(name) == FROZEN[name]


@pytest.mark.parametrize("name", NAMED)
def test_a_named_world_with_options_is_what_the_long_spec_opens(name):
    short, long = open_world(f"{name}?n=30&seed=4"), open_world(f"{NAMED[name].spec}&n=30&seed=4")
    assert short.spec == long.spec
    assert short.spec.startswith("world:shapes?n=30&seed=4&")
    assert short.fingerprint() == long.fingerprint()
    assert np.array_equal(short.scene(29).image, long.scene(29).image)
    assert open_images(short.spec).fingerprint() == short.fingerprint()
    assert NAMED[name].purpose


def test_given_options_go_over_those_of_the_name():
    world = open_images("world:waterbirds?background_bias=0.5&n=12", split="test")
    assert world.spec == "world:shapes?n=12&seed=0&split=test&image_px=64&clutter=0&background_bias=0.5"
    assert open_world("waterbirds?background_bias=0").fingerprint() == open_world("shapes").fingerprint()
    assert open_world("waterbirds", background_bias=0.2).spec.endswith("background_bias=0.2")
    assert open_world("waterbirds").spec.endswith("background_bias=0.9")


def test_named_worlds_show_what_they_are_for():
    def factors(name: str) -> list:
        world = open_world(name)
        assert isinstance(world, ShapesWorld)
        return [world.factors(i) for i in range(300)]

    assert 0.9 < np.mean([not f.minority for f in factors("waterbirds")]) < 0.99
    assert 0.85 < np.mean([not f.colour_minority for f in factors("colours")]) < 0.97
    assert 0.4 < np.mean([f.word is not None for f in factors("typographic")]) < 0.6
    assert not any(f.word_is_wrong for f in factors("typographic"))
    mixed = [f for f in factors("typographic-mixed") if f.word]
    assert 0.35 < np.mean([f.word_is_wrong for f in mixed]) < 0.65
    attack, unseen = factors("typographic-attack"), factors("typographic-unseen")
    assert all(f.word_is_wrong for f in attack + unseen)
    assert [f.word for f in attack] == [f.word for f in unseen]  # the same attack in other letters
    assert not {f.font for f in attack} & {f.font for f in unseen}
    assert {f.font for f in factors("typographic") + mixed} - {None} == {f.font for f in attack}
    assert all(f.bar for f in factors("crowded"))
    assert len({c.partition(":")[0] for c in open_world("everything").concepts}) == 17


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        ("waterbird", "there is no world 'waterbird'. Known: shapes.*; named: waterbirds, colours"),
        ("waterbirds?bias=1", "world 'shapes' has no option 'bias=1'"),
        ("typographic-attack?vocabulary=cat,dog", "of the words 'cat,dog' none is right or wrong"),
    ],
)
def test_bad_names_get_a_sentence(spec, sentence):
    with pytest.raises(ValueError, match=sentence):
        open_world(spec)
