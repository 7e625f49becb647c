"""A repaired model: the edits of vitrail.steering, inside one module that is saved, refused, opened and exported."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from vitrail.backbones import load
from vitrail.backbones.toy import ToyViT, wrap
from vitrail.coders import make_coder
from vitrail.files import write_tensors
from vitrail.statistics import ActivationStats
from vitrail.steering.defences import Correction
from vitrail.steering.interventions import Dose, Intervention, Latents, intervened
from vitrail.steering.repair import (
    CorrectionPart,
    Part,
    edited_latents,
    export_repaired,
    load_repaired,
    read_correction,
    repair,
    repair_metadata,
    save_repaired,
    time_overhead,
)
from vitrail.steering.repaired import EditedLatents

POINT = "blocks.1.hook_resid_post"
ARCHITECTURES = {
    "relu": {"l1": 0.1},
    "topk": {"k": 6},
    "batch_topk": {"k": 6},
    "matryoshka": {"ks": [4, 8, 48], "inference_k": 8},
    "matryoshka_prefix": {"k": 6},
    "jump_relu": {"initial_threshold": 0.3},
    "gated": {"l1": 0.1},
}


@pytest.fixture(scope="module")
def backbone():
    torch.manual_seed(0)
    vit = ToyViT(image_px=32, patch_px=8, d_model=24, n_layers=3, n_heads=2, d_mlp=32, n_classes=5)
    return wrap(vit, name="toy")


@pytest.fixture(scope="module")
def images():
    return torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def coder_for(backbone, images, architecture, point=POINT, normalization="mean_std", d_sae=48, **options):
    with torch.no_grad():
        x = backbone.activations(images, [point])[point].flatten(0, -2).clone()
    arguments = ARCHITECTURES.get(architecture, {}) | options
    coder = make_coder(architecture, d_in=x.shape[1], d_sae=d_sae, normalization=normalization, seed=0, **arguments)
    coder.fit(ActivationStats.of(x), x)
    coder.calibrate([x])
    if architecture == "gated":
        with torch.no_grad():
            coder.r_mag.uniform_(-0.3, 0.3)
            coder.b_mag.uniform_(-0.2, 0.2)
    return coder.eval(), x


def busiest(coder, x, n=5):
    return coder.encode_sparse(x).fired().topk(n).indices.tolist()


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_it_gives_what_the_intervention_gives(backbone, images, architecture):
    coder, x = coder_for(backbone, images, architecture)
    latents = busiest(coder, x)
    for operation, value, tokens in (
        ("ablate", 0, "all"),
        ("set", 2.0, "spatial"),
        ("scale", 3, "cls"),
        ("add", 1, "all"),
    ):
        dose = Dose(operation, float(value))
        asked = Intervention(POINT, Latents(coder), latents, dose, where=tokens)
        with torch.no_grad(), intervened(backbone, asked):
            want = backbone(images)
        repaired = repair(
            backbone, Part(coder=coder, point=POINT, latents=latents, tokens=tokens, operation=operation, value=value)
        )
        with torch.no_grad():
            got, plain = repaired(images), backbone(images)
        torch.testing.assert_close(got, want, atol=2e-5, rtol=2e-5)
        assert (got - plain).abs().max() > 1e-3, "the edit does something"


@pytest.mark.parametrize("normalization", ["none", "layer_norm", "row_norm", "mean_norm"])
def test_every_normalisation_is_undone(backbone, images, normalization):
    coder, x = coder_for(backbone, images, "topk", normalization=normalization)
    latents = busiest(coder, x)
    asked = Intervention(POINT, Latents(coder), latents, Dose("set", 1.5))
    with torch.no_grad(), intervened(backbone, asked):
        want = backbone(images)
    part = Part(coder=coder, point=POINT, latents=latents, operation="set", value=1.5)
    with torch.no_grad():
        torch.testing.assert_close(repair(backbone, part)(images), want, atol=2e-5, rtol=2e-5)


def test_one_row_by_hand():
    # Two latents along the axes, thresholds 1 and 3; of x = (2, 2) latent 0 fires with 2 and is removed, 1 does not.
    tensors = {
        "W": torch.eye(2), "b": torch.zeros(2), "W_dec": torch.eye(2), "b_dec": torch.zeros(2),
        "floor": torch.tensor([1.0, 3.0]), "value": torch.zeros(2),
    }  # fmt: skip
    about = {
        "rule": "threshold",
        "k": None,
        "normalization": "none",
        "operation": "ablate",
        "tokens": "all",
        "first": None,
        "stop": None,
    }
    edit = EditedLatents(tensors, about)
    assert edit(torch.tensor([[[2.0, 2.0]]])).tolist() == [[[0.0, 2.0]]]
    assert edit(torch.tensor([[[0.5, 4.0]]])).tolist() == [[[0.5, 0.0]]]
    assert edit.products_per_token() == 8


def test_what_changes_nothing_is_bit_identical(backbone, images):
    coder, x = coder_for(backbone, images, "topk")
    with torch.no_grad():
        plain = backbone(images)
        once = repair(backbone, Part(coder=coder, point=POINT, latents=busiest(coder, x), operation="scale", value=1.0))
        coder.b_enc[[3, 7]] = -1e6
        silent = [3, 7]
        assert torch.equal(once(images), plain)
        assert torch.equal(repair(backbone, Part(coder=coder, point=POINT, latents=silent))(images), plain)


def test_two_points_and_the_image_embedding(backbone, images):
    first, x = coder_for(backbone, images, "topk", point="blocks.0.hook_resid_post")
    last, e = coder_for(backbone, images, "relu", point="hook_image_embed")
    parts = [
        Part(coder=first, point="blocks.0.hook_resid_post", latents=busiest(first, x)),
        Part(coder=last, point="hook_image_embed", latents=busiest(last, e), operation="scale", value=2.0),
    ]
    asked = [
        Intervention("blocks.0.hook_resid_post", Latents(first), parts[0].latents, Dose("ablate")),
        Intervention("hook_image_embed", Latents(last), parts[1].latents, Dose("scale", 2.0)),
    ]
    with torch.no_grad(), intervened(backbone, asked):
        want = backbone(images)
    with torch.no_grad():
        torch.testing.assert_close(repair(backbone, parts)(images), want, atol=2e-5, rtol=2e-5)
    with pytest.raises(ValueError, match="two edits are at one place"):
        repair(backbone, [parts[0], Part(coder=first, point="blocks.1.hook_resid_pre", latents=[0])])


def test_it_is_saved_and_opened_again_without_coders_and_training(images, tmp_path):
    backbone = load("toy/shapes")
    pixels = torch.randn(3, 3, *backbone.preprocess.image_px, generator=torch.Generator().manual_seed(0))
    coder, x = coder_for(backbone, pixels, "batch_topk")
    repaired = repair(backbone, Part(coder=coder, point=POINT, latents=busiest(coder, x)))
    save_repaired(tmp_path / "r", repaired, {"accuracy": 0.5})
    assert repair_metadata(tmp_path / "r")["about"] == {"accuracy": 0.5}
    with torch.no_grad():
        want = repaired(pixels)
    torch.save(pixels, tmp_path / "pixels.pt")
    torch.save(want, tmp_path / "want.pt")
    code = f"""
