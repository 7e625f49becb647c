"""Figures: each as vector and PNG, with the numbers that it shows beside it."""

import csv

import numpy as np
import pytest
from PIL import Image

from vitrail.studies.figures import FIGURES, _wrapped, figures


def row(name, control_of=None):
    bins = [{"log10_low": -1.0 + i / 10, "log10_high": -0.9 + i / 10, "count": i, "share": i / 10} for i in range(5)]
    cells = [
        {"token": i, "kind": "patch", "row": i // 2, "column": i % 2, "mean": float(i), "minimum": 0, "low": 0, "q1": 1,
         "median": 2, "q3": 3, "high": 4, "maximum": 5}
        for i in range(4)
    ]  # fmt: skip
    cls = {**cells[0], "kind": "cls", "row": None, "column": None}
    value = {"definition": "d", "n": 3}
    return {
        "name": name,
        "control_of": control_of,
        "measured": {
            "l0_tokens": {"value": 8.0, **value},
            "explained_variance": {"value": 0.5, **value},
            "cknna": {"value": None, **value},
        },
        "curves": {
            "progressive": [{"k": k, "fvu": 1 / k, "cosine_normalized": 1 - 1 / k, "l0": k} for k in (1, 2, 4)],
            "activation_histogram": bins,
            "maximum_histogram": bins,
            "firing_histogram": [{"log10_low": None, "log10_high": None, "latents": 2, "share": 0.2}, *bins],
            "l0_positions": [cls, *cells],
            "l0_map": [{key: cell[key] for key in ("row", "column", "mean")} for cell in cells],
        },
    }


def test_every_figure_is_drawn_with_its_numbers(tmp_path):
    pytest.importorskip("matplotlib")
    paths = figures([row("a"), row("a / pca", "a"), row("b")], tmp_path)
    assert {path.stem for path in paths} == set(FIGURES) - {"cls_by_layer"}, "that one needs two layers"
    assert {path.suffix for path in paths} == {".svg", ".png"}
    for name in {path.stem for path in paths}:
        assert np.asarray(Image.open(tmp_path / f"{name}.png").convert("L")).std() > 5, "something is drawn"
        assert (tmp_path / f"{name}.svg").read_text().startswith("<?xml")
    with (tmp_path / "progressive.csv").open() as stream:
        numbers = list(csv.DictReader(stream))
    assert len(numbers) == 9
    assert (numbers[1]["name"], float(numbers[1]["k"]), float(numbers[1]["fvu"])) == ("a", 2, 0.5)
    with (tmp_path / "l0_map.csv").open() as stream:
        assert [float(one["mean"]) for one in csv.DictReader(stream)] == [0, 1, 2, 3] * 2, "coders, no controls"


def test_rows_without_curves_are_a_sentence(tmp_path):
    bare = {"name": "a", "control_of": None, "measured": {"l0_tokens": {"value": 1.0}}}
    with pytest.raises(ValueError, match="have no curves to draw"):
        figures([bare], tmp_path)


def test_l0_by_layer_and_the_front(tmp_path):
    pytest.importorskip("matplotlib")
    rows = []
    for layer, cls, variance in ((2, 10.0, 0.4), (9, 30.0, 0.6)):
        one = {**row("a"), "point": f"blocks.{layer}.hook_resid_post"}
        one["measured"] = {
            "l0_tokens": {"value": cls, "definition": "d", "n": 3},
            "l0_cls": {"value": cls, "definition": "d", "n": 3, "low": cls - 1, "high": cls + 1},
            "l0_patches": {"value": 5.0, "definition": "d", "n": 3},
            "explained_variance": {"value": variance, "definition": "d", "n": 3},
        }
        rows.append(one)
    rows.append({**rows[0], "name": "worse", "measured": {**rows[0]["measured"], "l0_tokens": {"value": 40.0}}})
    figures(rows, tmp_path)
    with (tmp_path / "cls_by_layer.csv").open() as stream:
        numbers = list(csv.DictReader(stream))
    assert [(one["name"], one["layer"], one["l0_cls"], one["l0_cls_low"]) for one in numbers] == [
        ("a", "2", "10.0", "9.0"), ("a", "9", "30.0", "29.0"),
    ]  # fmt: skip
    with (tmp_path / "pareto.csv").open() as stream:
        assert [one["explained_variance_on_front"] for one in csv.DictReader(stream)] == ["True", "True", "False"]


def test_long_titles_are_broken_so_that_panels_do_not_run_into_each_other():
    # "matryoshka near k 12 (blocks.11.hook_" has 37 letters; with "resid" it would have 42.
    told = _wrapped("matryoshka near k 12 (blocks.11.hook_resid_post of the tower)").splitlines()
    assert told == ["matryoshka near k 12 (blocks.11.hook_", "resid_post of the tower)"]
    assert _wrapped("topk (blocks.5)") == "topk (blocks.5)"
