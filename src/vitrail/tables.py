"""Tables on disk: Parquet, written, read and queried through DuckDB."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import duckdb
import numpy as np

from vitrail.files import replacing

Columns = dict[str, np.ndarray]


def write_table(path: Path, columns: Mapping[str, Any], types: Mapping[str, str]) -> None:
    """Write columns (equal-length sequences or arrays; None is NULL) as one Parquet file, atomically.

    `types` gives each column's DuckDB type, so that an all-NULL or empty column keeps its meaning.
    """
    if set(columns) != set(types):
        raise ValueError(f"columns {sorted(columns)} and types {sorted(types)} must name the same columns.")
    table = {name: _array(values) for name, values in columns.items()}
    select = ", ".join(f'"{name}"::{types[name]} AS "{name}"' for name in columns)
    with replacing(path) as temporary, duckdb.connect() as db:
        # preserve_insertion_order is DuckDB's default: rows keep their order in the file.
        db.register("source", table)
        db.execute(f"COPY (SELECT {select} FROM source) TO '{_quoted(temporary)}' (FORMAT parquet)")


def read_table(path: Path, columns: Sequence[str] | None = None, where: str = "", order_by: str = "") -> Columns:
    """Columns as numpy arrays (object arrays with None where a text column has NULLs, NaN in numeric ones)."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: there is no table here.")
    names = ", ".join(f'"{name}"' for name in columns) if columns else "*"
    query = f"SELECT {names} FROM read_parquet('{_quoted(path)}')"
    query += f" WHERE {where}" if where else ""
    query += f" ORDER BY {order_by}" if order_by else ""
    with duckdb.connect() as db:
        try:
            result = db.execute(query).fetchnumpy()
        except duckdb.Error as error:
            raise ValueError(f"{path} is not a readable Parquet table: {error}") from error
    return {name: _unmasked(np.ma.asanyarray(values)) for name, values in result.items()}


def _array(values: Any) -> np.ndarray:
    if isinstance(values, np.ndarray):
        return values
    values = list(values)
    if any(value is None or isinstance(value, str | list) for value in values):
        array = np.empty(len(values), dtype=object)
        array[:] = values
        return array
    return np.asarray(values)


def _unmasked(values: np.ndarray) -> np.ndarray:
    if not isinstance(values, np.ma.MaskedArray):
        return values
    if not values.mask.any():
        return values.data
    if values.dtype == object:
        plain = values.data.copy()
        plain[values.mask] = None
        return plain
    return np.where(values.mask, np.nan, values.data.astype(np.float64))


def _quoted(path: Path) -> str:
    return str(path).replace("'", "''")
