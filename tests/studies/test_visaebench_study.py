"""ViSAEBench's metrics of a study's cell, and the report."""

import math

import pytest

from vitrail.cli import main
from vitrail.studies.study_plan import read_plan
from vitrail.studies.study_report import profiles, write_study_report

PLAN = """
backbones:
  - {name: toy/clip, point: blocks.3.hook_resid_post, evaluator: toy/vit-1l-p16}
  - {name: toy/shapes, point: blocks.3.hook_resid_post}
coders:
  - {name: topk, architecture: topk, arguments: {d_sae: 64, k: 8}}
images:
  train: world:shapes?n=48
  test: world:shapes?n=288&split=test
batch_size: 512
training: {epochs: 2, warmup_steps: 1}
options:
  n_bootstrap: 20
  spatial_coherence: {min_images: 5}
  sparse_probing: {ks: [1, 4], headline: 4}
"""


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    (folder / "study.yaml").write_text(PLAN)
    main(
        ["study", "run", str(folder / "study.yaml"), "--out", str(folder / "out"), "--workers", "0", "--device", "cpu"]
    )
    return folder


def rows_of(path):
    import json

    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_study_measures_what_its_pictures_allow(out):
    clip, shapes = rows_of(out / "out" / "rows.jsonl")
    both = {"fvu", "moran", "dead_eval", "preservation", "ovr_auc_1", "multi_acc_4", "absorption"}
    assert both <= set(clip["measured"])
    assert both <= set(shapes["measured"])
    assert "monosemanticity" in clip["measured"]
    assert "monosemanticity" not in shapes["measured"], "it named no evaluator"
    for name in ("fvu", "moran", "preservation"):
        assert math.isfinite(clip["measured"][name]["value"])


def test_the_plan_is_told_before_anything_starts(out, tmp_path, capsys):
    main(["study", "run", str(out / "study.yaml"), "--out", str(tmp_path / "no"), "--plan"])
    told = capsys.readouterr().out
    assert "2 cells: 2 backbones, 1 coders and their seeds" in told
    assert "336 images, 21,504 tokens" in told
    assert not (tmp_path / "no").exists()


def test_the_report_has_every_setting_and_a_profile(out):
    told = (out / "out" / "report.md").read_text()
    assert "toy/clip" in told
    page = (out / "out" / "report.html").read_text()
    assert "Moran" in page
    assert "http" not in page.replace("http://www.w3.org", ""), "it needs nothing from elsewhere"
    assert (out / "out" / "data" / "profile.csv").is_file()
    assert (out / "out" / "data" / "settings.csv").read_text().startswith("backbone,coder,role,control_of")


def test_profiles_run_from_the_worst_to_the_best_by_hand():
    # EV: higher is better, means over coders .5, .7, .9; FVU: lower is better.
    found = {
        "explained_variance": {("a", "x"): 0.4, ("a", "y"): 0.6, ("b", "x"): 0.7, ("c", "x"): 0.9},
        "fvu": {("a", "x"): 0.1, ("b", "x"): 0.3, ("c", "x"): 0.2},
        "l0_cls": {("a", "x"): 3.0, ("b", "x"): 3.0, ("c", "x"): 3.0},
        "high_rows": {("a", "x"): 3.0, ("b", "x"): 2.0, ("c", "x"): 3.0},
    }
    drawn = profiles(["a", "b", "c"], found)
    assert set(drawn) == {"explained_variance", "fvu"}, "none without a difference or a better side"
    assert drawn["explained_variance"] == pytest.approx([0.0, 0.5, 1.0])
    assert drawn["fvu"] == pytest.approx([1.0, 0.0, 0.5])


def test_nothing_to_report_is_a_sentence(tmp_path):
    with pytest.raises(ValueError, match="a study without rows has nothing to report"):
        write_study_report([], tmp_path, title="t")


def test_the_files_of_docs_open(tmp_path):
    from pathlib import Path

    text = (Path(__file__).parents[2] / "docs" / "studies.md").read_text()
    (tmp_path / "study.yaml").write_text(text.split("```yaml\n")[1].split("```")[0])
    assert read_plan(tmp_path / "study.yaml").n_cells == 12
