"""Pictures in groups (class x attribute), accuracy group by group, its intervals, and tests of before against after.

    worst-group accuracy    the least of the groups' accuracies, each its own share of right answers
    Wilson                  (p + z^2/2n +- z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n)
    McNemar, exact          two-sided binomial of the images that went wrong -> right and right -> wrong, p = 1/2

The worst group is chosen by its own number, so its Wilson interval is that of one group, not of a minimum; the
interval of a *change* of worst-group accuracy is a bootstrap of the images within their groups, the minimum taken anew
each time.

Layouts: worlds; Waterbirds (Sagawa et al. 2020, arXiv:1911.08731); CelebA (Liu et al. 2015); any CSV. Wilson 1927;
McNemar 1947. SPEC rows 124 and 144.
"""

import csv
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from vitrail.images import open_images
from vitrail.images.base import ImageSource
from vitrail.images.folder import read_bytes, size_of
from vitrail.images.listed import Entry, ListedImages

SPLITS = {"0": "train", "1": "val", "2": "test"}

# --------------------------------------------------------------------------------------------------------- statistics


def wilson(right: int, n: int, *, confidence: float = 0.95) -> tuple[float, float]:
    """The interval of a share, within 0..1; (0, 1) of none. Raises ValueError unless 0 <= right <= n."""
    if not 0 <= right <= n:
        raise ValueError(f"of {n} answers, 0 to {n} can be right, got {right}.")
    if n == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    p, spread = right / n, z * z / n
    centre, half = p + spread / 2, z * math.sqrt(p * (1 - p) / n + spread / (4 * n))
    low, high = (centre - half) / (1 + spread), (centre + half) / (1 + spread)
    return (0.0 if right == 0 else max(0.0, low)), (1.0 if right == n else min(1.0, high))


def mcnemar(gained: int, lost: int) -> float:
    """Exact two-sided p of `gained` images that went wrong -> right against `lost` that went the other way; 1 where
    none changed."""
    if gained < 0 or lost < 0:
        raise ValueError(f"counts are not negative, got {gained} and {lost}.")
    n, fewer = gained + lost, min(gained, lost)
    term, total = 1, 1  # in whole numbers: exact for thousands of images
    for i in range(1, fewer + 1):
        term = term * (n - i + 1) // i
        total += term
    return min(1.0, 2 * total / 2**n)


@dataclass(frozen=True)
class Share:
    right: int
    n: int

    @property
    def value(self) -> float:
        return self.right / self.n if self.n else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        return wilson(self.right, self.n)


@dataclass(frozen=True)
class GroupAccuracy:
    """`groups`: those that have images. `worst`: the name of the worst of them, the first of equals."""

    overall: Share
    groups: dict[str, Share]

    @property
    def worst(self) -> str:
        return min(self.groups, key=lambda name: self.groups[name].value)

    @property
    def worst_share(self) -> Share:
        return self.groups[self.worst]

    def to_json(self) -> dict[str, Any]:
        def told(share: Share) -> dict[str, Any]:
            low, high = share.interval
            return {"accuracy": share.value, "low": low, "high": high, "right": share.right, "n": share.n}

        groups = {name: told(share) for name, share in self.groups.items()}
        return {"overall": told(self.overall), "worst": {"group": self.worst, **told(self.worst_share)}, **groups}


def group_accuracy(
    right: Bool[np.ndarray, " n"], group: Int[np.ndarray, " n_group"], names: Sequence[str]
) -> GroupAccuracy:
    """`group`: each image's place in `names`. Raises ValueError where they do not match, or there are no images."""
    if len(right) != len(group) or len(right) == 0:
        raise ValueError(f"{len(right)} answers and {len(group)} groups: one each, and at least one, is needed.")
    if group.min() < 0 or group.max() >= len(names):
        raise ValueError(f"groups are 0..{len(names) - 1}, got {group.min()}..{group.max()}.")
    n = np.bincount(group, minlength=len(names))
    k = np.bincount(group, weights=right, minlength=len(names)).astype(int)
    shares = {name: Share(int(k[i]), int(n[i])) for i, name in enumerate(names) if n[i]}
    return GroupAccuracy(Share(int(right.sum()), len(right)), shares)


