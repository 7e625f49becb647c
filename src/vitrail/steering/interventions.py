"""Latents, neurons or directions set, added, scaled or ablated inside the forward pass, by a stated dose.

    z           what is there: the coder's code, the coordinate, the projection on a unit direction
    change      set: v - z   add: v (a code stays >= 0)   scale: (v - 1) z   ablate: -z
    x'          x + s sum_j change_j direction_j         the error term x - x_hat stays; the default
    x'          x_hat + s sum_j change_j direction_j     the replacing form (keep_error=False), of coders only

s undoes the coder's normalisation: the scale of the data, or of the row. v is in units of z (`absolute`), of the
latent's own scale (`own`: its largest activation, or its mean where it fires), or is the L2 norm of the edit in raw
activations (`norm`), the only one in which latents, neurons and directions can be compared. A row in which nothing
changes is returned bit for bit.

"Steering CLIP's vision transformer with sparse autoencoders", section 6.1, sets a latent to 150 "across all patches";
whether the error is kept and CLS is among them is not said (SPEC row 106). Neurons there are set to the same 150,
which on a coordinate is another size of edit (row 116).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from math import isfinite
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
from vitrail.concepts.editing import columns_of

Operation = Literal["set", "add", "scale", "ablate"]
Unit = Literal["absolute", "own", "norm"]
Own = Literal["max", "mean"]
Where = str | Tensor

# ------------------------------------------------------------------------------------------------------------- doses


@dataclass(frozen=True)
class Dose:
    """What is done, and how much of it.

    unit     absolute: `value` is in units of z.  own: times the latent's own scale.  norm: `value` is the L2 norm of
             each row's edit in raw activations; goes with `add` alone.
    Raises ValueError for an unknown operation or unit, a value that is not finite, or `norm` with another operation.
    """

    operation: str = "set"
    value: float = 0.0
    unit: str = "absolute"

    def __post_init__(self) -> None:
        for name, known in (("operation", get_args(Operation)), ("unit", get_args(Unit))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}.")
        if not isfinite(self.value):
            raise ValueError(f"a dose must be a finite number, got {self.value}.")
        if self.unit == "norm" and self.operation != "add":
            raise ValueError(f"a dose in the norm of the edit is added; it does not {self.operation}.")
        if self.unit != "absolute" and self.operation not in ("set", "add"):
            raise ValueError(f"{self.operation} takes no unit, got {self.unit!r}: leave it at 'absolute'.")

    @classmethod
    def of(cls, text: str) -> "Dose":
        """ "set:150", "own:3" (set to three times the own scale), "norm:12", "add:5", "scale:2", "ablate"."""
        name, _, number = text.partition(":")
        if name == "ablate" and not number:
            return cls("ablate")
        kinds = {"set": ("set", "absolute"), "own": ("set", "own"), "norm": ("add", "norm")}
        kinds |= {"add": ("add", "absolute"), "scale": ("scale", "absolute")}
        try:
            return cls(kinds[name][0], float(number), kinds[name][1])
        except (KeyError, ValueError) as error:
            known = "set:150, own:3, norm:12, add:5, scale:2 or ablate"
            raise ValueError(f"a dose is one of {known}, got {text!r}.") from error

    def with_value(self, value: float) -> "Dose":
        return Dose(self.operation, value, self.unit)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


# ----------------------------------------------------------------------------------------------- what can be steered


@dataclass(frozen=True, eq=False)
class Reading:
    """What a basis finds in n rows: `columns(which)` is z, (n, m); `scale` the raw length of a step of one along a
    direction of length one, a number or (n, 1); `x_hat()` the rows without what the basis misses."""

    basis: "Basis"
    columns: Callable[[Int[Tensor, " m"]], Float[Tensor, "n m"]]
    scale: Tensor | float
    x_hat: Callable[[], Float[Tensor, "n d"]]

    def change(
        self,
        which: Int[Tensor, " m"],
        dose: Dose,
        *,
        own: Float[Tensor, " n_basis"] | None = None,
        per_row: Float[Tensor, "n 1"] | None = None,
    ) -> Float[Tensor, "n m"]:
        """z' - z. `own`: each coordinate's own scale, for doses in it. `per_row`: multiplies a dose in `norm`.

        Raises ValueError where `own` is needed and is not given, or a code would become negative.
        """
        if self.basis.non_negative and dose.operation in ("set", "scale") and dose.value < 0:
            raise ValueError(f"codes are not negative, so {dose.operation} {dose.value} cannot be.")
        z = self.columns(which)
        if dose.operation == "ablate":
            return -z
        if dose.operation == "scale":
            return (dose.value - 1) * z
        if dose.unit == "norm":
            lengths = torch.linalg.vector_norm(self.basis.directions(which), dim=1)
            wanted = torch.as_tensor(dose.value if per_row is None else dose.value * per_row).to(z)
            change = wanted / (lengths * self.scale).clamp_min(torch.finfo(z.dtype).tiny)
            return torch.where(lengths > 0, change, 0.0).expand_as(z)
        value = torch.full_like(z, dose.value)
        if dose.unit == "own":
            if own is None:
                raise ValueError("a dose in units of the own scale needs the own scales: see Basis.own.")
            value = value * own.to(z)[which]
        if dose.operation == "set":
            return value - z
        return torch.maximum(value, -z) if self.basis.non_negative else value

    def steps(
        self,
        which: Int[Tensor, " m"],
        dose: Dose,
        *,
        own: Float[Tensor, " n_basis"] | None = None,
        per_row: Float[Tensor, "n 1"] | None = None,
    ) -> Float[Tensor, "n m"]:
        """What each direction is multiplied by before it is added to the raw rows: scale x change."""
        return self.scale * self.change(which, dose, own=own, per_row=per_row)


class Basis(ABC):
    """n coordinates of rows of `width` numbers, each with a direction in raw activations. `kind` goes into tables."""

    kind: str
    n: int
    width: int
    non_negative: bool = False

    @abstractmethod
    def directions(self, which: Int[Tensor, " m"]) -> Float[Tensor, "m d"]:
        """The raw row moves along these."""

    @abstractmethod
    def read(self, x: Float[Tensor, "n d"]) -> Reading: ...

    @abstractmethod
    def own(self, x: Float[Tensor, "n d"], how: Own = "max") -> Float[Tensor, " n_basis"]:
        """Each coordinate's own scale over these rows: its largest activation, or the mean where it fires.

        Of signed coordinates the same of their absolute values. 0 for a latent that never fires: doses in its own
        scale leave it alone.
        """

    @property
    @abstractmethod
    def device(self) -> torch.device: ...

    def checked(self, which: Sequence[int] | Tensor) -> Int[Tensor, " m"]:
        """Raises ValueError where there is none, IndexError for one outside 0..n-1."""
        chosen = torch.as_tensor(which, dtype=torch.int64, device=self.device).reshape(-1)
        if len(chosen) == 0:
            raise ValueError(f"there is nothing to steer: name at least one of the {self.kind}.")
        outside = chosen[(chosen < 0) | (chosen >= self.n)]
        if len(outside):
            raise IndexError(f"{self.kind} are 0..{self.n - 1}, got {int(outside[0])}.")
        return chosen


class Latents(Basis):
    """A coder's latents. Raises ValueError for one whose output is not what it reads (transcoders, crosscoders)."""

    kind, non_negative = "latents", True

    def __init__(self, coder: SparseCoder) -> None:
        if isinstance(coder, Transcoder | MultiSource):
            raise ValueError(f"a {coder.name} does not reconstruct one point from itself: its latents cannot steer it.")
        self.coder, self.n, self.width = coder, coder.d_sae, coder.d_in

    @property
    def device(self) -> torch.device:
        return self.coder.W_dec.device

    def directions(self, which: Int[Tensor, " m"]) -> Float[Tensor, "m d"]:
        return self.coder.W_dec.detach()[which]

    @torch.no_grad()
    def read(self, x: Float[Tensor, "n d"]) -> Reading:
        if len(x) == 0:  # a row's own standard deviation is not taken of none without a warning
            return self.reading(Codes.from_dense(x.new_zeros(0, self.n)))
        return self.reading(self.coder.encode_sparse(x))

    def reading(self, codes: Codes) -> Reading:
        """Of rows that were encoded before."""
        scale = codes.scale if codes.scale is not None else getattr(self.coder.normalize, "scale", 1.0)
        return Reading(self, lambda which: columns_of(codes, which), scale, lambda: self.coder.decode_sparse(codes))

    @torch.no_grad()
    def own(self, x: Float[Tensor, "n d"], how: Own = "max") -> Float[Tensor, " n_basis"]:
        return own_of_codes(self.coder.encode_sparse(x), how)


