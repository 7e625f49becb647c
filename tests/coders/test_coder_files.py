"""coder.json and weights.safetensors: what is kept, and what a damaged folder is told."""

import json

import pytest
import torch
from coder_examples import D_IN, D_SAE, fitted, rows
from safetensors.torch import save_file

from vitrail.coders import coder_metadata, load_coder, save_coder
from vitrail.files import file_digest


@pytest.fixture
def folder(tmp_path):
    save_coder(tmp_path / "coder", fitted("topk"), {"point": "blocks.1.hook_resid_post", "tokens": "spatial"})
    return tmp_path / "coder"


def edit(folder, **changes):
    path = folder / "coder.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_the_description_says_what_the_coder_is(folder):
    described = json.loads((folder / "coder.json").read_text())
    assert (described["format"], described["version"], described["architecture"]) == ("vitrail-coder", 1, "topk")
    assert (described["d_in"], described["d_sae"], described["config"]["k"]) == (D_IN, D_SAE, 4)
    assert described["weights_sha256"] == file_digest(folder / "weights.safetensors")
    metadata = coder_metadata(folder)
    assert metadata["point"] == "blocks.1.hook_resid_post"
    assert metadata["normalization"] == "mean_std"
    assert metadata["provenance"]["vitrail"]


def test_only_json_and_safetensors_are_written(folder):
    assert sorted(path.name for path in folder.iterdir()) == ["coder.json", "weights.safetensors"]


def test_precision_is_kept(tmp_path):
    coder = fitted("topk").double()
    save_coder(tmp_path, coder)
    x = rows().double()
    assert load_coder(tmp_path).W_dec.dtype == torch.float64
    assert torch.equal(load_coder(tmp_path)(x), coder(x))


def test_saving_over_a_coder_replaces_it(folder):
    save_coder(folder, fitted("relu"))
    assert load_coder(folder).name == "relu"
    assert "point" not in coder_metadata(folder)


def test_a_missing_coder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere/coder\.json is missing: there is no coder here"):
        load_coder(tmp_path / "nowhere")


def test_missing_weights_are_named(folder):
    (folder / "weights.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"weights\.safetensors is missing"):
        load_coder(folder)


@pytest.mark.parametrize("kept", [0, 10, 500, -1])
def test_a_cut_file_is_named(folder, kept):
    path = folder / "weights.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"weights\.safetensors is cut short"):
        load_coder(folder)


def test_altered_weights_are_noticed(folder):
    path = folder / "weights.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="altered or replaced"):
        load_coder(folder)


def test_a_cut_description_is_named(folder):
    path = folder / "coder.json"
    path.write_text(path.read_text()[:-20])
    with pytest.raises(ValueError, match=r"coder\.json is not a readable coder"):
        load_coder(folder)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"version": 2}, "format version 2; this vitrail reads version 1. Upgrade"),
        ({"format": "something"}, "its format is not 'vitrail-coder'"),
        ({"architecture": "jumprelu9"}, "no coder architecture 'jumprelu9'. Known: relu, topk"),
        ({"d_in": 768}, "says d_in=768, d_sae=28, but its config makes a coder of d_in=20, d_sae=28"),
        ({"config": {"d_in": D_IN, "d_sae": D_SAE, "depth": 3}}, "depth"),
        ({"config": {"d_in": D_IN, "d_sae": D_SAE, "k": 10**6}}, "k must be in"),
        (
            {"d_in": 9, "config": {"d_in": 9, "d_sae": D_SAE, "k": 4}},
            r"W_dec has shape \(28, 20\).* d_in=9 and d_sae=28 has \(28, 9\)",
        ),
        ({"config": {"d_in": D_IN, "d_sae": D_SAE, "k": 4, "normalization": "none"}}, r"differ in: normalize\.mean"),
    ],
)
def test_a_description_that_does_not_fit_is_named(folder, changes, sentence):
    edit(folder, **changes)
    with pytest.raises(ValueError, match=sentence):
        load_coder(folder)


def test_a_description_that_lacks_a_field_is_named(folder):
    described = json.loads((folder / "coder.json").read_text())
    del described["config"]
    (folder / "coder.json").write_text(json.dumps(described))
    with pytest.raises(ValueError, match="lacks config"):
        load_coder(folder)
    (folder / "coder.json").write_text("[1, 2]")
    with pytest.raises(ValueError, match="does not describe a vitrail coder"):
        load_coder(folder)


def test_no_pickle_is_read(folder):
    torch.save({"W_dec": torch.zeros(2)}, folder / "weights.safetensors")
    with pytest.raises(ValueError, match="not a safetensors file"):
        load_coder(folder)
    save_file({"W_dec": torch.zeros(2)}, folder / "weights.safetensors")
    edit(folder, weights_sha256=file_digest(folder / "weights.safetensors"))
    with pytest.raises(ValueError, match="does not hold the tensors of a topk coder"):
        load_coder(folder)
