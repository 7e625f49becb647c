"""Pictures with a table of what made them: "factors:PATH?label=shape".

    PATH.npz              as dSprites: `imgs` (n, h, w) uint8 or bool, `latents_classes` (n, f) whole numbers from 0,
                          optionally `latents_values` (n, f)
    PATH/scenes.json      as CLEVR: also CLEVR_*_scenes.json, here or in scenes/; pictures in images/ or images/SPLIT/
    PATH/factors.csv      a column `file` (or `path`) and a column for each factor; `id`, `caption`, `split` are known

Concepts are "factor:value". `label` names the factor that becomes the class; without it pictures have no labels.
dSprites knows its masks (the sprite's pixels), the others do not. Files are read as data: pickled entries are passed
over. Names of a .npz's factors come from PATH.json ({"names": [...], "values": {"shape": ["square", ...]}}, values in
the order of the classes), else from a `metadata` entry that is JSON text, else, for six factors, from dSprites' order.

Matthey et al. 2017, github.com/google-deepmind/dsprites-dataset; Johnson et al. 2017, arXiv:1612.06890.
"""

import csv
import json
import math
import os
import re
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
from jaxtyping import Bool
from PIL import Image

from vitrail.files import json_digest, read_json
from vitrail.images import npz
from vitrail.images.base import ImageRecord, ImageSource
from vitrail.images.folder import read_bytes, size_of
from vitrail.images.listed import Entry, ListedImages
from vitrail.images.worlds.base import Scene

PREFIX = "factors:"
DSPRITES = ("color", "shape", "scale", "orientation", "posX", "posY")
_DSPRITES_VALUES = {"color": ["white"], "shape": ["square", "ellipse", "heart"]}
_CLEVR = ("size", "color", "material", "shape")  # in the order in which a caption says them

Values = Mapping[str, tuple[str, ...]]  # factor -> its values in one picture: one, or several where things are several


class FactorImages(ImageSource):
    """Pictures of which the factors are known. `concepts` are all "factor:value" that occur, over all splits."""

    factors: tuple[str, ...]
    concepts: tuple[str, ...]
    has_masks: bool = False

    @abstractmethod
    def values(self, i: int) -> Values:
        """Factor -> its values in picture i; a factor that does not apply is left out."""

    def attributes(self, i: int) -> dict[str, str]:
        return {factor: " and ".join(values) for factor, values in self.values(i).items()}

    def present(self, i: int) -> tuple[str, ...]:
        """The concepts of picture i."""
        return tuple(f"{factor}:{value}" for factor, values in self.values(i).items() for value in values)

    def scene(self, i: int) -> Scene:
        """As of a world (label -1: none). Raises ValueError where masks are not known: `present` needs none."""
        if not self.has_masks:
            raise ValueError(
                f"{self.spec} does not say where things are; present(i) says which concepts picture i has."
            )
        record = self.record(i)
        label = -1 if record.label is None else record.label
        return Scene(np.array(self.load(i)), label, record.caption or "", self.attributes(i), self.masks(i))

    def masks(self, i: int) -> dict[str, Bool[np.ndarray, "h w"]]:
        """The pixels of each concept that is present; empty where the data do not say."""
        self._check(i)
        return {}


def open_factors(spec: str, *, split: str | None = None) -> FactorImages:
    """ "factors:PATH?label=FACTOR"; `split` keeps the pictures of one split, where the table knows of splits."""
    place, _, query = spec.removeprefix(PREFIX).partition("?")
    label = None
    for part in filter(None, query.split("&")):
        option, equals, value = part.partition("=")
        if option != "label" or not equals:
            raise ValueError(f"factors have no option {part!r}. Known: label, as label=FACTOR.")
        label = value
    path = Path(place)
    if path.suffix.lower() == ".npz":
        return NpzFactors(path, label=label, split=split)
    if path.suffix.lower() == ".csv":
        return TableFactors(path, label=label, split=split)
    if (path / "factors.csv").is_file():
        return TableFactors(path / "factors.csv", label=label, split=split)
    if path.is_dir():
        return ClevrFactors(path, label=label, split=split)
    raise FileNotFoundError(
        f"{path} is missing. Factors come from a .npz, or a folder with factors.csv or scenes.json."
    )


