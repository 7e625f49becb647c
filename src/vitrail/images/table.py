"""Pictures named by a CSV file with a header: path[, id, label, class_name, caption, split]."""

import csv
from pathlib import Path

from vitrail.images.folder import read_bytes, size_of
from vitrail.images.listed import Entry, ListedImages

_ALIASES = {"file": "path", "filename": "path", "name": "class_name", "class": "class_name"}
_KNOWN = ("path", "id", "label", "class_name", "caption", "split")


class TableImages(ListedImages):
    """Pictures in the order of the rows. Paths are relative to the CSV; an id is the path as written, unless given.

    A label may be a number or a text; texts are numbered in sorted order. Empty cells are absent; other columns are
    passed over.
    """

    def __init__(self, path: str | Path, *, split: str | None = None) -> None:
        table = Path(path)
        if not table.is_file():
            raise FileNotFoundError(f"{table} is missing: there is no table of pictures here.")
        super().__init__(str(table), _entries(table), split)

    def _read(self, entry: Entry) -> bytes:
        return read_bytes(Path(str(entry.place)))

    def _size(self, entry: Entry) -> int:
        return size_of(Path(str(entry.place)))


def _entries(table: Path) -> list[Entry]:
    try:
        with table.open(newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream)
            columns = _columns(table, list(reader.fieldnames or []))
            # line_num while iterating: the line a row ends on, which is what an editor shows.
            return [_entry(table, row, columns, reader.line_num) for row in reader]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{table} is not a readable CSV file in UTF-8: {error}.") from error


def _columns(table: Path, header: list[str]) -> dict[str, str]:
    """What we call a column -> what the file calls it. A column's own name goes before its aliases."""
    columns = {name: name for name in header if name in _KNOWN}
    for alias, name in _ALIASES.items():
        if alias in header:
            columns.setdefault(name, alias)
    if "path" not in columns:
        raise ValueError(
            f"{table} has no column 'path' (or 'file'). Found: {', '.join(header) or 'nothing'}. "
            f"Needed: path; known besides: {', '.join(_KNOWN[1:])}."
        )
    return columns


def _entry(table: Path, row: dict[str, str], columns: dict[str, str], line: int) -> Entry:
    cells = {name: (row[column] or "").strip() or None for name, column in columns.items()}
    path = cells.pop("path")
    if path is None:
        raise ValueError(f"{table}, line {line}: the path is empty.")
    place = str(table.parent / path)  # an absolute path stays what it is
    return Entry(id=cells.pop("id", None) or path, uri=place, place=place, **cells)
