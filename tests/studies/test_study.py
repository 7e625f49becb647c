"""A study from one file: what it reads, what it keeps, and that nothing is done twice."""

import json
import re

import pytest

from vitrail.metrics.measured import Measured
from vitrail.studies.study import by_setting, run_study
from vitrail.studies.study_estimate import estimate
from vitrail.studies.study_plan import plan_from_json, plan_to_json, read_plan

PLAN = """
title: a small study
backbones:
  - {name: toy/vit-1l-p16, point: blocks.0.hook_resid_post, tokens: spatial}
  - {name: toy/attn-1l-p16, point: blocks.0.hook_resid_post, tokens: spatial}
coders:
  - {name: topk, architecture: topk, arguments: {d_sae: 96, k: 4}}
  - {name: batch, architecture: batch_topk, arguments: {d_sae: 96, k: 4}, lr: 2.0e-3}
seeds: [0, 1]
images:
  train: world:shapes?n=24
  test: world:shapes?n=12&split=test
batch_size: 128
training: {epochs: 1, warmup_steps: 1}
"""


def plan_of(tmp_path, text=PLAN):
    path = tmp_path / "study.yaml"
    path.write_text(text)
    return read_plan(path)


def measuring(calls):
    def measure(cell):
        calls.append((cell.place.name, cell.coder_plan.name, cell.seed))
        n = sum(len(x) for _, x in cell.batches("test", n_images=5))
        assert (cell.labels("test") >= 0).all()
        fired = sum(int(cell.coder.encode_sparse(x.flatten(0, 1)).nnz) for _, x in cell.batches("test"))
        return {"n": Measured(float(n), "count", n), "fired": Measured(float(fired), "count", n)}, {}

    return measure


def test_every_cell_once_and_finished_ones_stand(tmp_path):
    plan, calls = plan_of(tmp_path), []
    rows = run_study(plan, tmp_path / "out", measure=measuring(calls), version="1")
    assert len(rows) == len(calls) == plan.n_cells == 8
    assert rows[0]["name"] == "toy/vit-1l-p16 / topk#0"
    assert {row["measured"]["n"]["value"] for row in rows} == {12.0}
    assert len({row["coder_digest"] for row in rows}) == 8, "seeds and backbones give other coders"
    assert [json.loads(line) for line in (tmp_path / "out/rows.jsonl").read_text().splitlines()] == rows
    again = run_study(plan, tmp_path / "out", measure=measuring(calls), version="1")
    assert again == rows
    assert len(calls) == 8
    means = by_setting(rows, "fired")
    assert set(means) == {(b.name, c.name) for b in plan.backbones for c in plan.coders}
    two = [row["measured"]["fired"]["value"] for row in rows[:2]]
    assert means["toy/vit-1l-p16", "topk"] == sum(two) / 2


def test_a_killed_study_goes_on_to_the_same_rows(tmp_path):
    plan = plan_of(tmp_path)
    whole = run_study(plan, tmp_path / "whole", measure=measuring([]), version="1")
    calls: list = []
    plain = measuring(calls)

    def dying(cell):
        if len(calls) == 3:
            raise KeyboardInterrupt
        return plain(cell)

    with pytest.raises(KeyboardInterrupt):
        run_study(plan, tmp_path / "killed", measure=dying, version="1")
    assert not (tmp_path / "killed" / "rows.jsonl").exists()
    rows = run_study(plan, tmp_path / "killed", measure=plain, version="1")
    assert len(calls) == plan.n_cells, "three before the kill, five after"
    for one, other in zip(rows, whole, strict=True):
        kept = ("measured", "coder_digest", "cell")
        assert [one[key] for key in kept] == [other[key] for key in kept]


def test_what_changed_is_done_again_and_nothing_else(tmp_path):
    calls: list = []
    run_study(plan_of(tmp_path), tmp_path / "out", measure=measuring(calls), version="1")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("weights.safetensors")}
    assert len(before) == 8
    run_study(plan_of(tmp_path), tmp_path / "out", measure=measuring(calls), version="2")
    assert len(calls) == 16, "measured again"
    assert {p: p.stat().st_mtime_ns for p in before} == before, "but not trained again"
    head, _, tail = PLAN.rpartition("d_sae: 96")
    rows = run_study(
        plan_of(tmp_path, f"{head}d_sae: 80{tail}"), tmp_path / "out", measure=measuring(calls), version="2"
    )
    assert len(calls) == 20
    assert {row["coder"]: row["d_sae"] for row in rows} == {"topk": 96, "batch": 80}