# -- folders


class _ListedFactors(ListedImages, FactorImages):
    """`tables`: the factors of each entry, whose `place` is (path of the picture, factors)."""

    def __init__(
        self, root: Path, entries: Sequence[Entry], tables: Sequence[Values], *, label: str | None, split: str | None
    ) -> None:
        self._root, self._label = root, label
        self.factors = tuple(dict.fromkeys(factor for table in tables for factor in table))
        known = {factor: _ordered({v for table in tables for v in table.get(factor, ())}) for factor in self.factors}
        self.concepts = tuple(f"{factor}:{value}" for factor, values in known.items() for value in values)
        classes = [] if label is None else known[_known_factor(label, self.factors, str(root))]
        numbers = {value: number for number, value in enumerate(classes)}
        kept = []
        for entry, table in zip(entries, tables, strict=True):
            found = () if label is None else table.get(label, ())
            if len(found) > 1:
                single = [factor for factor in self.factors if all(len(t.get(factor, ())) <= 1 for t in tables)]
                raise ValueError(
                    f"{root}: {entry.id} has {label} {' and '.join(found)}; a label needs one value a picture. "
                    f"Of that kind: {', '.join(single) or 'none'}."
                )
            number, name = (numbers[found[0]], found[0]) if found else (None, None)
            place, caption = (entry.place, table), entry.caption or _caption(table)
            kept.append(Entry(entry.id, entry.uri, place, number, name, caption, entry.split))
        super().__init__(str(root), kept, split)

    @property
    def spec(self) -> str:
        return _spec(self._root, self._label, self.split)

    def values(self, i: int) -> Values:
        return dict(self._parts(self._entries[self._check(i)])[1])

    def _read(self, entry: Entry) -> bytes:
        return read_bytes(self._parts(entry)[0])

    def _size(self, entry: Entry) -> int:
        return size_of(self._parts(entry)[0])

    @staticmethod
    def _parts(entry: Entry) -> tuple[Path, Values]:
        place: Any = entry.place
        return Path(place[0]), place[1]


class TableFactors(_ListedFactors):
    """A CSV in UTF-8 with a header. Paths are relative to it; an empty cell is a factor that does not apply."""

    def __init__(self, path: str | Path, *, label: str | None = None, split: str | None = None) -> None:
        table = Path(path)
        if not table.is_file():
            raise FileNotFoundError(f"{table} is missing: there is no table of factors here.")
        entries, tables = [], []
        try:
            with table.open(newline="", encoding="utf-8-sig") as stream:
                reader = csv.DictReader(stream)
                file, factors = _header(table, list(reader.fieldnames or []))
                for row in reader:
                    cells = {name: (row[name] or "").strip() for name in row if isinstance(row[name], str)}
                    named = cells.get(file)
                    if not named:
                        raise ValueError(f"{table}, line {reader.line_num}: the {file} is empty.")
                    place = str(table.parent / named)
                    caption, of_split = (cells.get(name) or None for name in ("caption", "split"))
                    entries.append(Entry(cells.get("id") or named, place, place, None, None, caption, of_split))
                    tables.append({factor: (cells[factor],) for factor in factors if cells.get(factor)})
        except (UnicodeDecodeError, csv.Error) as error:
            raise ValueError(f"{table} is not a readable CSV file in UTF-8: {error}.") from error
        super().__init__(table, entries, tables, label=label, split=split)


def _header(table: Path, header: list[str]) -> tuple[str, list[str]]:
    file = next((name for name in ("file", "path", "filename") if name in header), None)
    factors = [name for name in header if name and name not in ("file", "path", "filename", "id", "caption", "split")]
    if file is None or not factors:
        raise ValueError(
            f"{table} needs a column 'file' (or 'path') and at least one factor. "
            f"Found: {', '.join(header) or 'nothing'}."
        )
    return file, factors


