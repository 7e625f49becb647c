"""`vitrail eval` with further metrics and with every kind of coder, and the verbs that read its rows."""

import csv
import json
import shutil

import pytest
import torch

from vitrail.backbones import load
from vitrail.cli import main
from vitrail.cli.eval import random_mode
from vitrail.coders import coder_metadata, load_coder
from vitrail.images import load_batches, open_images
from vitrail.metrics import MEASURES
from vitrail.metrics.groups import KINDS
from vitrail.metrics.reconstruction import fvu
from vitrail.studies.prisma_controls import RandomWeights

POINTS = ["blocks.1.hook_resid_mid", "blocks.1.hook_mlp_out"]
TEST = ["--images", "world:shapes?n=20&split=test", "--workers", "0", "--device", "cpu", "--n-bootstrap", "20"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    main(
        ["extract", "world:shapes?n=40", f"{out}/store", "--backbone", "toy/clip", "--points", *POINTS]
        + ["--workers", "0", "--device", "cpu"]
    )
    kinds = {
        "topk": ["--k", "8"],
        "transcoder": ["--k", "8", "--to", POINTS[1]],
        "crosscoder": ["--k", "8", "--beside", POINTS[1]],
    }
    architectures = {"topk": "topk", "transcoder": "topk_transcoder", "crosscoder": "topk_crosscoder"}
    for name, own in kinds.items():
        main(
            ["train", architectures[name], f"{out}/store", f"{out}/coders/{name}", "--point", POINTS[0], *own]
            + ["--d-sae", "192", "--epochs", "2", "--batch-size", "512", "--device", "cpu"]
        )
    return out


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_all_metrics_in_one_pass_and_what_is_made_of_their_rows(run, capsys):
    out = run / "eval.jsonl"
    main(
        ["eval", f"{run}/coders/topk", *TEST, "--out", str(out), "--head", "zero-shot", "--metrics", "all"]
        + ["--faithfulness", "4", "--templates", "{}", "--substitution", "all-tokens"]
    )
    rows = rows_of(out)
    coder = rows[0]
    assert rows[-1]["name"] == "topk / random backbone"
    assert {"sparsity", "cknna", "do_mean_sq", "dead_eval", "progressive_fvu", "necessity"} <= set(coder["measured"])
    assert set(coder["measured"]) <= set(MEASURES), "every number can be explained"
    assert {"progressive", "l0_map", "firing_histogram", "activation_histogram"} <= set(coder["curves"])
    assert coder["measured"]["ce_unscaled"]["definition"] == "prisma"
    assert set(coder["cost"]["metrics"]) >= {"CKNNA", "Progressive", "L0Maps"}
    assert coder["measured"]["sparsity"]["value"] == pytest.approx(1 - 8 / 192)
    for layout in ("prisma", "prisma-published", "msae", "msae-published"):
        main(["table", layout, str(out), "--form", "csv", "--out", str(run / f"{layout}.csv")])
    with (run / "msae.csv").open() as stream:
        found = next(csv.DictReader(stream))
    assert float(found["CKNNA"]) == coder["measured"]["cknna"]["value"]
    if pytest.importorskip("matplotlib"):
        main(["figures", str(out), "--out", str(run / "figures")])
        assert (run / "figures" / "progressive.svg").is_file()
    capsys.readouterr()
    main(["eval", f"{run}/coders/topk", *TEST, "--out", str(run / "plain.jsonl"), "--head", "zero-shot"])
    plain = rows_of(run / "plain.jsonl")[0]["measured"]
    assert plain["fvu"] == coder["measured"]["fvu"], "further metrics change nothing that was measured without them"


def test_a_transcoder_is_measured_where_it_writes_and_a_crosscoder_at_its_points(run):
    for name in ("transcoder", "crosscoder"):
        main(["eval", f"{run}/coders/{name}", *TEST, "--out", f"{run}/{name}.jsonl", "--head", "zero-shot"])
    (transcoder, *controls) = rows_of(run / "transcoder.jsonl")
    assert (transcoder["point"], transcoder["target_point"]) == tuple(POINTS)
    assert all(row["control_of"] == "transcoder" for row in controls)
    rows = {row["name"]: row for row in rows_of(run / "crosscoder.jsonl")}
    assert rows["crosscoder"]["points"] == POINTS
    assert {f"crosscoder @ {point}" for point in POINTS} <= set(rows)
    main(["eval", f"{run}/coders/transcoder", *TEST, "--out", f"{run}/transcoder.jsonl", "--head", "zero-shot"])


def test_coders_of_several_points_are_put_in_together(run, tmp_path, capsys):
    main(
        ["train", "topk", f"{run}/store", f"{tmp_path}/second", "--point", POINTS[1], "--k", "8", "--d-sae", "192"]
        + ["--epochs", "2", "--batch-size", "512", "--device", "cpu"]
    )
    both = [f"{run}/coders/topk", f"{tmp_path}/second"]
    main(["eval", *both, *TEST, "--together", "--out", f"{tmp_path}/e.jsonl", "--head", "zero-shot"])
    rows = {row["name"]: row for row in rows_of(tmp_path / "e.jsonl")}
    assert {"topk + second", *(f"topk + second @ {point}" for point in POINTS)} <= set(rows)
    assert rows["topk + second"]["measured"]["recon_ce"]["definition"].endswith("in-turn")
    told = fails(capsys, "eval", both[0], both[0], *TEST, "--together", "--out", tmp_path / "no.jsonl")
    assert "a set has one for each point" in told


def test_a_linear_probe_of_cls_tokens(run, tmp_path, capsys):
    main(
        ["extract", "world:shapes?n=96", f"{tmp_path}/store", "--backbone", "toy/clip", "--tokens", "cls"]
        + ["--points", "blocks.3.hook_resid_post", "--workers", "0", "--device", "cpu"]
    )
    main(
        ["train", "topk", f"{tmp_path}/store", f"{tmp_path}/topk", "--k", "8", "--d-sae", "192", "--epochs", "30"]
        + ["--batch-size", "48", "--device", "cpu"]
    )
    main(["eval", f"{tmp_path}/topk", *TEST, "--out", f"{tmp_path}/e.jsonl", "--head", "zero-shot", "--linear-probe"])
    row = rows_of(tmp_path / "e.jsonl")[0]["measured"]
    assert {"lp_kl", "lp_agreement", "lp_accuracy", "recon_lp_accuracy"} <= set(row)
    assert 0 <= row["lp_agreement"]["value"] <= 1
    told = fails(capsys, "eval", run / "coders/topk", *TEST, "--out", tmp_path / "no.jsonl", "--linear-probe")
    assert "reads one row an image, and" in told


def test_a_coder_trained_on_a_random_backbone_stands_beside(run, tmp_path, capsys):
    out = tmp_path / "e.jsonl"
    asked = ["eval", f"{run}/coders/topk", *TEST, "--out", str(out), "--head", "zero-shot", "--no-controls"]
    main([*asked, "--random-backbone", "train"])
    told = capsys.readouterr().out
    rows = {row["name"]: row for row in rows_of(out)}
    assert list(rows) == ["topk", "topk / random backbone", "topk / trained on random backbone"]
    encoded, like = list(rows.values())[1:]
    assert encoded["coder_digest"] == rows["topk"]["coder_digest"] != like["coder_digest"]
    assert like["config"] == rows["topk"]["config"]
    assert like["random_backbone"]["digest"] == encoded["random_backbone"]["digest"]
    assert like["measured"]["fvu"]["value"] < encoded["measured"]["fvu"]["value"], "it was fitted to what it reads"
    assert set(rows["topk"]["paired"]) == {encoded["name"], like["name"]}
    assert "topk less trained on random backbone" in told
    (folder,) = (tmp_path / "e.random").iterdir()  # the activations are gone, the coder is kept
    before, after = (coder_metadata(one)["training"] for one in (run / "coders/topk", folder))
    assert (after["steps"], after["rows"]) == (before["steps"], before["rows"])
    assert after["request"]["config"] == before["request"]["config"]
    kept = (folder / "weights.safetensors").stat().st_mtime_ns
    out.unlink()
    main([*asked, "--random-backbone", "train"])
    assert (folder / "weights.safetensors").stat().st_mtime_ns == kept, "trained once"
    again = rows_of(out)[2]
    assert again["measured"] == like["measured"]
    # Witness: its FVU on the random model's activations, by hand.
    backbone = load("toy/clip")
    source = open_images(TEST[1])
    batch = next(load_batches(source, range(20), backbone.preprocess, batch_size=20))
    with RandomWeights.of(backbone, seed=0).within(backbone), torch.inference_mode():
        assert backbone.digest != rows["topk"]["backbone_digest"]
        x = backbone.activations(batch.images, [POINTS[0]])[POINTS[0]].flatten(0, 1).clone()
        x_hat = load_coder(folder)(x)
    assert backbone.digest == rows["topk"]["backbone_digest"]
    assert like["measured"]["fvu"]["value"] == pytest.approx(fvu(x, x_hat), rel=1e-3)


def test_a_transcoder_too_and_what_cannot_be_trained_again_is_a_sentence(run, tmp_path, capsys):
    asked = [*TEST, "--head", "none", "--no-controls", "--random-backbone", "train"]
    main(["eval", f"{run}/coders/transcoder", *asked, "--out", f"{tmp_path}/t.jsonl"])
    assert rows_of(tmp_path / "t.jsonl")[-1]["name"] == "transcoder / trained on random backbone"
    moved = tmp_path / "topk"
    shutil.copytree(run / "coders/topk", moved)
    told = json.loads((moved / "coder.json").read_text())
    told["metadata"]["store"] = str(tmp_path / "gone")
    (moved / "coder.json").write_text(json.dumps(told))
    told_of = fails(capsys, "eval", moved, *asked, "--out", tmp_path / "m.jsonl")
    assert "the training data of topk cannot be found" in told_of
    assert "--random-backbone encode" in told_of
    main(["eval", str(moved), *asked, "--store", f"{run}/store", "--out", f"{tmp_path}/m.jsonl"])
    assert len(rows_of(tmp_path / "m.jsonl")) == 3


@pytest.mark.parametrize(
    ("asked", "controls", "metrics", "mode"),
    [
        ("auto", True, "all", "encode"),
        ("auto", True, "prisma", None),
        ("auto", False, "all", None),
        ("True", True, "", "encode"),
        ("False", True, "all", None),
        ("none", True, "all", None),
        ("train", False, "", "train"),
    ],
)
def test_which_random_backbone_is_meant(asked, controls, metrics, mode):
    assert random_mode(asked, controls, metrics) == mode


def fails(capsys, *arguments):
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    assert stopped.value.code != 0
    return capsys.readouterr().err


def test_mistakes_are_sentences(run, capsys):
    coder, out = run / "coders/topk", run / "no.jsonl"
    told = fails(capsys, "eval", coder, *TEST, "--out", out, "--metrics", "ckna")
    assert "there is no metric 'ckna'. Nearest: cknna" in told
    assert all(name in told for name in KINDS)
    told = fails(capsys, "eval", coder, run / "coders/transcoder", *TEST, "--out", out)
    assert "different target_points" in told
    told = fails(capsys, "eval", coder, *TEST, "--out", out, "--head", "none", "--faithfulness", 4)
    assert "give a head" in told
    assert "name at least one" in fails(capsys, "table", "prisma")
    (run / "bare.jsonl").write_text(json.dumps({"name": "a", "control_of": None, "measured": {}}) + "\n")
    assert "have no curves to draw" in fails(capsys, "figures", run / "bare.jsonl", "--out", run / "f")