import sys
for gone in ("vitrail.training", "vitrail.coders", "vitrail.store", "vitrail.studies", "vitrail.concepts"):
    sys.modules[gone] = None  # as if it were not installed
import torch
from vitrail.steering.repair import load_repaired
model = load_repaired({str(tmp_path / "r")!r})
with torch.no_grad():
    got = model(torch.load({str(tmp_path / "pixels.pt")!r}))
assert torch.equal(got, torch.load({str(tmp_path / "want.pt")!r})), "other numbers"
print(model.name, model.n_classes)
"""
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stderr
    assert "toy/shapes (repaired)" in told.stdout


def test_other_weights_and_altered_files_are_refused(backbone, images, tmp_path):
    coder, x = coder_for(backbone, images, "topk")
    save_repaired(tmp_path / "r", repair(backbone, Part(coder=coder, point=POINT, latents=busiest(coder, x))))
    torch.manual_seed(9)
    other = wrap(ToyViT(image_px=32, patch_px=8, d_model=24, n_layers=3, n_heads=2, d_mlp=32, n_classes=5), name="toy")
    with pytest.raises(ValueError, match="has other weights .* than the model that was repaired"):
        load_repaired(tmp_path / "r", other)
    assert load_repaired(tmp_path / "r", backbone).points == (POINT,)
    file = tmp_path / "r/edit.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match="it was altered"):
        load_repaired(tmp_path / "r", backbone)
    (tmp_path / "r/repair.json").write_text(json.dumps({"format": "else"}))
    with pytest.raises(ValueError, match="does not describe a vitrail-repair of version 1"):
        load_repaired(tmp_path / "r", backbone)
    with pytest.raises(FileNotFoundError, match="there is no repaired model here"):
        load_repaired(tmp_path / "none", backbone)


@pytest.mark.parametrize("architecture", ["topk", "batch_topk", "gated"])
def test_it_is_exported_whole_for_any_batch(backbone, images, tmp_path, architecture):
    coder, x = coder_for(backbone, images, architecture)
    repaired = repair(backbone, Part(coder=coder, point=POINT, latents=busiest(coder, x), tokens="spatial"))
    path = export_repaired(tmp_path, repaired)
    program = torch.export.load(path).module()
    with torch.no_grad():
        for n in (1, 4, 6):
            torch.testing.assert_close(program(images[:n]), repaired(images[:n]), atol=1e-5, rtol=1e-5)


def test_mistakes_are_sentences(backbone, images):
    coder, _ = coder_for(backbone, images, "topk")
    part = {"coder": coder, "point": POINT, "latents": [1]}
    for change, told in (
        ({"latents": []}, "nothing to repair"),
        ({"latents": [48]}, r"latents are 0\.\.47, got 48"),
        ({"tokens": "left"}, "tokens must be all, cls or spatial, got 'left'"),
        ({"operation": "flip"}, "operation must be one of set, add, scale, ablate, got 'flip'"),
        ({"operation": "set", "value": -1.0}, "codes are not negative"),
        ({"point": "blocks.1.hook_mlp_out"}, "edited between blocks or at hook_image_embed"),
        ({"point": "hook_image_embed", "coder": make_coder("topk", d_in=7, d_sae=48, k=2)}, "d_in=7"),
        ({"coder": make_coder("topk_transcoder", d_in=24, d_out=24, d_sae=48, k=2)}, "does not reconstruct one point"),
        ({"coder": make_coder("matryoshka", d_in=24, d_sae=48, ks=[4, 48], soft_cap=5.0)}, "no rule"),
    ):  # fmt: skip
        with pytest.raises((ValueError, IndexError), match=told):
            repair(backbone, Part(**(part | change)))


def test_a_rule_that_does_not_say_how_the_coder_fires_is_found_out(backbone, images, monkeypatch):
    coder, _ = coder_for(backbone, images, "topk")
    monkeypatch.setattr("vitrail.steering.repair._largest", lambda coder: coder.k + 3)
    with pytest.raises(ValueError, match="its codes and those of the rule 'largest' differ"):
        edited_latents(backbone, Part(coder=coder, point=POINT, latents=list(range(48))))


def test_overhead_is_counted_and_timed(backbone, images):
    coder, _ = coder_for(backbone, images, "batch_topk")
    repaired = repair(backbone, Part(coder=coder, point=POINT, latents=[1, 2, 3], tokens="cls"))
    told = repaired.overhead()
    assert told["products"] == 2 * 24 * 3  # one token, three latents of width 24, in and out
    assert told["products_share"] == pytest.approx(144 / (12 * 24**2 * 17 * 3))
    measured = time_overhead(repaired, images, repeats=2)
    assert set(measured) == {"plain_ms", "repaired_ms", "ratio"}
    assert measured["ratio"] > 0


def test_a_linear_correction_is_the_defences_own_and_survives_disk_and_export(backbone, images, tmp_path):
    generator = torch.Generator().manual_seed(3)
    d = backbone.d_model
    centre = torch.randn(d, generator=generator)
    matrix = torch.randn(d, 4, generator=generator) @ torch.randn(4, d, generator=generator) / d
    defence = Correction(POINT, centre, matrix, backbone.grid.n_special, rank=4)
    write_tensors(tmp_path / "correction.safetensors", defence.tensors, {"point": POINT})
    with torch.no_grad(), backbone.hooks({POINT: defence.hook}):
        want = backbone(images)
    repaired = repair(backbone, read_correction(tmp_path / "correction.safetensors"))
    assert repaired.edits[0].about["rank"] == 4, "two thin factors, not d x d"
    assert repaired.overhead()["products"] == backbone.grid.n_patches * 2 * 4 * d
    save_repaired(tmp_path / "r", repaired)
    with torch.no_grad():
        assert (want - backbone(images)).abs().max() > 1e-3
        torch.testing.assert_close(repaired(images), want, atol=2e-5, rtol=2e-5)
        again = load_repaired(tmp_path / "r", backbone)
        assert torch.equal(again(images), repaired(images))
        program = torch.export.load(export_repaired(tmp_path, repaired)).module()
        torch.testing.assert_close(program(images[:3]), want[:3], atol=2e-5, rtol=2e-5)


def test_what_is_no_correction_is_a_sentence(backbone, tmp_path):
    write_tensors(tmp_path / "c.safetensors", {"centre": torch.zeros(24), "W": torch.zeros(24, 24)}, {"point": POINT})
    with pytest.raises(ValueError, match="no correction that `vitrail defend` wrote: it holds W, centre"):
        read_correction(tmp_path / "c.safetensors")
    part = CorrectionPart(point=POINT, centre=torch.zeros(8), matrix=torch.zeros(8, 8))
    with pytest.raises(ValueError, match=r"is 24 wide, the correction's matrix is \(8, 8\)"):
        repair(backbone, part)
    with pytest.raises(ValueError, match="has one row an image"):
        repair(backbone, replace(part, point="hook_image_embed"))