def test_what_it_will_cost(tmp_path):
    (one, other) = estimate(plan_of(tmp_path))
    # 36 pictures of 16 patches; 2 bytes, 64 wide: 36 * 16 * 64 * 2 = 73,728.
    assert (one["images"], one["tokens"], one["bytes"]) == (36, 576, 73_728)
    # Two coders of 96 latents, two seeds, 24 * 16 rows: 6 * 64 * 96 * 384 * 4.
    assert one["train_flops"] == 6 * 64 * 96 * 384 * 4
    assert one["hours"]["1 GPU"] < one["hours"]["1 core"]
    assert other["extract_flops"] < one["extract_flops"], "attention alone has fewer weights"


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("seeds: [0, 1]", "sedes: [0, 1]", "study.yaml has no 'sedes'. Known: backbones, batch_size, coders"),
        ("lr: 2.0e-3", "learning_rate: 2", "coders of study.yaml has no 'learning_rate'"),
        ("name: batch,", "name: topk,", "two coders are called 'topk'"),
        ("  test:", "  val:", "images must have a 'test' set, got train, val"),
        ("epochs: 1", "epoch: 1", "training has no 'epoch'"),
        ("seeds: [0, 1]", "seeds: [1, 1]", "seeds must be different numbers"),
        ("title: a", "title: {a", "is not YAML that can be read"),
    ],
)
def test_mistakes_in_the_file_are_sentences(tmp_path, old, new, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        plan_of(tmp_path, PLAN.replace(old, new))


WIDER = """
backbones:
  - {name: toy/vit-2l-p16, label: last, point: blocks.1.hook_resid_post}
  - {name: toy/vit-2l-p16, label: first, point: blocks.0.hook_resid_post, role: layer, coders: [one]}
  - {name: toy/vit-2l-p16, label: drawn, point: blocks.1.hook_resid_post, random: 3, coders: [one, pca]}
coders:
  - {name: one, architecture: topk, arguments: {expansion: 1.5, k: 4}, seeds: [0, 1]}
  - {name: two, architecture: topk, arguments: {d_sae: 32, k: 2}}
  - {name: pca, architecture: pca_all, control_of: one}
images:
  train: world:shapes?n=24
  test: world:shapes?n=12&split=test
seeds: [5]
batch_size: 128
training: {epochs: 1, warmup_steps: 1}
"""


def test_points_of_a_model_are_extracted_once_and_controls_stand_beside_their_coder(tmp_path):
    plan = plan_of(tmp_path, WIDER)
    calls: list = []

    def measure(cell):
        calls.append(cell)
        return {}, {}

    rows = run_study(plan, tmp_path / "out", measure=measure, version="1")
    told = [(row["backbone"], row["coder"], row["seed"], row["role"]) for row in rows]
    assert told == [
        ("last", "one", 0, "main"),
        ("last", "one", 1, "main"),
        ("last", "two", 5, "main"),
        ("last", "pca", 0, "control"),
        ("first", "one", 0, "layer"),
        ("first", "one", 1, "layer"),
        ("drawn", "one", 0, "main"),
        ("drawn", "one", 1, "main"),
        ("drawn", "pca", 0, "control"),
    ]
    stores = sorted(path.name for path in (tmp_path / "out" / "stores").iterdir())
    assert len(stores) == 2, f"one for both points, one for the model that was never trained: {stores}"
    assert rows[0]["d_sae"] == round(1.5 * rows[0]["d_in"])
    assert (rows[0]["layer"], rows[4]["layer"]) == (1, 0)
    control = rows[3]
    assert (control["control_of"], control["architecture"]) == ("one", "pca")
    codes = calls[3].coder.encode_sparse(next(calls[3].batches("test"))[1].flatten(0, 1))
    assert codes.l0().max() <= 4, "at its coder's k"
    assert rows[6]["backbone_digest"] != rows[0]["backbone_digest"]
    assert rows[6]["model"] == "toy/vit-2l-p16, random weights of seed 3"
    assert all(row["cost"]["train_seconds"] >= 0 for row in rows)


def test_a_part_of_the_backbones_can_be_run_by_itself(tmp_path):
    plan, calls = plan_of(tmp_path, WIDER), []
    some = run_study(plan, tmp_path / "out", measure=measuring(calls), version="1", only=["first"])
    assert [row["backbone"] for row in some] == ["first", "first"]
    assert not (tmp_path / "out" / "rows.jsonl").exists()
    rows = run_study(plan, tmp_path / "out", measure=measuring(calls), version="1")
    assert len(calls) == len(rows) == 9
    assert rows[4:6] == some
    with pytest.raises(ValueError, match="no backbone 'frist' in the plan. There are last, first, drawn"):
        run_study(plan, tmp_path / "out", measure=measuring(calls), version="1", only=["frist"])


def test_training_is_timed_once_and_told_again(tmp_path):
    plan = plan_of(tmp_path)
    (first, *_) = run_study(plan, tmp_path / "out", measure=measuring([]), version="1")
    (again, *_) = run_study(plan, tmp_path / "out", measure=measuring([]), version="2")
    assert again["cost"]["train_seconds"] == first["cost"]["train_seconds"] > 0


def test_a_plan_survives_its_own_json(tmp_path):
    plan = plan_of(tmp_path, WIDER)
    assert plan_from_json(json.loads(json.dumps(plan_to_json(plan)))) == plan


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("role: layer", "role: layers", "role must be main or layer, got 'layers'"),
        ("coders: [one]}", "coders: [eins]}", "coders of first: 'eins' is not among the coders (one, two, pca)"),
        ("control_of: one", "control_of: none", "pca is a control of 'none', which must be one of one, two"),
        ("architecture: pca_all", "architecture: pcas", "pca: there is no control 'pcas'. Known: random, pca"),
        ("label: first", "label: last", "two backbones are called 'last': give them different names (label:"),
        ("expansion: 1.5", "expansion: 1.5, d_sae: 8", "one has d_sae and expansion"),
        ("random: 3", "random: 3, weights: a.safetensors", "drawn has weights and random: 3"),
        ("batch_size: 128", "masks: {scenes: there}", "masks: 'scenes' is not among the images (train, test)"),
    ],
)
def test_mistakes_in_a_wider_file_are_sentences(tmp_path, old, new, said):
    assert old in WIDER
    with pytest.raises(ValueError, match=re.escape(said)):
        plan_of(tmp_path, WIDER.replace(old, new))
