"""A vision transformer as `embed`, `blocks` and `finish`, over the original module of whichever library.

    tokens = backbone.embed(images)             patches, CLS, registers, positions, pre-norm
    tokens = backbone.run_blocks(tokens)        the residual blocks, all or some
    output = backbone.finish(tokens)            final norm and pooling, `hook_image_embed`, head

The three together equal the module's own forward bit for bit, so a run may start and stop at any block. The module is
put in eval mode; its parameters are left as they are.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vitrail.backbones.grid import Grid
from vitrail.backbones.points import Point, block_sites, unknown_point
from vitrail.backbones.preprocess import Preprocess
from vitrail.backbones.splice import CoderLike, splice
from vitrail.backbones.text import TextTower
from vitrail.files import tensors_digest
from vitrail.hooks import Site, capturing, editing

HookFn = Callable[[Tensor, Point], Tensor | None]
Hooks = Mapping[str, HookFn | Sequence[HookFn]] | Sequence[tuple[str | Callable[[str], bool], HookFn]]
Names = str | Sequence[str] | Callable[[str], bool] | None


@dataclass(frozen=True, eq=False, kw_only=True)
class Parts:
    """What an adapter says of a module: how its forward falls apart, and where its hook points are.

    `pool(tokens)` is what is handed to `head`. `full_embed` is None where no module sees that value on its way: it is
    then what `embed` returns. `block_arguments(i)` are keywords block i wants beside the tokens (rotary positions).
    """

    embed: Callable[[Tensor], Tensor]
    blocks: Sequence[nn.Module]
    pool: Callable[[Tensor], Tensor]
    head: Callable[[Tensor], Tensor]
    patches: Site
    full_embed: Site | None
    ln_final: Site
    post_norm: bool = False
    block_arguments: Callable[[int], dict[str, Any]] = field(default=lambda _block: {})


class Backbone(nn.Module):
    """`name` goes into manifests; `module` is the original. `n_classes` is None where the output is an embedding."""

    def __init__(
        self,
        module: nn.Module,
        parts: Parts,
        *,
        name: str,
        preprocess: Preprocess,
        patch_px: int,
        n_cls: int,
        n_registers: int,
        has_head: bool,
        class_names: Sequence[str] = (),
        text: TextTower | None = None,
    ) -> None:
        super().__init__()
        self.name = name
        self.module = module.eval()
        self.preprocess = preprocess
        self.text = text
        self.blocks = tuple(parts.blocks)
        self.n_layers = len(self.blocks)
        self._parts = parts
        # Identities that only carry hooks, where the original has no module at that place.
        self._full_embed, self._image_embed = nn.Identity(), nn.Identity()
        seen = self._probe()
        n_tokens, self.d_model = seen["tokens"][1:]
        self.grid = Grid.of_tokens(
            n_tokens, image_px=preprocess.image_px, patch_px=patch_px, n_cls=n_cls, n_registers=n_registers
        )
        self.d_embed = seen["embedding"][-1]
        self.n_classes: int | None = seen["output"][-1] if has_head else None
        self.class_names = tuple(class_names)
        self._sites, points = self._table(seen["ln_final"])
        self.points: Mapping[str, Point] = {point.name: point for point in points}

    # ------------------------------------------------------------------------------------------------ forward, in parts

    def embed(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b t d"]:
        """The tokens that enter block 0."""
        if tuple(images.shape[-2:]) != self.preprocess.image_px:
            raise ValueError(
                f"{self.name} takes images of (height, width) {self.preprocess.image_px}, "
                f"got {tuple(images.shape[-2:])}. Use backbone.preprocess, or load it with image_px=."
            )
        tokens = self._parts.embed(images)
        return tokens if self._parts.full_embed else self._full_embed(tokens)

    def run_blocks(
        self, tokens: Float[Tensor, "b t d"], start: int = 0, stop: int | None = None
    ) -> Float[Tensor, "b t d"]:
        """Blocks start..stop-1; `tokens` is what enters block `start` (its hook_resid_pre)."""
        for i in range(self.n_layers)[start:stop]:
            tokens = self.blocks[i](tokens, **self._parts.block_arguments(i))
            if isinstance(tokens, tuple):  # transformers 4
                tokens = tokens[0]
        return tokens

    def pool(self, tokens: Float[Tensor, "b t d"]) -> Float[Tensor, "b d_embed"]:
        """Final norm, pooling and projection: what is handed to the head."""
        return self._parts.pool(tokens)

    def head(self, embedding: Float[Tensor, "b d_embed"]) -> Float[Tensor, "b d_out"]:
        """Class logits, or the embedding itself where the model has no head."""
        return self._parts.head(embedding)

    def finish(self, tokens: Float[Tensor, "b t d"]) -> Float[Tensor, "b d_out"]:
        """The output, from what leaves the last block."""
        return self.head(self._image_embed(self.pool(tokens)))

    def forward(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b d_out"]:
        return self.finish(self.run_blocks(self.embed(images)))

    # -------------------------------------------------------------------------------------------------- look and change

    def run_with_cache(
        self, images: Float[Tensor, "b 3 h w"], names: Names = None, *, stop_at_layer: int | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(output, values by name). With `stop_at_layer=l`, nothing from block l on runs, the output is the residual
        that would enter it, and the points that were not reached are not in the cache.

        Values keep their graph where gradients are enabled.
        """
        chosen = self._names(names)
        if stop_at_layer is not None:
            if not -self.n_layers <= stop_at_layer <= self.n_layers:
                raise ValueError(f"stop_at_layer must be in -{self.n_layers}..{self.n_layers}, got {stop_at_layer}.")
            stop_at_layer = range(self.n_layers)[stop_at_layer] if stop_at_layer < 0 else stop_at_layer
            reached = [name for name in chosen if self._is_before(self.points[name], stop_at_layer)]
            if isinstance(names, str | Sequence) and len(reached) < len(chosen):
                missed = [name for name in chosen if name not in reached]
                raise ValueError(f"{', '.join(missed)} cannot be cached with stop_at_layer={stop_at_layer}.")
            chosen = reached
        with capturing({name: self._sites[name] for name in chosen}) as cache:
            tokens = self.run_blocks(self.embed(images), stop=stop_at_layer)
            output = tokens if stop_at_layer is not None else self.finish(tokens)
        return output, cache

    def activations(self, images: Float[Tensor, "b 3 h w"], points: Sequence[str]) -> dict[str, Tensor]:
        """The values of these points, in this order; nothing after the last of them is computed."""
        chosen = self._names(list(points))
        with capturing({name: self._sites[name] for name in chosen}, stop=True) as cache:
            self(images)
        return {name: cache[name] for name in chosen}

    def run_with_hooks(self, images: Float[Tensor, "b 3 h w"], hooks: Hooks) -> Tensor:
        """The output, with `hooks` in place for this run only."""
        with self.hooks(hooks):
            return self(images)

    @contextmanager
    def hooks(self, hooks: Hooks) -> Iterator["Backbone"]:
        """While open, each `fn(value, point)` may return what takes the value's place (None: it only looked)."""
        edits = [(name, self._sites[name], self._bound(fn, self.points[name])) for name, fn in self._pairs(hooks)]
        with editing(edits):
            yield self

    @contextmanager
    def with_coders(
        self,
        coders: Mapping[str, CoderLike],
        use_error_term: bool = False,
        tokens: str = "all",
        edit: Callable[[Tensor, Point], Tensor] | None = None,
    ) -> Iterator["Backbone"]:
        """While open, the activations of these points are replaced by their reconstructions, at the chosen tokens.

        `use_error_term` adds back what the reconstruction misses: the output is then bit-identical, gradients flow
        through the coder, and only what `edit(z, point)` does to the codes shows. `edit` needs a coder with encode and
        decode; without it a coder may be any callable (n, d_in) -> (n, d_in).
        """
        spliced: dict[str, HookFn] = {}
        for name in self._names(list(coders)):
            point, coder = self.points[name], coders[name]
            d_in = getattr(coder, "d_in", None)
            if d_in is not None and d_in != point.width:
                raise ValueError(f"coder takes d_in={d_in}, {name} of {self.name} is {point.width} wide.")
            positions = self.grid.tokens(tokens) if point.has_tokens else None
            if name == "hook_embed" and tokens == "spatial":
                positions = self.grid.tokens("all")  # there are no special tokens yet
            elif name == "hook_embed" and tokens == "cls":
                raise ValueError("hook_embed lies before the CLS token is added; use tokens='spatial'.")
            spliced[name] = splice(coder, positions, use_error_term=use_error_term, edit=edit)
        with self.hooks(spliced):
            yield self

    def point(self, name: str) -> Point:
        """What is known of a hook point. Raises KeyError naming the nearest if there is none of this name."""
        return self.points[self._names(name)[0]]

    @cached_property
    def digest(self) -> str:
        """sha256 of the weights as they are when first asked for."""
        return tensors_digest(self.module.state_dict())

    # ---------------------------------------------------------------------------------------------------------- details

    def _names(self, names: Names) -> list[str]:
        """Known names, in the order asked for."""
        if names is None:
            return list(self.points)
        if not isinstance(names, str) and callable(names):
            return [name for name in self.points if names(name)]
        chosen = [names] if isinstance(names, str) else list(dict.fromkeys(names))
        for name in chosen:
            if name not in self.points:
                raise unknown_point(self.name, name, self.points)
        return chosen

    def _pairs(self, hooks: Hooks) -> list[tuple[str, HookFn]]:
        if isinstance(hooks, Mapping):
            listed = {name: [fns] if callable(fns) else list(fns) for name, fns in hooks.items()}
            return [(name, fn) for asked, fns in listed.items() for name in self._names(asked) for fn in fns]
        return [(name, fn) for asked, fn in hooks for name in self._names(asked)]

    @staticmethod
    def _bound(fn: HookFn, point: Point) -> Callable[[Tensor], Tensor | None]:
        return lambda value: fn(value, point)

    @staticmethod
    def _is_before(point: Point, layer: int) -> bool:
        return point.layer < layer if point.layer is not None else point.blocks_needed == 0

    @torch.no_grad()
    def _probe(self) -> dict[str, tuple[int, ...]]:
        """Shapes, from one empty image that passes no block."""
        weight = next(self.module.parameters())
        image = torch.zeros(1, 3, *self.preprocess.image_px, dtype=weight.dtype, device=weight.device)
        tokens = self._parts.embed(image)
        with capturing({"ln_final": self._parts.ln_final}) as cache:
            embedding = self._parts.pool(tokens)
        if embedding.ndim != 2:
            raise ValueError(
                f"{self.name} does not pool its tokens into one vector per image; build it so that it does."
            )
        output = self._parts.head(embedding)
        shapes = {"tokens": tokens, "embedding": embedding, "output": output, "ln_final": cache["ln_final"]}
        return {name: tuple(value.shape) for name, value in shapes.items()}

    def _table(self, ln_final: tuple[int, ...]) -> tuple[dict[str, Site], list[Point]]:
        """Sites by name and points, both in order of computation."""
        parts, d, n = self._parts, self.d_model, self.n_layers
        sites = {
            "hook_embed": parts.patches,
            "hook_full_embed": parts.full_embed or Site(self._full_embed, "output"),
        }
        points = [Point(name, None, True, 0, d) for name in sites]
        for layer, block in enumerate(self.blocks):
            for last, site in block_sites(block, post_norm=parts.post_norm).items():
                name = f"blocks.{layer}.{last}"
                sites[name] = site
                points.append(Point(name, layer, True, layer + (last != "hook_resid_pre"), d))
        if len(ln_final) == 2 or ln_final[1] == self.grid.n_tokens:  # not after a pooling into several queries
            sites["ln_final.hook_normalized"] = parts.ln_final
            points.append(Point("ln_final.hook_normalized", None, len(ln_final) == 3, n, ln_final[-1]))
        sites["hook_image_embed"] = Site(self._image_embed, "output")
        points.append(Point("hook_image_embed", None, False, n, self.d_embed))
        return sites, points