class ClevrFactors(_ListedFactors):
    """Scenes of several things. Factors: size, color, material and shape (of any thing), count.

    `objects(i)` has each thing as the file says it, `3d_coords` and `pixel_coords` too: they give a thing's centre but
    not its extent, so there are no masks.
    """

    def __init__(self, path: str | Path, *, label: str | None = None, split: str | None = None) -> None:
        root = Path(path)
        files = _scene_files(root)
        entries, tables, self._objects = [], [], {}
        for file in files:
            for number, scene in enumerate(_scenes(file)):
                name, objects, of_split = _scene(file, number, scene)
                place = next(
                    (p for p in (root / "images" / name, root / "images" / (of_split or "") / name) if p.is_file()),
                    root / "images" / name,
                )
                entries.append(Entry(name, str(place), str(place), None, None, _things(objects), of_split))
                found = {factor: _ordered({str(o[factor]) for o in objects if factor in o}) for factor in _CLEVR}
                tables.append({k: tuple(v) for k, v in found.items() if v} | {"count": (str(len(objects)),)})
                self._objects[name] = objects
        super().__init__(root, entries, tables, label=label, split=split)

    def objects(self, i: int) -> list[dict[str, Any]]:
        return self._objects[self.record(i).id]


def _scene_files(root: Path) -> list[Path]:
    named = ("scenes.json", "CLEVR_*_scenes.json")
    found = sorted({file for folder in (root, root / "scenes") for name in named for file in folder.glob(name)})
    if not found:
        raise ValueError(
            f"{root} has no table of factors. Looked for factors.csv, scenes.json and CLEVR_*_scenes.json, "
            "the last two also in scenes/."
        )
    return found


def _scenes(file: Path) -> list[Any]:
    said = read_json(file, "list of scenes")
    scenes = said.get("scenes") if isinstance(said, dict) else None
    if not isinstance(scenes, list):
        raise ValueError(f'{file} has no list "scenes".')
    return scenes


def _scene(file: Path, number: int, scene: Any) -> tuple[str, list[dict[str, Any]], str | None]:
    name, objects = (scene.get(key) if isinstance(scene, dict) else None for key in ("image_filename", "objects"))
    fit = isinstance(name, str) and isinstance(objects, list) and all(isinstance(thing, dict) for thing in objects)
    if not fit:
        raise ValueError(f'{file}: scene {number} needs "image_filename", a text, and "objects", a list of objects.')
    return str(name), list(objects or []), scene.get("split") or None


def _things(objects: Sequence[Mapping[str, Any]]) -> str:
    if not objects:
        return "nothing"
    words = [" ".join(str(thing[factor]) for factor in _CLEVR if factor in thing) or "thing" for thing in objects]
    *before, last = [f"{'an' if word[0] in 'aeiou' else 'a'} {word}" for word in words]
    return f"{', '.join(before)} and {last}" if before else last


# -- arrays


