"""Pictures in a folder: class/…/picture.jpg, or all in one place without classes.

The first folder below the root is the class. If every folder below the root is named like a split (train, val,
valid, validation, test), it is the split and the next one is the class, as in ImageNet's layout.
"""

import os
from collections.abc import Iterator
from pathlib import Path

from vitrail.images.base import BadImage
from vitrail.images.decode import SUFFIXES
from vitrail.images.listed import Entry, ListedImages

_SPLITS = {"train", "val", "valid", "validation", "test"}


class FolderImages(ListedImages):
    """Pictures sorted by path; ids are paths below the root. Hidden files and folders are passed over."""

    def __init__(self, path: str | Path, *, split: str | None = None) -> None:
        root = Path(path)
        if not root.is_dir():
            raise FileNotFoundError(f"{root} is not a folder.")
        found = sorted(_pictures(root))
        if not found:
            raise ValueError(f"{root} holds no pictures. Looked in it and below for {' '.join(SUFFIXES)}.")
        tops = {parts[0] for parts in found if len(parts) > 1}
        by_split = bool(tops) and tops <= _SPLITS and all(len(parts) > 1 for parts in found)
        super().__init__(str(root), [_entry(root, parts, by_split) for parts in found], split)

    def _read(self, entry: Entry) -> bytes:
        return read_bytes(Path(str(entry.place)))

    def _size(self, entry: Entry) -> int:
        return size_of(Path(str(entry.place)))


def read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise BadImage("the file is missing") from error
    except OSError as error:
        raise BadImage(f"the file cannot be read: {error.strerror or error}") from error


def size_of(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1


def _entry(root: Path, parts: tuple[str, ...], by_split: bool) -> Entry:
    path = root.joinpath(*parts)
    folders = parts[1:-1] if by_split else parts[:-1]
    return Entry(
        id="/".join(parts),
        uri=str(path),
        place=str(path),
        class_name=folders[0] if folders else None,
        split=parts[0] if by_split else None,
    )


def _pictures(root: Path) -> Iterator[tuple[str, ...]]:
    """Paths of pictures below the root, as parts. Links are followed, but none back up."""
    for folder, names, files in os.walk(root, followlinks=True):
        above = {os.path.realpath(parent) for parent in (folder, *_parents(folder, root))}
        names[:] = [
            name
            for name in names
            if not name.startswith(".") and os.path.realpath(os.path.join(folder, name)) not in above
        ]
        base = Path(folder).relative_to(root).parts
        yield from ((*base, name) for name in files if name.lower().endswith(SUFFIXES) and not name.startswith("."))


def _parents(folder: str, root: Path) -> Iterator[str]:
    here = Path(folder)
    while here != root and here != here.parent:
        here = here.parent
        yield str(here)
