"""`vitrail modality`: a coder of images and one of texts, each on both, from the command line."""

import json

import pytest
import torch

from vitrail.backbones import load
from vitrail.backbones.text_rows import text_rows
from vitrail.cli import main
from vitrail.coders import coder_metadata, load_coder
from vitrail.images import open_images
from vitrail.metrics.reconstruction import fvu

COMMON = ["--workers", "0", "--device", "cpu"]
TEST = "world:shapes?n=30&split=test"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("modality")
    points = ["hook_image_embed", "blocks.3.hook_resid_post"]
    main(
        ["extract", "world:shapes?n=120", f"{out}/store", "--backbone", "toy/clip", "--tokens", "cls"]
        + ["--points", *points, *COMMON]
    )
    for point, name in zip(points, ("images", "elsewhere"), strict=True):
        main(
            ["train", "topk", f"{out}/store", f"{out}/{name}", "--point", point, "--k", "8", "--d-sae", "96"]
            + ["--epochs", "20", "--batch-size", "40", "--normalization", "mean_std", "--device", "cpu"]
        )
    return out


def asked(run, *more):
    options = ["--images", TEST, "--out", f"{run}/m.jsonl", "--n-bootstrap", "20", *COMMON]
    return ["modality", f"{run}/images", f"{run}/texts", *options, *more]


def test_each_coder_on_both_modalities(run, capsys):
    main(asked(run))
    assert "images on texts" in capsys.readouterr().out
    rows = [json.loads(line) for line in (run / "m.jsonl").read_text().splitlines()]
    names = ["images on images", "images on texts", "texts on images", "texts on texts"]
    assert [row["name"] for row in rows] == names
    value = {row["name"]: row["measured"]["fvu"]["value"] for row in rows}
    # Witness: the text coder's own cell is the plain FVU of the captions' rows.
    source = open_images(TEST)
    x = text_rows(load("toy/clip"), [source.record(i).caption for i in range(len(source))])
    with torch.no_grad():
        x_hat = load_coder(run / "texts")(x)
    assert value["texts on texts"] == pytest.approx(fvu(x, x_hat), rel=1e-4)
    # By hand: the difference of two coders on the same texts is that of their numbers, and has an interval.
    pair = rows[1]["paired"]["texts on texts"]["fvu"]
    assert pair["value"] == pytest.approx(value["images on texts"] - value["texts on texts"])
    assert pair["low"] <= pair["high"]
    assert set(rows[0]["paired"]) == {"texts on images"}
    like, own = (coder_metadata(run / name)["training"]["request"] for name in ("images", "texts"))
    assert own["coder"] == like["coder"]
    assert {**own["config"]} == {**like["config"]}
    main(["table", "msae", f"{run}/m.jsonl", "--paired", "--against", "texts on texts"])
    assert "images on texts less texts on texts" in capsys.readouterr().out


def test_texts_of_files_and_mistakes_in_sentences(run, capsys):
    (run / "few.txt").write_text("a red circle\n\na blue square\na yellow triangle\n")
    main(asked(run, "--texts", f"{run}/few.txt", "--train-texts", f"{run}/few.txt", "--metrics", "dead"))
    rows = [json.loads(line) for line in (run / "m.jsonl").read_text().splitlines()]
    assert [row["measured"]["fvu"]["n"] for row in rows] == [30, 3, 30, 3]
    (run / "empty.txt").write_text("\n")
    for more, told in (
        (["--texts", f"{run}/empty.txt"], "holds no texts: it should have one a line"),
        (["--texts", f"{run}/none.txt"], "is missing: it should hold texts"),
    ):
        with pytest.raises(SystemExit):
            main(asked(run, *more))
        assert told in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["modality", f"{run}/elsewhere", f"{run}/texts", *asked(run)[3:]])
    assert "modalities meet in the final space" in capsys.readouterr().err