class Directions(Basis):
    """Given directions, made unit rows; what is there is the projection, with its sign.

    Raises ValueError for a row of zeros, or one that is not finite.
    """

    def __init__(self, rows: Float[Tensor, "n d"], *, kind: str = "directions") -> None:
        norms = torch.linalg.vector_norm(rows.float(), dim=1, keepdim=True)
        if rows.ndim != 2 or not bool((torch.isfinite(norms) & (norms > 0)).all()):
            raise ValueError("directions must be (n, d), finite, and none of them 0.")
        self.rows, self.kind = rows.float() / norms, kind
        self.n, self.width = rows.shape

    @property
    def device(self) -> torch.device:
        return self.rows.device

    def directions(self, which: Int[Tensor, " m"]) -> Float[Tensor, "m d"]:
        return self.rows[which]

    def read(self, x: Float[Tensor, "n d"]) -> Reading:
        x = x.to(self.rows)
        return Reading(self, lambda which: x @ self.rows[which].T, 1.0, _has_no_error)

    def own(self, x: Float[Tensor, "n d"], how: Own = "max") -> Float[Tensor, " n_basis"]:
        highest, total = torch.zeros(2, self.n, device=self.device)
        for rows in x.to(self.rows).split(1024):
            z = (rows @ self.rows.T).abs()
            highest, total = torch.maximum(highest, z.amax(0)), total + z.sum(0)
        return _own(how, highest, total, torch.tensor(len(x)))


