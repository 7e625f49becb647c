"""vitrail recover, as a person types it; and what the report then shows."""

import json
import shutil

import pytest
from PIL import Image

from vitrail.cli import main

POINT = "blocks.1.hook_resid_post"
SPLITS = ("--choose", "world:shapes?n=48&split=val", "--score", "world:shapes?n=48&split=test")
QUICK = ("--patches-per-image", 8, "--n-bootstrap", 20, "--workers", 0, "--device", "cpu")


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
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    common = ["--workers", "0", "--device", "cpu"]
    main(["extract", "world:shapes?n=48", f"{out}/store", "--backbone", "toy/shapes", "--points", POINT, *common])
    main(
        ["train", "topk", f"{out}/store", f"{out}/coders/topk", "--d-sae", "128", "--k", "8", "--epochs", "2"]
        + ["--batch-size", "512", "--lr", "1e-3", "--device", "cpu"]
    )
    main(["encode", f"{out}/coders/topk", f"{out}/store", f"{out}/codes/topk"])
    main(["index", f"{out}/codes/topk", f"{out}/index/topk"])
    return out


def test_recover_writes_a_table_concepts_and_pictures_that_the_report_shows(run, capsys):
    told = say(capsys, "recover", run / "coders/topk", *SPLITS, "--out", run / "recovery", *QUICK, "--no-controls")
    assert "topk" in told
    rows = [json.loads(line) for line in (run / "recovery/recovery.jsonl").read_text().splitlines()]
    assert [row["name"] for row in rows] == ["topk"]
    assert rows[0]["backbone"] == "toy/shapes"
    assert rows[0]["patches_per_image"] == 8
    assert (run / "recovery/topk/image.png").is_file()
    say(capsys, "report", run)
    page = (run / "report.html").read_text(encoding="utf-8")
    assert page.count('<p class="concept') == page.count("<article>")
    assert "F1 of at least 0.5" in page
    concepts = json.loads((run / "recovery/topk/concepts.json").read_text())
    shown = next(row for row in concepts["latents"] if f"<h3>latent {row['latent']}</h3>" in page and row["concept"])
    assert f"<strong>{shown['concept']}</strong>" in page
    assert f"F1 {shown['f1']:.2f} (always: {shown['constant']:.2f}" in page


def test_a_report_never_shows_another_coders_concepts(run, capsys, tmp_path):
    say(capsys, "recover", run / "coders/topk", *SPLITS, "--out", run / "recovery", *QUICK, "--no-controls")
    shutil.copytree(run, tmp_path / "run")
    path = tmp_path / "run/recovery/topk/concepts.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "coder_digest": "0" * 64}))
    assert "tells of another coder" in fail(capsys, "report", tmp_path / "run")


def test_controls_stand_beside_and_the_calibration_curve_falls(run, capsys, tmp_path):
    told = say(capsys, "recover", run / "coders/topk", *SPLITS, "--out", tmp_path / "r", *QUICK, "--calibrate")
    for control in ("neurons", "pca", "kmeans", "random", "untrained"):
        assert control in told
    curve = [json.loads(line) for line in (tmp_path / "r/calibration.jsonl").read_text().splitlines()]
    shuffled = [row["image_f1"] for row in curve if row["dial"] == "shuffled"]
    assert shuffled[0] > shuffled[-1]
    assert (tmp_path / "r/calibration.png").stat().st_size > 5000


def test_mistakes_get_a_sentence(run, capsys, tmp_path):
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (64, 64)).save(tmp_path / "photos/a.png")
    coder, out = run / "coders/topk", ("--out", tmp_path / "o", "--workers", 0)
    test = "world:shapes?n=48&split=test"
    assert "does not say what is in its pictures" in fail(
        capsys, "recover", coder, "--choose", tmp_path / "photos", "--score", test, *out
    )
    assert "chosen on other pictures than they are scored on" in fail(
        capsys, "recover", coder, "--choose", test, "--score", test, *out
    )
    assert "holds rows of another recovery" in fail(
        capsys, "recover", coder, "--choose", "world:shapes?n=40&split=val", "--score", test, "--out", run / "recovery",
        "--no-controls",
    )  # fmt: skip