class NpzFactors(FactorImages):
    """Grey pictures in one .npz. Values 0 and 1 alone (bool, or uint8 as in dSprites) are shown as black and white.

    `imgs` is memory-mapped where the file is not compressed. Where it is, it is inflated once, when the first picture
    is asked for, and kept as bits if it is black and white: 377 MB for the whole of dSprites.
    """

    def __init__(self, path: str | Path, *, label: str | None = None, split: str | None = None) -> None:
        self.path = Path(path)
        if split is not None:
            raise ValueError(f"{path} says of no picture which split it is in, so split={split!r} cannot be chosen.")
        if not self.path.is_file():
            raise FileNotFoundError(f"{path} is missing: there is no .npz of pictures here.")
        self._shape, dtype = npz.array_header(self.path, "imgs")
        if len(self._shape) != 3 or dtype not in (np.dtype(bool), np.dtype(np.uint8)) or 0 in self._shape:
            raise ValueError(f"{path}: imgs must be (n, h, w) in uint8 or bool, got {self._shape} in {dtype}.")
        codes = npz.array(self.path, "latents_classes")
        if codes.shape != (self._shape[0], *codes.shape[1:2]) or codes.dtype.kind not in "iu" or codes.min() < 0:
            raise ValueError(
                f"{path}: latents_classes must be (n={self._shape[0]}, f) whole numbers from 0, got {codes.shape} in "
                f"{codes.dtype}."
            )
        self._codes = codes.astype(np.uint16 if codes.max() < 2**16 else np.int64)
        self.factors, named = _names(self.path, codes.shape[1])
        values = npz.data(self.path, "latents_values")
        self._values = [_value_names(self._codes, values, j, named.get(name)) for j, name in enumerate(self.factors)]
        self._named = [dict(zip(codes, names, strict=True)) for codes, names in self._values]
        self.concepts = tuple(
            f"{factor}:{value}"
            for factor, (_, values) in zip(self.factors, self._values, strict=True)
            for value in values
        )
        self._label = label
        self._column = None if label is None else self.factors.index(_known_factor(label, self.factors, str(path)))
        self.classes = () if self._column is None else tuple(self._values[self._column][1])
        self._pixels: np.ndarray | None = None  # bits of black and white pictures, or what was mapped
        self._binary = False

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_pixels": None}  # each process maps or inflates for itself

    @property
    def spec(self) -> str:
        return _spec(self.path, self._label, None)

    @property
    def has_masks(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether pictures are black and white, so that the white pixels are the thing."""
        self._images()
        return self._binary

    def __len__(self) -> int:
        return self._shape[0]

    def values(self, i: int) -> Values:
        codes = self._codes[self._check(i)].tolist()
        named = zip(self.factors, self._named, codes, strict=True)
        return {factor: (names[code],) for factor, names, code in named}

    def record(self, i: int) -> ImageRecord:
        label = name = None
        if self._column is not None:
            label = self._values[self._column][0].index(int(self._codes[self._check(i), self._column]))
            name = self.classes[label]
        identity = f"{self.path.stem}-{self._check(i):07d}"
        return ImageRecord(identity, f"{self.path}#{i}", label, name, _caption(self.values(i)))

    def load(self, i: int) -> Image.Image:
        return Image.fromarray(self._grey(self._check(i))).convert("RGB")

    def masks(self, i: int) -> dict[str, Bool[np.ndarray, "h w"]]:
        self._check(i)
        if not self.has_masks:
            return {}
        thing = self._grey(i) > 0
        return dict.fromkeys(self.present(i), thing)

    def size_bytes(self, i: int) -> int:
        self._check(i)
        return self._shape[1] * self._shape[2]

    def fingerprint(self) -> str:
        """From the checksums that the file itself holds of its arrays, and the chosen label."""
        with npz.opened(self.path) as archive:
            sums = [[info.filename, info.CRC, info.file_size] for info in archive.infolist()]
        arrays = sorted(entry for entry in sums if entry[0] in ("imgs.npy", "latents_classes.npy"))
        return json_digest({"arrays": arrays, "label": self._label, "classes": self.classes})

    def _grey(self, i: int) -> np.ndarray:
        pixels, (_, height, width) = self._images(), self._shape
        if not self._binary:
            return np.array(pixels[i])
        bits = np.unpackbits(pixels[i], count=height * width) if pixels.ndim == 2 else pixels[i].reshape(-1)
        return (bits.reshape(height, width) > 0).astype(np.uint8) * 255

    def _images(self) -> np.ndarray:
        if self._pixels is None:
            mapped = npz.mapped(self.path, "imgs")
            if mapped is not None:
                rows = max(1, npz.BLOCK // math.prod(self._shape[1:]))
                self._binary = all(mapped[at : at + rows].max() <= 1 for at in range(0, len(mapped), rows))
                self._pixels = mapped
            else:
                self._pixels, self._binary = npz.inflated(self.path, "imgs")
        return self._pixels


def _names(path: Path, n_factors: int) -> tuple[tuple[str, ...], dict[str, list[str]]]:
    """Names of the factors, and of the values of those that have some."""
    beside = path.with_suffix(".json")
    said: Any = read_json(beside, "list of factors") if beside.is_file() else _metadata(path)
    if said is not None:
        names = said.get("names", said.get("latents_names")) if isinstance(said, dict) else None
        values = said.get("values", {}) if isinstance(said, dict) else None
        if not _texts(names) or not isinstance(values, dict) or not all(_texts(v) for v in values.values()):
            raise ValueError(
                f"names of {path}, or {beside.name} beside it, must be "
                '{"names": [texts], "values": {name: [texts]}}; values may be left out.'
            )
        if len(names) != n_factors or len(set(names)) != n_factors:
            named = f"{len(set(names))} different factors are named"
            raise ValueError(f"{path}, or {beside.name} beside it: {named}; latents_classes has {n_factors}.")
        return tuple(names), values
    if n_factors == len(DSPRITES):
        return DSPRITES, _DSPRITES_VALUES
    raise ValueError(
        f"{path} has {n_factors} factors without names that can be read as data (dSprites has six). "
        f'Write them to {beside.name} beside it: {{"names": [...]}}.'
    )


def _texts(value: Any) -> TypeGuard[list[str]]:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def _metadata(path: Path) -> Any:
    """`metadata` if it is JSON text; None if it is not there or pickled, as in dSprites."""
    found = npz.data(path, "metadata")
    try:
        said = json.loads(str(found)) if found is not None and found.shape == () and found.dtype.kind == "U" else None
    except json.JSONDecodeError:
        return None
    return said if isinstance(said, dict) and {"names", "latents_names"} & set(said) else None


def _value_names(
    codes: np.ndarray, values: np.ndarray | None, column: int, named: Sequence[str] | None
) -> tuple[list[int], list[str]]:
    """The classes of a factor that occur, and a name for each: as said, else its value, else its number."""
    found, first = np.unique(codes[:, column], return_index=True)
    numbers = [int(code) for code in found]
    if named is not None and numbers[-1] < len(named):
        return numbers, [named[code] for code in numbers]
    if values is not None and values.shape == codes.shape and values.dtype.kind in "fiu":
        names = [f"{float(value):.4g}" for value in values[first, column]]
        if len(set(names)) == len(names):
            return numbers, names
    return numbers, [str(code) for code in numbers]


def _spec(path: Path, label: str | None, split: str | None) -> str:
    chosen, of_split = f"?label={label}" if label else "", f"#split={split}" if split else ""
    return f"{PREFIX}{os.path.abspath(path)}{chosen}{of_split}"


def _known_factor(label: str, factors: Sequence[str], where: str) -> str:
    if label not in factors:
        raise ValueError(f"{where} has no factor {label!r}. Known: {', '.join(factors)}.")
    return label


def _ordered(values: set[str]) -> list[str]:
    """Numbers by size, then texts by their letters."""
    number = re.compile(r"-?\d+(\.\d+)?$")
    return sorted(values, key=lambda text: (0, float(text), text) if number.match(text) else (1, 0.0, text))


def _caption(values: Values) -> str:
    """In plain words: "a white heart, scale 0.8, orientation 0.16, at x 0.5 and y 0"; "shape cup, colour red"."""
    if set(DSPRITES) == set(values):
        color, shape, scale, orientation, x, y = (values[name][0] for name in DSPRITES)
        article = "an" if color[0] in "aeiou" else "a"
        return f"{article} {color} {shape}, scale {scale}, orientation {orientation}, at x {x} and y {y}"
    return ", ".join(f"{factor} {' and '.join(found)}" for factor, found in values.items())
