"""A sparse coder in the middle of a forward pass: activations replaced by their reconstructions."""

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

from einops import rearrange
from torch import Tensor, nn

from vitrail.backbones.points import Point


@runtime_checkable
class CoderLike(Protocol):
    """(n, d_in) -> (n, d_in). What this room knows of sparse coders; `d_in` is checked where there is one."""

    def __call__(self, x: Tensor, /) -> Tensor: ...


def splice(
    coder: CoderLike,
    positions: slice | None,
    *,
    use_error_term: bool,
    edit: Callable[[Tensor, Point], Tensor] | None,
) -> Callable[[Tensor, Point], Tensor]:
    """A hook that reconstructs these token positions (None: the value is one row per image)."""

    def hook(value: Tensor, point: Point) -> Tensor:
        chosen = value if positions is None else value[:, positions]
        rows = chosen if positions is None else rearrange(chosen, "b t d -> (b t) d")
        new = _reconstruct(coder, rows.to(_dtype(coder, rows)), point, use_error_term=use_error_term, edit=edit)
        new = new.to(value.dtype)
        if positions is None:
            return new
        value = value.clone()
        value[:, positions] = rearrange(new, "(b t) d -> b t d", b=len(value))
        return value

    return hook


def _reconstruct(
    coder: Any,
    x: Tensor,
    point: Point,
    *,
    use_error_term: bool,
    edit: Callable[[Tensor, Point], Tensor] | None,
) -> Tensor:
    edited = coder(x) if edit is None else coder.decode(edit(coder.encode(x), point), like=x)
    if not use_error_term:
        return edited
    x_hat = edited if edit is None else coder(x)
    # x_hat + (x - x_hat) is x only up to rounding. This is x exactly where nothing was edited; the error is detached.
    return x.detach() + (edited - x_hat.detach())


def _dtype(coder: Any, rows: Tensor) -> Any:
    """The coder's own precision: an fp32 coder reads the activations of an fp16 model in fp32."""
    parameter = next(coder.parameters(), None) if isinstance(coder, nn.Module) else None
    return rows.dtype if parameter is None else parameter.dtype