@dataclass(frozen=True)
class Change:
    """After less before, of the same images. `p`: McNemar's, exact."""

    n: int
    gained: int
    lost: int

    @property
    def value(self) -> float:
        return (self.gained - self.lost) / self.n

    @property
    def p(self) -> float:
        return mcnemar(self.gained, self.lost)

    def to_json(self) -> dict[str, Any]:
        return {"change": self.value, "gained": self.gained, "lost": self.lost, "n": self.n, "p": self.p}


@dataclass(frozen=True)
class GroupChange:
    """`worst`: worst-group accuracy after less worst-group accuracy before, whichever groups those are, with a 95 %
    bootstrap interval. `in_worst`: the change within the group that was the worst before, with its test."""

    overall: Change
    groups: dict[str, Change]
    worst: float
    worst_low: float
    worst_high: float
    in_worst: Change

    def to_json(self) -> dict[str, Any]:
        worst = {"change": self.worst, "low": self.worst_low, "high": self.worst_high}
        groups = {name: one.to_json() for name, one in self.groups.items()}
        return {"overall": self.overall.to_json(), "worst": worst, "in_worst": self.in_worst.to_json(), **groups}


def group_change(
    before: Bool[np.ndarray, " n"],
    after: Bool[np.ndarray, " n"],
    group: Int[np.ndarray, " n"],
    names: Sequence[str],
    *,
    n_bootstrap: int = 4000,
    seed: int = 0,
) -> GroupChange:
    """Of right answers to the same images. Raises ValueError as `group_accuracy`."""
    was, now = group_accuracy(before, group, names), group_accuracy(after, group, names)
    gained, lost = ~before & after, before & ~after
    groups, kinds = {}, []
    for i, name in enumerate(names):
        own = group == i
        if own.any():
            groups[name] = Change(int(own.sum()), int((gained & own).sum()), int((lost & own).sum()))
            kinds.append(np.bincount(2 * before[own] + after[own], minlength=4))
    rng = np.random.default_rng(seed)
    drawn = np.stack([rng.multinomial(counts.sum(), counts / counts.sum(), n_bootstrap) for counts in kinds])
    n = drawn.sum(2)  # (groups, n_bootstrap)
    worst = ((drawn[..., 1] + drawn[..., 3]) / n).min(0) - ((drawn[..., 2] + drawn[..., 3]) / n).min(0)
    low, high = np.percentile(worst, [2.5, 97.5])
    change = now.worst_share.value - was.worst_share.value
    overall = Change(len(before), int(gained.sum()), int(lost.sum()))
    return GroupChange(overall, groups, change, float(low), float(high), groups[was.worst])


# ------------------------------------------------------------------------------------------------- pictures in groups


