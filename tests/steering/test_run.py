"""A run from images to a table: its rows are the metrics of the naive forward; killed, it goes on; families compare."""

import json

import numpy as np
import pytest
import torch

import vitrail.steering.run as steering_run
from backbones.small_backbones import build_case
from vitrail.backbones import load
from vitrail.coders import TopK
from vitrail.concepts.editing import Edit, edit_hook
from vitrail.concepts.vocabulary import embed, stored_vocabulary
from vitrail.images import open_images
from vitrail.metrics.heads import ZeroShotHead
from vitrail.statistics import ActivationStats
from vitrail.steering.bench import SteerOptions, prepare
from vitrail.steering.figures import figures
from vitrail.steering.interventions import Dose
from vitrail.steering.routes import answers
from vitrail.steering.run import distinct_first, steer
from vitrail.steering.steerability import steerability
from vitrail.tables import read_table

POINT, LAST = "blocks.1.hook_resid_post", "blocks.3.hook_resid_post"
WORDS = ["star", "ring", "cross", "red thing", "blue thing", "thing on ice", "striped thing", "thing on the sea"]


@pytest.fixture(scope="module")
def toy():
    backbone = load("toy/clip")
    world = open_images("world:shapes?n=5&seed=4&split=val&image_px=64")
    images = torch.stack([backbone.preprocess(world.load(i)) for i in range(5)])
    coders = {}
    with torch.no_grad():
        for point, x in backbone.activations(images, [POINT, LAST]).items():
            rows = x.flatten(0, 1)
            coders[point] = TopK(d_in=rows.shape[1], d_sae=40, k=6, normalization="mean_std", seed=1)
            coders[point].fit(ActivationStats.of(rows), rows)
    return backbone, world, images, coders, embed(backbone.text, WORDS)


def run(toy, out, point=LAST, latents=None, **options):
    backbone, world, _, coders, words = toy
    return steer(
        backbone, coders[point], world, out, point=point, tokens="all", vocabulary=words, latents=latents,
        options=SteerOptions(**{"dose": Dose("set", 30.0), "batch_size": 2, "n_curves": 2, "n_strengths": 3} | options),
    )  # fmt: skip


@pytest.mark.parametrize("point", [POINT, LAST])
def test_a_row_is_the_metrics_of_the_naive_forward(toy, tmp_path, point):
    backbone, _, images, coders, words = toy
    chosen = [0, 7, 21]
    layers = run(toy, tmp_path, point, chosen)
    table = read_table(tmp_path / "steerability.parquet")
    assert table["number"].tolist() == chosen
    head = ZeroShotHead(words.embeddings, backbone.text.logit_scale)
    with torch.no_grad():
        before = answers(backbone, backbone(images), head)
        after = []
        for latent in chosen:
            hook = edit_hook(backbone, point, coders[point], [Edit((latent,), "set", 30.0)])
            with backbone.hooks({point: hook}):
                after.append(answers(backbone, backbone(images), head))
    found = steerability(torch.stack(after), before, words.embeddings)
    for name in ("s", "s_sd", "ipr", "delta_max", "delta_tv", "top_probability", "distance"):
        assert table[name] == pytest.approx(getattr(found, name), rel=1e-3, abs=1e-5), name
    assert table["top"].tolist() == [words.words[at] for at in found.top]
    assert table["delta_word"].tolist() == [words.words[at] for at in found.delta_word]
    assert layers["latents"].mean_s.value == pytest.approx(found.s.mean(), rel=1e-4)
    assert found.s.max() > 0.01
    told = json.loads((tmp_path / "steerability.json").read_text())
    assert told["families"]["latents"]["route"] == ("closed" if point == LAST else "blocks+cls")
    assert (told["logit_scale"], told["n_images"]) == (backbone.text.logit_scale, 5)
    assert told["s_without_a_change"] < 1e-10
    flat = steerability(torch.full((1, 5, len(WORDS)), 1 / len(WORDS)), before, words.embeddings)
    assert told["before"]["s_of_flattening"] == pytest.approx(flat.s[0], rel=1e-5)
    assert (told["families"]["latents"]["limit_mean_s"] is None) == (point == POINT)
    assert {path.suffix for path in figures(tmp_path)} == {".svg", ".png"}


def test_killed_it_goes_on_and_ends_the_same(toy, tmp_path, monkeypatch):
    whole = run(toy, tmp_path / "whole", shard=16, against=("neurons",))
    done, measured = [], steering_run.measured

    def dies(bench, family, numbers, task):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(len(numbers))
        return measured(bench, family, numbers, task)

    monkeypatch.setattr(steering_run, "measured", dies)
    with pytest.raises(KeyboardInterrupt):
        run(toy, tmp_path / "cut", shard=16, against=("neurons",))
    assert not (tmp_path / "cut/steerability.parquet").exists()
    counted = []
    monkeypatch.setattr(
        steering_run, "measured", lambda *given: counted.append((given[1].name, len(given[2]))) or measured(*given)
    )
    again = run(toy, tmp_path / "cut", shard=16, against=("neurons",))
    assert done == [16, 16]
    assert counted[0] == ("latents", 8)
    one, two = (read_table(tmp_path / name / "steerability.parquet") for name in ("whole", "cut"))
    assert all(np.array_equal(one[name], two[name]) or np.isnan(one[name].astype(float)).any() for name in one)
    assert whole["latents"].to_json() == again["latents"].to_json()
    with pytest.raises(ValueError, match="holds a run of other dose"):
        run(toy, tmp_path / "cut", shard=16, dose=Dose("set", 31.0))


