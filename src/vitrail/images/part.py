"""A part of a source: "photos@0:0.8" is the four fifths of the pictures whose ids hash below 0.8.

Which part a picture falls in depends on its id alone, so parts never overlap, and stay as they are when others come.
Frames of a clip stay together: a source with `part_id(i)` says there what is hashed instead.

What a source knows of its pictures, its part knows of those that it has: a part of a world has scenes, one of factors
values, one of a folder neither.
"""

import hashlib
import re
from typing import Any, Self

import numpy as np
from jaxtyping import Bool, Float
from PIL import Image
from torch import Tensor

from vitrail.files import json_digest
from vitrail.images.base import ImageRecord, ImageSource
from vitrail.images.factors import ClevrFactors, FactorImages, Values
from vitrail.images.worlds.base import Scene, World
from vitrail.images.worlds.factors import Factors
from vitrail.images.worlds.moving import Clip, Motion, MovingWorld
from vitrail.images.worlds.shapes import ShapesWorld

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
    """The pictures of `whole` whose share lies in [start, stop), in their order. Labels and classes are the whole's.

    PartOfImages(world, 0, 0.8) is a PartOfWorld, and so on: of the kind in `_KINDS` that offers what the whole does.
    """

    whole: Any  # an ImageSource, with what its kind of part passes on

    def __new__(cls, whole: ImageSource | None = None, *_: float) -> Self:  # unpickling gives no `whole`
        kind: Any = cls if whole is None or cls is not PartOfImages else _kind_of(whole)
        return super().__new__(kind)

    def __init__(self, whole: ImageSource, start: float, stop: float) -> None:
        self.whole, self.start, self.stop = whole, start, stop
        self.classes = whole.classes
        part_id = getattr(whole, "part_id", None) or (lambda i: whole.record(i).id)
        self._positions = [i for i in range(len(whole)) if start <= share_of(part_id(i)) < stop]
        if not self._positions:
            raise ValueError(f"no picture of {whole.spec} ({len(whole)} in all) falls in the part {start:g}:{stop:g}.")

    @property
    def spec(self) -> str:
        return f"{self.whole.spec}@{self.start!r}:{self.stop!r}"

    def __len__(self) -> int:
        return len(self._positions)

    def record(self, i: int) -> ImageRecord:
        return self.whole.record(self._at(i))

    def load(self, i: int) -> Image.Image:
        return self.whole.load(self._at(i))

    def size_bytes(self, i: int) -> int:
        return self.whole.size_bytes(self._at(i))

    def fingerprint(self) -> str:
        """As of any source; but where ids and sizes do not tell the whole's pictures (a world's), from the whole's."""
        whole = self.whole
        while isinstance(whole, PartOfImages):
            whole = whole.whole
        if type(whole).fingerprint is ImageSource.fingerprint:
            return super().fingerprint()
        return json_digest({"part_of": self.whole.fingerprint(), "start": self.start, "stop": self.stop})

    def _at(self, i: int) -> int:
        """Where the whole has picture i of this part."""
        return self._positions[self._check(i)]


class PartOfScenes(PartOfImages):
    """Of any source that has `concepts` and `scene`."""

    def __init__(self, whole: ImageSource, start: float, stop: float) -> None:
        super().__init__(whole, start, stop)
        self.concepts: tuple[str, ...] = self.whole.concepts

    def scene(self, i: int) -> Scene:
        return self.whole.scene(self._at(i))


class PartOfWorld(PartOfScenes):
    def __init__(self, whole: ImageSource, start: float, stop: float) -> None:
        super().__init__(whole, start, stop)
        self.groups, self.image_px = self.whole.groups, self.whole.image_px

    def patch_coverage(self, i: int, patch_px: int) -> Float[Tensor, "n_concepts grid_h grid_w"]:
        return self.whole.patch_coverage(self._at(i), patch_px)


class PartOfShapes(PartOfWorld):
    def factors(self, i: int) -> Factors:
        return self.whole.factors(self._at(i))

    def label(self, i: int) -> int:
        return self.whole.label(self._at(i))

    def true_label(self, i: int) -> int:
        return self.whole.true_label(self._at(i))


class PartOfMoving(PartOfWorld):
    """Whole clips: position i is frame i % n_frames of clip i // n_frames of the n that fall in the part."""

    def __init__(self, whole: ImageSource, start: float, stop: float) -> None:
        super().__init__(whole, start, stop)
        self.n_frames: int = self.whole.n_frames
        self.n = len(self) // self.n_frames

    def part_id(self, i: int) -> str:
        return self.whole.part_id(self._at(i))

    def factors(self, i: int) -> Factors:
        return self.whole.factors(self._at(i))

    def motion(self, j: int) -> Motion:
        return self.whole.motion(self._clip_at(j))

    def clip(self, j: int) -> Clip:
        return self.whole.clip(self._clip_at(j))

    def _clip_at(self, j: int) -> int:
        if not 0 <= j < self.n:
            raise IndexError(f"clip must be in 0..{self.n - 1}, got {j}.")
        return self._positions[j * self.n_frames] // self.n_frames


class PartOfFactors(PartOfScenes):
    def __init__(self, whole: ImageSource, start: float, stop: float) -> None:
        super().__init__(whole, start, stop)
        self.factors: tuple[str, ...] = self.whole.factors

    @property
    def has_masks(self) -> bool:
        return self.whole.has_masks

    def values(self, i: int) -> Values:
        return self.whole.values(self._at(i))

    def attributes(self, i: int) -> dict[str, str]:
        return self.whole.attributes(self._at(i))

    def present(self, i: int) -> tuple[str, ...]:
        return self.whole.present(self._at(i))

    def masks(self, i: int) -> dict[str, Bool[np.ndarray, "h w"]]:
        return self.whole.masks(self._at(i))


class PartOfClevr(PartOfFactors):
    def objects(self, i: int) -> list[dict[str, Any]]:
        return self.whole.objects(self._at(i))


# kind of the whole -> kind of its part; the first that fits.
_KINDS: dict[type[ImageSource], type[PartOfImages]] = {
    ShapesWorld: PartOfShapes,
    MovingWorld: PartOfMoving,
    World: PartOfWorld,
    ClevrFactors: PartOfClevr,
    FactorImages: PartOfFactors,
}


def _kind_of(whole: ImageSource) -> type[PartOfImages]:
    if isinstance(whole, PartOfImages):
        return type(whole)
    fallback = PartOfScenes if hasattr(whole, "scene") and hasattr(whole, "concepts") else PartOfImages
    return next((part for kind, part in _KINDS.items() if isinstance(whole, kind)), fallback)
