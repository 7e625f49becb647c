"""The command line, verb by verb, as a person types it; and what it says when they mistype."""

import json
import warnings

import pytest

from vitrail.cli import VERBS, main, warnings_as_sentences
from vitrail.store import Store
from vitrail.training import loop

POINT = "blocks.1.hook_resid_post"
WORLD = "world:shapes?n=48"


def say(capsys, *arguments):
    main([str(argument) for argument in arguments])
    return capsys.readouterr().out


def fail(capsys, *arguments):
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    assert stopped.value.code != 0
    assert "Traceback" not in captured.err
    return captured.err + str(stopped.value.code)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder with everything in it, made by the verbs."""
    out = tmp_path_factory.mktemp("run")
    common = ["--workers", "0", "--device", "cpu"]
    main(["extract", WORLD, f"{out}/store", "--backbone", "toy/shapes", "--points", POINT, *common])
    for architecture, own in (("topk", ["--k", "8"]), ("matryoshka", ["--ks", "4", "8", "--inference-k", "8"])):
        main(
            ["train", architecture, f"{out}/store", f"{out}/coders/{architecture}", "--d-sae", "256", *own]
            + ["--epochs", "2", "--batch-size", "512", "--lr", "1e-3", "--device", "cpu"]
        )
        main(["encode", f"{out}/coders/{architecture}", f"{out}/store", f"{out}/codes/{architecture}"])
        main(["index", f"{out}/codes/{architecture}", f"{out}/index/{architecture}"])
    return out


def test_the_verbs_make_a_run_that_eval_and_report_read(run, capsys):
    told = say(
        capsys, "eval", run / "coders/topk", run / "coders/matryoshka", "--images", "world:shapes?n=30&split=test",
        "--out", run / "eval.jsonl", "--workers", 0, "--n-bootstrap", 50,
    )  # fmt: skip
    assert "topk" in told
    assert "pca_all" in told
    rows = [json.loads(line) for line in (run / "eval.jsonl").read_text().splitlines()]
    assert [row["name"] for row in rows if row["control_of"] is None] == ["topk", "matryoshka"]
    assert {"ce", "recon_ce", "zero_ce", "ce_recovered"} <= set(rows[0]["measured"])
    told = say(capsys, "report", run)
    assert (run / "report.html").is_file()
    assert "report.html" in told
    assert "checksum is right" in say(capsys, "verify", run / "store")


def test_the_held_out_images_are_not_trained_on(run):
    description = json.loads((run / "coders/topk/coder.json").read_text())
    first, last = description["metadata"]["train_images"]
    assert (first, last) == (0, Store.open(run / "store").n_images - 2)  # 5 % of 48


def test_help_says_what_an_architecture_is_and_takes(capsys):
    with pytest.raises(SystemExit):
        main(["train", "matryoshka", "--help"])
    told = capsys.readouterr().out
    assert "--ks" in told
    assert "nested" in told
    assert all(verb in say(capsys, "--help") for verb in VERBS)
    assert say(capsys, "--version").startswith("vitrail 0.")


@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb != "train"])
def test_every_verb_has_help(verb, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([verb, "--help"])
    assert stopped.value.code == 0
    assert "usage" in capsys.readouterr().out


def test_points_lists_shapes(capsys):
    told = say(capsys, "points", "toy/shapes")
    assert "blocks.0.hook_resid_mid" in told
    assert "(b, 65, 128)" in told


def test_world_draws_a_sheet(capsys, tmp_path):
    assert "48 classes" in say(capsys, "world", "world:shapes", "--out", tmp_path / "w.png", "--n", 8)
    assert (tmp_path / "w.png").stat().st_size > 1000


def test_mistakes_get_a_sentence(run, capsys, tmp_path):
    extract = ["extract", "--workers", 0, "--device", "cpu"]
    s = tmp_path / "s"
    at = ["--points", POINT]
    assert "no verb 'extrct'" in fail(capsys, "extrct")
    assert "no hook point 'blocks.1.resid_post'" in fail(
        capsys, *extract, WORLD, s, "--backbone", "toy/shapes", "--points", "blocks.1.resid_post"
    )
    assert "no weights of a toy 'shape'" in fail(capsys, *extract, WORLD, s, "--backbone", "toy/shape", *at)
    assert "LIBRARY/MODEL" in fail(capsys, *extract, WORLD, s, "--backbone", "resnet50", *at)
    (tmp_path / "empty").mkdir()
    assert "empty" in fail(capsys, *extract, tmp_path / "empty", s, "--backbone", "toy/shapes", *at)
    assert "is missing" in fail(capsys, *extract, tmp_path / "gone", s, "--backbone", "toy/shapes", *at)
    assert "no store manifest" in fail(capsys, "train", "topk", tmp_path, tmp_path / "c")
    assert "no coder architecture 'topkk'" in fail(capsys, "train", "topkk", run / "store", tmp_path / "c")
    assert "k must be in 1..d_sae=64" in fail(
        capsys, "train", "topk", run / "store", tmp_path / "c", "--d-sae", 64, "--k", 65
    )
    assert "no classifier head" not in fail(
        capsys, "eval", run / "coders/topk", "--images", WORLD, "--out", tmp_path / "e", "--head", "mine"
    )
    assert "has no text tower" in fail(
        capsys, "eval", run / "coders/topk", "--images", WORLD, "--out", tmp_path / "e", "--head", "zero-shot",
        "--workers", 0,
    )  # fmt: skip


def test_a_coder_meets_only_the_weights_it_was_trained_on(run, capsys, tmp_path):
    import shutil
    from pathlib import Path

    from safetensors.torch import load_file, save_file

    from vitrail.backbones import toy

    source = Path(toy.__file__).parent / "weights/shapes"
    weights = load_file(f"{source}.safetensors")
    weights["head.bias"] += 0.01
    save_file(weights, tmp_path / "other.safetensors")
    shutil.copy(f"{source}.json", tmp_path / "other.json")
    told = fail(
        capsys, "eval", run / "coders/topk", "--images", WORLD, "--out", tmp_path / "e", "--backbone", "toy/shapes",
        "--weights", tmp_path / "other.safetensors",
    )  # fmt: skip
    assert "has other weights than the coders were trained on" in told


def test_pictures_of_other_classes_are_not_taken_for_the_heads(run, capsys, tmp_path):
    from vitrail.images import open_images

    world = open_images("world:shapes?n=6&split=test")
    for i in range(6):
        folder = tmp_path / "pictures" / ("apple" if i % 2 else "zebra")
        folder.mkdir(parents=True, exist_ok=True)
        world.load(i).save(folder / f"{i}.png")
    told = fail(
        capsys, "eval", run / "coders/topk", "--images", tmp_path / "pictures", "--out", tmp_path / "e", "--workers", 0
    )
    assert "the pictures have 2 classes and the head of toy/shapes has 48" in told
    assert "class 0 is 'apple' here and 'plain circle' there" in told


def test_a_split_is_remembered(run, capsys, tmp_path):
    """The report opens the same split that was extracted."""
    from vitrail.images import open_images

    world = open_images("world:shapes?n=20&split=test")
    for i in range(20):
        folder = tmp_path / "pictures" / ("val" if i < 12 else "train")
        folder.mkdir(parents=True, exist_ok=True)
        world.load(i).save(folder / f"{i}.png")
    out = tmp_path / "run"
    main(
        ["extract", str(tmp_path / "pictures"), f"{out}/store", "--split", "val", "--backbone", "toy/shapes"]
        + ["--points", POINT, "--workers", "0", "--device", "cpu"]
    )
    store = Store.open(out / "store")
    assert store.n_images == 12
    again = open_images(store.manifest.request["images"])
    assert [again.record(int(p)).id for p in store.images()["position"]] == store.images()["id"].tolist()


def test_what_can_go_wrong_in_a_run_is_a_sentence(run, capsys, tmp_path):
    told = fail(
        capsys, "train", "relu", run / "store", tmp_path / "c", "--lr", "1e30", "--d-sae", 64, "--batch-size", 256,
        "--epochs", 3,
    )  # fmt: skip
    assert "at step" in told
    assert "k must be at least 1, got 0" in fail(capsys, "index", run / "codes/topk", tmp_path / "i", "--k", 0)


def test_own_warnings_are_sentences_and_others_stay(monkeypatch):
    monkeypatch.delenv("VITRAIL_DEBUG", raising=False)
    before = warnings.formatwarning
    with warnings_as_sentences("train"):
        ours = warnings.formatwarning("missed its target.", UserWarning, loop.__file__, 272)
        theirs = warnings.formatwarning("deprecated.", UserWarning, "/elsewhere/torch.py", 3, line="x = 1")
    assert ours == "vitrail train: missed its target.\n"
    assert theirs == "/elsewhere/torch.py:3: UserWarning: deprecated.\n  x = 1\n"
    assert warnings.formatwarning is before
