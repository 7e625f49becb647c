"""Concepts on disk."""

import csv
import json
from dataclasses import fields, replace

import numpy as np
import pytest

from vitrail.concepts.table import TYPES, Concept, names_of, read_concepts, to_json, write_concepts, write_review
from vitrail.tables import write_table

STAR = Concept(
    latent=3,
    method="top_images",
    name="star",
    score=0.8,
    runner_up="ring",
    runner_up_score=0.3,
    cosine_ok=True,
    ratio_ok=True,
    unique_ok=True,
    valid=True,
    detection_auc=0.9,
    detection_low=0.85,
    detection_high=0.95,
    detection_random=0.5,
    detection_random_low=0.3,
    detection_random_high=0.7,
    rival="moon",
    rival_auc=0.7,
    fires=0.25,
    truth="shape:star",
    true=True,
)
BY_LABEL = replace(STAR, method="labels", name="striped, star", cosine_ok=None, ratio_ok=None, detection_auc=0.95)
UNSURE = replace(STAR, latent=1, name="sea", valid=False, detection_auc=None, fires=None, truth=None, true=None)


def test_rows_survive_the_disk_in_order(tmp_path):
    write_concepts(tmp_path / "concepts.parquet", [BY_LABEL, STAR, UNSURE])
    assert read_concepts(tmp_path) == [UNSURE, STAR, BY_LABEL]
    assert list(TYPES) == [field.name for field in fields(Concept)]
    empty = tmp_path / "none.parquet"
    write_concepts(empty, [])
    assert read_concepts(empty) == []


def test_a_table_of_before_rivals_is_read(tmp_path):
    columns = {name: kind for name, kind in TYPES.items() if name not in ("rival", "rival_auc", "class_f1")}
    cells = {name: np.array([getattr(STAR, name)], dtype=object) for name in columns}
    write_table(tmp_path / "concepts.parquet", cells, columns)
    assert read_concepts(tmp_path) == [replace(STAR, rival=None, rival_auc=None)]


def test_captions_stand_beside_pictures(tmp_path):
    write_review(tmp_path / "r.csv", [STAR], {3: ["a.png", "b.png"]}, {3: ["a star", "two stars"]})
    (row,) = csv.DictReader((tmp_path / "r.csv").read_text().splitlines())
    assert (row["top pictures"], row["top captions"]) == ("a.png b.png", "a star | two stars")
    write_review(tmp_path / "r.csv", [STAR], {3: ["a.png"]}, {3: []})
    assert "top captions" not in (tmp_path / "r.csv").read_text()


def test_a_latent_has_one_name_by_a_method(tmp_path):
    with pytest.raises(ValueError, match="latent 3 has two names by top_images"):
        write_concepts(tmp_path / "c.parquet", [STAR, STAR])
    with pytest.raises(ValueError, match="no naming method 'guess'"):
        replace(STAR, method="guess")


def test_the_best_valid_name_has_the_largest_auc():
    assert names_of([STAR, BY_LABEL, UNSURE]) == {3: "striped, star"}
    assert names_of([STAR, BY_LABEL, UNSURE], "top_images") == {3: "star"}
    # Of equals the method that comes first.
    assert names_of([replace(BY_LABEL, detection_auc=0.9), STAR]) == {3: "star"}


def test_json_and_the_sheet_for_people(tmp_path):
    nan = replace(STAR, detection_high=float("nan"))
    to_json(tmp_path / "concepts.json", [nan], {"share": float("nan"), "n": 3})
    value = json.loads((tmp_path / "concepts.json").read_text())
    assert value["about"] == {"share": None, "n": 3}
    assert value["concepts"][0]["detection_high"] is None
    assert value["concepts"][0]["name"] == "star"
    write_review(tmp_path / "review.csv", [BY_LABEL, STAR, UNSURE], {3: ["a.png", "b.png"]})
    with (tmp_path / "review.csv").open(encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["latent"] for row in rows] == ["1", "3"]
    assert rows[1]["name"] == "striped, star"
    assert rows[1]["top_images"] == "star"
    assert rows[1]["labels detection AUC"] == "0.950"
    assert rows[1]["top pictures"] == "a.png b.png"
    assert rows[0]["name"] == ""  # no valid one
    assert rows[0]["top_images"] == "sea"
    assert rows[0]["is the name right? (y/n)"] == ""
