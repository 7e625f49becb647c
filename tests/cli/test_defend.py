"""vitrail attack and vitrail defend, as a person types them, on toy/clip."""

import json

import pytest

from vitrail.cli import main
from vitrail.images import open_images
from vitrail.steering.prefix import Prefix, token_embedding

POINT = "blocks.0.hook_resid_post"


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
def coder(tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    main(
        ["extract", "world:shapes?n=32&seed=3&words=0.5", f"{out}/store", "--backbone", "toy/clip", "--points", POINT]
        + ["--workers", "0", "--device", "cpu"]
    )
    main(
        ["train", "batch_topk", f"{out}/store", f"{out}/coders/b", "--d-sae", "96", "--k", "8", "--epochs", "2"]
        + ["--batch-size", "512", "--lr", "1e-3", "--device", "cpu"]
    )
    return out / "coders/b"


def test_attacked_pictures_are_saved_with_a_record(capsys, tmp_path):
    words = tmp_path / "words.txt"
    words.write_text("star\nheart\nring\n")
    told = say(
        capsys, "attack", "world:shapes?n=5&seed=1", "--out", tmp_path / "a", "--words", words, "--fonts", "bold",
        "--sheet",
    )  # fmt: skip
    assert "a word on 5 of 5 pictures, of 3 words in 1 fonts" in told
    back = open_images(tmp_path / "a/attack.csv")
    assert len(back) == 5
    assert back.record(0).class_name == open_images("world:shapes?n=5&seed=1").record(0).class_name
    assert (tmp_path / "a/sheet.png").is_file()
    assert "no font" in fail(capsys, "attack", "world:shapes?n=2", "--out", tmp_path / "b", "--fonts", "comic")


def test_a_defence_is_chosen_measured_and_handed_to_repair(coder, capsys, tmp_path):
    from vitrail.backbones import load

    backbone, prefix = load("toy/clip"), tmp_path / "prefix.safetensors"
    Prefix(token_embedding(backbone).weight[5].detach()).save(prefix)
    told = say(
        capsys, "defend", coder, "world:shapes?n=60&seed=7&split=test", "--out", tmp_path / "d", "--fonts", "regular",
        "bold", "--random", 2, "--clean-loss", 1.0, "--prefix", prefix, "--device", "cpu", "--workers", 0,
    )  # fmt: skip
    for shown in ("clean", "seen", "all unseen", "linear correction", "random latents", "prefix + "):
        assert shown in told
    about = json.loads((tmp_path / "d/defence.json").read_text())
    assert (about["format"], about["version"], about["operation"]) == ("vitrail-defence", 1, "remove")
    assert about["point"] == POINT
    assert about["features"]
    rows = json.loads((tmp_path / "d/rows.json").read_text())["rows"]
    plain = [row for row in rows if row["defence"] == "none"]
    assert {row["condition"] for row in plain} >= {"clean", "seen", "unseen fonts", "unseen words", "all unseen"}
    assert all(row["low"] <= row["accuracy"] <= row["high"] for row in plain)
    clean = next(row["accuracy"] for row in plain if row["condition"] == "clean")
    assert ("right in only" in told) == (clean < 0.5), "a model that does not know the pictures cannot be defended"
    page = (tmp_path / "d/report.html").read_text()
    assert "Defense" in page
    assert "http" not in page.replace("http://www.w3.org", "")
    repaired = say(capsys, "repair", coder, "--features", tmp_path / "d/defence.json", "--out", tmp_path / "r")
    assert f"{len(about['features'])} latents of {POINT}" in repaired


def test_what_cannot_be_defended_is_a_sentence(coder, capsys, tmp_path):
    asked = ("defend", coder, "world:shapes?n=20", "--out", tmp_path / "d", "--device", "cpu", "--workers", 0)
    assert "two fonts at least" in fail(capsys, *asked, "--fonts", "bold")
    assert "0 < first < second < 1" in fail(capsys, *asked, "--parts", 0.7, 0.6)
