"""The table as a person reads it in a terminal."""

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from vitrail.metrics import COLUMNS, MEASURES, RECOVERY_COLUMNS
from vitrail.studies.paper_tables import is_control, own_name
from vitrail.studies.truth_recovery import best_of_variants

# What fits a line of a terminal; the report has every column.
LEFT_OUT = ("l0_image_sum", "recon_accuracy", "ce_unscaled", "recon_ce_unscaled", "zero_ce_unscaled")
PAIRED = ("explained_variance", "cosine", "recon_cosine", "ce_recovered", "recon_accuracy")  # and their intervals
SHOWN = tuple(name for name in COLUMNS if name not in LEFT_OUT)


def print_table(rows: Sequence[dict[str, Any]], console: Console | None = None) -> None:
    """Each coder, its controls under it; a dash where there is no number."""
    lines = [
        (row, "  " + own_name(row["name"]), True) if row["control_of"] is not None else (row, row["name"], False)
        for row in rows
    ]
    _print(lines, SHOWN, console)


def print_pairs(rows: Sequence[dict[str, Any]], console: Console | None = None) -> None:
    """Each coder less each of its controls, then each less the first, with intervals over the same images. Nothing
    where no row has such differences.
    """
    found = [(row, other, of) for row in rows for other, of in row.get("paired", {}).items()]
    coders = [row["name"] for row in rows if row["control_of"] is None]
    controlled = [(row["name"], other, of) for row, other, of in found if is_control(row, other)]
    others = [(row["name"], other, of) for row, other, of in found if other == coders[0]]
    for title, lines in (("coder less control", controlled), ("coder less coder", others)):
        shown = [name for name in PAIRED if any(of.get(name, {}).get("value") is not None for _, _, of in lines)]
        if not shown:
            continue
        table = Table(box=None, pad_edge=False, header_style="bold")
        table.add_column(f"{title}, paired over the same images", no_wrap=True)
        for name in shown:
            table.add_column(MEASURES[name].title, justify="right")
        for name, other, of in lines:
            cells = [_difference(of.get(measure), MEASURES[measure].digits) for measure in shown]
            table.add_row(Text(f"{name} less {own_name(other)}"), *cells)
        console = console or _console()
        console.print()
        console.print(table)


def _difference(found: dict[str, Any] | None, digits: int) -> str:
    """With its interval."""
    if found is None or found["value"] is None:
        return "–"
    text = f"{found['value']:+.{digits}f}"
    if found["low"] is None or found["high"] is None:
        return text
    return f"{text} [{found['low']:+.{digits}f}, {found['high']:+.{digits}f}]"


def print_recovery(rows: Sequence[dict[str, Any]], console: Console | None = None) -> None:
    """Coders (means over seeds where there are several), then controls, each number that of the better variant."""
    best = best_of_variants(rows)
    lines = [(row, row["name"], row["kind"] == "control") for row in best]
    _print(lines, RECOVERY_COLUMNS, console)


def _print(lines: Sequence[tuple[dict[str, Any], str, bool]], columns: Sequence[str], console: Console | None) -> None:
    """(row, its name, whether it is a control) for each line."""
    console = console or _console()
    rows = [row for row, _, _ in lines]
    shown = [name for name in columns if any(row["measured"].get(name, {}).get("value") is not None for row in rows)]
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("", no_wrap=True)
    for name in shown:
        arrow = {"higher": "↑", "lower": "↓"}.get(MEASURES[name].better, "")
        table.add_column(f"{MEASURES[name].title}{arrow}", justify="right")
    for row, name, control in lines:
        cells = [_number(row, measure) for measure in shown]
        table.add_row(Text(name), *cells, style="dim" if control else "bold")
    console.print(table)


def _console() -> Console:
    return Console(width=None if Console().is_terminal else 150)


def _number(row: dict[str, Any], measure: str) -> str:
    value = row["measured"].get(measure, {}).get("value")
    return "–" if value is None else f"{value:.{MEASURES[measure].digits}f}"
