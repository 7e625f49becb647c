"""Outlines as signed distances: negative inside, in the units of (u, v), v downwards, spanning about radius 1.

Where parts join, each reaches well into the other: at a seam both distances would be 0, and the ground show through.

Only + - * /, abs, min, max and sqrt: all exactly rounded, so that the pixels are the same everywhere. The distance is
true along edges and may be a little off at corners, which rounds them by less than a pixel.
Formulas in the manner of Inigo Quilez, "2D distance functions".
"""

import math
from collections.abc import Callable

import numpy as np
from jaxtyping import Float

Plane = Float[np.ndarray, "h w"]
Silhouette = Callable[[Plane, Plane], Plane]


def _length(u: Plane, v: Plane) -> Plane:
    return np.sqrt(u * u + v * v)


def _polygon(*corners: tuple[float, float]) -> Silhouette:
    """A convex polygon: the farthest of its edges' half planes. Corners run clockwise as seen on the screen."""
    edges = []
    for (x0, y0), (x1, y1) in zip(corners, corners[1:] + corners[:1], strict=True):
        length = math.sqrt((x1 - x0) ** 2 + (y1 - y0) ** 2)
        edges.append(((y1 - y0) / length, (x0 - x1) / length, x0, y0))

    def distance(u: Plane, v: Plane) -> Plane:
        planes = [nx * (u - x) + ny * (v - y) for nx, ny, x, y in edges]
        return np.maximum.reduce(planes)

    return distance


_TRIANGLE = _polygon((0.0, -1.0), (0.95, 0.72), (-0.95, 0.72))
_DIAMOND = _polygon((0.0, -1.0), (0.72, 0.0), (0.0, 1.0), (-0.72, 0.0))
_ARROW_HEAD = _polygon((0.05, -0.95), (1.0, 0.0), (0.05, 0.95))
_ARROW_SHAFT = _polygon((-0.95, -0.36), (0.6, -0.36), (0.6, 0.36), (-0.95, 0.36))
_DROP_TIP = _polygon((0.0, -1.05), (0.575, 0.02), (-0.575, 0.02))
_UPPER = _polygon((-0.85, -0.9), (0.85, -0.9), (0.0, 0.12))
_LOWER = _polygon((0.0, -0.12), (0.85, 0.9), (-0.85, 0.9))
# One arm of the star, seen from its axis: tip at the top, valley at 36 degrees.
_STAR_TIP, _STAR_VALLEY = (0.0, -1.06), (0.46 * 0.5877853, -0.46 * 0.8090170)
_COS36, _SIN36 = 0.8090169943749475, 0.5877852522924731


def circle(u: Plane, v: Plane) -> Plane:
    return _length(u, v) - 0.95


def ring(u: Plane, v: Plane) -> Plane:
    return np.abs(_length(u, v) - 0.72) - 0.27


def crescent(u: Plane, v: Plane) -> Plane:
    return np.maximum(_length(u - 0.19, v) - 0.98, 0.78 - _length(u - 0.69, v))


def drop(u: Plane, v: Plane) -> Plane:
    return np.minimum(_length(u, v - 0.33) - 0.65, _DROP_TIP(u, v))


def heart(u: Plane, v: Plane) -> Plane:
    right = np.abs(u)
    lobe = _length(right - 0.46, v + 0.36) - 0.5
    # From the notch between the lobes to the middle of a lobe: deep inside one part wherever it leaves the other.
    top = (0.196 * right - 0.46 * (v + 0.556)) * 2.0
    point = np.maximum((right + v - 0.80) * math.sqrt(0.5), top)
    return np.minimum(lobe, np.maximum(point, right - 0.96))


def square(u: Plane, v: Plane) -> Plane:
    return np.maximum(np.abs(u), np.abs(v)) - 0.8


def diamond(u: Plane, v: Plane) -> Plane:
    return _DIAMOND(u, v)


def triangle(u: Plane, v: Plane) -> Plane:
    return _TRIANGLE(u, v)


def star(u: Plane, v: Plane) -> Plane:
    """Five arms: mirror the plane about the arms' axes until one half arm is left, then one edge decides."""
    u = np.abs(u)
    for nx, ny in ((_COS36, _SIN36), (-_COS36, _SIN36)):
        fold = 2.0 * np.maximum(nx * u + ny * v, 0.0)
        u, v = u - fold * nx, v - fold * ny
    u = np.abs(u)
    (x0, y0), (x1, y1) = _STAR_TIP, _STAR_VALLEY
    length = math.sqrt((x1 - x0) ** 2 + (y1 - y0) ** 2)
    return ((y1 - y0) * (u - x0) - (x1 - x0) * (v - y0)) * (1.0 / length)


def cross(u: Plane, v: Plane) -> Plane:
    across, down = np.abs(u), np.abs(v)
    return np.minimum(np.maximum(across - 0.95, down - 0.34), np.maximum(across - 0.34, down - 0.95))


def arrow(u: Plane, v: Plane) -> Plane:
    return np.minimum(_ARROW_HEAD(u, v), _ARROW_SHAFT(u, v))


def hourglass(u: Plane, v: Plane) -> Plane:
    return np.minimum(_UPPER(u, v), _LOWER(u, v))


SILHOUETTES: dict[str, Silhouette] = {
    "circle": circle,
    "ring": ring,
    "crescent": crescent,
    "drop": drop,
    "heart": heart,
    "square": square,
    "diamond": diamond,
    "triangle": triangle,
    "star": star,
    "cross": cross,
    "arrow": arrow,
    "hourglass": hourglass,
}
