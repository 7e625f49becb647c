"""Grounds for things to lie on: three like land, three like water. Rendered from noise, none is a photograph.

Noise is drawn on a lattice of bytes and interpolated with whole-number weights, so that the matrix products stay below
2**24 and are exact in fp32 whatever order a library sums in. Waves are triangle waves, not sines, for the same reason.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
from jaxtyping import Float

from vitrail.images.worlds.draws import Draws

Plane = Float[np.ndarray, "h w"]
Tone = tuple[int, int, int]
_STEPS = 64  # interpolation weights are multiples of 1/64


@dataclass(frozen=True)
class Background:
    """A field in about 0..1 that runs from the dark tone to the light one."""

    field: Callable[[Draws, int], Plane]
    dark: Tone
    light: Tone
    ground: str  # "land" or "water"
    phrase: str  # as a caption says it, after "on"


@cache
def _weights(size: int, cells: int) -> Float[np.ndarray, "size knots"]:
    """Row i: how pixel i mixes the cells + 1 knots of a lattice, in 64ths, eased so that no knot shows a kink."""
    weights = np.zeros((size, cells + 1), dtype=np.float32)
    for i in range(size):
        cell, rest = divmod((2 * i + 1) * cells, 2 * size)
        t = rest / (2 * size)
        upper = round(_STEPS * t * t * (3.0 - 2.0 * t))
        weights[i, cell], weights[i, cell + 1] = _STEPS - upper, upper
    return weights


def noise(draws: Draws, size: int, rows: int, columns: int) -> Plane:
    """Smooth noise in 0..1 with rows x columns cells over the image."""
    lattice = draws.bytes(rows + 1, columns + 1).astype(np.float32)
    field = _weights(size, rows) @ lattice @ _weights(size, columns).T
    return field * (1.0 / (255 * _STEPS * _STEPS))


@cache
def _grid(size: int) -> tuple[Plane, Plane]:
    """x and y of the pixel centres, in 0..1."""
    centres = ((np.arange(size) * 2 + 1) / (2 * size)).astype(np.float32)
    return np.broadcast_to(centres[None, :], (size, size)), np.broadcast_to(centres[:, None], (size, size))


def _wave(x: Plane) -> Plane:
    """Triangle wave of period 1 between 0 and 1."""
    return np.abs((x - np.floor(x)) * 2.0 - 1.0)


def sand(draws: Draws, size: int) -> Plane:
    _, y = _grid(size)
    dunes = _wave(y * 4.0 + noise(draws, size, 3, 3) * 3.0)
    return 0.55 * noise(draws, size, 48, 48) + 0.3 * dunes + 0.15 * noise(draws, size, 5, 5)


def grass(draws: Draws, size: int) -> Plane:
    blades = noise(draws, size, 9, 40)
    return np.clip(1.3 * blades + 0.35 * noise(draws, size, 5, 5) - 0.35, 0.0, 1.0)


def rock(draws: Draws, size: int) -> Plane:
    slabs = np.abs(noise(draws, size, 7, 7) - noise(draws, size, 7, 7))
    return np.clip(0.15 + 4.0 * slabs, 0.0, 0.75) + 0.3 * noise(draws, size, 32, 32) - 0.1


def sea(draws: Draws, size: int) -> Plane:
    _, y = _grid(size)
    crests = _wave(y * 7.0 + noise(draws, size, 4, 6) * 1.6)
    return np.clip(1.7 * crests * crests - 0.5, 0.0, 1.0) * (0.35 + 0.65 * noise(draws, size, 8, 6))


def pond(draws: Draws, size: int) -> Plane:
    x, y = _grid(size)
    centre_x, centre_y = draws.uniform(2)
    across, down = x - centre_x, y - centre_y
    rings = _wave(np.sqrt(across * across + down * down) * 9.0)
    return 0.65 * rings * rings + 0.45 * noise(draws, size, 4, 4)


def ice(draws: Draws, size: int) -> Plane:
    cracks = np.minimum(
        np.abs(noise(draws, size, 4, 4) - noise(draws, size, 3, 3)),
        np.abs(noise(draws, size, 3, 5) - noise(draws, size, 5, 3)),
    )
    return np.clip(cracks * 12.0, 0.0, 0.75) + 0.25 * noise(draws, size, 6, 6)


BACKGROUNDS: dict[str, Background] = {
    "sand": Background(sand, (176, 140, 92), (236, 212, 164), "land", "sand"),
    "grass": Background(grass, (40, 66, 22), (128, 152, 62), "land", "grass"),
    "rock": Background(rock, (64, 58, 54), (158, 150, 144), "land", "rock"),
    "sea": Background(sea, (22, 52, 92), (150, 186, 208), "water", "the sea"),
    "pond": Background(pond, (38, 84, 84), (116, 164, 150), "water", "a pond"),
    "ice": Background(ice, (84, 132, 176), (186, 214, 234), "water", "ice"),
}
