"""A part of a source: "photos@0:0.8" is the four fifths of the pictures whose ids hash below 0.8.

Which part a picture falls in depends on its id alone, so parts never overlap, and stay as they are when others come.
"""

import hashlib
import re

from PIL import Image

from vitrail.images.base import ImageRecord, ImageSource

SUFFIX = re.compile(r"^(?P<spec>.+)@(?P<start>[01]?\.?\d*):(?P<stop>[01]?\.?\d*)$")


def split_spec(spec: str) -> tuple[str, float, float] | None:
    """("photos", 0.0, 0.8) of "photos@0:0.8"; None where there is no such suffix. Raises ValueError for a bad range."""
    found = SUFFIX.match(spec)
    if found is None:
        return None
    start, stop = float(found["start"] or 0), float(found["stop"] or 1)
    if not 0 <= start < stop <= 1:
        raise ValueError(f"a part must be START:STOP with 0 <= START < STOP <= 1, got {spec!r}.")
    return found["spec"], start, stop


def share_of(image_id: str) -> float:
    """A number in 0..1 that depends on nothing but the id."""
    return int.from_bytes(hashlib.sha256(image_id.encode()).digest()[:8]) / 2**64


class PartOfImages(ImageSource):
    """The pictures of `whole` whose share lies in [start, stop), in their order. Labels and classes are the whole's."""

    def __init__(self, whole: ImageSource, start: float, stop: float) -> None:
        self.whole, self.start, self.stop = whole, start, stop
        self.classes = whole.classes
        self._positions = [i for i in range(len(whole)) if start <= share_of(whole.record(i).id) < stop]
        if not self._positions:
            raise ValueError(f"no picture of {whole.spec} ({len(whole)} in all) falls in the part {start:g}:{stop:g}.")

    @property
    def spec(self) -> str:
        return f"{self.whole.spec}@{self.start!r}:{self.stop!r}"

    def __len__(self) -> int:
        return len(self._positions)

    def record(self, i: int) -> ImageRecord:
        return self.whole.record(self._positions[self._check(i)])

    def load(self, i: int) -> Image.Image:
        return self.whole.load(self._positions[self._check(i)])

    def size_bytes(self, i: int) -> int:
        return self.whole.size_bytes(self._positions[self._check(i)])