def test_families_are_compared_at_edits_of_equal_length(toy, tmp_path):
    layers = run(toy, tmp_path, against=("neurons", "random"), n_random=20)
    table = read_table(tmp_path / "steerability.parquet")
    backbone = toy[0]
    lengths = {name: table["edit_norm"][table["family"] == name] for name in layers}
    assert {name: len(one) for name, one in lengths.items()} == {
        "latents": 40,
        "neurons": backbone.d_model,
        "random": 20,
    }
    for name in ("neurons", "random"):
        assert lengths[name] == pytest.approx(lengths["latents"].mean(), rel=1e-4)
    assert set(layers["latents"].concepts_of) == {20, 40}  # no family has fewer than 20; 40 latents have no 128
    same = run(toy, tmp_path / "same", against=("neurons",), against_dose="same")
    numbers = read_table(tmp_path / "same/steerability.parquet")
    # Set to 30 a coordinate moves by |30 - x|; a latent by 30 times the scale that the coder divides by.
    assert numbers["edit_norm"][numbers["family"] == "neurons"].mean() == pytest.approx(30, rel=0.1)
    assert same["latents"].to_json()["mean_s"] == layers["latents"].to_json()["mean_s"]


def test_doses_in_own_scale_leave_dead_latents_alone(toy, tmp_path):
    backbone, _, images, coders, _ = toy
    run(toy, tmp_path, dose=Dose("set", 4.0, "own"), n_curves=0)
    with torch.no_grad():
        x = backbone.activations(images, [LAST])[LAST].flatten(0, 1)
        largest = coders[LAST].encode(x).amax(0)
    table = read_table(tmp_path / "steerability.parquet")
    assert (largest == 0).any()
    assert (table["edit_norm"][(largest == 0).numpy()] == 0).all()
    assert table["s"][(largest == 0).numpy()].max() < 1e-10
    assert table["s"][(largest > 0).numpy()].max() > 1e-3
    assert not (tmp_path / "curves.parquet").exists()


def test_curves_end_at_the_dose_and_at_the_limit(toy, tmp_path):
    run(toy, tmp_path)
    curves, table = read_table(tmp_path / "curves.parquet"), read_table(tmp_path / "steerability.parquet")
    assert sorted(set(curves["strength"].tolist())) == pytest.approx([0.1, 3**0.5, 30.0, np.inf])
    for number in set(curves["number"].tolist()):
        mine, row = curves["number"] == number, int(np.flatnonzero(table["number"] == number)[0])
        assert curves["s"][mine][2] == pytest.approx(table["s"][row], rel=1e-5)
        assert curves["s"][mine][3] == pytest.approx(table["limit_s"][row], rel=1e-4)
        assert curves["word_1"][mine][2] == table["top"][row]
    assert len(set(curves["word_1"][curves["strength"] == 30])) == 2
    far = tmp_path / "far"
    run(toy, far, dose=Dose("set", 1e6), latents=sorted(set(curves["number"].tolist())))
    assert read_table(far / "steerability.parquet")["limit_s"] == pytest.approx(
        read_table(far / "steerability.parquet")["s"], abs=1e-4
    )


def test_a_replacing_run_says_what_leaving_out_the_error_does(toy, tmp_path):
    run(toy, tmp_path, keep_error=False, against=("neurons",))
    told = json.loads((tmp_path / "steerability.json").read_text())
    assert told["s_without_a_change"] > 1e-4
    families = told["families"]
    assert families["latents"]["mean_s"]["value"] != families["neurons"]["mean_s"]["value"]


def test_words_may_come_as_rows_where_there_is_no_text_tower(tmp_path):
    backbone = build_case("timm-average").backbone
    world = open_images("world:shapes?n=3&seed=4&split=val&image_px=32")
    rows = np.random.default_rng(0).normal(size=(6, backbone.d_embed)).astype(np.float32)
    words = stored_vocabulary(["a", "b", "c", "d", "e", "f"], rows, source="made up")
    coder = TopK(d_in=24, d_sae=9, k=3, normalization="none", seed=0)
    layers = steer(
        backbone, coder, world, tmp_path, point="blocks.2.hook_resid_post", tokens="spatial", vocabulary=words
    )
    told = json.loads((tmp_path / "steerability.json").read_text())
    assert told["families"]["latents"]["route"] == "closed"
    assert told["logit_scale"] == 100
    assert layers["latents"].mean_s.value > 0.01


def test_patches_of_the_last_layer_move_nothing_and_that_is_said(toy, tmp_path):
    with pytest.warns(UserWarning, match=r"no edited token \(spatial\)"):
        layers = run(toy, tmp_path, where="spatial", n_curves=0)
    assert layers["latents"].mean_s.value < 1e-10


def test_the_most_steerable_of_different_words_come_first():
    table = {"number": np.array([10, 11, 12, 13]), "s": np.array([0.1, 0.9, 0.8, 0.7]), "top": np.array(list("abba"))}
    assert distinct_first(table, 3).tolist() == [11, 13, 12]


def test_what_cannot_be_is_told(toy, tmp_path):
    backbone, world, _, coders, words = toy
    with pytest.raises(IndexError, match=r"0\.\.39, got 40"):
        run(toy, tmp_path, latents=[40])
    with pytest.raises(ValueError, match="neurons and random, not 'pca'"):
        SteerOptions(against=("pca",))
    with pytest.raises(ValueError, match="d_in=128"):
        prepare(
            backbone, coders[LAST], world, point="hook_image_embed", tokens="pooled", vocabulary=words,
            chosen=np.arange(2), options=SteerOptions(),
        )  # fmt: skip
