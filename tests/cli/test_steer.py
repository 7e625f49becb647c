"""`vitrail steer`, on the toy CLIP and on a model without a text tower."""

import json

import numpy as np
import pytest
import torch

from vitrail.backbones import load
from vitrail.cli import main
from vitrail.cli.steer import chosen_latents
from vitrail.coders import TopK, save_coder
from vitrail.images import open_images
from vitrail.statistics import ActivationStats
from vitrail.tables import read_table

COMMON = ["--workers", "0", "--device", "cpu", "--n-bootstrap", "20"]
PICTURES = "world:shapes?n=4&seed=9&split=val&image_px=64"
POINT = "blocks.3.hook_resid_post"


@pytest.fixture(scope="module")
def coders(tmp_path_factory):
    out = tmp_path_factory.mktemp("steer")
    world = open_images("world:shapes?n=16&seed=3&image_px=64")
    for name in ("clip", "shapes"):
        toy = load(f"toy/{name}")
        images = torch.stack([toy.preprocess(world.load(i)) for i in range(len(world))])
        with torch.no_grad():
            rows = toy.activations(images, [POINT])[POINT].flatten(0, 1)
        coder = TopK(d_in=rows.shape[1], d_sae=64, k=4, normalization="mean_std")
        coder.fit(ActivationStats.of(rows), rows)
        about = {"point": POINT, "tokens": "all", "backbone": f"toy/{name}", "backbone_digest": toy.digest}
        save_coder(out / name, coder, about)
    return out


def test_steering_writes_a_row_a_latent(coders, tmp_path, capsys):
    asked = ["steer", f"{coders}/clip", "--images", PICTURES, "--words", "shapes", "--out", str(tmp_path), *COMMON]
    main([*asked, "--latents", "sample", "20", "--dose", "own:3", "--against", "neurons", "random", "--n-random", "16"])
    said = capsys.readouterr().out
    assert "latents: 20 of 64; mean S" in said
    assert "words with ipr > 0.5, of 16 each: latents" in said
    table = read_table(tmp_path / "steerability.parquet")
    assert np.unique(table["family"], return_counts=True)[1].tolist() == [20, 128, 16]
    told = json.loads((tmp_path / "steerability.json").read_text())
    assert told["dose"] == {"operation": "set", "value": 3.0, "unit": "own"}
    assert told["families"]["latents"]["share_sampling"] is not None
    assert (tmp_path / "histogram.svg").is_file()
    assert (tmp_path / "curves.svg").is_file()
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "20 of 64 latents of blocks.3.hook_resid_post" in page
    assert page.count("data:image/png;base64") == 3
    mine = table["family"] == "latents"
    most = int(table["number"][mine][np.argmax(table["s"][mine])])
    assert f"<tr><td>{most}</td>" in page.split("move the answer most")[1].split("</tr>")[1]
    assert "http" not in page


def test_without_a_text_tower_words_come_as_rows(coders, tmp_path, capsys):
    asked = ["steer", f"{coders}/shapes", "--images", PICTURES, "--out", f"{tmp_path}/out", *COMMON, "--strength", "20"]
    with pytest.raises(SystemExit):
        main(asked)
    assert "--word-rows FILE.npy" in capsys.readouterr().err
    words, rows = tmp_path / "words.txt", tmp_path / "rows.npy"
    words.write_text("one\ntwo\nthree\n", encoding="utf-8")
    given = np.random.default_rng(0).normal(size=(3, 128))
    np.save(rows, given / np.linalg.norm(given, axis=1, keepdims=True))
    main([*asked, "--words", str(words), "--word-rows", str(rows), "--latents", "3,1"])
    assert read_table(tmp_path / "out/steerability.parquet")["number"].tolist() == [1, 3]
    assert json.loads((tmp_path / "out/steerability.json").read_text())["logit_scale"] == 100


def test_which_latents_are_meant():
    assert chosen_latents(("all",), 9, 0) is None
    assert chosen_latents(("5,2", "2"), 9, 0).tolist() == [2, 5]
    drawn = chosen_latents(("sample", "4"), 9, 0)
    assert len(set(drawn.tolist())) == 4
    assert drawn.tolist() == chosen_latents(("sample", "4"), 9, 0).tolist()
    for wrong in (("sample", "10"), ("sample", "x"), ("some",), ("1,-2",)):
        with pytest.raises(ValueError, match=r"sample"):
            chosen_latents(wrong, 9, 0)


def test_two_doses_are_told(coders, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(
            [
                "steer",
                f"{coders}/clip",
                "--images",
                PICTURES,
                "--out",
                str(tmp_path),
                "--strength",
                "3",
                "--dose",
                "own:3",
            ]
        )
    assert "not both" in capsys.readouterr().err
