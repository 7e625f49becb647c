"""What an outline is filled with: the share of the second tone at (u, v), both in pixels of a 64-pixel image.

Edges between the tones are softened over one pixel by their distance, like the outline itself.
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float

Plane = Float[np.ndarray, "h w"]
Fill = Callable[[Plane, Plane], Plane]


def _from_edge(x: Plane, period: float) -> Plane:
    """Signed distance to the nearest edge of a square wave: positive on one half of the period."""
    return (np.abs(x * (1.0 / period) - np.floor(x * (1.0 / period)) - 0.5) - 0.25) * period


def plain(u: Plane, v: Plane) -> Plane:
    return np.zeros_like(u)


def striped(u: Plane, v: Plane) -> Plane:
    return np.clip(0.5 + _from_edge(v, 6.0), 0.0, 1.0)


def dotted(u: Plane, v: Plane) -> Plane:
    across = (u * (1.0 / 6.0) - np.floor(u * (1.0 / 6.0)) - 0.5) * 6.0
    down = (v * (1.0 / 6.0) - np.floor(v * (1.0 / 6.0)) - 0.5) * 6.0
    return np.clip(0.5 + 1.75 - np.sqrt(across * across + down * down), 0.0, 1.0)


def checked(u: Plane, v: Plane) -> Plane:
    across, down = _from_edge(u, 9.0), _from_edge(v, 9.0)
    distance = np.minimum(np.abs(across), np.abs(down))
    return np.clip(0.5 + np.where(across * down > 0.0, distance, -distance), 0.0, 1.0)


FILLS: dict[str, Fill] = {"plain": plain, "striped": striped, "dotted": dotted, "checked": checked}
