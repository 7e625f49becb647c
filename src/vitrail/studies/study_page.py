"""What a study's page is made of: tables as HTML, Markdown and CSV, figures with their numbers, sentences.

Every string that comes from outside goes through `escape` here.
"""

import base64
import csv
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from vitrail.files import replacing
from vitrail.studies.study_analyses import StudyRows, Table, about
from vitrail.studies.study_figures import Drawing


@dataclass
class Page:
    study: StudyRows
    out: Path
    drawing: Drawing
    parts: list[str] = field(default_factory=list)
    short: list[str] = field(default_factory=list)  # lines of report.md
    found: dict[str, Table] = field(default_factory=dict)  # what one section worked out and another reads

    def section(self, title: str, *parts: str) -> None:
        self.parts.append(f"<section><h2>{escape(title)}</h2>{''.join(parts)}</section>")

    def table(self, name: str, rows: Table, columns: Sequence["Column"] = (), *, shown: Table | None = None) -> str:
        """Into data/name.csv; the HTML of `columns`, or nothing."""
        if not rows:
            return ""
        write_csv(self.out / "data" / f"{name}.csv", rows)
        return html_table(rows if shown is None else shown, columns) if columns else ""

    def figure(self, name: str, paint: Callable[[Any], Any], caption: str) -> str:
        path = self.drawing.draw(name, paint)
        if path is None:
            return ""
        data = base64.b64encode(path.read_bytes()).decode()
        return (
            f'<figure class="plot"><img alt="{escape(caption)}" src="data:image/svg+xml;base64,{data}">'
            f"<figcaption>{escape(caption)} Numbers: data/{escape(name)}.csv.</figcaption></figure>"
        )


@dataclass(frozen=True)
class Column:
    key: str
    title: str
    show: Callable[[Any], str] = str  # of a value that is there
    word: bool = False
    meaning: str = ""


def digits(n: int, sign: str = "") -> Callable[[Any], str]:
    return lambda value: f"{value:{sign}.{n}f}"


def p_value(value: float) -> str:
    return f"{value:.4f}" if value >= 0.0001 else f"{value:.0e}"


def html_table(rows: Table, columns: Sequence[Column]) -> str:
    """Columns that no row has a number for are left out."""
    kept = [column for column in columns if any(there(row.get(column.key)) for row in rows)]
    head = "".join(
        f'<th{_class(column)} title="{escape(column.meaning)}">{escape(column.title)}</th>' for column in kept
    )
    body = []
    for row in rows:
        cells = []
        for column in kept:
            value = row.get(column.key)
            text = escape(column.show(value)) if there(value) else "–"
            cells.append(f"<td{_class(column)}>{text}{_spread(row, column)}</td>")
        kind = ' class="control"' if row.get("control_of") is not None else ""
        body.append(f"<tr{kind}>{''.join(cells)}</tr>")
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'


def _class(column: Column) -> str:
    return ' class="word"' if column.word else ""


def there(value: Any) -> bool:
    return value is not None and value != "" and not (isinstance(value, float) and math.isnan(value))


def _spread(row: Mapping[str, Any], column: Column) -> str:
    sd, low, high = (row.get(f"{column.key}_{end}") for end in ("sd", "low", "high"))
    if there(sd):
        return f"<small>± {column.show(sd)}</small>"
    if there(low) and there(high):
        return f"<small>{column.show(low)} to {column.show(high)}</small>"
    return ""


def write_csv(path: Path, rows: Table) -> None:
    """NaN and None are empty."""
    names = list(dict.fromkeys(key for row in rows for key in row))
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as stream:
        table = csv.DictWriter(stream, names, lineterminator="\n")
        table.writeheader()
        table.writerows({key: value for key, value in row.items() if there(value)} for row in rows)


def says(*sentences: str) -> str:
    return "".join(f'<p class="says">{escape(sentence)}</p>' for sentence in sentences)


def needs(*sentences: str) -> str:
    return "".join(f'<p class="needs">{escape(sentence)}</p>' for sentence in sentences)


def listed(sentences: Sequence[str]) -> str:
    return f"<ul>{''.join(f'<li>{escape(sentence)}</li>' for sentence in sentences)}</ul>" if sentences else ""


def measure_column(name: str) -> Column:
    told = about(name)
    arrow = {"higher": " ↑", "lower": " ↓"}.get(told.better, "")
    return Column(name, told.title + arrow, digits(told.digits), meaning=told.meaning)


def titled(rows: Table, *keys: str) -> Table:
    """Copies with titles in the place of measures' names, for the page; the CSV keeps the names."""
    return [{**row, **{key: about(row[key]).title for key in keys if row.get(key)}} for row in rows]


RHO = (
    Column("n", "n"),
    Column("rho", "rho", digits(2, "+")),
    Column("p", "p, exact", p_value, meaning="over all orders; drawn ones from 10 pairs on"),
    Column("p_least", "least p", p_value, meaning="no p can be below this with so few"),
)
HOLM = Column("p_holm", "p, Holm", p_value)


def markdown_table(rows: Table, columns: Sequence[Column]) -> list[str]:
    kept = [column for column in columns if any(there(row.get(column.key)) for row in rows)]
    lines = ["| " + " | ".join(markdown_cell(column.title) for column in kept) + " |", "|---" * len(kept) + "|"]
    for row in rows:
        cells = [column.show(value) if there(value := row.get(column.key)) else "–" for column in kept]
        lines.append("| " + " | ".join(map(markdown_cell, cells)) + " |")
    return lines


def markdown_cell(text: str) -> str:
    return escape(str(text), quote=False).replace("|", "\\|").replace("\n", " ")
