"""What a set of pictures is: so many records, each of which can be read, and an identity that moves when they do."""

import hashlib
import json
from abc import ABC, abstractmethod
from dataclasses import dataclass

from PIL import Image


class BadImage(Exception):
    """One picture cannot be read. Its message is the reason, in words fit for a list of skipped images."""


@dataclass(frozen=True)
class ImageRecord:
    """What is known of a picture without looking at it. `id` is unique in its source and stays when files move."""

    id: str
    uri: str
    label: int | None = None
    class_name: str | None = None
    caption: str | None = None
    split: str | None = None


class ImageSource(ABC):
    """A fixed, ordered set of pictures. Position i means the same picture in every process that opens the same spec.

    Sources are pickled into worker processes, so none keeps an open file.
    """

    classes: tuple[str, ...]  # name of each label; empty if the pictures carry no labels

    @property
    @abstractmethod
    def spec(self) -> str:
        """Opens the same source again."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def record(self, i: int) -> ImageRecord:
        """Cheap: reads no pixels. Raises IndexError outside 0..len-1."""

    @abstractmethod
    def load(self, i: int) -> Image.Image:
        """The picture in mode RGB, upright. Raises BadImage with the reason if it cannot be read."""

    @abstractmethod
    def size_bytes(self, i: int) -> int:
        """Length of the stored picture; -1 if it is missing."""

    def fingerprint(self) -> str:
        """sha256 over (id, label, bytes) of every picture in order. Times and places of files do not enter."""
        digest = hashlib.sha256()
        for i in range(len(self)):
            record = self.record(i)
            digest.update(json.dumps([record.id, record.label, self.size_bytes(i)]).encode())
        return digest.hexdigest()

    def _check(self, i: int) -> int:
        if not 0 <= i < len(self):
            raise IndexError(f"position must be in 0..{len(self) - 1}, got {i}.")
        return i
