"""Concepts of a run on disk: one row a (latent, method), the name with its evidence.

    DIR/concepts.parquet   the columns of `Concept`
    DIR/concepts.json      the same rows, and what was said of the run
    DIR/review.csv         a row a latent for people to judge: names by method, evidence, top pictures, empty columns

Columns with None where nothing is known: cosine_ok and ratio_ok of methods whose score is no cosine, all of detection
where it was not measured, `true` and `truth` where pictures have no truth.
"""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np

from vitrail.files import read_json, replacing, write_json
from vitrail.tables import read_table, write_table

METHODS = ("decoder_text", "top_images", "effect", "captions", "labels")


@dataclass(frozen=True, kw_only=True)
class Concept:
    """`fires`: share of all pictures. `detection_*`: AUC on pictures that were not used to find the name, its 95 %
    interval, and mean and 95 % range of random names. `rival`: the other word that did best on the naming pictures.
    `class_f1`: of names from labels, on the pictures that try. `true`: whether the name says `truth`, the latent's best
    concept.
    """

    latent: int
    method: str
    name: str
    score: float
    runner_up: str
    runner_up_score: float
    cosine_ok: bool | None = None
    ratio_ok: bool | None = None
    unique_ok: bool = False
    valid: bool = False
    detection_auc: float | None = None
    detection_low: float | None = None
    detection_high: float | None = None
    detection_random: float | None = None
    detection_random_low: float | None = None
    detection_random_high: float | None = None
    rival: str | None = None
    rival_auc: float | None = None
    class_f1: float | None = None
    fires: float | None = None
    truth: str | None = None
    true: bool | None = None

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"there is no naming method {self.method!r}. Known: {', '.join(METHODS)}.")


_FLAGS = ("cosine_ok", "ratio_ok", "unique_ok", "valid", "true")
_TEXTS = ("method", "name", "runner_up", "rival", "truth")
_NEWER = ("rival", "rival_auc", "class_f1")  # tables of before have no such columns
TYPES = {
    field.name: "INTEGER"
    if field.name == "latent"
    else ("BOOLEAN" if field.name in _FLAGS else ("VARCHAR" if field.name in _TEXTS else "DOUBLE"))
    for field in fields(Concept)
}
FORMAT, VERSION = "vitrail-names", 1


def write_concepts(path: str | Path, rows: Sequence[Concept]) -> None:
    """The rows as Parquet, by latent, then in the order of METHODS. Raises ValueError for a (latent, method) twice."""
    rows = sorted(rows, key=lambda row: (row.latent, METHODS.index(row.method)))
    keys = [(row.latent, row.method) for row in rows]
    if len(set(keys)) < len(keys):
        twice = next(key for at, key in enumerate(keys) if key in keys[:at])
        raise ValueError(f"latent {twice[0]} has two names by {twice[1]}: a row a latent and method.")
    columns = {name: _column([getattr(row, name) for row in rows]) for name in TYPES}
    write_table(Path(path), columns, TYPES)


def read_concepts(path: str | Path) -> list[Concept]:
    """`path`: the Parquet file, or the folder it lies in."""
    path = Path(path)
    columns = read_table(path / "concepts.parquet" if path.is_dir() else path)
    missing = [name for name in TYPES if name not in columns and name not in _NEWER]
    if missing:
        raise ValueError(f"{path} is no table of concepts: it has no column {missing[0]}.")
    n, there = len(columns["latent"]), [name for name in TYPES if name in columns]
    return [Concept(**{name: _value(columns[name][at], TYPES[name]) for name in there}) for at in range(n)]


def coder_of_names(folder: str | Path) -> str | None:
    """The digest of the coder whose latents a folder of concepts names; None where it does not say."""
    path = Path(folder) / "concepts.json"
    about = read_json(path, "table of names").get("about", {}) if path.is_file() else {}
    return about.get("coder_digest")


def to_json(path: str | Path, rows: Sequence[Concept], about: Mapping[str, Any]) -> None:
    """`about`: what else there is to say, such as counts per rule; its NaNs are written as null."""
    write_json(
        Path(path),
        {
            "format": FORMAT,
            "version": VERSION,
            "about": _plain(dict(about)),
            "concepts": [_plain(asdict(row)) for row in rows],
        },
    )


def write_review(
    path: str | Path,
    rows: Sequence[Concept],
    examples: Mapping[int, Sequence[str]],
    captions: Mapping[int, Sequence[str]] | None = None,
) -> None:
    """A CSV for people: a row a latent, its names and evidence, `examples` of top pictures, what their `captions` say
    where there are any, and columns to fill in.

    SPEC rows 98 and 99 (MSAE appendix A: a human check of the top concepts; figure 8: captions beside pictures).
    """
    captions = captions or {}
    heard = ["top captions"] if any(captions.values()) else []
    methods = [method for method in METHODS if any(row.method == method for row in rows)]
    best = names_of(rows)
    out = io.StringIO()
    sheet = csv.writer(out, lineterminator="\n")
    given = [column for method in methods for column in (method, f"{method} detection AUC", f"{method} valid")]
    sheet.writerow(
        ["latent", "name", "fires", *given, "top pictures", *heard, "is the name right? (y/n)", "better name", "note"]
    )
    of_latent: dict[int, dict[str, Concept]] = {}
    for row in rows:
        of_latent.setdefault(row.latent, {})[row.method] = row
    for latent, by_method in sorted(of_latent.items()):
        evidence: list[str] = []
        for method in methods:
            row = by_method.get(method)
            auc = "" if row is None or row.detection_auc is None else f"{row.detection_auc:.3f}"
            evidence += ["", "", ""] if row is None else [row.name, auc, "yes" if row.valid else "no"]
        fires = next((row.fires for row in by_method.values() if row.fires is not None), None)
        share = "" if fires is None else f"{fires:.4f}"
        pictures = " ".join(examples.get(latent, ()))
        told = [" | ".join(captions.get(latent, ()))] if heard else []
        sheet.writerow([latent, best.get(latent, ""), share, *evidence, pictures, *told, "", "", ""])
    with replacing(Path(path)) as temporary:
        temporary.write_text(out.getvalue(), encoding="utf-8")


def names_of(rows: Sequence[Concept], method: str | None = None) -> dict[int, str]:
    """The best valid name of each latent that has one: the largest held-out AUC, of equals the earlier of METHODS."""
    return {latent: row.name for latent, row in best_of(rows, method).items()}


def best_of(rows: Sequence[Concept], method: str | None = None) -> dict[int, Concept]:
    """As `names_of`, with all that is known of the name."""
    found: dict[int, tuple[tuple[float, int], Concept]] = {}
    for row in rows:
        if not row.valid or method not in (None, row.method):
            continue
        rank = (-1.0 if row.detection_auc is None else row.detection_auc, -METHODS.index(row.method))
        if row.latent not in found or rank > found[row.latent][0]:
            found[row.latent] = (rank, row)
    return {latent: row for latent, (_, row) in sorted(found.items())}


def _column(values: list[Any]) -> Any:
    array = np.empty(len(values), dtype=object)
    array[:] = [None if isinstance(value, float) and not isfinite(value) else value for value in values]
    return array


def _value(value: Any, kind: str) -> Any:
    if value is None or (isinstance(value, float | np.floating) and not isfinite(value)):
        return None
    return {"INTEGER": int, "VARCHAR": str, "DOUBLE": float, "BOOLEAN": bool}[kind](value)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not isfinite(value) else value
