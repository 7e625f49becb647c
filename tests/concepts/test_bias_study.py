"""A bias study from pictures to a page: a planted direction must be found first, and move the answer."""

import json

import pytest
import torch

from vitrail.backbones import load
from vitrail.cli import main
from vitrail.coders import make_coder
from vitrail.concepts.bias_study import Changed, bias_study
from vitrail.images import open_images

SPEC = "world:shapes?n=80&split=test"


@pytest.fixture(scope="module")
def toy():
    """toy/clip, and a coder of its image embeddings whose latent 0 is the direction from land to water."""
    backbone, images = load("toy/clip"), open_images(SPEC)
    with torch.inference_mode():
        pixels = torch.stack([backbone.preprocess(images.load(i)) for i in range(len(images))])
        rows = backbone.activations(pixels, ["hook_image_embed"])["hook_image_embed"]
    water = torch.tensor(["ground:water" in images.scene(i).masks for i in range(len(images))])
    direction = rows[water].mean(0) - rows[~water].mean(0)
    coder = make_coder("topk", d_in=rows.shape[1], d_sae=8, k=4, normalization="none", seed=0)
    with torch.no_grad():
        coder.W_dec[0] = direction / direction.norm()
        coder.W_enc.copy_(coder.W_dec.t())
        coder.b_dec.copy_(rows.mean(0))
    return backbone, coder.eval(), images, rows.clone()


def test_the_planted_direction_is_found_first_and_moves_the_answer(toy, tmp_path):
    backbone, coder, images, _ = toy
    told = bias_study(
        backbone, coder, images, tmp_path, point="hook_image_embed", tokens="cls", target="ground:water",
        n_changed=16, n_permutations=300, n_shown=2,
    )  # fmt: skip
    first = next(one for one in told["interventions"] if one["latent"] == 0)
    strongest = told["associations"][0]
    assert (strongest["latent"], strongest["name"], first["name"]) == (0, "ground:water", "ground:water")
    assert strongest["p_family"] == 1 / 301
    assert 0 in next(one["latents"] for one in told["concepts"] if one["name"] == "ground:water")
    levels = [row["probability"] for row in first["curve"]]
    assert levels == sorted(levels), "the more water, the likelier"
    assert (first["way"], first["rank"]) == ("right", 1.0)
    assert first["rise_low"] > 0
    assert first["rise"] == pytest.approx(levels[-1] - levels[0])
    assert json.loads((tmp_path / "bias.json").read_text())["accuracy"] == told["accuracy"] > 0.8
    page = (tmp_path / "report.html").read_text()
    assert "ground:water" in page
    assert "http" not in page
    assert (tmp_path / "associations.csv").read_text().startswith("name,latent,fires,auc")
    assert len((tmp_path / "curves.csv").read_text().splitlines()) == 1 + sum(
        len(one["curve"]) for one in told["interventions"]
    )


def test_an_embedding_is_moved_along_the_decoder_and_by_nothing_else(toy):
    backbone, coder, images, rows = toy
    changed = Changed(backbone, coder, images, [0, 1, 2], "hook_image_embed", "cls")
    z = coder.encode_sparse(rows[:3]).to_dense()[:, 0]
    want = rows[:3] + (2.5 - z)[:, None] * coder.W_dec[0]
    unit = torch.nn.functional.normalize
    torch.testing.assert_close(changed(0, 2.5), unit(want, dim=1), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(changed.before, unit(rows[:3], dim=1), atol=1e-5, rtol=1e-5)


def test_a_latent_of_an_inner_layer_is_set_in_the_forward_pass():
    backbone, images = load("toy/clip"), open_images(SPEC)
    point = "blocks.1.hook_resid_post"
    coder = make_coder("topk", d_in=backbone.point(point).width, d_sae=32, k=4, normalization="none", seed=0).eval()
    changed = Changed(backbone, coder, images, [0, 1], point, "spatial")
    pixels = torch.stack([backbone.preprocess(images.load(i)) for i in (0, 1)])

    def by_hand(value, _point):
        patches = value[:, backbone.grid.tokens("spatial")]
        z = coder.encode_sparse(patches.flatten(0, 1)).to_dense()[:, 7].reshape(patches.shape[:2])
        out = value.clone()
        out[:, backbone.grid.tokens("spatial")] = patches + (5.0 - z)[..., None] * coder.W_dec[7]
        return out

    with torch.inference_mode(), backbone.hooks({point: by_hand}):
        want = backbone.activations(pixels, ["hook_image_embed"])["hook_image_embed"]
    want = torch.nn.functional.normalize(want, dim=1)
    torch.testing.assert_close(changed(7, 5.0), want, atol=1e-5, rtol=1e-5)
    assert (changed(7, 5.0) - changed.before).abs().max() > 1e-3


def test_what_pictures_do_not_know_is_a_sentence(toy, tmp_path, capsys):
    backbone, coder, images, _ = toy
    told = {"point": "hook_image_embed", "tokens": "cls"}
    with pytest.raises(ValueError, match="know nothing of 'ground:lava'. They know object, shape:circle"):
        bias_study(backbone, coder, images, tmp_path, target="ground:lava", **told)
    with pytest.raises(ValueError, match="'object' is true of 80 of 80 pictures: a classifier needs both"):
        bias_study(backbone, coder, images, tmp_path, target="object", **told)
    with pytest.raises(SystemExit):
        main(["bias", str(tmp_path / "no"), "--images", SPEC, "--target", "object", "--out", str(tmp_path / "o")])
    assert "vitrail bias:" in capsys.readouterr().err