@dataclass(frozen=True, eq=False)
class GroupedImages:
    """Pictures with a class, which a classifier should tell, and an attribute, which it should not lean on."""

    images: ImageSource
    labels: Int[np.ndarray, " n"]
    attribute: Int[np.ndarray, " n"]
    classes: tuple[str, ...]
    attributes: tuple[str, ...]

    def __post_init__(self) -> None:
        for what, numbers, names in (
            ("classes", self.labels, self.classes),
            ("attributes", self.attribute, self.attributes),
        ):
            if len(numbers) != len(self.images):
                raise ValueError(f"{len(self.images)} images have {len(numbers)} {what}: one each is needed.")
            if len(names) < 2 or len(set(numbers.tolist())) < 2:
                shown = ", ".join(names[int(i)] for i in sorted(set(numbers.tolist())))
                raise ValueError(f"groups need at least two {what}; these images have {shown or 'none'}.")

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def group(self) -> Int[np.ndarray, " n"]:
        return self.labels * len(self.attributes) + self.attribute

    @property
    def groups(self) -> tuple[str, ...]:
        return tuple(f"{one}, {other}" for one in self.classes for other in self.attributes)

    def counts(self) -> dict[str, int]:
        n = np.bincount(self.group, minlength=len(self.groups))
        return {name: int(count) for name, count in zip(self.groups, n, strict=True)}

    def write_table(self, path: Path) -> None:
        """The same pictures as a CSV that every verb opens: path, label, class_name, attribute, group, split. Raises
        ValueError for pictures that are not files."""
        records = [self.images.record(i) for i in range(len(self))]
        if not all(Path(record.uri).is_file() for record in records):
            raise ValueError(
                f"the pictures of {self.images.spec} are no files here: a table of paths cannot name them."
            )
        with path.open("w", newline="", encoding="utf-8") as stream:
            table = csv.writer(stream, lineterminator="\n")
            table.writerow(["path", "id", "label", "class_name", "attribute", "group", "split"])
            for i, record in enumerate(records):
                label, attribute = int(self.labels[i]), self.attributes[self.attribute[i]]
                row = [record.uri, record.id, label, self.classes[label], attribute, self.groups[self.group[i]]]
                table.writerow([*row, record.split or ""])


def open_groups(spec: str, *, layout: str = "auto", split: str | None = None, **options: Any) -> GroupedImages:
    """`layout`: one of LAYOUTS, or "auto" by what is there. `options` are the layout's.

    Raises ValueError or FileNotFoundError that says what is missing.
    """
    if layout != "auto" and layout not in LAYOUTS:
        raise ValueError(f"layout must be auto, {', '.join(LAYOUTS)}, got {layout!r}.")
    for name, (fits, opened) in LAYOUTS.items():
        if layout == name or (layout == "auto" and fits(spec)):
            try:
                return opened(spec, split=split, **options)
            except TypeError as error:
                if "unexpected keyword" not in str(error):
                    raise
                raise ValueError(f"the layout {name} does not take these options: {error}.") from error
    if not Path(spec).exists():
        raise FileNotFoundError(f"{spec} is missing. Groups come from a world, a folder or a CSV file.")
    raise ValueError(
        f"{spec} is in no layout known here: a world, a folder with metadata.csv (Waterbirds) or list_attr_celeba.txt "
        "(CelebA), or a CSV file with columns of a class and an attribute."
    )


def world_groups(
    spec: str, *, split: str | None = None, label: str = "home", attribute: str = "ground"
) -> GroupedImages:
    """`label` and `attribute`: factors of a world of shapes (home, ground, background, colour, shape, texture...)."""
    images: Any = open_images(spec, split=split)
    if not callable(getattr(images, "factors", None)):
        raise ValueError(f"{spec} does not know what made each picture: groups need a world of shapes, or a table.")
    factors = [images.factors(i) for i in range(len(images))]
    for name in (label, attribute):
        if not isinstance(getattr(factors[0], name, None), str):
            known = "home, ground, background, shape, colour, texture, size"
            raise ValueError(f"{spec} has no factor {name!r}. Try {known}.")
    labels, classes = _numbered([str(getattr(one, label)) for one in factors])
    found, attributes = _numbered([str(getattr(one, attribute)) for one in factors])
    return GroupedImages(images, labels, found, classes, attributes)


def waterbirds_groups(spec: str, *, split: str | None = None) -> GroupedImages:
    """A folder with metadata.csv: img_filename, y, split (0, 1, 2), place, as group_DRO makes it."""
    root = Path(spec)
    rows = _rows_of(root / "metadata.csv", ("img_filename", "y", "split", "place"))
    entries = [_file(root, row["img_filename"], row["y"], row["place"], _split_of(row["split"], root)) for row in rows]
    return _of_files(spec, entries, split, ("landbird", "waterbird"), ("land", "water"))


