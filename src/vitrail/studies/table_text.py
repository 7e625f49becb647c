"""The table as a person reads it in a terminal."""

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from vitrail.metrics import COLUMNS, MEASURES

# What fits a line of a terminal; the report has every column.
LEFT_OUT = ("l0_image_sum", "recon_accuracy", "ce_unscaled", "recon_ce_unscaled", "zero_ce_unscaled")
SHOWN = tuple(name for name in COLUMNS if name not in LEFT_OUT)


def print_table(rows: Sequence[dict[str, Any]], console: Console | None = None) -> None:
    """Each coder, its controls under it; a dash where there is no number."""
    console = console or Console(width=None if Console().is_terminal else 150)
    shown = [name for name in SHOWN if any(row["measured"].get(name, {}).get("value") is not None for row in rows)]
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("")
    for name in shown:
        arrow = {"higher": "↑", "lower": "↓"}.get(MEASURES[name].better, "")
        table.add_column(f"{MEASURES[name].title}{arrow}", justify="right")
    for row in rows:
        control = row["control_of"] is not None
        name = "  " + row["name"].split(" / ")[-1] if control else row["name"]
        cells = [_number(row, measure) for measure in shown]
        table.add_row(Text(name), *cells, style="dim" if control else "bold")
    console.print(table)


def _number(row: dict[str, Any], measure: str) -> str:
    value = row["measured"].get(measure, {}).get("value")
    return "–" if value is None else f"{value:.{MEASURES[measure].digits}f}"
