"""Rows of `vitrail eval` or of a study as one Parquet table of numbers, for DuckDB, pandas or polars.

A line a number, in full precision: `name`, `measure`, `value`, `low`, `high`, `n`, `definition`, and beside them what
the row is of (backbone, point, tokens, coder_digest, ...). Differences between rows (`paired`) have `against`, the
other row's name; elsewhere it is NULL.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vitrail.tables import write_table

OF_THE_ROW = ("name", "control_of", "kind", "role", "backbone", "model", "point", "tokens", "coder", "architecture")
DIGESTS = ("coder_digest", "backbone_digest")
NUMBERS = {"d_in": "INTEGER", "d_sae": "INTEGER", "k": "INTEGER", "layer": "INTEGER", "seed": "INTEGER"}


def write_long_table(rows: Sequence[Mapping[str, Any]], path: str | Path) -> int:
    """How many numbers were written. Raises ValueError for no rows."""
    lines = [line for row in rows for line in _lines(row)]
    if not lines:
        raise ValueError("there are no numbers to write: the rows hold none.")
    types = dict.fromkeys((*OF_THE_ROW, *DIGESTS, "images", "against", "measure", "definition"), "VARCHAR")
    types |= NUMBERS | {"value": "DOUBLE", "low": "DOUBLE", "high": "DOUBLE", "n": "BIGINT"}
    write_table(Path(path), {name: [line.get(name) for line in lines] for name in types}, types)
    return len(lines)


def _lines(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    about = {name: _text(row.get(name)) for name in (*OF_THE_ROW, *DIGESTS, "images")}
    about |= {name: row[name] if isinstance(row.get(name), int) else None for name in NUMBERS}
    own = [{**about, "measure": name, "against": None, **_numbers(one)} for name, one in row["measured"].items()]
    for other, differences in (row.get("paired") or {}).items():
        own += [
            {
                **about,
                "measure": name,
                "against": other,
                "definition": "difference, paired over images",
                **_numbers(one),
            }
            for name, one in differences.items()
        ]
    return own


def _numbers(one: Mapping[str, Any]) -> dict[str, Any]:
    return {name: one.get(name) for name in ("value", "low", "high", "n", "definition") if name in one}


def _text(value: Any) -> str | None:
    return value if value is None or isinstance(value, str) else str(value)