def celeba_groups(
    spec: str, *, split: str | None = None, label: str = "Male", attribute: str = "Blond_Hair"
) -> GroupedImages:
    """A folder with list_attr_celeba.txt (or .csv), list_eval_partition.txt (or .csv) and img_align_celeba/."""
    root = Path(spec)
    rows = _celeba_rows(root)
    for name in (label, attribute):
        if name not in rows[0]:
            known = [one for one in rows[0] if one != "image_id"]
            raise ValueError(f"{spec} has no attribute {name!r}. It has {', '.join(known[:8])}...")
    parts = _celeba_parts(root)
    if split is not None and not parts:
        raise ValueError(f"{root} has no list_eval_partition.txt or .csv: which pictures are {split!r} is not said.")
    folders = [root / "img_align_celeba" / "img_align_celeba", root / "img_align_celeba", root]
    pictures = next((one for one in folders if (one / rows[0]["image_id"]).is_file()), folders[1])
    entries = []
    for row in rows:
        said = {}
        for name in (label, attribute):
            if row[name] not in ("1", "-1", "0"):
                raise ValueError(f"{spec}, {row['image_id']}: {name} must be 1 or -1, got {row[name]!r}.")
            said[name] = "1" if row[name] == "1" else "0"
        part = _split_of(parts[row["image_id"]], root) if row["image_id"] in parts else None
        entries.append(_file(pictures, row["image_id"], said[label], said[attribute], part))
    return _of_files(spec, entries, split, (f"not {label}", label), (f"not {attribute}", attribute))


def table_groups(
    spec: str, *, split: str | None = None, label_column: str = "label", group_columns: Sequence[str] = ("group",)
) -> GroupedImages:
    """Any CSV with a column path (or file, filename, image_id, img_filename) and these. Several group columns make one
    attribute of all their values together."""
    path = Path(spec)
    if not group_columns:
        raise ValueError("name at least one column of groups.")
    rows = _rows_of(path, (label_column, *group_columns))
    known = ("path", "file", "filename", "img_filename", "image_id")
    column = next((name for name in known if name in rows[0]), None)
    if column is None:
        raise ValueError(f"{path} has no column of pictures ({', '.join(known)}). Found: {', '.join(rows[0])}.")
    joined = [" and ".join(row[name] for name in group_columns) for row in rows]
    for line, (row, value) in enumerate(zip(rows, joined, strict=True), 2):
        if not row[label_column] or not value.replace(" and ", ""):
            raise ValueError(f"{path}, line {line}: {label_column} or {', '.join(group_columns)} is empty.")
    labels, classes = _numbered([row[label_column] for row in rows])
    found, attributes = _numbered(joined)
    entries = [
        _file(path.parent, row[column], str(labels[i]), str(found[i]), row.get("split") or None)
        for i, row in enumerate(rows)
    ]
    return _of_files(spec, entries, split, classes, attributes)


# layout -> (is it this?, open it); the first that fits opens it.
LAYOUTS: Mapping[str, tuple[Callable[[str], bool], Callable[..., GroupedImages]]] = {
    "world": (lambda spec: spec.startswith("world:"), world_groups),
    "waterbirds": (lambda spec: (Path(spec) / "metadata.csv").is_file(), waterbirds_groups),
    "celeba": (lambda spec: any((Path(spec) / name).is_file() for name in _CELEBA), celeba_groups),
    "table": (lambda spec: spec.lower().endswith(".csv"), table_groups),
}

# ------------------------------------------------------------------------------------------------------------ details

_CELEBA = ("list_attr_celeba.txt", "list_attr_celeba.csv")


class GroupedFiles(ListedImages):
    """Pictures in files; an entry's place is (path, number of the attribute)."""

    def _read(self, entry: Entry) -> bytes:
        return read_bytes(Path(_placed(entry)[0]))

    def _size(self, entry: Entry) -> int:
        return size_of(Path(_placed(entry)[0]))

    def attribute(self, i: int) -> int:
        return _placed(self._entries[self._check(i)])[1]


def _placed(entry: Entry) -> tuple[str, int]:
    place: Any = entry.place
    return place


