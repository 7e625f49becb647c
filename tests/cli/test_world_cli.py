"""`vitrail world`: what it lists, shows and makes; a folder made in two goes is the one made in one."""

import csv
import inspect
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vitrail.cli import main
from vitrail.images import WORLDS, open_images, open_world
from vitrail.images.worlds import NAMED, export, read_masks
from vitrail.images.worlds.shapes import ShapesWorld

SPEC = "world:everything?n=60&split=val&clutter=2"


def say(capsys, *arguments):
    main([str(argument) for argument in arguments])
    return capsys.readouterr().out


def fail(capsys, *arguments):
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    assert stopped.value.code != 0
    assert "Traceback" not in captured.err
    return captured.err


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(export, "PART", 16)


@pytest.fixture
def made(tmp_path):
    main(["world", "make", SPEC, "--out", str(tmp_path / "made")])
    return tmp_path / "made"


def test_the_list_has_every_world_and_every_option_with_its_meaning(capsys):
    listed = say(capsys, "world", "list")
    assert listed == say(capsys, "world")
    for name, named in NAMED.items():
        assert f"  {name} " in listed
        assert f"world:{named.spec}\n" in listed
    for name, world in WORLDS.items():
        assert f"world:{name}?" in listed
        for option in inspect.signature(world).parameters:
            lines = [line for line in listed.splitlines() if line.startswith(f"  {option}=")]
            assert lines
            assert all(len(line.split(" ", 3)[-1].split()) >= 2 for line in lines), option
    assert "  background_bias=0.0        share of pictures whose ground" in listed


def test_show_draws_the_pictures_with_and_without_the_word(capsys, tmp_path):
    assert "48 classes" in say(capsys, "world", "show", "world:grey?n=9", "--out", tmp_path / "a.png", "-n", 4)
    assert "the first 9 are in" in say(capsys, "world", "world:grey?n=9", "--out", tmp_path / "b.png", "--n", 40)
    with Image.open(tmp_path / "a.png") as a, Image.open(tmp_path / "b.png") as b:
        assert b.height > a.height


def test_a_made_world_opens_as_the_same_pictures(made):
    world, images = open_world(SPEC), open_images(made / "images.csv")
    assert len(images) == 60
    for i in range(60):
        assert np.array_equal(np.asarray(images.load(i)), world.scene(i).image)
        there, here = images.record(i), world.record(i)
        assert (there.id, there.caption, there.split) == (here.id, here.caption, here.split)
        assert (there.label, there.class_name) == (here.label, here.class_name)
    # As a folder of classes too, for tools that read no table; in order of path.
    folder = open_images(made)
    assert (len(folder), folder.record(0).split) == (60, "val")
    by_name = {record.id.split("/")[-1]: i for i, record in enumerate(map(folder.record, range(60)))}
    for i in range(60):
        at = by_name[f"{world.record(i).id}.png"]
        assert np.array_equal(np.asarray(folder.load(at)), world.scene(i).image)
        assert folder.record(at).class_name == world.record(i).class_name


def test_the_truth_beside_the_pictures_is_the_worlds(made):
    world = open_world(SPEC)
    truth = [json.loads(line) for line in (made / "truth.jsonl").read_text(encoding="utf-8").splitlines()]
    parts = [read_masks(path) for path in sorted((made / "masks").iterdir())]
    assert [len(part) for part in parts] == [16, 16, 16, 12]
    masks = {name: known for part in parts for name, known in part.items()}
    assert list(masks) == [line["id"] for line in truth] == [world.record(i).id for i in range(60)]
    for i, line in enumerate(truth):
        scene, stored = world.scene(i), masks[line["id"]]
        assert line["attributes"] == scene.attributes
        assert line["label"] == scene.label
        assert set(stored) == set(scene.masks)
        assert all(np.array_equal(stored[concept], mask) for concept, mask in scene.masks.items())
    about = json.loads((made / "world.json").read_text(encoding="utf-8"))
    assert (about["spec"], about["fingerprint"]) == (world.spec, world.fingerprint())
    assert (about["classes"], about["concepts"]) == (list(world.classes), list(world.concepts))
    assert about["groups"]["star"] == list(world.groups["star"])


def test_a_world_of_clips_is_written_frame_by_frame(tmp_path):
    main(["world", "make", "world:moving?n=3&n_frames=4", "--out", str(tmp_path / "made")])
    world, images = open_world("moving?n=3&n_frames=4"), open_images(tmp_path / "made" / "images.csv")
    assert len(images) == len(world) == 12
    for i in range(12):
        assert np.array_equal(np.asarray(images.load(i)), world.scene(i).image)


@pytest.mark.parametrize("k", [0, 5, 16, 33, 59])
def test_a_killed_run_goes_on_to_the_same_files(made, tmp_path, monkeypatch, k):
    rendered = []

    def scene(self, i, really=ShapesWorld.scene):
        if len(rendered) == k:
            raise KeyboardInterrupt
        rendered.append(i)
        return really(self, i)

    with monkeypatch.context() as killing:
        killing.setattr(ShapesWorld, "scene", scene)
        with pytest.raises(SystemExit, match="Run the same command again"):
            main(["world", "make", SPEC, "--out", str(tmp_path / "again")])
    assert not (tmp_path / "again" / "images.csv").exists()
    assert rendered == list(range(k))
    with monkeypatch.context() as watching:
        watching.setattr(
            ShapesWorld, "scene", lambda self, i, really=ShapesWorld.scene: rendered.append(i) or really(self, i)
        )
        main(["world", "make", SPEC, "--out", str(tmp_path / "again")])
    assert rendered == list(range(k)) + list(range(k - k % 16, 60))  # whole parts are kept
    assert files(tmp_path / "again") == files(made)


def test_a_picture_that_went_missing_is_made_again(made):
    before = files(made)
    with (made / "images.csv").open(encoding="utf-8", newline="") as stream:
        lost = made / list(csv.DictReader(stream))[20]["path"]
    lost.unlink()
    main(["world", "make", SPEC, "--out", str(made)])
    assert files(made) == before


def test_folders_with_something_else_are_refused(made, capsys, tmp_path):
    before = files(made)
    told = fail(capsys, "world", "make", SPEC.replace("n=60", "n=61"), "--out", made)
    assert "holds another world, world:shapes?n=60&" in told
    assert "or delete that one" in told
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").write_bytes(b"")
    assert "not empty and holds no world" in fail(capsys, "world", "make", SPEC, "--out", tmp_path / "photos")
    (tmp_path / "photos" / "world.json").write_text("[]")
    assert "holds another world" in fail(capsys, "world", "make", SPEC, "--out", tmp_path / "photos")
    assert "there is no world 'waterbird'" in fail(capsys, "world", "make", "waterbird", "--out", tmp_path / "new")
    assert not (tmp_path / "new").exists()
    assert files(made) == before
