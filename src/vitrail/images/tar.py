"""Pictures in WebDataset tars: members of one name with different endings are one sample.

    key.jpg | .png | .webp …     the picture            key.cls    its label, a whole number
    key.json                     label, class_name (or name), caption, split            key.txt    its caption

Each tar is read through once, for names and offsets, when it is opened; after that any picture is one seek away. The
webdataset package reads forward only, which a store that permutes its images and resumes cannot use.
"""

import glob
import json
import re
import tarfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vitrail.images.base import BadImage
from vitrail.images.decode import SUFFIXES
from vitrail.images.listed import Entry, ListedImages

_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


@dataclass(frozen=True)
class _Place:
    tar: str
    offset: int
    size: int
    damage: str | None = None  # why there is nothing to read


@dataclass
class _Sample:
    picture: _Place | None = None
    said: dict[str, Any] = field(default_factory=dict)
    suffixes: set[str] = field(default_factory=set)  # seen so far


class TarImages(ListedImages):
    """Pictures in the order of the tars and of the members in them; ids are "tar/key".

    "train-{000..003}.tar" names four tars, "train-*.tar" all that match, sorted. Where a tar is cut short or damaged,
    the samples before are read, and one more record stands for the rest: loading it gives the reason.
    """

    def __init__(self, path: str | Path, *, split: str | None = None) -> None:
        spec = str(path)
        tars = expand(spec)
        names = [tar.stem for tar in tars]
        entries: list[Entry] = []
        for tar in tars:
            # Tars of one name in different folders are told apart by their paths.
            shard = tar.stem if names.count(tar.stem) == 1 else str(tar.with_suffix(""))
            entries += _entries(tar, shard)
        super().__init__(spec, entries, split)

    def _read(self, entry: Entry) -> bytes:
        place = entry.place
        assert isinstance(place, _Place)
        if place.damage is not None:
            raise BadImage(place.damage)
        # Opened anew each time: no handle to pickle, and none shared between processes or threads.
        try:
            with open(place.tar, "rb") as stream:
                stream.seek(place.offset)
                data = stream.read(place.size)
        except OSError as error:
            raise BadImage(f"{place.tar} cannot be read: {error.strerror or error}") from error
        if len(data) < place.size:
            raise BadImage(f"{place.tar} ends inside this picture, at byte {place.offset + len(data)}")
        return data

    def _size(self, entry: Entry) -> int:
        assert isinstance(entry.place, _Place)
        return entry.place.size


def expand(pattern: str) -> list[Path]:
    """The tars that a pattern names: {000..003} counts (zeros kept), * ? [] match. Raises if one is missing."""
    patterns = [pattern]
    while any(_RANGE.search(text) for text in patterns):
        patterns = [text for before in patterns for text in _counted(before)]
    tars: list[Path] = []
    for text in patterns:
        found = [Path(text)] if Path(text).is_file() else [Path(match) for match in sorted(glob.glob(text))]
        if not found:
            raise FileNotFoundError(f"{text} is missing: there is no tar here.")
        tars += found
    return tars


def _counted(pattern: str) -> list[str]:
    found = _RANGE.search(pattern)
    if found is None:
        return [pattern]
    first, last = found.groups()
    if int(last) < int(first):
        raise ValueError(f"{found.group()} in {pattern} counts down; write the smaller number first.")
    before, after = pattern[: found.start()], pattern[found.end() :]
    return [f"{before}{number:0{len(first)}d}{after}" for number in range(int(first), int(last) + 1)]


def _entries(tar: Path, shard: str) -> list[Entry]:
    samples, damage = _index(tar)
    entries = [
        Entry(
            id=f"{shard}/{key}",
            uri=f"{tar}#{key}",
            place=sample.picture,
            label=sample.said.get("label"),
            class_name=sample.said.get("class_name"),
            caption=sample.said.get("caption"),
            split=sample.said.get("split"),
        )
        for key, sample in samples.items()
        if sample.picture is not None
    ]
    if damage is not None:
        size = tar.stat().st_size
        entries.append(Entry(f"{shard}/(damaged at the end)", str(tar), _Place(str(tar), size, 0, damage)))
    return entries


def _index(tar: Path) -> tuple[dict[str, _Sample], str | None]:
    """Samples by key, and what is wrong with the tar, if anything."""
    samples: dict[str, _Sample] = {}
    end = 0  # of the last whole member, rounded to tar's blocks of 512 bytes
    length = tar.stat().st_size
    try:
        with tarfile.open(tar, "r:") as archive:
            for member in archive:
                if not member.isfile():
                    continue
                if member.offset_data + member.size > length:
                    return samples, f"{tar} is cut short inside {member.name}, at byte {length}; what followed is lost"
                _take(samples, tar, member, archive)
                end = member.offset_data + -(-member.size // 512) * 512
    except tarfile.TarError as error:
        if not samples:
            raise ValueError(f"{tar} is not a readable, uncompressed tar: {error}.") from error
        return samples, f"{tar} is damaged after byte {end} ({error}); what followed is lost"
    with tar.open("rb") as stream:
        stream.seek(end)
        closing = stream.read(1024)
    if len(closing) < 1024 or closing.strip(b"\0"):
        return samples, f"{tar} has no end mark after byte {end}: it is cut short or damaged; what followed is lost"
    return samples, None


def _take(samples: dict[str, _Sample], tar: Path, member: tarfile.TarInfo, archive: tarfile.TarFile) -> None:
    folder, _, file = member.name.rpartition("/")
    stem, dot, suffix = file.partition(".")  # WebDataset: the key ends at the first dot of the file's name
    if not stem or not dot:
        return
    suffix = f".{suffix.lower()}"
    sample = samples.setdefault(f"{folder}/{stem}" if folder else stem, _Sample())
    if suffix in sample.suffixes:
        raise ValueError(f"{tar} holds {member.name} twice.")
    if suffix.endswith(SUFFIXES):
        # key.jpg goes before key.seg.png, whichever comes first.
        simple = suffix in SUFFIXES and not sample.suffixes.intersection(SUFFIXES)
        if sample.picture is None or simple:
            sample.picture = _Place(str(tar), member.offset_data, member.size)
    elif suffix in (".json", ".cls", ".txt"):
        stored = archive.extractfile(member)
        assert stored is not None
        sample.said |= _said(stored.read(), suffix, f"{tar}#{member.name}")
    sample.suffixes.add(suffix)


def _said(data: bytes, suffix: str, where: str) -> dict[str, Any]:
    try:
        text = data.decode("utf-8").strip()
        if suffix == ".txt":
            return {"caption": text or None}
        if suffix == ".cls":
            return {"label": int(text)}
        value = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{where} is not a readable {suffix} member: {error}.") from error
    if not isinstance(value, dict):
        raise ValueError(f"{where} must hold a JSON object, got {type(value).__name__}.")
    name = value.get("class_name", value.get("name"))
    said = {"class_name": name, "caption": value.get("caption"), "split": value.get("split")}
    for key, given in said.items():
        if given is not None and not isinstance(given, str):
            raise ValueError(f"{where}: {key} must be text, got {given!r}.")
    label = value.get("label")
    if isinstance(label, bool) or not isinstance(label, int | str | None):
        raise ValueError(f"{where}: label must be a whole number or text, got {label!r}.")
    return {key: given for key, given in (said | {"label": label}).items() if given is not None}
