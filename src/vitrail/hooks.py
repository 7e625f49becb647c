"""The one file that touches PyTorch hooks: look at, replace, or stop after a named place in a module.

A `Site` is a place: the input or the output of a module, in a layout. Callers name their sites; nothing here depends on
the order in which modules fire. Hooks are gone when the `with` block ends, also by an exception.

Callbacks see tokens `(b, t, d)`, or `(b, d)` after pooling, whatever the library's layout. An editing callback gets a
copy, so that what it does to its argument changes nothing unless it is returned.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from einops import rearrange
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

Callback = Callable[[Tensor], Tensor | None]
Layout = Literal["tokens", "channels_first", "channels_last"]


@dataclass(frozen=True, eq=False)
class Site:
    """`layout`: "tokens" as it is; "channels_first" (b, d, h, w) and "channels_last" (b, h, w, d) become (b, h*w, d).

    `in_place`: an edit is written into the tensor itself, because the module's caller keeps using that same tensor.
    """

    module: nn.Module
    at: Literal["input", "output"]
    layout: Layout = "tokens"
    in_place: bool = False


@contextmanager
def editing(edits: Iterable[tuple[str, Site, Callback]]) -> Iterator[None]:
    """While open, what each callback returns replaces what is at its site (None: left as it is), in the order given."""
    handles: list[RemovableHandle] = []
    try:
        for name, site, callback in edits:
            handles.append(_attach(name, site, callback, copy=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def capturing(sites: Mapping[str, Site], *, stop: bool = False) -> Iterator[dict[str, Tensor]]:
    """While open, what passes each site is kept by name, as it is after the edits that were opened before.

    `stop`: once every site was seen, leave the `with` block without computing the rest.
    """
    cache: dict[str, Tensor] = {}
    all_seen = _AllSeen()

    def keep(name: str) -> Callback:
        def callback(value: Tensor) -> None:
            cache[name] = value
            if stop and len(cache) == len(sites):
                raise all_seen

        return callback

    handles: list[RemovableHandle] = []
    try:
        for name, site in sites.items():
            handles.append(_attach(name, site, keep(name), copy=site.in_place))
        yield cache
    except _AllSeen as raised:
        if raised is not all_seen:  # it belongs to a capture around this one
            raise
    finally:
        for handle in handles:
            handle.remove()


class _AllSeen(Exception):
    """Leaves a forward pass of which nothing more is wanted."""


def _attach(name: str, site: Site, callback: Callback, *, copy: bool) -> RemovableHandle:
    def replaced(raw: Tensor) -> Tensor | None:
        seen = _to_tokens(raw, site.layout)
        new = callback(seen.clone() if copy else seen)
        if new is None:
            return None
        new = _from_tokens(_checked(new, seen, name), raw, site.layout)
        if not site.in_place:
            return new
        # The residual stream between attention and MLP is one tensor with two readers: the norm before the MLP, and the
        # skip connection. Replacing the norm's input would leave the skip with the old value. The tensor was made by an
        # addition, which keeps nothing for its backward pass, so autograd allows (and follows) the write.
        raw.copy_(new)
        return None

    def on_input(_module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
        new = replaced(arguments[0])
        return None if new is None else (new, *arguments[1:])

    def on_output(_module: nn.Module, _arguments: tuple[Any, ...], output: Any) -> Any:
        # Attention modules of several libraries return (tokens, weights), and so did some blocks.
        if not isinstance(output, tuple):
            return replaced(output)
        new = replaced(output[0])
        return None if new is None else (new, *output[1:])

    if site.at == "input":
        return site.module.register_forward_pre_hook(on_input)
    return site.module.register_forward_hook(on_output)


def _checked(new: Any, seen: Tensor, name: str) -> Tensor:
    if not isinstance(new, Tensor):
        raise TypeError(f"a hook on {name!r} returned a {type(new).__name__}; return a Tensor, or None to only look.")
    if new.shape != seen.shape:
        raise ValueError(f"a hook on {name!r} returned shape {tuple(new.shape)}; it must be {tuple(seen.shape)}.")
    return new.to(seen.dtype)  # an fp32 vector added in an fp16 model gives fp32


def _to_tokens(raw: Tensor, layout: Layout) -> Tensor:
    if layout == "tokens":
        return raw
    if layout == "channels_first":
        return rearrange(raw, "b d h w -> b (h w) d")
    return rearrange(raw, "b h w d -> b (h w) d")


def _from_tokens(tokens: Tensor, raw: Tensor, layout: Layout) -> Tensor:
    if layout == "tokens":
        return tokens
    if layout == "channels_first":
        return rearrange(tokens, "b (h w) d -> b d h w", h=raw.shape[2])
    return rearrange(tokens, "b (h w) d -> b h w d", h=raw.shape[1])
