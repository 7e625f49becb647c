"""Rows as one Parquet table of numbers."""

import json

import numpy as np
import pytest

from vitrail.cli import main
from vitrail.studies.long_table import write_long_table
from vitrail.tables import read_table

ROWS = [
    {
        "name": "topk",
        "control_of": None,
        "d_sae": 96,
        "measured": {
            "fvu": {"value": 0.1 + 0.2, "low": 0.25, "high": 0.35, "n": 7, "definition": "ratio-of-sums"},
            "alive": {"value": 1.0, "definition": "any", "n": 96, "low": None, "high": None},
        },
        "paired": {"topk / pca": {"fvu": {"value": -0.5, "low": -0.6, "high": -0.4, "n": 7}}},
    },
    {"name": "topk / pca", "control_of": "topk", "d_sae": 16, "measured": {"fvu": {"value": None, "n": 7}}},
]


def test_a_number_a_line_in_full_precision(tmp_path):
    assert write_long_table(ROWS, tmp_path / "n.parquet") == 4
    table = read_table(tmp_path / "n.parquet")
    assert table["name"].tolist() == ["topk", "topk", "topk", "topk / pca"]
    assert table["measure"].tolist() == ["fvu", "alive", "fvu", "fvu"]
    assert table["against"].tolist() == [None, None, "topk / pca", None]
    assert table["value"][0] == 0.1 + 0.2
    assert np.isnan(table["value"][3])
    assert np.isnan(table["low"][1])
    assert table["definition"].tolist()[2] == "difference, paired over images"
    assert table["d_sae"].tolist() == [96, 96, 96, 16]


def test_the_command_writes_it_to_a_file_only(tmp_path, capsys):
    (tmp_path / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    main(["table", "prisma", str(tmp_path), "--form", "parquet", "--out", str(tmp_path / "n.parquet")])
    assert "4 numbers in" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["table", "prisma", str(tmp_path), "--form", "parquet"])
    with pytest.raises(ValueError, match="there are no numbers to write"):
        write_long_table([], tmp_path / "none.parquet")
