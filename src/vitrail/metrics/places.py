"""Where a coder reads and where what it makes is put, and which of an image's tokens these are.

SAE          reads one hook point and writes it
transcoder   reads one and writes another
crosscoder   reads several side by side and writes them all
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from vitrail.backbones.base import Backbone
from vitrail.backbones.grid import Grid
from vitrail.coders.base import SparseCoder
from vitrail.coders.columns import column_slices
from vitrail.coders.crosscoder import MultiSource
from vitrail.coders.sparse import Codes
from vitrail.coders.transcoder import Transcoder
from vitrail.store.tokens import patch_slice, select_tokens


@dataclass(frozen=True)
class Place:
    """Hook points in the order in which they lie in a coder's rows."""

    reads: tuple[str, ...]
    writes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """`point`, and what there is beside it: `target_point` of a transcoder, `points` of a crosscoder."""
        about: dict[str, Any] = {"point": self.reads[0]}
        if self.reads != self.writes:
            about["target_point"] = self.writes[0]
        if len(self.reads) > 1:
            about["points"] = list(self.reads)
        return about


def place_of(
    coder: SparseCoder, *, point: str, target_point: str | None = None, points: Sequence[str] = (), name: str = ""
) -> Place:
    """`target_point` is of transcoders, `points` of crosscoders; a coder of another kind is at `point` alone."""
    called = f"coder {name}" if name else f"a {coder.name} coder"
    if isinstance(coder, Transcoder):
        if target_point is None:
            raise ValueError(f"{called} is a {coder.name}: say with target_point which hook point it writes.")
        return Place((point,), (target_point,))
    if isinstance(coder, MultiSource):
        several = tuple(points) or (point,)
        if len(several) != coder.n_sources:
            raise ValueError(
                f"{called} is a {coder.name} of {coder.n_sources} sources: say with points which hook points they are, "
                f"in the order of its rows; got {', '.join(several)}."
            )
        return Place(several, several)
    return Place((point,), (point,))


def place_in(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """`point`, `target_point` and `points` as a saved coder's metadata says them (`coder_metadata`): the keyword
    arguments of `place_of`. Raises ValueError for a crosscoder of several models: one run of one model has not its
    points.
    """
    found = {name: metadata[name] for name in ("point", "target_point", "points") if metadata.get(name)}
    parts = metadata.get("parts") or []
    models = {part.get("backbone_digest") or part.get("backbone") for part in parts}
    if len(models) > 1:
        raise ValueError(f"this coder reads {len(models)} models side by side; a table runs one.")
    if len(parts) > 1:
        names = [part["point"] for part in parts]
        found = {"point": names[0], **({"target_point": names[1]} if len(names) == 2 else {}), "points": names} | found
    return found


def check_place(backbone: Backbone, coder: SparseCoder, place: Place, *, name: str) -> None:
    """Raises ValueError where widths or the order of computation do not fit, KeyError for an unknown point."""
    widths = {point: backbone.point(point).width for point in (*place.reads, *place.writes)}
    for side, points, takes in (("d_in", place.reads, coder.d_in), ("d_out", place.writes, coder.d_out)):
        if sum(widths[point] for point in points) != takes:
            verb = "takes" if side == "d_in" else "gives"
            raise ValueError(
                f"coder {name} {verb} {side}={takes}, but {' + '.join(points)} of {backbone.name} is "
                f"{' + '.join(str(widths[point]) for point in points)} wide."
            )
    order = list(backbone.points)
    if place.reads != place.writes and order.index(place.reads[0]) > order.index(place.writes[0]):
        raise ValueError(
            f"{place.reads[0]} is computed after {place.writes[0]}: a transcoder reads first and writes later."
        )


def decoded(coder: SparseCoder, codes: Codes, x: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_out"]:
    """The reconstruction of codes, which may have been cut or edited since `x` was encoded."""
    return coder.decode_sparse(codes, like=x) if isinstance(coder, Transcoder) else coder.decode_sparse(codes)


@dataclass(frozen=True)
class Tokens:
    """The rows of a kind, taken from a point's activation and put back into it."""

    grid: Grid
    kind: str

    def rows(self, activations: Mapping[str, Tensor], points: Sequence[str]) -> Float[Tensor, "b t d"]:
        """fp32, the points side by side."""
        parts = [select_tokens(activations[point], self.grid, self.kind).float() for point in points]
        if len({part.shape[1] for part in parts}) > 1:
            counts = ", ".join(f"{point} {part.shape[1]}" for point, part in zip(points, parts, strict=True))
            raise ValueError(f"these points have not the same rows of {self.kind!r} tokens per image: {counts}.")
        return parts[0] if len(parts) == 1 else torch.cat(parts, 2)

    def put(self, activation: Float[Tensor, "b ..."], rows: Float[Tensor, "b t d"]) -> Float[Tensor, "b ..."]:
        """The activation with `rows` in the place of its own."""
        if activation.ndim == 2:
            return rows[:, 0].to(activation)
        if self.kind == "pooled":
            # A pooled row stands for all patches: moving their mean moves each of them alike.
            where = patch_slice(self.grid, activation.shape[1])
            patches = activation[:, where]
            moved = activation.clone()
            moved[:, where] = patches + (rows.to(activation) - patches.mean(1, keepdim=True))
            return moved
        if rows.shape[1] == activation.shape[1]:
            return rows.to(activation)
        value = activation.clone()
        value[:, self.grid.tokens(self.kind)] = rows.to(activation)
        return value

    def put_all(
        self, activations: Mapping[str, Tensor], points: Sequence[str], rows: Float[Tensor, "b t d"]
    ) -> dict[str, Tensor]:
        """The same for points side by side."""
        columns = column_slices([activations[point].shape[-1] for point in points])
        return {point: self.put(activations[point], rows[..., c]) for point, c in zip(points, columns, strict=True)}
