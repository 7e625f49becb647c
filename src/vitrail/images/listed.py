"""A source whose pictures are all listed when it is opened: what folders, tables and tars have in common."""

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from vitrail.images.base import ImageRecord, ImageSource
from vitrail.images.decode import decode_rgb
from vitrail.images.labels import resolve_labels


@dataclass(frozen=True)
class Entry:
    """One picture as a file says it. `place` is the source's own: how to find its bytes."""

    id: str
    uri: str
    place: object
    label: str | int | None = None
    class_name: str | None = None
    caption: str | None = None
    split: str | None = None


class ListedImages(ImageSource):
    """`entries` of all splits: labels are numbered before `split` picks, so that they agree between splits."""

    def __init__(self, spec: str, entries: Sequence[Entry], split: str | None) -> None:
        if not entries:
            raise ValueError(f"{spec} holds no pictures.")
        twice, times = Counter(entry.id for entry in entries).most_common(1)[0]
        if times > 1:
            raise ValueError(f"{spec} has {times} pictures with id {twice!r}; ids must be unique.")
        self._spec, self.split = spec, split
        labels, self.classes = resolve_labels([e.label for e in entries], [e.class_name for e in entries], spec)
        kept = _of_split(spec, entries, split)
        self._entries = [entries[i] for i in kept]
        self._labels = [labels[i] for i in kept]

    @property
    def spec(self) -> str:
        """Absolute, with the split: what opens the same pictures from any folder."""
        return os.path.abspath(self._spec) + (f"#split={self.split}" if self.split else "")

    def __len__(self) -> int:
        return len(self._entries)

    def record(self, i: int) -> ImageRecord:
        entry, label = self._entries[self._check(i)], self._labels[i]
        name = None if label is None else self.classes[label]
        return ImageRecord(entry.id, entry.uri, label, name, entry.caption, entry.split)

    def load(self, i: int) -> Image.Image:
        return decode_rgb(self._read(self._entries[self._check(i)]))

    def size_bytes(self, i: int) -> int:
        return self._size(self._entries[self._check(i)])

    def _read(self, entry: Entry) -> bytes:
        """The stored bytes; raises BadImage if they cannot be had."""
        raise NotImplementedError

    def _size(self, entry: Entry) -> int:
        raise NotImplementedError


def _of_split(spec: str, entries: Sequence[Entry], split: str | None) -> list[int]:
    if split is None:
        return list(range(len(entries)))
    known = sorted({entry.split for entry in entries if entry.split is not None})
    if not known:
        raise ValueError(f"{spec} says of no picture which split it is in, so split={split!r} cannot be chosen.")
    if split not in known:
        raise ValueError(f"{spec} has no split {split!r}. Found: {', '.join(known)}.")
    # A record without a split, such as the note that a tar is cut short, belongs to all.
    return [i for i, entry in enumerate(entries) if entry.split in (split, None)]
