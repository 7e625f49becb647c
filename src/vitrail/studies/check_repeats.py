"""Numbers of a table that are another row's: copied by mistake, or put together from two coders.

    repeats    three neighbouring columns or more agree in two rows of different coders, or of one coder in two tables,
               by more than chance: sum over them of -log10(chance) >= 7
    differ     two tables print the same rows (half of their common labels agree so), but not the same numbers
    mixed      an (overall, worst) pair whose halves stand at that layer of a fuller table, but never together

The chance that two rows print the same value is the largest of 10^-digits, one over the number of printable values in
the column's range, and how common the value is in the column.
"""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, combinations, product

from vitrail.studies.check_table import Finding, Interval, Sheet

BEYOND_CHANCE = 7.0  # one chance in ten million for each pair of rows
COLUMNS = 3  # fewer that agree are coincidence more often than error: accuracies have few values
OVERLAP = 1 / 4  # of the common labels with all numbers equal: the tables are meant to print the same


@dataclass(frozen=True, eq=False)
class _Line:
    sheet: Sheet
    number: int
    cells: Mapping[str, str]

    @property
    def label(self) -> str:
        return self.sheet.label(self.cells)

    def place(self, seen_from: "_Line") -> str:
        named = f"row {self.number} ({self.label})"
        return named if self.sheet is seen_from.sheet else f"{named} of {self.sheet.name}"

    def finding(self, columns: Sequence[str], why: str) -> Finding:
        value = ", ".join(f"{column} = {self.cells[column]}" for column in columns)
        return Finding(self.sheet.name, self.number, self.label, value, why)


Pairs = list[tuple[_Line, _Line]]


def check_repeats(sheets: Sequence[Sheet]) -> list[Finding]:
    lines = {
        sheet.name: [_Line(sheet, number, cells) for number, cells in enumerate(sheet.rows, 1)] for sheet in sheets
    }
    surprise = _Surprise(sheets)
    twins, overlapping = _twins(sheets, surprise)
    found: list[Finding] = [one for sheet in sheets for one in _within_rows(lines[sheet.name], surprise)]
    told: set[tuple[tuple[str, str], ...]] = set()
    within = [pair for own in lines.values() for pair in combinations(own, 2)]
    across = (
        pair for a, b in combinations(sheets, 2) if _comparable(a, b) for pair in product(lines[a.name], lines[b.name])
    )
    for one, other in chain(within, across):
        tables = frozenset((one.sheet.name, other.sheet.name))
        if (tables in twins or tables in overlapping) and _same_label(one, other):
            continue
        for columns in _runs(one, other):
            values = tuple((column, one.cells[column]) for column in columns)
            if len(columns) < COLUMNS or values in told:
                continue
            if sum(surprise.of(column, one, other) for column in columns) >= BEYOND_CHANCE:
                told.add(values)
                found.append(other.finding(columns, f"the same as in {one.place(other)}"))
    found += [finding for pairs in twins.values() for finding in _differences(pairs)]
    return found + list(_mixed([line for own in lines.values() for line in own]))


def _comparable(one: Sheet, other: Sheet) -> bool:
    return len(set(one.number_columns) & set(other.number_columns)) >= COLUMNS


def _same_label(one: _Line, other: _Line) -> bool:
    """In the columns that both tables have."""
    named = [column for column in one.sheet.label_columns if column in other.sheet.label_columns]
    return bool(named) and all(one.cells[column] == other.cells[column] for column in named)


class _Surprise:
    """How unlikely it is that two rows print the same value, in powers of ten."""

    def __init__(self, sheets: Sequence[Sheet]) -> None:
        self._counts: dict[str, Counter[str]] = defaultdict(Counter)
        self._printable: dict[tuple[str, str], float] = {}
        for column in {column for sheet in sheets for column in sheet.number_columns}:
            having = [sheet for sheet in sheets if column in sheet.number_columns]
            # A coder that two tables print counts once.
            named = {(sheet.label(row), row[column]) for sheet in having for row in sheet.rows if row[column]}
            self._counts[column].update(text for _, text in named)
            for sheet in having:
                values = [value for row in sheet.rows if (value := Interval.of(row[column]))]
                step = min((value.high - value.low for value in values), default=0.0)
                middles = [value.middle for value in values] or [0.0]
                self._printable[sheet.name, column] = (max(middles) - min(middles)) / step + 1 if step else 1.0

    def of(self, column: str, one: _Line, other: _Line) -> float:
        text = one.cells[column]
        digits = len(re.sub(r"[eE].*$|\D", "", text).lstrip("0"))
        counts = self._counts[column]
        others, total = counts[text] - 2, counts.total() - 2
        common = others / total if others > 0 else 0.0
        printable = min(self._printable[line.sheet.name, column] for line in (one, other))
        return max(0.0, -math.log10(max(10.0**-digits, 1 / printable, common)))