def _file(root: Path, name: str, label: str, attribute: str, split: str | None) -> Entry:
    for number in (label, attribute):
        if not number.isdecimal():
            raise ValueError(f"{root}, {name}: classes and attributes are numbers here, got {number!r}.")
    path = str(root / name)
    return Entry(id=name, uri=path, place=(path, int(attribute)), label=int(label), split=split)


def _of_files(
    spec: str, entries: Sequence[Entry], split: str | None, classes: tuple[str, ...], attributes: tuple[str, ...]
) -> GroupedImages:
    for what, names, numbers in (
        ("class", classes, {int(entry.label or 0) for entry in entries}),
        ("attribute", attributes, {_placed(entry)[1] for entry in entries}),
    ):
        if beyond := sorted(number for number in numbers if not 0 <= number < len(names)):
            raise ValueError(f"{spec} has {what} {beyond[0]}; known are 0 ({names[0]}) to {len(names) - 1}.")
    images = GroupedFiles(spec, entries, split)
    labels = np.array([images.record(i).label for i in range(len(images))], dtype=np.int64)
    attribute = np.array([images.attribute(i) for i in range(len(images))], dtype=np.int64)
    return GroupedImages(images, labels, attribute, classes, attributes)


def _numbered(values: Sequence[str]) -> tuple[Int[np.ndarray, " n"], tuple[str, ...]]:
    names = tuple(sorted(set(values), key=lambda one: (float(one) if _is_number(one) else math.inf, one)))
    place = {name: i for i, name in enumerate(names)}
    return np.array([place[value] for value in values], dtype=np.int64), names


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _rows_of(path: Path, needed: Sequence[str]) -> list[dict[str, str]]:
    """Raises FileNotFoundError or ValueError for what is not there."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: which picture is in which group is not known without it.")
    try:
        with path.open(newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream)
            header = list(reader.fieldnames or [])
            if missing := [name for name in needed if name not in header]:
                raise ValueError(f"{path} has no column {missing[0]!r}. Found: {', '.join(header) or 'nothing'}.")
            rows = [{name: (value or "").strip() for name, value in row.items() if name is not None} for row in reader]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} is not a readable CSV file in UTF-8: {error}.") from error
    if not rows:
        raise ValueError(f"{path} names no pictures.")
    return rows


def _split_of(number: str, root: Path) -> str:
    if number not in SPLITS:
        raise ValueError(f"{root}: a split is 0 (train), 1 (val) or 2 (test), got {number!r}.")
    return SPLITS[number]


def _celeba_rows(root: Path) -> list[dict[str, str]]:
    text, table = (root / name for name in _CELEBA)
    if not text.is_file():
        return _rows_of(table if table.is_file() else text, ("image_id",))
    lines = text.read_text(encoding="utf-8").splitlines()
    if len(lines) < 3 or not lines[0].strip().isdecimal():
        raise ValueError(f"{text} must begin with the number of pictures, then the names of the attributes.")
    names, rows = lines[1].split(), []
    for number, line in enumerate(lines[2:], 3):
        cells = line.split()
        if cells and len(cells) != len(names) + 1:
            raise ValueError(f"{text}, line {number}: {len(names) + 1} columns are needed, got {len(cells)}.")
        if cells:
            rows.append(dict(zip(["image_id", *names], cells, strict=True)))
    if len(rows) != int(lines[0]):
        raise ValueError(f"{text} announces {int(lines[0])} pictures and names {len(rows)}: it was cut short.")
    return rows


def _celeba_parts(root: Path) -> dict[str, str]:
    text, table = root / "list_eval_partition.txt", root / "list_eval_partition.csv"
    if text.is_file():
        cells = [line.split() for line in text.read_text(encoding="utf-8").splitlines() if line.strip()]
        if wrong := [i for i, row in enumerate(cells, 1) if len(row) != 2]:
            raise ValueError(f"{text}, line {wrong[0]}: a picture and its split are needed.")
        return {row[0]: row[1] for row in cells}
    if table.is_file():
        return {row["image_id"]: row["partition"] for row in _rows_of(table, ("image_id", "partition"))}
    return {}
