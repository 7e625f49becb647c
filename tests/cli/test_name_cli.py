"""`vitrail name`, from pictures to names that are true, on the toy CLIP."""

import csv
import json
import re
import shutil

import numpy as np
import pytest
import torch

from vitrail.backbones import load
from vitrail.cli import main
from vitrail.cli.search import find_names
from vitrail.coders import TopK, save_coder
from vitrail.concepts.table import names_of, read_concepts
from vitrail.concepts.vocabulary import embed, read_words
from vitrail.files import file_digest
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


def test_names_of_a_runs_coder_lie_where_search_and_report_look(run, capsys, tmp_path):
    shutil.copytree(run / "inner", tmp_path / "r/coders/inner")
    few = ["--images", "world:shapes?n=24&seed=9&split=val&image_px=64", "--words", "shapes", "--method", "top_images"]
    main(["name", f"{tmp_path}/r/coders/inner", *few, "--n-bootstrap", "20", *COMMON])
    rows = read_concepts(tmp_path / "r/concepts/inner")
    assert find_names(None, tmp_path / "r", "inner") == names_of(rows)
    with pytest.raises(SystemExit):
        main(["name", f"{run}/inner", *few])
    assert "lies in no run's coders/: say where the names go with --out" in capsys.readouterr().err


def test_names_by_every_method(run, capsys):
    out = run / "names"
    asked = ["name", f"{run}/last", "--images", PICTURES, "--words", "shapes", "--out", str(out)]
    main([*asked, "--n-bootstrap", "40", "--n-effect-images", "1", *COMMON])
    said = capsys.readouterr().out
    rows = read_concepts(out)
    methods = {row.method for row in rows}
    assert methods == {"decoder_text", "top_images", "effect", "captions", "labels"}
    assert all(f"{method}: " in said for method in methods)
    assert re.search(r"\d+ of 42 latents have a valid name, \d+ different ones", said)
    assert re.search(r"decoder_text and top_images: the same name for \d+% of \d+ latents", said)
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


def test_names_are_tried_on_masks_of_a_world(run, tmp_path, capsys):
    """An inner layer's coder, of patches this time; its names are words of shapes."""
    out, toy = tmp_path / "names", load("toy/clip")
    world = open_images("world:shapes?n=48&seed=3&image_px=64")
    with torch.no_grad():
        x = toy.activations(
            torch.stack([toy.preprocess(world.load(i)) for i in range(48)]), ["blocks.3.hook_resid_post"]
        )
    rows = x["blocks.3.hook_resid_post"][:, toy.grid.tokens("spatial")].flatten(0, 1)
    coder = TopK(d_in=rows.shape[1], d_sae=32, k=4)
    coder.fit(ActivationStats.of(rows), rows)
    about = {"point": "blocks.3.hook_resid_post", "tokens": "spatial", "backbone": "toy/clip"}
    save_coder(tmp_path / "patches", coder, {**about, "backbone_digest": toy.digest})
    asked = ["name", f"{tmp_path}/patches", "--images", PICTURES, "--words", "shapes", "--out", str(out)]
    asked += ["--method", "top_images", "labels", "--n-bootstrap", "20", *COMMON]
    main([*asked, "--mask-images", "world:shapes?n=60&seed=9&split=test&image_px=64"])
    said = capsys.readouterr().out
    assert "top_images, against masks:" in said
    assert "labels, against masks: 0 of" in said  # classes of this world are no concepts of its masks
    told = json.loads((out / "mask_check.json").read_text())
    assert told["n_images"] == 60
    with (out / "mask_check.csv").open(encoding="utf-8") as stream:
        sheet = list(csv.DictReader(stream))
    assert len(sheet) == told["methods"]["top_images"]["measured"] > 0
    assert {row["concept"].partition(":")[2] in row["name"] for row in sheet} == {True}
    with pytest.raises(SystemExit):
        main([*asked, "--mask-images", PICTURES])
    assert "a name is tried on others" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*asked, "--masks", str(tmp_path)])
    assert "needs --mask-images" in capsys.readouterr().err


def test_stored_words_name_a_backbone_without_a_text_tower(tmp_path, capsys):
    """toy/shapes has none. The rows are means of pictures of a kind, so that they lie where pictures do."""
    toy, out = load("toy/shapes"), tmp_path / "names"
    world = open_images("world:shapes?n=60&seed=3")
    with torch.no_grad():
        seen = toy.activations(
            torch.stack([toy.preprocess(world.load(i)) for i in range(60)]),
            ["blocks.1.hook_resid_post", "hook_image_embed"],
        )
    x = seen["blocks.1.hook_resid_post"][:, toy.grid.tokens("spatial")].flatten(0, 1)
    coder = TopK(d_in=x.shape[1], d_sae=24, k=4)
    coder.fit(ActivationStats.of(x), x)
    about = {"point": "blocks.1.hook_resid_post", "tokens": "spatial", "backbone": "toy/shapes"}
    save_coder(tmp_path / "coder", coder, {**about, "backbone_digest": toy.digest})
    words = ["shape:star", "shape:circle", "shape:heart"]
    embed = torch.nn.functional.normalize(seen["hook_image_embed"].float(), dim=1)
    shown = torch.tensor([[word in world.scene(i).masks for word in words] for i in range(60)]).float()
    rows = torch.nn.functional.normalize(shown.t() @ embed, dim=1)
    np.save(tmp_path / "rows.npy", rows.numpy())
    (tmp_path / "words.json").write_text(json.dumps([word.partition(":")[2] for word in words]))
    asked = ["name", f"{tmp_path}/coder", "--images", "world:shapes?n=80&seed=9&split=val", "--out", str(out)]
    asked += [
        "--words",
        f"{tmp_path}/words.json",
        "--n-bootstrap",
        "20",
        *COMMON,
        "--method",
        "top_images",
        "--word-rows",
    ]
    main([*asked, f"{tmp_path}/rows.npy"])
    assert "top_images: " in capsys.readouterr().out
    assert {row.name for row in read_concepts(out)} <= {"star", "circle", "heart"}
    about = json.loads((out / "concepts.json").read_text())["about"]
    assert about["words"]["n"] == 3
    assert about["words"]["source"].endswith("rows.npy")
    assert about["word_rows_sha256"] == file_digest(tmp_path / "rows.npy")
    for bad, message in (
        (rows[:2], "has 2 rows, and there are 3 words"),
        (rows[:, :5], f"has 5 columns, the model's image embedding {embed.shape[1]}"),
        (rows * torch.tensor([[1.0], [torch.nan], [1.0]]), "the row of 'circle' in .*NaN"),
    ):
        np.save(tmp_path / "bad.npy", bad.numpy())
        with pytest.raises(SystemExit):
            main([*asked, f"{tmp_path}/bad.npy"])
        assert re.search(message, capsys.readouterr().err)
