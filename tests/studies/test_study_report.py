"""The report of a study: planted relations come out, what is missing is a sentence, and nothing comes from outside."""

import csv
import json
import math
import re
import warnings

import numpy as np
import pytest
import torch
from study_rows import GRID, made_up, measured

from vitrail.coders import make_coder
from vitrail.statistics import ActivationStats
from vitrail.store import Store
from vitrail.studies import study_figures
from vitrail.studies.hypotheses import HYPOTHESES, Hypothesis, hypotheses_of, resolve
from vitrail.studies.study_analyses import (
    StudyRows,
    about,
    common,
    family_rows,
    hypothesis_rows,
    layer_rows,
    lift_rows,
    matrix_rows,
    of_settings,
    scatter_rows,
    setting_rows,
    variance_rows,
)
from vitrail.studies.study_audit import pick, top_images, widest
from vitrail.studies.study_guide import guide_rows, guide_words
from vitrail.studies.study_report import write_study_report
from vitrail.studies.variance import noise_over_seeds


def numbers(path):
    with path.open(encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def test_planted_variance_by_hand():
    # moran = .2 + .2 i + .01 [k = 32], i = 0..4, 4 configurations: SS of backbones 4 * .04 * 10 = 1.6, of k
    # 20 * .005^2 = .0005, which is also that of configurations; nothing is left.
    rows, notes = variance_rows(StudyRows.of(made_up(5), {}))
    of = {(row["design"], row["term"]): row for row in rows if row["metric"] == "moran"}
    assert of["backbone x configuration", "backbone"]["ss"] == pytest.approx(1.6)
    assert of["backbone x configuration", "backbone"]["eta2"] == pytest.approx(1.6 / 1.6005)
    assert of["backbone x configuration", "configuration"]["ss"] == pytest.approx(0.0005)
    assert of["backbone, width, k", "k"]["ss"] == pytest.approx(0.0005)
    assert of["backbone, width, k", "width"]["ss"] == pytest.approx(0, abs=1e-12)
    assert of["backbone x configuration", "backbone"]["df"] == 4
    assert all(row["eta2_low"] is None for row in rows), "one seed gives no interval"
    assert not notes


def test_only_common_configurations_of_one_family_are_decomposed():
    rows = made_up(4, ("batch_topk", "jump_relu")) + made_up(1, controls=True, layers=True)[4:]
    rows = [row for row in rows if not (row["backbone"] == "net2" and row["coder"] == "batch_topk-8x-k32")]
    study = StudyRows.of(rows, {})
    assert study.family == "jump_relu", "which has a cell more"
    study = StudyRows.of([row for row in rows if row["architecture"] != "jump_relu"], {})
    found, notes = variance_rows(study)
    first = next(row for row in found if row["metric"] == "moran" and row["design"].startswith("backbone x"))
    assert (first["n"], first["configurations"], first["balanced"]) == (12, 3, True)
    assert any("only the 3 configurations that all backbones have" in note for note in notes)
    assert any("only the ks" in note or "not crossed" in note for note in notes), "4 x 16, 4 x 32, 8 x 16"
    # Means would otherwise compare net2 without its k = 32, 8x with the others.
    assert study.by_backbone("moran")["net2"] == pytest.approx(0.2 + 0.4 + 0.01 / 3)
    assert common(of_settings(study.main, "moran"))[1]


def test_seeds_give_intervals_even_if_few_cells_have_them():
    every = made_up(3, seeds=(0, 1, 2), noise=0.02)
    few = [row for row in every if row["seed"] == 0 or row["coder"] == "batch_topk-4x-k16"]
    for rows, seeds in ((every, 3), (few, 1)):
        found, _ = variance_rows(StudyRows.of(rows, {}))
        one = next(row for row in found if row["metric"] == "fvu" and row["term"] == "backbone")
        assert one["seeds"] == seeds
        assert 0 <= one["eta2_low"] < one["eta2_high"] <= 1
        assert one["n"] == 12 * seeds
    # (0, 2) and (1, 1, 4): squares 2 and 6 over 1 + 2 degrees of freedom.
    assert noise_over_seeds([[0, 2], [1, 1, 4], [9]]) == pytest.approx(math.sqrt(8 / 3))
    assert math.isnan(noise_over_seeds([[1.0]]))


def test_hypotheses_read_what_was_measured():
    study = StudyRows.of(made_up(5), {})
    rows, notes = hypothesis_rows(study, HYPOTHESES)
    of = {row["hypothesis"]: row for row in rows}
    assert of["H1"]["task"] == "segmentation_miou_raw@coco"
    assert of["H4"]["task"] == "cross_domain_codes_accuracy_128@drawings"
    assert (of["H1"]["rho"], of["H3"]["rho"]) == (1, -1)
    assert of["H1"]["p"] == pytest.approx(2 / math.factorial(5))
    assert of["H1"]["p_holm"] == pytest.approx(3 * 2 / math.factorial(5))
    assert of["H3"]["verdict"] == "not supported"
    assert notes == ["H2 was not tested: the study has no monosemanticity_normalized."]
    told = [{"name": "mine", "metric": "fvu", "task": "retrieval_r@1_raw", "threshold": -1}]
    (row,) = hypothesis_rows(study, hypotheses_of({"hypotheses": told}))[0]
    assert (row["hypothesis"], row["rho"]) == ("mine", -1)
    assert resolve(Hypothesis("", "fvu", "linear_*", 0), ["fvu"], ["linear_a", "linear_b"]).task == "linear_a"
    assert resolve(Hypothesis("", "fvu", "linear_", 0), ["fvu"], ["linear_a"]) is None
    for wrong in ("H1", [{"name": "x"}], [{**told[0], "threshold": "high"}], [{**told[0], "threshold": 7}]):
        with pytest.raises(ValueError, match="hypothes|threshold"):
            hypotheses_of({"hypotheses": wrong})


def test_a_random_backbone_is_left_out_the_second_time():
    plan = {"backbones": [{"label": f"net{i}", "name": "timm/x", "random": 0 if i == 0 else None} for i in range(5)]}
    study = StudyRows.of(made_up(5), plan)
    assert study.untrained == ["net0"]
    rows, _ = hypothesis_rows(study, HYPOTHESES[:1])
    assert [(row["backbones"], row["n"]) for row in rows] == [("all", 5), ("trained", 4)]


def test_fvu_and_preservation_point_apart_within_and_between():
    points, found = scatter_rows(StudyRows.of(made_up(5), {}))
    of = {row["backbone"]: row["rho"] for row in found}
    assert len(points) == 20
    assert of["net0"] == pytest.approx(1), "k = 32 adds to both"
    assert of["between"] == pytest.approx(1), "and both fall from backbone to backbone"


def test_families_layers_and_lifts():
    study = StudyRows.of(made_up(4, ("batch_topk", "jump_relu"), layers=True), {})
    rows, kept = family_rows(study)
    assert {(row["cells"], row["rho"]) for row in rows if row["metric"] == "moran"} == {
        ("all", 1.0),
        ("|L0 - target| <= 2", 1.0),
    }
    assert [(one["cells"], one["near_target"]) for one in kept] == [(16, 12), (16, 12)], "8x at 32 is 5 off"
    moran = next(row for row in layer_rows(study) if row["metric"] == "moran")
    assert (moran["against"], moran["n"], moran["rises"]) == ("earlier", 4, 0)
    assert moran["change"] == pytest.approx(-0.1)
    assert moran["p"] == 2 / 16
    rows, rho, _ = lift_rows(study)
    one = next(row for row in rows if row["task"] == "retrieval_r@1" and row["backbone"] == "net0")
    # codes .35 + .001 k, k = 16, 32, 16, 32, raw .4
    assert one["lift"] == pytest.approx((0.366 + 0.382) / 2 / 0.4)
    assert {row["task"] for row in rho} >= {"retrieval_r@1", "segmentation_miou@coco"}
    assert all(-1 <= row["rho_by_chance"] <= 1 for row in rho)


def test_the_guide_follows_the_rows_and_says_how_little_it_knows():
    study = StudyRows.of(made_up(5), {})
    rows = guide_rows(study, matrix_rows(study))
    assert {row["raw"].split(" > ")[0] for row in rows} == {"net4"}
    assert rows[0]["metric"] == "moran"
    words = " ".join(guide_words(study, rows))
    assert "5 backbones: too few" in words
    assert "nothing is significant" in words
    # The other way round: names are read, not written.
    turned = [{**row, "backbone": f"x{9 - int(row['backbone'][3:])}"} for row in made_up(5)]
    study = StudyRows.of(turned, {})
    assert guide_rows(study, matrix_rows(study))[0]["raw"].startswith("x5 > x6")
    few = StudyRows.of(made_up(7), {})
    assert "too few" not in " ".join(guide_words(few, guide_rows(few, matrix_rows(few))))


def test_settings_stand_beside_their_controls_with_seeds():
    rows = setting_rows(StudyRows.of(made_up(2, seeds=(0, 1), noise=0.01, controls=True), {}))
    assert [row["coder"] for row in rows[:2]] == ["batch_topk-4x-k16", "random"]
    assert rows[0]["seeds"] == 2
    assert rows[0]["moran_sd"] > 0
    assert about("absorption").title.startswith("M7")
    assert about("cross_domain_preservation@x").title.endswith("@x")


def test_the_whole_report_with_data_beside_each_figure(tmp_path):
    pytest.importorskip("matplotlib")
    rows = made_up(3, ("batch_topk", "jump_relu"), layers=True, controls=True)
    for row in rows:
        row["backbone"] = row["model"] = row["backbone"].replace("net0", "<script>$x$|")
    page = write_study_report(rows, tmp_path, title="a <study>")
    html = page.read_text()
    assert page == tmp_path / "report.html"
    assert "<script" not in html
    assert "&lt;script&gt;$x$|" in html
    assert "a &lt;study&gt;" in html
    assert not re.search(r'(src|href)\s*=\s*"(?!data:)', html)
    assert not re.search(r"url\(|@import|https?://", html)
    drawn = {path.stem for path in (tmp_path / "figures").glob("*.svg")}
    assert drawn == {path.stem for path in (tmp_path / "figures").glob("*.png")}
    assert drawn <= {path.stem for path in (tmp_path / "data").glob("*.csv")}
    assert {"profile", "moran_distributions", "fvu_preservation", "k_curves", "variance", "metric_task_matrix"} <= drawn
    assert float(numbers(tmp_path / "data" / "profile.csv")[0]["net2"]) == 1
    short = (tmp_path / "report.md").read_text()
    assert "| H1 |" in short
    assert "&lt;script&gt;$x$\\|" in short


def test_without_matplotlib_tables_stand(tmp_path, monkeypatch):
    monkeypatch.setattr(study_figures, "_pyplot", lambda: None)
    with pytest.warns(UserWarning, match="which needs matplotlib") as caught:
        write_study_report(made_up(3), tmp_path, title="t")
    assert len(caught) == 1
    assert not (tmp_path / "figures").exists()
    assert numbers(tmp_path / "data" / "metric_task_matrix.csv")
    assert "metric_task_matrix" not in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize("kept", [(), ("fvu",), ("fvu", "moran", "retrieval_r@1_raw")])
@pytest.mark.parametrize("n", [1, 2])
def test_what_is_missing_is_a_sentence(tmp_path, monkeypatch, kept, n):
    monkeypatch.setattr(study_figures, "_pyplot", lambda: None)
    rows = [
        {"backbone": row["backbone"], "coder": row["coder"], "control_of": None, "cost": {}, "curves": {}}
        | {"measured": {name: row["measured"][name] for name in kept} | {"absorption": measured(None)}}
        for row in made_up(n, grid=GRID[:1])
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        html = write_study_report(rows, tmp_path, title="t").read_text()
    for words in ("A profile needs", "It needs three settings", "coders of a second family", "rows of role layer"):
        assert words in html
    assert html.count('class="needs"') > 7


def test_no_rows_are_a_sentence(tmp_path):
    with pytest.raises(ValueError, match="a study without rows has nothing to report"):
        write_study_report([], tmp_path, title="t")


def test_wrong_hypotheses_are_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(study_figures, "_pyplot", lambda: None)
    (tmp_path / "plan.json").write_text(json.dumps({"options": {"hypotheses": "H1"}}))
    with pytest.warns(UserWarning, match="matplotlib"), pytest.raises(ValueError, match="hypotheses must be a list"):
        write_study_report(made_up(3), tmp_path, title="t")


def test_latents_are_picked_by_rule():
    # 40 evaluable: top 5 % are two, scores 39 and 38; the mean is 19.5, between 19 and 20: the first of the two.
    latents = {
        "latent": np.arange(50.0),
        "moran": np.arange(50.0) % 40,
        "n_images": np.where(np.arange(50) < 40, 60.0, 3.0),
    }
    assert pick(latents, min_images=50) == [
        (19, "nearest the mean Moran's I", 19.0),
        (38, "middle of the top 5 %", 38.0),
        (39, "highest", 39.0),
    ]
    assert pick(latents, min_images=99) == []
    assert pick({}, min_images=1) == []
    row = widest(StudyRows.of(made_up(1, seeds=(1, 0)), {}), "net0")
    assert (row["coder"], row["seed"]) == ("batch_topk-8x-k32", 0)


class FakeStore(Store):
    def __init__(self, x):
        self.x = x

    def kind(self, point, tokens):
        return tokens

    def image_batches(self, point, kind, *, n_images=256, start=0):
        for at in range(start, len(self.x), n_images):
            yield at, self.x[at : at + n_images]


@pytest.mark.parametrize("architecture", ["topk", "batch_topk", "jump_relu", "gated", "matching_pursuit"])
def test_top_images_are_those_of_all_codes(architecture):
    torch.manual_seed(0)
    x = torch.randn(90, 5, 8)
    arguments = {"k": 3} if architecture in ("topk", "batch_topk", "matching_pursuit") else {}
    coder = make_coder(architecture, d_in=8, d_sae=24, seed=0, **arguments).eval()
    coder.fit(ActivationStats.of(x.flatten(0, 1)), x.flatten(0, 1))
    coder.calibrate([x.flatten(0, 1)])
    z = coder.encode(x.flatten(0, 1)).detach().reshape(90, 5, 24)
    latents = z.amax((0, 1)).argsort(descending=True)[:3].tolist()
    assert (z.amax(1)[:, latents] > 0).sum() > 10
    for latent, top in zip(latents, top_images(coder, FakeStore(x), "p", "spatial", latents, 6), strict=True):
        largest = z[:, :, latent].amax(1).numpy()
        expected = [i for i in np.argsort(-largest, kind="stable")[:6] if largest[i] > 0]
        assert top.images.tolist() == expected
        assert top.values == pytest.approx(largest[expected], rel=1e-4)
        assert torch.allclose(top.tokens, z[expected, :, latent], atol=1e-5)
