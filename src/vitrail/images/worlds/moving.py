"""The world "moving": short clips of one thing that moves in a known way over a ground that lies still.

    x_t = x_0 + v t, diameter_t = diameter_0 + g t;  of speed s: left v = (-s, 0), ..., growing g = s, shrinking g = -s

Thing, ground and classes are drawn as in the world "shapes", with all dials off; motion and speed evenly and apart from
them. The thing stays inside the picture: it starts anywhere from where its way ends inside, so that a large, fast thing
starts in a band, and the start is told to some degree by where it goes. Things do not turn: of a plain circle nobody
would see it. Only the pixels' noise differs between the frames of a thing that lies still.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from vitrail.images.base import ImageRecord
from vitrail.images.worlds import painting
from vitrail.images.worlds.backgrounds import BACKGROUNDS
from vitrail.images.worlds.base import Scene, World
from vitrail.images.worlds.draws import Draws, pick
from vitrail.images.worlds.factors import POSITIONS, SIZES, Factors
from vitrail.images.worlds.painting import Mask, Picture
from vitrail.images.worlds.shapes import ShapesWorld

# motion -> what a pixel of speed moves: x (to the right), y (down), diameter
MOTIONS: dict[str, tuple[int, int, int]] = {
    "still": (0, 0, 0),
    "left": (-1, 0, 0),
    "right": (1, 0, 0),
    "up": (0, -1, 0),
    "down": (0, 1, 0),
    "growing": (0, 0, 1),
    "shrinking": (0, 0, -1),
}
SPEEDS = ("slow", "fast")
TRAVEL = 22.0  # longest way of a clip in pixels of a 64-pixel image: what the largest thing leaves free
_EXTENT, _MARGIN = 1.125, 1.0  # no turned outline reaches farther along an axis than so many radii; pixels left free
_PHRASES = {"still": "lying still", "growing": "growing", "shrinking": "shrinking"}
_ADVERBS = {None: "", "slow": " slowly", "fast": " fast"}

# Purposes of draws; those that the world "shapes" uses are below 64. Frame t has its noise at _NOISE + t.
_GROUND, _MOTION, _NOISE = 64, 65, 128


@dataclass(frozen=True)
class Motion:
    """How the thing of a clip moves. Lengths in pixels of a 64-pixel image, changes per frame."""

    motion: str
    speed: str | None  # None where nothing moves
    x: float  # in frame 0, as are y and radius
    y: float
    radius: float
    dx: float
    dy: float
    d_radius: float

    def at(self, frame: int) -> tuple[float, float, float]:
        """x, y and radius."""
        return self.x + self.dx * frame, self.y + self.dy * frame, self.radius + self.d_radius * frame

    @property
    def phrase(self) -> str:
        """ "moving left slowly", "growing fast", "lying still"."""
        return _PHRASES.get(self.motion, f"moving {self.motion}") + _ADVERBS[self.speed]


@dataclass(frozen=True, eq=False)
class Clip:
    """t frames and the truth about them.

    `attributes` are those that all frames share: a moving thing passes from position to position and has none.
    `masks` has an entry for each concept that is present in any frame; it is empty where a frame does not show it.
    """

    frames: UInt8[np.ndarray, "t h w 3"]
    label: int
    caption: str
    attributes: Mapping[str, str]
    masks: Mapping[str, Bool[np.ndarray, "t h w"]]
    centre: Float[
        np.ndarray, "t 2"
    ]  # x and y of the outline's origin, in pixels of this image; 0.5 is the first's middle
    radius: Float[np.ndarray, " t"]  # in pixels of this image
    velocity: tuple[float, float]  # of the centre, in pixels of this image per frame: to the right, down


class MovingWorld(World):
    """n clips of n_frames frames each: position i is frame i % n_frames of clip i // n_frames, so len is n * n_frames.

    slow, fast: the two speeds, in pixels of a 64-pixel image per frame: of the centre, or of the diameter where a thing
        grows or shrinks.

    `position` and `size` are those of the frame: the nearest of nine places, the nearest of three radii.
    """

    name: ClassVar[str] = "moving"
    version: ClassVar[int] = 1
    always_named: ClassVar[tuple[str, ...]] = (*World.always_named, "n_frames")

    def __init__(
        self,
        *,
        n: int = 500,
        seed: int = 0,
        split: str = "train",
        image_px: int = 64,
        n_frames: int = 8,
        slow: float = 1.0,
        fast: float = 2.5,
    ) -> None:
        super().__init__(n=n, seed=seed, split=split, image_px=image_px)
        if not 2 <= n_frames <= 64:
            raise ValueError(f"n_frames must be in 2..64, got {n_frames}.")
        if not 0 < slow < fast:
            raise ValueError(f"slow must be above 0 and below fast, got slow={slow} and fast={fast}.")
        if fast * (n_frames - 1) > TRAVEL:
            raise ValueError(
                f"a thing stays inside the picture for {TRAVEL:g} pixels of 64, but fast={fast:g} for "
                f"{n_frames - 1} steps is {fast * (n_frames - 1):g}: fast may be "
                f"{math.floor(100 * TRAVEL / (n_frames - 1)) / 100:g} at most."
            )
        self.n_frames, self.slow, self.fast = n_frames, float(slow), float(fast)
        self._things = _Things(n=n, seed=seed, split=split, image_px=image_px)
        self.classes, self.groups = self._things.classes, self._things.groups
        self.concepts = (
            *self._things.concepts,
            *(f"motion:{motion}" for motion in MOTIONS),
            *(f"speed:{speed}" for speed in SPEEDS),
        )

    def __len__(self) -> int:
        return self.n * self.n_frames

    def record(self, i: int) -> ImageRecord:
        """Of a frame; caption and label are those of its clip."""
        clip, frame = divmod(self._check(i), self.n_frames)
        label = self._things.label(clip)
        return ImageRecord(
            id=f"{self.part_id(i)}-{frame:02d}",
            uri=f"{self.spec}#{i}",
            label=label,
            class_name=self.classes[label],
            caption=self._of(clip).caption,
            split=self.split,
        )

    def part_id(self, i: int) -> str:
        """The same for all frames of a clip, so that a part of this world ("world:moving@0:0.8") has whole clips."""
        return f"{self.name}-{self.seed}-{self.split}-{self._check(i) // self.n_frames:07d}"

    def motion(self, j: int) -> Motion:
        """How the thing of clip j moves, without drawing it."""
        return self._of(j).motion

    def factors(self, i: int) -> Factors:
        """What frame i shows but for its motion, without drawing it."""
        clip, frame = divmod(self._check(i), self.n_frames)
        return self._of(clip).at(frame)

    def scene(self, i: int) -> Scene:
        clip, frame = divmod(self._check(i), self.n_frames)
        script = self._of(clip)
        return self._frame(script, frame, self._ground(script))

    def clip(self, j: int) -> Clip:
        """Clip j of n. Raises IndexError outside 0..n-1."""
        script = self._of(j)
        ground, motion, scale = self._ground(script), script.motion, self.image_px / 64.0
        scenes = [self._frame(script, t, ground.copy()) for t in range(self.n_frames)]
        way = np.array([motion.at(t) for t in range(self.n_frames)]) * scale
        return Clip(
            frames=np.stack([scene.image for scene in scenes]),
            label=script.label,
            caption=script.caption,
            attributes=_shared(scenes),
            masks=_stacked(scenes),
            centre=way[:, :2],
            radius=way[:, 2],
            velocity=(motion.dx * scale, motion.dy * scale),
        )

    def _of(self, j: int) -> "_Script":
        if not 0 <= j < self.n:
            raise IndexError(f"clip must be in 0..{self.n - 1}, got {j}.")
        thing = self._things.factors(j)
        return _Script(j, self._things.label(j), thing, self._moved(j, thing), self.n_frames)

    def _moved(self, j: int, thing: Factors) -> Motion:
        which, how_fast, across, down = Draws(self._key, j, _MOTION).uniform(4)
        motion = pick(MOTIONS, which)
        speed = None if motion == "still" else pick(SPEEDS, how_fast)
        pace = {None: 0.0, "slow": self.slow, "fast": self.fast}[speed]
        dx, dy, d_diameter = (share * pace for share in MOTIONS[motion])
        d_radius = d_diameter / 2.0
        half = (self.n_frames - 1) / 2.0  # frames from the middle of the clip to either end
        reach = _EXTENT * (thing.radius + abs(d_radius) * half) + _MARGIN
        x, y = (
            _between(reach + abs(step) * half, 64.0 - reach - abs(step) * half, share)
            for step, share in ((dx, across), (dy, down))
        )
        return Motion(motion, speed, x - dx * half, y - dy * half, thing.radius - d_radius * half, dx, dy, d_radius)

    def _ground(self, script: "_Script") -> Picture:
        return painting.ground(script.thing, Draws(self._key, script.clip, _GROUND), self.image_px, drawing=False)

    def _frame(self, script: "_Script", t: int, picture: Picture) -> Scene:
        """Frame t, painted over `picture`."""
        factors, motion = script.at(t), script.motion
        mask = painting.thing(picture, factors, drawing=False)
        noise = Draws(self._key, script.clip, _NOISE + t)
        image = painting.photograph(picture, factors.brightness, noise, palette="plain")
        attributes = factors.attributes | {"motion": motion.motion}
        attributes |= {} if motion.speed is None else {"speed": motion.speed}
        ground = ~mask
        masks: dict[str, Mask] = {"object": mask}
        for family, value in attributes.items():
            masks[f"{family}:{value}"] = ground if family in ("background", "ground") else mask
        return Scene(image, script.label, script.caption, attributes, masks)


@dataclass(frozen=True)
class _Script:
    """All that decides a clip but its ground and noise."""

    clip: int
    label: int
    thing: Factors
    motion: Motion
    n_frames: int

    def at(self, frame: int) -> Factors:
        x, y, radius = self.motion.at(frame)
        return replace(self.thing, x=x, y=y, radius=radius, size=_size(radius), position=_position(x, y))

    @property
    def caption(self) -> str:
        """ "a large red striped star moving left slowly on sand"; of what passes from size to size none is told."""
        thing, sizes = self.thing, {_size(self.motion.at(t)[2]) for t in (0, self.n_frames - 1)}
        words = f"{sizes.pop()} {thing.colour}" if len(sizes) == 1 else thing.colour
        article = "an" if words[0] in "aeiou" else "a"
        ground = BACKGROUNDS[thing.background].phrase
        return f"{article} {words} {thing.texture} {thing.shape} {self.motion.phrase} on {ground}"


class _Things(ShapesWorld):
    """What "shapes" would draw under another name: from unrelated streams."""

    name: ClassVar[str] = MovingWorld.name


def clip_coverage(
    clip: Clip, concepts: Sequence[str], patch_px: int, tubelet: int
) -> Float[Tensor, "n_concepts n_tubelets grid_h grid_w"]:
    """Share of the pixels of each tubelet (`tubelet` frames of a patch) that show each concept, 0..1.

    Raises ValueError unless `patch_px` divides the frames' sides and `tubelet` their number.
    """
    n_frames, height, width, _ = clip.frames.shape
    if patch_px < 1 or height % patch_px or width % patch_px:
        raise ValueError(f"patch_px must divide the frames' sides {height} and {width}, got {patch_px}.")
    if tubelet < 1 or n_frames % tubelet:
        raise ValueError(f"tubelet must divide the number of frames, {n_frames}, got {tubelet}.")
    grid = n_frames // tubelet, height // patch_px, width // patch_px
    coverage = np.zeros((len(concepts), *grid), dtype=np.float32)
    shares: dict[int, np.ndarray] = {}  # concepts of one thing share one mask
    for row, concept in enumerate(concepts):
        mask = clip.masks.get(concept)
        if mask is None:
            continue
        if id(mask) not in shares:
            tubes = mask.reshape(grid[0], tubelet, grid[1], patch_px, grid[2], patch_px)
            shares[id(mask)] = tubes.sum(axis=(1, 3, 5)) / (tubelet * patch_px**2)
        coverage[row] = shares[id(mask)]
    return torch.from_numpy(coverage)


def _size(radius: float) -> str:
    return min(SIZES, key=lambda size: abs(SIZES[size] - radius))


def _position(x: float, y: float) -> str:
    return min(POSITIONS, key=lambda name: (POSITIONS[name][0] - x) ** 2 + (POSITIONS[name][1] - y) ** 2)


def _between(low: float, high: float, share: float) -> float:
    return low + share * (high - low)


def _shared(scenes: Sequence[Scene]) -> dict[str, str]:
    """The attributes that are the same in all."""
    first = scenes[0].attributes
    return {
        family: value for family, value in first.items() if all(scene.attributes[family] == value for scene in scenes)
    }


def _stacked(scenes: Sequence[Scene]) -> dict[str, Bool[np.ndarray, "t h w"]]:
    """Masks over time. Concepts that share a mask in every frame share the stack of them."""
    nothing = np.zeros_like(scenes[0].masks["object"])
    stacks: dict[tuple[int, ...], np.ndarray] = {}
    masks = {}
    for concept in dict.fromkeys(concept for scene in scenes for concept in scene.masks):
        parts = [scene.masks.get(concept, nothing) for scene in scenes]
        together = tuple(map(id, parts))
        if together not in stacks:
            stacks[together] = np.stack(parts)
        masks[concept] = stacks[together]
    return masks
