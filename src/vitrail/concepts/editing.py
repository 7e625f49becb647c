"""Concepts set, added, scaled or removed, in an embedding or inside the forward pass; what else that changes.

    z = encode(x),   z' = edit(z)
    x' = x + s (z' - z) W_dec                 the error term x - x_hat stays as it is; the default
    x' = decode(z')                           without it

s undoes the coder's normalisation: the scale of the data, or of the row. Only the edited latents enter the sum, and a
row of which none changes is returned bit for bit.

MSAE (Zaigrajew et al. 2025, arXiv:2502.20578), section 5.2 and figures 6-7, sets a latent, decodes and queries again;
whether its error term is kept is not said (SPEC row 101).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vitrail.backbones.base import Backbone
from vitrail.backbones.points import Point
from vitrail.coders.base import SparseCoder
from vitrail.coders.crosscoder import MultiSource
from vitrail.coders.sparse import Codes
from vitrail.coders.transcoder import Transcoder
from vitrail.concepts.inverted import Neighbours
from vitrail.concepts.search import Names, latents_named
from vitrail.metrics.heads import Head

Operation = Literal["set", "add", "scale", "remove"]


@dataclass(frozen=True)
class Edit:
    """One operation on one latent or several, in the coder's own units.

    set: z_i = value.   add: z_i = max(0, z_i + value).   scale: z_i = value z_i.   remove: z_i = 0.
    Raises ValueError for another operation, a value that is missing, not finite or would make codes negative.
    """

    latents: tuple[int, ...]
    operation: str
    value: float = 0.0

    def __post_init__(self) -> None:
        if self.operation not in get_args(Operation):
            raise ValueError(f"operation must be one of {', '.join(get_args(Operation))}, got {self.operation!r}.")
        if not self.latents:
            raise ValueError("an edit needs at least one latent.")
        if not torch.isfinite(torch.tensor(self.value)) or (self.operation in ("set", "scale") and self.value < 0):
            raise ValueError(f"codes are finite and not negative, so {self.operation} {self.value} cannot be.")

    @classmethod
    def of(cls, concept: str | int, operation: str, value: float = 0.0, *, names: Names | None = None) -> "Edit":
        """`concept`: a latent's number, or a name in `names` (every latent of that name).

        Raises KeyError where there is no such name, ValueError where a name is given and no names are.
        """
        if isinstance(concept, int) or concept.isdigit():
            return cls((int(concept),), operation, value)
        if names is None:
            raise ValueError(f"{concept!r} is no latent's number, and no table of names was given.")
        return cls(latents_named(concept, names), operation, value)

    def with_value(self, value: float) -> "Edit":
        return Edit(self.latents, self.operation, value)

    def apply(self, z: Float[Tensor, "n m"]) -> Float[Tensor, "n m"]:
        if self.operation == "set":
            return torch.full_like(z, self.value)
        if self.operation == "add":
            return (z + self.value).clamp_min(0)
        return z * self.value if self.operation == "scale" else torch.zeros_like(z)


def latents_of(edits: Sequence[Edit], d_sae: int) -> tuple[int, ...]:
    """All latents that are edited. Raises IndexError for one outside 0..d_sae-1, ValueError where there is none."""
    latents = tuple(sorted({latent for edit in edits for latent in edit.latents}))
    if not latents:
        raise ValueError("there is nothing to edit: give at least one edit.")
    if latents[0] < 0 or latents[-1] >= d_sae:
        raise IndexError(f"latent must be in 0..{d_sae - 1}, got {latents[0] if latents[0] < 0 else latents[-1]}.")
    return latents


@torch.no_grad()
def edit_rows(
    coder: SparseCoder, x: Float[Tensor, "n d_in"], edits: Sequence[Edit], *, keep_error: bool = True
) -> Float[Tensor, "n d_in"]:
    """The rows with their concepts changed, edits in the order given. `x` is left as it is.

    Raises ValueError for a coder whose output is not what it reads (transcoders, crosscoders), and as `latents_of`.
    """
    latents = latents_of(edits, coder.d_sae)
    if isinstance(coder, Transcoder | MultiSource):
        raise ValueError(f"a {coder.name} does not reconstruct one point from itself, so its latents cannot edit it.")
    codes = coder.encode_sparse(x)
    before = columns_of(codes, torch.tensor(latents))
    after, place = before.clone(), {latent: i for i, latent in enumerate(latents)}
    for edit in edits:
        at = [place[latent] for latent in edit.latents]
        after[:, at] = edit.apply(after[:, at])
    change = after - before
    direction = change @ coder.W_dec[list(latents)]
    if not keep_error:
        base = coder.decode_sparse(codes)
        return (base + _scale(coder, codes) * direction).to(x.dtype)
    moved = (x.to(direction.dtype) + _scale(coder, codes) * direction).to(x.dtype)
    return torch.where((change != 0).any(1, keepdim=True), moved, x)


# -- inside the forward pass


def edit_hook(
    backbone: Backbone,
    point: str,
    coder: SparseCoder,
    edits: Sequence[Edit],
    *,
    where: str | Bool[Tensor, "*b h w"] = "all",
    keep_error: bool = True,
) -> Callable[[Tensor, Point], Tensor]:
    """A hook for `backbone.hooks({point: ...})` that edits these tokens.

    `where`: "all", "cls", "spatial" (the patches), or marks of patches, one map for all images or one each. A pooled
    point has one row an image, and takes "all" only. Raises ValueError where that does not fit, or widths do not.
    """
    known, grid = backbone.point(point), backbone.grid
    latents_of(edits, coder.d_sae)
    if coder.d_in != known.width:
        raise ValueError(f"coder takes d_in={coder.d_in}, {point} of {backbone.name} is {known.width} wide.")
    if not known.has_tokens and not (isinstance(where, str) and where == "all"):
        raise ValueError(f"{point} has one row an image: edit it with where='all'.")
    n_special = 0 if point == "hook_embed" else grid.n_special  # before CLS is added there are only patches
    if isinstance(where, Tensor) and tuple(where.shape[-2:]) != (grid.height, grid.width):
        raise ValueError(f"marks of patches are {grid.height} x {grid.width}, got {tuple(where.shape)}.")
    if isinstance(where, str) and where == "cls" and n_special == 0:
        raise ValueError(f"{point} of {backbone.name} has no CLS token.")

    def hook(value: Tensor, _point: Point) -> Tensor:
        if not known.has_tokens:
            return edit_rows(coder, value, edits, keep_error=keep_error)
        marked = torch.zeros(value.shape[:2], dtype=torch.bool, device=value.device)
        if isinstance(where, Tensor):
            marked[:, n_special:] = rearrange(where, "... h w -> ... (h w)").to(value.device)
        else:
            marked[:, slice(None) if n_special == 0 else grid.tokens(where)] = True
        edited = value.clone()
        edited[marked] = edit_rows(coder, value[marked], edits, keep_error=keep_error)
        return edited

    return hook


@contextmanager
def edited(
    backbone: Backbone,
    point: str,
    coder: SparseCoder,
    edits: Sequence[Edit],
    *,
    where: str | Bool[Tensor, "*b h w"] = "all",
    keep_error: bool = True,
) -> Iterator[Backbone]:
    """While open, these concepts are changed in every forward pass; arguments and errors as `edit_hook`."""
    hook = edit_hook(backbone, point, coder, edits, where=where, keep_error=keep_error)
    with backbone.hooks({point: hook}):
        yield backbone


# -- what else an edit does


@dataclass(frozen=True)
class Drift:
    """What an edit changed, means over images (or rows). None where there are no classes, or no targets.

    norm_share         |x' - x| / |x| of the rows that were edited
    probability        of the target classes together: after minus before
    others             total variation between the other classes' probabilities, 0 to 1, the targets' share taken out:
                       0 where the others only made room, whatever the targets took
    top_changed        share of images whose most probable class is another one
    latents_changed    other latents that fire only before or only after, in x' encoded again
    codes_share        sum of |z'' - z| over the other latents, divided by the sum of their z; z'' = encode(x')
    reached            what the edited latents are in z'', divided by what they were to become; None where that is 0
    """

    norm_share: float
    probability: float | None
    others: float | None
    top_changed: float | None
    latents_changed: float
    codes_share: float
    reached: float | None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@torch.no_grad()
def drift(
    coder: SparseCoder,
    before: Float[Tensor, "n d_in"],
    after: Float[Tensor, "n d_in"],
    edits: Sequence[Edit],
    *,
    outputs: tuple[Float[Tensor, "m d_out"], Float[Tensor, "m d_out"]] | None = None,
    head: Head | None = None,
    targets: Sequence[int] = (),
) -> Drift:
    """`before`, `after`: the edited rows at the point. `outputs`: the backbone's, of the same images, for `head`.

    Raises ValueError where there are no rows or where targets leave no other class, IndexError for an unknown target.
    """
    if len(before) == 0:
        raise ValueError("drift is measured over at least one row.")
    latents = list(latents_of(edits, coder.d_sae))
    norms = torch.linalg.vector_norm(before.double(), dim=1).clamp_min(torch.finfo(torch.float64).tiny)
    moved = torch.linalg.vector_norm((after - before).double(), dim=1) / norms
    first, again = coder.encode_sparse(before), coder.encode_sparse(after)
    wanted = columns_of(first, torch.tensor(latents))
    place = {latent: i for i, latent in enumerate(latents)}
    for edit in edits:
        at = [place[latent] for latent in edit.latents]
        wanted[:, at] = edit.apply(wanted[:, at])
    is_other = torch.ones(coder.d_sae, dtype=torch.bool, device=before.device)
    is_other[latents] = False
    flipped, changed, total = 0.0, 0.0, 0.0
    for rows in torch.arange(len(before)).split(256):  # dense, but few rows at a time
        z, new = (c.select_rows(rows.to(c.device)).to_dense()[:, is_other].double() for c in (first, again))
        flipped += float(((z > 0) != (new > 0)).sum())
        changed, total = changed + float((new - z).abs().sum()), total + float(z.sum())
    found, asked = float(columns_of(again, torch.tensor(latents)).double().sum()), float(wanted.double().sum())
    return Drift(
        norm_share=float(moved.mean()),
        **_class_drift(outputs, head, targets),
        latents_changed=flipped / len(before),
        codes_share=changed / total if total else 0.0,
        reached=found / asked if asked else None,
    )


def _class_drift(
    outputs: tuple[Tensor, Tensor] | None, head: Head | None, targets: Sequence[int]
) -> dict[str, float | None]:
    if outputs is None or head is None:
        return {"probability": None, "others": None, "top_changed": None}
    p, new = (head(output).double().softmax(1) for output in outputs)
    top_changed = float((p.argmax(1) != new.argmax(1)).double().mean())
    if not targets:
        return {"probability": None, "others": float((p - new).abs().sum(1).mean() / 2), "top_changed": top_changed}
    is_target = torch.zeros(p.shape[1], dtype=torch.bool, device=p.device)
    is_target[list(targets)] = True
    if bool(is_target.all()):
        raise ValueError("every class is a target: there are no others to see drift in.")
    tiny = torch.finfo(torch.float64).tiny
    others, new_others = (q[:, ~is_target] / q[:, ~is_target].sum(1, keepdim=True).clamp_min(tiny) for q in (p, new))
    return {
        "probability": float((new[:, is_target].sum(1) - p[:, is_target].sum(1)).mean()),
        "others": float((others - new_others).abs().sum(1).mean() / 2),
        "top_changed": top_changed,
    }


# -- the same query, edited more and more


@dataclass(frozen=True)
class Requery:
    """The neighbours of one strength. `kept`: share of the unedited query's k neighbours that are still there."""

    strength: float
    neighbours: Neighbours
    kept: tuple[float, ...]
    drift: Drift | None = None

    def to_json(self) -> dict[str, Any]:
        found = self.neighbours
        told = {"strength": self.strength, "kept": list(self.kept), "rows": found.rows.tolist()}
        return {**told, "values": found.values.tolist(), "drift": None if self.drift is None else self.drift.to_json()}


def requery(
    search: Callable[[Tensor], Neighbours],
    embeddings: Float[Tensor, "m d_embed"],
    edited_at: Mapping[float, Float[Tensor, "m d_embed"]],
    drifts: Mapping[float, Drift] | None = None,
) -> list[Requery]:
    """How the neighbours of m queries change with strength (MSAE figure 7).

    `search`: embeddings to neighbours, as `lambda q: index.nearest(q, 8)`. `edited_at`: the queries' embeddings at each
    strength, however they were edited. Raises ValueError where a strength has another number of rows.
    """
    original = search(embeddings).rows
    table = []
    for strength, rows in edited_at.items():
        if len(rows) != len(embeddings):
            raise ValueError(f"strength {strength} has {len(rows)} queries, not {len(embeddings)}.")
        found = search(rows)
        kept = (original[:, :, None] == found.rows[:, None, :]).any(2).double().mean(1)
        table.append(Requery(strength, found, tuple(kept.tolist()), (drifts or {}).get(strength)))
    return table


# -- details


def columns_of(codes: Codes, which: Int[Tensor, " m"]) -> Float[Tensor, "n m"]:
    """The asked latents of every row, dense: nothing of n x d_sae. A latent may be asked for twice."""
    latents, back = which.to(codes.device).unique(return_inverse=True)
    place = torch.full((codes.d_sae,), -1, device=codes.device)
    place[latents] = torch.arange(len(latents), device=codes.device)
    at = place[codes.indices.long()]
    asked = at >= 0
    z = codes.values.new_zeros(codes.n, len(latents))
    return z.index_put((codes.rows()[asked], at[asked]), codes.values[asked])[:, back]


def _scale(coder: SparseCoder, codes: Codes) -> Tensor | float:
    """What a step in normalised space is multiplied by to be one in raw activations."""
    if codes.scale is not None:
        return codes.scale
    return getattr(coder.normalize, "scale", 1.0)
