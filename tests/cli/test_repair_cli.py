"""vitrail repair, as a person types it, on toy/clip."""

import json

import pytest
import torch

from vitrail.backbones import load
from vitrail.cli import main
from vitrail.coders import load_coder
from vitrail.files import tensors_digest, write_tensors
from vitrail.steering.repair import load_repaired

POINT = "blocks.2.hook_resid_post"


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
        ["extract", "world:shapes?n=40&seed=3", f"{out}/store", "--backbone", "toy/clip", "--points", POINT]
        + ["--workers", "0", "--device", "cpu"]
    )
    main(
        ["train", "batch_topk", f"{out}/store", f"{out}/coders/b", "--d-sae", "96", "--k", "8", "--epochs", "2"]
        + ["--batch-size", "512", "--lr", "1e-3", "--device", "cpu"]
    )
    return out / "coders/b"


def test_a_repaired_model_is_measured_saved_exported_and_opened(coder, capsys, tmp_path):
    features = tmp_path / "defence.json"
    digest = tensors_digest(load_coder(coder).state_dict())
    features.write_text(json.dumps({"features": [5, 9], "point": POINT, "coder_digest": digest, "where": "spatial"}))
    told = say(
        capsys, "repair", coder, "--latents", 1, 2, "--features", features, "--out", tmp_path / "r", "--device", "cpu",
        "--images", "world:shapes?n=24&split=test", "--templates", "a {}", "--export",
    )  # fmt: skip
    assert f"toy/clip (repaired): 4 latents of {POINT} (ablate) on spatial tokens" in told
    assert "of 24 pictures" in told
    assert "repaired: right in" in told
    recorded = json.loads((tmp_path / "r/repair.json").read_text())
    assert recorded["edits"][0]["latents"] == [1, 2, 5, 9]
    assert recorded["about"]["n_images"] == 24
    assert 0 <= recorded["about"]["accuracy_repaired"]["low"] <= recorded["about"]["accuracy_repaired"]["value"] <= 1
    backbone = load("toy/clip")
    images = torch.randn(3, 3, *backbone.preprocess.image_px, generator=torch.Generator().manual_seed(0))
    repaired = load_repaired(tmp_path / "r")
    with torch.no_grad():
        want = repaired(images)
        torch.testing.assert_close(torch.export.load(tmp_path / "r/model.pt2").module()(images), want)
        assert want.shape == backbone(images).shape


def test_a_correction_takes_the_place_of_latents(coder, capsys, tmp_path):
    d = load("toy/clip").d_model
    tensors = {"centre": torch.zeros(d), "matrix": 0.1 * torch.eye(d)}
    write_tensors(tmp_path / "c.safetensors", tensors, {"point": POINT})
    asked = ("repair", coder, "--correction", tmp_path / "c.safetensors", "--out", tmp_path / "r", "--device", "cpu")
    assert f"a linear correction of {POINT}, spatial tokens" in say(capsys, *asked)
    assert load_repaired(tmp_path / "r").edits[0].about["rank"] == d
    assert "latents or a --correction, not both" in fail(capsys, *asked, "--latents", 1)


def test_what_cannot_be_repaired_is_a_sentence(coder, capsys, tmp_path):
    out = ("--out", tmp_path / "r", "--device", "cpu")
    assert "nothing to repair: name at least one latent" in fail(capsys, "repair", coder, *out)
    assert "latents are 0..95, got 96" in fail(capsys, "repair", coder, "--latents", 96, *out)
    assert "no names are known: run `vitrail name`" in fail(capsys, "repair", coder, "-c", "red", *out)
    features = tmp_path / "f.json"
    for content, told in (
        ({"latents": [1]}, "holds no list of latents"),
        ({"features": ["red"]}, "features are numbers of latents, got ['red']"),
        ({"features": [1], "coder_digest": "0"}, "lists latents of another coder"),
        ({"features": [1], "point": "blocks.0.hook_resid_post"}, f"the coder reads {POINT}"),
    ):
        features.write_text(json.dumps(content))
        assert told in fail(capsys, "repair", coder, "--features", features, *out)
    assert not (tmp_path / "r").exists()