def _runs(one: _Line, other: _Line) -> Iterator[list[str]]:
    """Neighbouring number columns of both in which both print the same."""
    run: list[str] = []
    for column in one.sheet.number_columns:
        if column not in other.cells:
            continue
        if one.cells[column] and one.cells[column] == other.cells[column]:
            run.append(column)
            continue
        if run:
            yield run
        run = []
    if run:
        yield run


def _twins(sheets: Sequence[Sheet], surprise: _Surprise) -> tuple[dict[frozenset[str], Pairs], set[frozenset[str]]]:
    """Pairs of tables that print the same rows: for each common label the two rows that agree best. And those of which
    at least some rows are equal throughout."""
    twins, overlapping = {}, set()
    for one, other in combinations(sheets, 2):
        if not _comparable(one, other):
            continue
        best: dict[str, tuple[float, _Line, _Line]] = {}
        n_equal = 0
        for a_number, a in enumerate(one.rows, 1):
            for b_number, b in enumerate(other.rows, 1):
                pair = (_Line(one, a_number, a), _Line(other, b_number, b))
                if _same_label(*pair):
                    key = min(pair[0].label, pair[1].label, key=len)
                    score = sum(surprise.of(column, *pair) for run in _runs(*pair) for column in run)
                    n_equal += all(a[column] == b.get(column) for column in one.number_columns)
                    if key not in best or score > best[key][0]:
                        best[key] = (score, *pair)
        agreeing = [(a, b) for score, a, b in best.values() if score >= BEYOND_CHANCE]
        names = frozenset((one.name, other.name))
        if best and len(agreeing) >= len(best) / 2:
            twins[names] = agreeing
        if best and n_equal >= OVERLAP * len(best):
            overlapping.add(names)
    return twins, overlapping


def _differences(pairs: Pairs) -> Iterator[Finding]:
    for one, other in pairs:
        columns = [
            column
            for column in one.sheet.number_columns
            if one.cells[column] and other.cells.get(column) and one.cells[column] != other.cells[column]
        ]
        apart = [column for column in columns if not _may_be_equal(one.cells[column], other.cells[column])]
        if apart:
            theirs = ", ".join(other.cells[column] for column in apart)
            yield one.finding(apart, f"{other.place(one)} prints {theirs}")


def _may_be_equal(one: str, other: str) -> bool:
    a, b = Interval.of(one), Interval.of(other)
    return a is not None and b is not None and a.meets(b.low, b.high) and len(one) != len(other)


def _within_rows(lines: Sequence[_Line], surprise: _Surprise) -> Iterator[Finding]:
    """Two groups of columns of one row, as text_FVU, text_CS and image_FVU, image_CS."""
    for line in lines:
        for one, other in _column_groups(tuple(line.sheet.number_columns)):
            same = [(a, b) for a, b in zip(one, other, strict=True) if line.cells[a] and line.cells[a] == line.cells[b]]
            score = sum(surprise.of(a, line, line) for a, _ in same)
            if score >= BEYOND_CHANCE and len(same) == len(one):
                yield line.finding([a for a, _ in same], f"the same as in {', '.join(b for _, b in same)}")


def _column_groups(columns: tuple[str, ...]) -> list[tuple[list[str], list[str]]]:
    """Groups of three columns or more whose names differ in their beginning only."""
    groups: dict[str, dict[str, str]] = defaultdict(dict)
    for column in columns:
        for match in re.finditer("_", column):
            groups[column[: match.start()]][column[match.end() :]] = column
    return [
        (list(a.values()), [b[ending] for ending in a])
        for a, b in combinations(groups.values(), 2)
        if len(a) >= 3 and a.keys() == b.keys() and not set(a.values()) & set(b.values())
    ]


def _mixed(lines: Sequence[_Line]) -> Iterator[Finding]:
    by_layer: dict[tuple[str, int], list[tuple[_Line, str, tuple[str, str]]]] = defaultdict(list)
    for line in lines:
        layer = re.search(r"\d+", line.cells.get("layer", ""))
        for column in line.sheet.header:
            worst = column.removesuffix("_overall") + "_worst"
            if layer and column.endswith("_overall") and line.cells[column] and line.cells.get(worst):
                pair = (line.cells[column], line.cells[worst])
                by_layer[line.sheet.name, int(layer.group())].append((line, column, pair))
    for (name, layer), pairs in by_layer.items():
        for line, column, pair in pairs:
            others = {
                other: [found for *_, found in theirs]
                for (other, at), theirs in by_layer.items()
                if at == layer and other != name and len(theirs) > len(pairs)
            }
            if any(pair in theirs for theirs in others.values()):
                continue
            for other, theirs in others.items():
                if all(pair[i] in [found[i] for found in theirs] for i in (0, 1)):
                    told = f"{other} has {pair[0]} and {pair[1]} at layer {layer}, but of two different coders"
                    yield line.finding([column, column.removesuffix("_overall") + "_worst"], told)
                    break
