import numpy as np
import pytest

from vitrail.tables import read_table, write_table


def test_columns_come_back_in_order_with_their_nulls(tmp_path):
    path = tmp_path / "t.parquet"
    write_table(
        path,
        {"row": [2, None, 1], "name": ["b", None, "it's é"], "x": np.array([0.5, 1.5, 2.5], dtype=np.float32)},
        {"row": "BIGINT", "name": "VARCHAR", "x": "FLOAT"},
    )
    table = read_table(path)
    assert table["name"].tolist() == ["b", None, "it's é"]
    assert table["x"].dtype == np.float32
    assert table["row"][0] == 2
    assert np.isnan(table["row"][1])
    assert read_table(path, ["row"], where="name is not null", order_by='"row"')["row"].tolist() == [1, 2]


def test_an_empty_table_keeps_its_columns(tmp_path):
    path = tmp_path / "t.parquet"
    write_table(path, {"a": np.zeros(0, dtype=np.int64), "b": []}, {"a": "BIGINT", "b": "VARCHAR"})
    table = read_table(path)
    assert {name: len(values) for name, values in table.items()} == {"a": 0, "b": 0}


def test_a_missing_or_broken_table_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"t\.parquet is missing"):
        read_table(tmp_path / "t.parquet")
    (tmp_path / "t.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(ValueError, match="not a readable Parquet table"):
        read_table(tmp_path / "t.parquet")
