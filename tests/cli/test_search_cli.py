"""vitrail search and vitrail edit, as a person types them, on toy/clip."""

import json

import pytest

from vitrail.cli import main
from vitrail.images import open_images
from vitrail.store import Store

POINT = "blocks.2.hook_resid_post"
IMAGES = "world:shapes?n=40&seed=3"


def say(capsys, *arguments):
    main([str(argument) for argument in arguments])
    return capsys.readouterr().out


def fail(capsys, *arguments):
    with pytest.raises(SystemExit):
        main([str(argument) for argument in arguments])
    told = capsys.readouterr().err
    assert "Traceback" not in told
    return told


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    common = ["--workers", "0", "--device", "cpu"]
    for point, store in ((POINT, "store"), ("hook_image_embed", "embeddings")):
        main(["extract", IMAGES, f"{out}/{store}", "--backbone", "toy/clip", "--points", point, *common])
    main(
        ["train", "topk", f"{out}/store", f"{out}/coders/topk", "--d-sae", "128", "--k", "8", "--epochs", "2"]
        + ["--batch-size", "512", "--lr", "1e-3", "--device", "cpu"]
    )
    main(["encode", f"{out}/coders/topk", f"{out}/store", f"{out}/codes/topk"])
    (out / "names.json").write_text(json.dumps({str(i): f"word{i % 4}" for i in range(128)}))
    return out


def test_images_like_an_image_and_why(run, capsys):
    told = say(capsys, "search", run, "--image", 4, "--k", 3, "--names", run / "names.json", "--out", run / "hits.json")
    found = json.loads((run / "hits.json").read_text())
    assert "distance" in told
    assert "word" in told
    assert len(found["hits"]) == 3
    assert 4 not in [hit["row"] for hit in found["hits"]]
    distances = [hit["value"] for hit in found["hits"]]
    assert distances == sorted(distances)
    assert all(0 < sum(one["share"] for one in hit["why"]) <= 1 + 1e-9 for hit in found["hits"])
    assert (run / "search/topk-max/manifest.json").is_file()
    say(capsys, "search", run / "codes/topk", "--image", 4, "--metric", "cosine", "--pool", "cls", "--k", 3)
    say(capsys, "search", run, "--image", 4, "--metric", "embedding", "--embeddings", run / "embeddings", "--k", 3)


def test_images_by_words_and_by_a_box(run, capsys):
    names = ("--names", run / "names.json")
    told = say(capsys, "search", run, "--text", "word1, word2", "--k", 3, *names)
    assert "concepts: word1 (latent 1)" in told
    told = say(capsys, "search", run, "--image", 2, "--box", 8, 8, 24, 24, "--k", 3, *names)
    assert "in the box" in told
    assert "patches" in told
    assert "no latent is named" in fail(capsys, "search", run, "--text", "zebra", *names)
    assert "one of --image, --picture and --text" in fail(capsys, "search", run)
    assert "rows must be in 0..39" in fail(capsys, "search", run, "--image", 40)
    assert "extract it from the same images" in fail(capsys, "search", run, "--image", 4, "--metric", "embedding")


def test_a_picture_that_is_not_in_the_store_finds_its_like(run, capsys, tmp_path):
    """A stored image, saved as a file, is found first by every metric; another is a picture too."""
    world = open_images(IMAGES)
    file = tmp_path / "seven.png"
    world.load(7).save(file)
    row = list(Store.open(run / "store").images()["id"]).index(world.record(7).id)  # a store is in an order of its own
    for metric, best in (("l1", 0), ("cosine", 1), ("overlap", 1), ("embedding", 1)):
        more = ("--embeddings", run / "embeddings") if metric == "embedding" else ()
        say(
            capsys, "search", run, "--picture", file, "--metric", metric, "--k", 3, *more,
            "--out", tmp_path / "hits.json",
        )  # fmt: skip
        first = json.loads((tmp_path / "hits.json").read_text())["hits"][0]
        # Activations are stored in half precision before they are encoded, so a code may differ in its last bits.
        assert first["row"] == row
        assert first["value"] == pytest.approx(best, abs=0.3 if metric == "l1" else 2e-3)
    told = say(capsys, "search", run, "--picture", file, "--box", 8, 8, 40, 40, "--k", 2)
    assert "in the box" in told
    open_images("world:shapes?n=1&seed=77").load(0).save(file)
    assert "distance" in say(capsys, "search", run, "--picture", file, "--pool", "cls", "--k", 2)
    file.write_bytes(b"no picture")
    assert "not a picture that Pillow knows" in fail(capsys, "search", run, "--picture", file)
    assert "No such file" in fail(capsys, "search", run, "--picture", tmp_path / "none.png")


def test_an_edited_query_leaves_its_neighbours(run, capsys):
    arguments = ("edit", run, IMAGES, "--concept", "word1", "--names", run / "names.json", "--queries", 4, "--k", 5)
    told = say(
        capsys, *arguments, "--operation", "scale", "--strengths", 1, 4, 30, "--target", "plain circle",
        "--out", run / "edit.json", "--device", "cpu",
    )  # fmt: skip
    assert "kept" in told
    table = json.loads((run / "edit.json").read_text())["table"]
    assert [row["strength"] for row in table] == [1, 4, 30]
    assert table[0]["kept"] == [1.0] * 4  # scaling by one changes nothing at all
    assert table[0]["drift"]["norm_share"] == 0
    assert table[0]["drift"]["others"] == 0
    assert table[2]["drift"]["norm_share"] > table[1]["drift"]["norm_share"] > 0
    assert sum(table[2]["kept"]) < 4
    assert all(i not in row["rows"][i] for row in table for i in range(4))
    removed = say(capsys, *arguments, "--operation", "remove", "--where", "spatial", "--device", "cpu")
    assert "removed" in removed
    assert "there is no class" in fail(capsys, *arguments, "--target", "zebra", "--device", "cpu")
