"""A transcoder in the middle of a forward pass: read at one hook point, put in the place of another.

    with transcoding(backbone, coder, "blocks.5.hook_resid_mid", "blocks.5.hook_mlp_out") as replaced:
        output = replaced(images)     # the MLP of block 5 is the transcoder

What Prisma calls a transcoder's substitution error is this. Their code puts the output in the place of the *input* hook
(PEERS.md); here it replaces what it was trained to give.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from vitrail.backbones.base import Backbone
from vitrail.backbones.points import Point
from vitrail.backbones.splice import CoderLike


@contextmanager
def transcoding(
    backbone: Backbone,
    coder: CoderLike,
    source_point: str,
    target_point: str,
    use_error_term: bool = False,
    tokens: str = "all",
    target_tokens: str | None = None,
    edit: Callable[[Tensor, Point], Tensor] | None = None,
) -> Iterator[Backbone]:
    """While open, the value at `target_point` is what `coder` makes of the value at `source_point`, token by token.

    `use_error_term` adds back what the transcoder misses: the output is then bit-identical, gradients flow through the
    coder, and only what `edit(z, point)` does to the codes shows. `edit` needs a coder with encode and decode, and is
    told the target. Edits of other hooks at the source that were opened before are seen. `target_tokens`: where the
    target's tokens are of another kind than the source's.
    """
    source, target = backbone.point(source_point), backbone.point(target_point)
    _check_order(backbone, source, target)
    _check_width(backbone, coder, "d_in", source)
    _check_width(backbone, coder, "d_out", target)
    read, written = _positions(backbone, source, tokens), _positions(backbone, target, target_tokens or tokens)
    if (n := _count(backbone, source, read)) != (m := _count(backbone, target, written)):
        raise ValueError(
            f"{source.name} has {n} {tokens!r} rows per image and {target.name} has {m} "
            f"{target_tokens or tokens!r} rows: a transcoder needs one for one. Choose tokens and target_tokens so."
        )
    held: list[Tensor] = []

    def look(value: Tensor, point: Point) -> None:
        held[:] = [_rows(value, read)]

    def put(value: Tensor, point: Point) -> Tensor:
        if not held:
            raise RuntimeError(
                f"{target.name} was reached without {source.name}: run the model from before block "
                f"{source.layer or 0}, so that the transcoder has something to read."
            )
        x_in = held.pop()  # taken, so that a later run that starts in between cannot meet this one's
        x_in = x_in.to(_dtype(coder, x_in))
        new = _transcoded(coder, x_in, _rows(value, written), point, use_error_term=use_error_term, edit=edit)
        new = new.to(value.dtype)
        if written is None:
            return new
        value = value.clone()
        value[:, written] = rearrange(new, "(b t) d -> b t d", b=len(value))
        return value

    with backbone.hooks([(source.name, look), (target.name, put)]):
        yield backbone


def _transcoded(
    coder: Any,
    x_in: Tensor,
    x_out: Tensor,
    point: Point,
    *,
    use_error_term: bool,
    edit: Callable[[Tensor, Point], Tensor] | None,
) -> Tensor:
    edited = coder(x_in) if edit is None else coder.decode(edit(coder.encode(x_in), point), like=x_in)
    if not use_error_term:
        return edited
    x_hat = edited if edit is None else coder(x_in)
    # As in splice.py: exactly x_out where nothing was edited; the error is detached.
    return x_out.detach() + (edited - x_hat.detach())


def _rows(value: Tensor, positions: slice | None) -> Tensor:
    return value if positions is None else rearrange(value[:, positions], "b t d -> (b t) d")


def _positions(backbone: Backbone, point: Point, tokens: str) -> slice | None:
    if not point.has_tokens:
        return None
    if point.name == "hook_embed":  # there are no special tokens yet
        if tokens == "cls":
            raise ValueError("hook_embed lies before the CLS token is added; use tokens='spatial'.")
        return slice(0, backbone.grid.n_patches)
    return backbone.grid.tokens(tokens)


def _count(backbone: Backbone, point: Point, positions: slice | None) -> int:
    if positions is None:
        return 1
    return len(range(backbone.grid.n_tokens)[positions])


def _check_order(backbone: Backbone, source: Point, target: Point) -> None:
    names = list(backbone.points)
    if names.index(source.name) > names.index(target.name):
        raise ValueError(f"{source.name} is computed after {target.name}: a transcoder reads first and writes later.")


def _check_width(backbone: Backbone, coder: Any, name: str, point: Point) -> None:
    width = getattr(coder, name, None)
    if width is not None and width != point.width:
        raise ValueError(f"coder has {name}={width}, {point.name} of {backbone.name} is {point.width} wide.")


def _dtype(coder: Any, rows: Tensor) -> torch.dtype:
    """The coder's own precision: an fp32 coder reads the activations of an fp16 model in fp32."""
    parameter = next(coder.parameters(), None) if isinstance(coder, nn.Module) else None
    return rows.dtype if parameter is None else parameter.dtype
