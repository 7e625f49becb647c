"""`vitrail name`, from pictures to names that are true, on the toy CLIP."""

import csv
import json

import pytest
import torch

from vitrail.backbones import load
from vitrail.cli import main
from vitrail.coders import TopK, save_coder
from vitrail.concepts.table import names_of, read_concepts
from vitrail.concepts.vocabulary import embed, read_words
from vitrail.images import open_images
from vitrail.statistics import ActivationStats

COMMON = ["--workers", "0", "--device", "cpu"]
PICTURES = "world:shapes?n=120&seed=9&split=val&image_px=64"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Coders of the toy CLIP: the last one's directions are words, the inner one's are random."""
    out, toy = tmp_path_factory.mktemp("name"), load("toy/clip")
    world = open_images("world:shapes?n=48&seed=3&image_px=64")
    images = torch.stack([toy.preprocess(world.load(i)) for i in range(len(world))])
    words = embed(toy.text, read_words("shapes")).centred
    with torch.no_grad():
        seen = toy.activations(images, ["blocks.3.hook_resid_post", "hook_image_embed"])
    for point, x in seen.items():
        rows = x[:, 0] if x.ndim == 3 else x
        coder = TopK(d_in=rows.shape[1], d_sae=len(words), k=4, normalization="mean_std")
        coder.fit(ActivationStats.of(rows), rows)
        if point == "hook_image_embed":
            with torch.no_grad():
                coder.W_dec.copy_(words)
                coder.W_enc.copy_(words.t())
        about = {"point": point, "tokens": "cls", "backbone": "toy/clip", "backbone_digest": toy.digest}
        save_coder(out / ("last" if point == "hook_image_embed" else "inner"), coder, about)
    return out


def test_names_by_every_method(run, capsys):
    out = run / "names"
    asked = ["name", f"{run}/last", "--images", PICTURES, "--words", "shapes", "--out", str(out)]
    main([*asked, "--n-bootstrap", "40", "--n-effect-images", "1", *COMMON])
    said = capsys.readouterr().out
    rows = read_concepts(out)
    methods = {row.method for row in rows}
    assert methods == {"decoder_text", "top_images", "effect", "captions", "labels"}
    assert all(f"{method}: " in said for method in methods)
    about = json.loads((out / "concepts.json").read_text())["about"]
    by_text = about["methods"]["top_images"]
    assert by_text["detection_auc"] > by_text["detection_random"] + 0.1
    assert by_text["true_of_valid"] > by_text["true"]
    assert {(one["space"], one["keep_bias"]) for one in about["decoder_text_spaces"]} == {
        (space, keep) for space in ("normalised", "model") for keep in (False, True)
    }
    assert len(about["agreement"]) == 10
    valid = [row for row in rows if row.valid]
    assert valid
    assert all(row.detection_low > row.detection_random_high for row in valid)
    with (out / "review.csv").open(encoding="utf-8") as stream:
        sheet = list(csv.DictReader(stream))
    names = names_of(rows)
    assert {int(row["latent"]): row["name"] for row in sheet if row["name"]} == names
    assert (out / "concepts.parquet").is_file()
    assert len(list((out / "vocabulary").iterdir())) == 1


def test_an_inner_layer_has_no_decoder_text(run, tmp_path, capsys):
    words = tmp_path / "words.txt"
    words.write_text("star\nstriped thing\nthing on the sea\nspaceship\n", encoding="utf-8")
    asked = ["name", f"{run}/inner", "--images", PICTURES, "--words", str(words), "--out", f"{tmp_path}/names"]
    with pytest.raises(SystemExit):
        main([*asked, "--method", "decoder_text", *COMMON])
    assert "needs a coder of hook_image_embed" in capsys.readouterr().err
    with pytest.warns(UserWarning, match="does not read 1 of 4 words.*spaceship"):
        main([*asked, "--method", "top_images", "--n-bootstrap", "20", *COMMON])
    assert {row.name for row in read_concepts(tmp_path / "names")} <= {"star", "striped thing", "thing on the sea"}
