"""One pass over the images feeds every metric: what a metric is shown, and what it gives back.

A pass runs the backbone once per batch, encodes once, decodes once, and shows the same `Seen` to each metric. A metric
keeps sums, or a bounded sample; nothing of size rows x d_sae. At the end it gives `Measured` numbers, and `curves`:
small tables that are drawn rather than read (a histogram's bins, a number at each k, a map of patches).
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor

from vitrail.backbones.grid import Grid
from vitrail.coders.base import SparseCoder
from vitrail.coders.sparse import Codes
from vitrail.metrics.measured import Measured

Curve = list[dict[str, Any]]  # one row per point, all with the same keys; full precision


@dataclass(frozen=True, eq=False)
class Seen:
    """A batch of whole images, image-major: t rows an image, the tokens that the coder was trained on.

    `x`: raw activations where the coder reads; `target`: where it writes (the same tensor, but for transcoders and
    crosscoders); `x_hat`: its reconstruction of `target`. `codes` has b * t rows.
    """

    x: Float[Tensor, "b t d_in"]
    target: Float[Tensor, "b t d_out"]
    codes: Codes
    x_hat: Float[Tensor, "b t d_out"]
    labels: Int[Tensor, " b"] | None = None
    positions: Sequence[int] = ()  # of the images in their source

    @property
    def n_images(self) -> int:
        return self.x.shape[0]

    @property
    def n_tokens(self) -> int:
        return self.x.shape[1]


@dataclass(frozen=True, eq=False, kw_only=True)
class Setting:
    """What a metric may know before the first batch."""

    coder: SparseCoder
    n_tokens: int  # rows an image
    tokens: str  # their kind: all, spatial, cls, pooled
    grid: Grid
    cls_token: int | None  # which of an image's rows is the CLS token
    patches: slice | None  # which are its patches; None: none is
    n_images: int  # that will be shown, at most
    shift: Float[Tensor, " d_out"]  # a rough mean of `target`'s rows, from training rows
    seed: int = 0

    @property
    def d_sae(self) -> int:
        return self.coder.d_sae


class Metric(ABC):
    """Streams over a pass."""

    @abstractmethod
    def update(self, seen: Seen) -> None: ...

    @abstractmethod
    def compute(self, *, n_bootstrap: int = 1000, seed: int = 0) -> dict[str, Measured]:
        """Intervals are over images, unless the definition says otherwise."""

    def curves(self) -> dict[str, Curve]:
        """Name -> table. Values only; drawing is studies/figures.py's."""
        return {}


def finite(value: Any) -> Any:
    """NaN and infinities as None: they are no JSON."""
    if isinstance(value, Mapping):
        return {key: finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