class Neurons(Basis):
    """The coordinates of the rows themselves. `both_signs`: coordinate k downwards as well, as number width + k."""

    kind = "neurons"

    def __init__(self, width: int, *, both_signs: bool = False, device: torch.device | str = "cpu") -> None:
        if width < 1:
            raise ValueError(f"width must be at least 1, got {width}.")
        self.n, self.width, self._device = width * (1 + both_signs), width, torch.device(device)

    @property
    def device(self) -> torch.device:
        return self._device

    def directions(self, which: Int[Tensor, " m"]) -> Float[Tensor, "m d"]:
        rows = torch.zeros(len(which), self.width, device=self.device)
        return rows.scatter_(1, which[:, None] % self.width, self._signs(which)[:, None])

    def read(self, x: Float[Tensor, "n d"]) -> Reading:
        rows = x.float()
        return Reading(self, lambda which: rows[:, which % self.width] * self._signs(which), 1.0, _has_no_error)

    def own(self, x: Float[Tensor, "n d"], how: Own = "max") -> Float[Tensor, " n_basis"]:
        size = x.float().abs()
        return _own(how, size.amax(0), size.sum(0), torch.tensor(len(x))).repeat(self.n // self.width)

    def _signs(self, which: Int[Tensor, " m"]) -> Float[Tensor, " m"]:
        return 1.0 - 2.0 * (which >= self.width)


def random_directions(
    n: int, width: int, *, seed: int = 0, device: torch.device | str = "cpu", kind: str = "random"
) -> Directions:
    """n unit rows, uniform on the sphere: the control. The same seed gives the same rows on every device."""
    if n < 1:
        raise ValueError(f"at least one random direction is needed, got {n}.")
    rows = torch.randn(n, width, generator=torch.Generator().manual_seed(seed))
    return Directions(rows.to(device), kind=kind)


# ---------------------------------------------------------------------------------------------------------- the edit


@torch.no_grad()
def moved_rows(
    basis: Basis,
    x: Float[Tensor, "n d"],
    which: Sequence[int] | Tensor,
    dose: Dose,
    *,
    own: Float[Tensor, " n_basis"] | None = None,
    keep_error: bool = True,
) -> Float[Tensor, "n d"]:
    """The rows with these coordinates changed, all of them at once. `x` is left as it is.

    Raises IndexError for a coordinate that is not there, ValueError for rows of another width, for keep_error=False
    where there is no reconstruction, and as `Reading.change`.
    """
    chosen = basis.checked(which)
    if x.shape[1] != basis.width:
        raise ValueError(f"these {basis.kind} are of rows {basis.width} wide, got {x.shape[1]}.")
    reading = basis.read(x)
    change = reading.change(chosen, dose, own=own)
    direction = change @ basis.directions(chosen).to(change)
    if not keep_error:
        return (reading.x_hat() + reading.scale * direction).to(x.dtype)
    moved = (x.to(direction.dtype) + reading.scale * direction).to(x.dtype)
    return torch.where((change != 0).any(1, keepdim=True), moved, x)


@dataclass(frozen=True, eq=False)
class Intervention:
    """`which` of `basis`, moved by `dose` at `point`, in every forward pass.

    where        "all", "cls", "spatial" (the patches), or marks of patches, (h, w) for all images or (b, h, w)
    own          own scales, where the dose is in them
    keep_error   the delta form; False: the replacing form, on the same tokens
    """

    point: str
    basis: Basis
    which: Sequence[int] | Tensor
    dose: Dose
    where: Where = "all"
    own: Tensor | None = None
    keep_error: bool = True


def intervention_hook(backbone: Backbone, asked: Intervention) -> Callable[[Tensor, Point], Tensor]:
    """A hook for `backbone.hooks({asked.point: ...})`.

    Raises ValueError where tokens or widths do not fit the point, and as `moved_rows`.
    """
    known = backbone.point(asked.point)
    asked.basis.checked(asked.which)
    if asked.basis.width != known.width:
        found = f"{asked.point} of {backbone.name} is {known.width} wide"
        raise ValueError(f"these {asked.basis.kind} are of rows {asked.basis.width} wide, {found}.")
    if known.has_tokens:
        marks = marked_tokens(backbone, asked.point, asked.where)
    elif isinstance(asked.where, str) and asked.where == "all":
        marks = None
    else:
        raise ValueError(f"{asked.point} has one row an image: steer it with where='all'.")

    def moved(rows: Tensor) -> Tensor:
        return moved_rows(asked.basis, rows, asked.which, asked.dose, own=asked.own, keep_error=asked.keep_error)

    def hook(value: Tensor, _point: Point) -> Tensor:
        if marks is None:
            return moved(value)
        if marks.shape[0] not in (1, len(value)):
            raise ValueError(f"marks are of {marks.shape[0]} images, the batch has {len(value)}.")
        marked = marks.to(value.device).expand(value.shape[:2])
        edited = value.clone()
        edited[marked] = moved(value[marked])
        return edited

    return hook


def intervention_hooks(
    backbone: Backbone, asked: Sequence[Intervention]
) -> list[tuple[str, Callable[[Tensor, Point], Tensor]]]:
    """For `backbone.hooks`. Of several at one point, each reads what the one before it left."""
    if not asked:
        raise ValueError("there is nothing to steer: give at least one intervention.")
    return [(one.point, intervention_hook(backbone, one)) for one in asked]


@contextmanager
def intervened(backbone: Backbone, asked: Intervention | Sequence[Intervention]) -> Iterator[Backbone]:
    """While open, these interventions happen in every forward pass, at one point or several."""
    several = [asked] if isinstance(asked, Intervention) else list(asked)
    with backbone.hooks(intervention_hooks(backbone, several)):
        yield backbone


def marked_tokens(backbone: Backbone, point: str, where: Where) -> Bool[Tensor, "_ t"]:
    """Which tokens of a point with tokens are meant; the first axis is 1, or the images where each has its marks.

    Raises ValueError for a kind of tokens that is not there, or marks of another grid.
    """
    grid, bare = backbone.grid, point == "hook_embed"  # before CLS is added there are only patches
    n_special = 0 if bare else grid.n_special
    if isinstance(where, Tensor):
        if where.dtype != torch.bool or tuple(where.shape[-2:]) != (grid.height, grid.width) or where.ndim > 3:
            raise ValueError(f"marks of patches are bool, {grid.height} x {grid.width}, got {tuple(where.shape)}.")
        patches = rearrange(where, "... h w -> ... (h w)").reshape(-1, grid.n_patches)
        return torch.nn.functional.pad(patches, (n_special, 0), value=False)
    if where == "cls" and (bare or not grid.n_cls):
        raise ValueError(f"{point} of {backbone.name} has no CLS token.")
    marks = torch.zeros(1, n_special + grid.n_patches, dtype=torch.bool)
    marks[:, slice(None) if bare else grid.tokens(where)] = True
    return marks


# ----------------------------------------------------------------------------------------------------------- details


def own_of_codes(codes: Codes, how: Own = "max") -> Float[Tensor, " d_sae"]:
    """Each latent's largest value, or its mean over the rows in which it fires; 0 where it never does."""
    values, latents = codes.values.float(), codes.indices.long()
    zeros = values.new_zeros(codes.d_sae)
    highest = zeros.scatter_reduce(0, latents, values, "amax")
    return _own(how, highest, zeros.scatter_add(0, latents, values), codes.fired())


def _own(how: str, highest: Tensor, total: Tensor, count: Tensor) -> Tensor:
    if how not in get_args(Own):
        raise ValueError(f"an own scale is max or mean, got {how!r}.")
    return highest if how == "max" else total / count.to(total.device).clamp_min(1)


def _has_no_error() -> Tensor:
    raise ValueError("only a coder leaves an error: neurons and directions are steered with keep_error=True.")
